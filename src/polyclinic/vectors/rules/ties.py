"""TIES: trim each vector to its largest values, elect a sign, average what agrees with it.

Yadav, Tam, Choshen, Raffel, Bansal: TIES-Merging: Resolving interference when merging models. NeurIPS 2023.
arXiv 2306.01708.

With keptⱼ the values of vector j that are among its largest: s = sign(Σⱼ keptⱼ), and the result is λ times the mean of
keptⱼ over the sites with sign(keptⱼ) = s.

The paper trims each vector as a whole (``trim: network``). Trimming each tensor by itself (``layer``) is what mergekit
does; here it is the default because networks for images mix tensors of very different sizes. What the paper leaves
open: values equal to the smallest kept magnitude are all kept, so that nothing depends on their order, but zeros never
count; where the sum of the kept values is exactly zero, no sign is elected and the result is zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from polyclinic.vectors.rules.base import Layer, Merged, Rule
from polyclinic.vectors.rules.elementwise import each_block
from polyclinic.vectors.rules.magnitude import kth_magnitudes


class Ties(Rule):
    """Trim, elect a sign, merge what agrees."""

    name: Literal["ties"] = "ties"
    density: float = Field(0.2, gt=0, le=1)
    """Share of the values of each vector that is kept."""
    trim: Literal["layer", "network"] = "layer"
    """Whether the largest values are taken of each tensor or of the whole vector."""
    scale: float = 1.0
    """λ, which the merged vector is multiplied by."""

    def survey(self, layers: Iterable[Layer]) -> list[float] | None:
        """For ``network``, each site's smallest kept magnitude."""
        if self.trim == "layer":
            return None
        return kth_magnitudes(lambda: (layer.vectors for layer in layers), self._kept)

    def merge(self, layer: Layer, survey: object) -> Merged:
        """Elect and average; values in float32, sums in float64."""
        thresholds = survey if isinstance(survey, list) else kth_magnitudes(lambda: [layer.vectors], self._kept)
        # hardshrink keeps what is larger than its bound; the next smaller float32 makes that "or equal".
        bounds = [_next_smaller(value) for value in thresholds]
        return Merged(each_block(layer.vectors, lambda values: _elect(values, bounds)).mul_(self.scale))

    def _kept(self, count: int) -> int:
        """How many of so many values are kept: at least one."""
        return max(1, round(self.density * count))


def _next_smaller(value: float) -> float:
    """The largest float32 below a positive one; zero stays zero."""
    exact = torch.tensor(value, dtype=torch.float32)
    return float(torch.nextafter(exact, torch.zeros(()))) if math.isfinite(value) and value > 0 else value


def _elect(values: Sequence[Tensor], bounds: Sequence[float]) -> Tensor:
    """Mean of the kept values that have the sign of their sum, float64."""
    kept = [torch.nn.functional.hardshrink(value, bound) for value, bound in zip(values, bounds, strict=True)]
    total = torch.zeros(values[0].numel(), dtype=torch.float64)
    for value in kept:
        total += value
    sign = total.sign_().float()
    agreeing, count = torch.zeros_like(total), torch.zeros_like(sign)
    for value in kept:
        value.mul_(sign).clamp_(min=0)
        agreeing += value
        count += value.sign_()
    return agreeing.div_(count.clamp_(min=1)).mul_(sign)
