"""Trimmed mean: for each entry, the mean over the sites without its ``f`` smallest and ``f`` largest values.

Yin, Chen, Ramchandran, Bartlett: Byzantine-robust distributed learning: towards optimal statistical rates. ICML 2018.
arXiv 1803.01498. Up to ``f`` sites cannot move an entry beyond what the others sent. The result has the scale of a
mean.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from polyclinic.errors import ContributionError
from polyclinic.vectors.rules.base import Layer, Merged, Rule
from polyclinic.vectors.rules.elementwise import each_block
from polyclinic.vectors.rules.sorted_values import sorted_places


class TrimmedMean(Rule):
    """Entry by entry the mean of the middle values."""

    name: Literal["trimmed-mean"] = "trimmed-mean"
    elementwise: ClassVar[bool] = True
    trim: int = Field(1, ge=0)
    """f: how many of the smallest and how many of the largest values are dropped; needs 2f + 1 contributions."""
    scale: float = 1.0
    """What the mean is multiplied by."""

    def merge(self, layer: Layer, survey: object) -> Merged:
        """The mean of the middle values of each entry, float64.

        Raises:
            ContributionError: There are fewer than 2f + 1 contributions.
        """
        sites = len(layer.vectors)
        if sites < 2 * self.trim + 1:
            raise ContributionError(
                f"trimmed-mean with trim {self.trim} needs at least {2 * self.trim + 1} contributions; there are "
                f"{sites}. Lower trim to {(sites - 1) // 2} or wait for more contributions."
            )
        kept = range(self.trim, sites - self.trim)

        def work(values: list[Tensor]) -> Tensor:
            total = torch.zeros(values[0].numel(), dtype=torch.float64)
            for value in sorted_places(values, kept):
                total += value
            return total.mul_(self.scale / len(kept))

        return Merged(each_block(layer.vectors, work))
