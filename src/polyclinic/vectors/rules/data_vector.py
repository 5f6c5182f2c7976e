"""Data vectors: the base plus the sum of what each site's data changed, times a coefficient.

Tian, Xu, Yin, Wang, Yue: Improving the classification effect of clinical images of diseases for multi-source privacy
protection. arXiv 2408.13038. The paper's rule is ``sum``: θ = θ₀ + Σⱼ τⱼ. The other coefficients are ours or taken from
elsewhere:

- ``mean``: 1/N, the average of the sites' models (McMahan et al., AISTATS 2017, in one round).
- ``weighted``: by the number of images, a site's share being at most ``cap / N``, as these numbers are self-declared.
- ``norm-keep``: 1/√(N (1 + (N−1) ρ)) for each tensor, ρ being the mean pairwise cosine: vectors of one length then have
  a result of that length. At most 1, as vectors that cancel would have their noise blown up.
- ``model-stock``: t/N for each tensor, t = Nρ / (1 + (N−1) ρ) (Jang, Yun, Han: Model Stock, ECCV 2024,
  arXiv 2403.19522), t held in [0, 1]; vectors that agree in nothing (ρ ≤ 0) leave the tensor at the base.
- ``search``: λ Σⱼ τⱼ with the λ that is best on the coordinator's validation images.

A vector of zeros has no direction; its cosines count as 0, as those of faint noise would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from polyclinic.errors import ContributionError
from polyclinic.vectors.rules.base import Judge, Layer, Merged, Rule
from polyclinic.vectors.rules.elementwise import blocks, combine


class DataVector(Rule):
    """A linear combination of the vectors."""

    name: Literal["data-vector"] = "data-vector"
    coefficients: Literal["sum", "mean", "weighted", "norm-keep", "model-stock", "search"] = "mean"
    """How much of each vector is taken; ``sum`` is the paper's, and goes too far from three sites on."""
    scale: float = 1.0
    """λ, which the coefficients are multiplied by."""
    cap: float = Field(2.0, ge=1)
    """``weighted``: a site's share is at most so many times 1/N; what is cut goes to the others in proportion."""
    grid: tuple[float, ...] = ()
    """``search``: how much is tried, as the sum of all shares: 1 is the mean, N the sum. Empty: 0.25, 0.5, 0.75, 1,
    1.25, 1.5 and every whole number from 2 to N."""

    @property
    def judged(self) -> bool:
        """Only ``search`` looks at validation images."""
        return self.coefficients == "search"

    def shares(self, images: Sequence[int], judge: Judge | None) -> list[float] | None:
        """One share a site; None for the coefficients that differ from tensor to tensor.

        Raises:
            ContributionError: ``search`` without a judge.
        """
        sites = len(images)
        if self.coefficients == "sum":
            return [self.scale] * sites
        if self.coefficients == "mean":
            return [self.scale / sites] * sites
        if self.coefficients == "weighted":
            return [self.scale * share for share in capped_shares(images, self.cap / sites)]
        if self.coefficients == "search":
            return self._search(sites, judge)
        return None

    def merge(self, layer: Layer, survey: object) -> Merged:
        """One tensor by ``norm-keep`` or ``model-stock``; sums in float64."""
        sites = len(layer.vectors)
        coefficient = COEFFICIENTS[self.coefficients](sites, mean_cosine(layer.vectors))
        shares = (self.scale * coefficient,) * sites
        return Merged(combine(layer.vectors, shares), shares)

    def _search(self, sites: int, judge: Judge | None) -> list[float]:
        """The total with the best score; of equal ones the smallest."""
        if judge is None:
            raise ContributionError(
                "data-vector with coefficients search picks the scale on validation images and there are none. Give "
                "the coordinator's validation images, or take other coefficients, such as mean."
            )
        totals = self.grid or (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, *(float(n) for n in range(2, sites + 1)))
        candidates = [[self.scale * total / sites] * sites for total in sorted(totals)]
        scores = [judge(candidate) for candidate in candidates]
        return candidates[max(range(len(scores)), key=lambda k: (scores[k], -k))]


def norm_keep(sites: int, rho: float) -> float:
    """1/√(N (1 + (N−1) ρ)), at most 1. Rounding can make the square of a length that is near zero negative."""
    return 1 / math.sqrt(max(1.0, sites * (1 + (sites - 1) * rho)))


def model_stock(sites: int, rho: float) -> float:
    """t/N with t = Nρ / (1 + (N−1) ρ) in [0, 1]; one site alone is taken whole."""
    if sites == 1:
        return 1.0
    return min(1.0, sites * rho / (1 + (sites - 1) * rho)) / sites if rho > 0 else 0.0


COEFFICIENTS: dict[str, Callable[[int, float], float]] = {"norm-keep": norm_keep, "model-stock": model_stock}
"""Coefficient of every vector of a tensor, from the number of sites and the mean pairwise cosine."""


CACHED = 1 << 14
"""Values of one site that are multiplied at a time."""


def mean_cosine(vectors: Sequence[Tensor]) -> float:
    """Mean cosine over all pairs, 0 for pairs with a vector of zeros and where there is one vector only."""
    sites = len(vectors)
    products = torch.zeros(sites, sites, dtype=torch.float64)
    rows = torch.empty(sites, CACHED, dtype=torch.float64)
    for place in blocks(vectors[0].numel(), CACHED):
        block = rows[:, : place.stop - place.start]
        for row, vector in zip(block, vectors, strict=True):
            row.copy_(vector.reshape(-1)[place])
        products.addmm_(block, block.T)
    lengths = products.diagonal().sqrt()
    units = torch.where(lengths > 0, 1 / lengths, 0.0)
    cosines = (products * units[:, None] * units).clamp(-1, 1).fill_diagonal_(0.0)
    return float(cosines.sum()) / max(1, sites * (sites - 1))


def capped_shares(images: Sequence[int], limit: float) -> list[float]:
    """Shares in proportion to ``images``, none above ``limit``, with the sum 1; equal where nobody has an image.

    Args:
        images: Of each site.
        limit: At least 1 over the number of sites.
    """
    shares = [0.0] * len(images)
    free = list(range(len(images)))
    left = 1.0
    while free:
        total = sum(images[j] for j in free)
        wanted = {j: left * images[j] / total if total else left / len(free) for j in free}
        over = [j for j in free if wanted[j] > limit]
        for j in list(over or free):
            shares[j] = min(wanted[j], limit)
            left -= shares[j]
            free.remove(j)
    return shares
