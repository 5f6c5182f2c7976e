"""Fisher merging: each entry is averaged with the precision that each site has about it.

Matena, Raffel: Merging models with Fisher-weighted averaging. NeurIPS 2022. arXiv 2111.09832.

θ = Σⱼ Fⱼ θⱼ / Σⱼ Fⱼ with the diagonal Fisher information Fⱼ, which for changes since one base is
θ₀ + Σⱼ Fⱼ τⱼ / Σⱼ Fⱼ. Where all Fⱼ are zero no site knows anything about the entry: there the result is the plain mean
(ours; the paper floors F at a small constant instead, which is what ``floor`` does).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from polyclinic.errors import ContributionError
from polyclinic.vectors.rules.base import Layer, Merged, Rule
from polyclinic.vectors.rules.elementwise import each_block
from polyclinic.vectors.sources import Kind


class Fisher(Rule):
    """Mean of the vectors, weighted entry by entry with the sites' Fisher information."""

    name: Literal["fisher"] = "fisher"
    elementwise: ClassVar[bool] = True
    floor: float = Field(0.0, ge=0)
    """Smaller Fisher information counts as this much."""
    scale: float = 1.0
    """What the mean is multiplied by."""

    @property
    def needs(self) -> frozenset[Kind]:
        """The diagonal Fisher information of every site."""
        return frozenset({"fisher"})

    def merge(self, layer: Layer, survey: object) -> Merged:
        """The weighted mean, float64.

        Raises:
            ContributionError: A site's Fisher information is missing, has another shape, or is negative.
        """
        fishers = [self._information(layer, j) for j in range(len(layer.vectors))]
        return Merged(each_block([*layer.vectors, *fishers], self._mean).mul_(self.scale))

    def _mean(self, values: list[Tensor]) -> Tensor:
        """Weighted mean of one block, from the vectors followed by as much Fisher information."""
        vectors, weights = values[: len(values) // 2], values[len(values) // 2 :]
        total = torch.zeros(vectors[0].numel(), dtype=torch.float64)
        weighted, plain = torch.zeros_like(total), torch.zeros_like(total)
        for vector, weight in zip(vectors, weights, strict=True):
            precision = weight.double().clamp_(min=self.floor)
            total += precision
            weighted.addcmul_(precision, vector.double())
            plain += vector
        unknown = total == 0
        mean = plain.div_(len(vectors))
        return torch.where(unknown, mean, weighted.div_(total.masked_fill_(unknown, 1.0)))

    def _information(self, layer: Layer, site: int) -> Tensor:
        """A site's Fisher information of this layer, checked."""
        found = layer.extra(site, "fisher")
        who = f"contribution {site + 1} of {len(layer.vectors)} (in the order of digests)"
        if found is None:
            raise ContributionError(
                f"fisher needs Fisher information of {layer.name}, and {who} brings none. Let the site make a "
                "contribution with it, or leave this contribution out."
            )
        if found.shape != layer.base.shape:
            raise ContributionError(
                f"{who}: Fisher information of {layer.name} has shape {tuple(found.shape)}, the layer "
                f"{tuple(layer.base.shape)}."
            )
        if bool((found < 0).any()):
            raise ContributionError(f"{who}: Fisher information of {layer.name} has negative values, which cannot be.")
        return found
