"""RegMean: the matrix whose outputs are nearest to those of all sites' layers, in closed form.

Jin, Ren, Preotiuc-Pietro, Cheng: Dataless knowledge fusion by merging weights of language models. ICLR 2023.
arXiv 2212.09849. With the Gram matrices Gⱼ = Xⱼᵀ Xⱼ of a layer's inputs, Δ = (Σⱼ Δⱼ Gⱼ) (Σⱼ Gⱼ)⁺; for weights
W₀ + Δⱼ it is the same, as W₀ drops out. Off-diagonal values are multiplied by ``alpha``, as published. Gram matrices
are taken as they were sent: where they are sums over images, large sites count more.

``grams: proxy`` guesses Gⱼ = Δⱼᵀ Δⱼ / ‖Δⱼ‖² from the vector itself. That is the exact minimiser of Σⱼ ‖(Δ − Δⱼ) Δⱼᵀ‖² /
‖Δⱼ‖², the objective of WUDI (Cheng et al., ICML 2025, arXiv 2503.08099), which as published is approached by some
hundred steps of Adam.

Ours: convolution kernels as matrices; the ridge, which is added to every Gⱼ (so where the Gram matrices say nothing the
result is the mean, and one site alone gets its own vector back); the mean for biases and normalisation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from polyclinic.errors import ContributionError
from polyclinic.vectors.rules.base import Layer, Merged, Rule
from polyclinic.vectors.rules.elementwise import mean
from polyclinic.vectors.rules.matrix import as_layer, as_matrix
from polyclinic.vectors.sources import Kind


class RegMean(Rule):
    """Least squares on the outputs of each layer."""

    name: Literal["regmean"] = "regmean"
    grams: Literal["real", "proxy"] = "real"
    """Gram matrices that the sites sent, or guesses from their vectors."""
    alpha: float | None = Field(None, ge=0, le=1)
    """What off-diagonal values of Gram matrices are multiplied by. None: 0.9 for real ones, 1 for proxies."""
    ridge: float = Field(1e-4, ge=0)
    """Added to the diagonal of the summed Gram matrix, relative to its mean. With 0 the pseudoinverse is taken."""
    scale: float = 1.0
    """What the result is multiplied by."""

    @property
    def needs(self) -> frozenset[Kind]:
        """Real Gram matrices must be sent."""
        return frozenset({"gram"}) if self.grams == "real" else frozenset()

    def merge(self, layer: Layer, survey: object) -> Merged:
        """Solve one layer in float64; the mean where it is no matrix or no site sent a Gram matrix of it.

        Raises:
            ContributionError: Some sites sent a Gram matrix of this layer and others did not, or one does not fit.
        """
        deltas = [as_matrix(vector) for vector in layer.vectors]
        matrices = [delta.double() for delta in deltas if delta is not None]
        if not matrices:
            return mean(layer, self.scale)
        if self.grams == "proxy":
            merged = self._by_proxy(matrices)
        else:
            if all(layer.extra(j, "gram") is None for j in range(len(matrices))):
                return mean(layer, self.scale, "no site sent a Gram matrix of it: plain mean")
            merged = self._solve(matrices, lambda j: _gram(layer, j, matrices[j].shape[1]), matrices[0].shape[1])
        return Merged(as_layer(merged, tuple(layer.base.shape)).mul_(self.scale))

    def _by_proxy(self, matrices: list[Tensor]) -> Tensor:
        """Solve with Gram matrices made from the vectors."""
        columns = matrices[0].shape[1]
        rows = len(matrices) * matrices[0].shape[0]
        if rows < columns and self._alpha == 1:
            # All that happens lies in the space of the rows, which is smaller: work in a basis of it.
            basis = torch.linalg.qr(torch.cat(matrices).T).Q
            small = [matrix @ basis for matrix in matrices]
            solved: Tensor = self._solve(small, lambda j: _proxy(small[j]), columns) @ basis.T
            return solved
        return self._solve(matrices, lambda j: _proxy(matrices[j]), columns)

    def _solve(self, matrices: list[Tensor], gram: Callable[[int], Tensor], columns: int) -> Tensor:
        """(Σ Δⱼ Gⱼ) (Σ Gⱼ)⁺, with ``alpha`` and the ridge.

        Args:
            matrices: Δⱼ, float64.
            gram: Makes Gⱼ; one is in memory at a time.
            columns: What the trace is divided by for the mean of the diagonal.
        """
        size = matrices[0].shape[1]
        total = torch.zeros(size, size, dtype=torch.float64)
        target = torch.zeros_like(matrices[0])
        for j, matrix in enumerate(matrices):
            shrunk = gram(j)
            diagonal = shrunk.diagonal().clone()
            shrunk.mul_(self._alpha).diagonal().copy_(diagonal)
            total += shrunk
            target += matrix @ shrunk
        ridge = self.ridge * float(total.trace()) / columns
        if ridge > 0:
            total.diagonal().add_(ridge)
            target += sum(matrices) * (ridge / len(matrices))
        return _divide(target, total, definite=ridge > 0)

    @property
    def _alpha(self) -> float:
        """What off-diagonal values are multiplied by."""
        if self.alpha is not None:
            return self.alpha
        return 0.9 if self.grams == "real" else 1.0


def _proxy(matrix: Tensor) -> Tensor:
    """Δᵀ Δ / ‖Δ‖², zero for a matrix of zeros."""
    square = float(matrix.square().sum())
    return matrix.T @ matrix / square if square > 0 else torch.zeros(matrix.shape[1], matrix.shape[1]).double()


def _divide(target: Tensor, total: Tensor, definite: bool) -> Tensor:
    """``target @ pinv(total)`` for a symmetric, positive semidefinite ``total``; by Cholesky where it is definite."""
    if definite:
        factor, failed = torch.linalg.cholesky_ex(total)
        if not int(failed):
            return torch.cholesky_solve(target.T, factor).T.contiguous()
    values, directions = torch.linalg.eigh(total)
    cut = float(values[-1].clamp(min=0)) * total.shape[0] * torch.finfo(torch.float64).eps
    kept = values > cut
    directions = directions[:, kept]
    solved: Tensor = (target @ directions / values[kept]) @ directions.T
    return solved


def _gram(layer: Layer, site: int, size: int) -> Tensor:
    """A site's Gram matrix in float64, checked and symmetric; a copy."""
    found = layer.extra(site, "gram")
    who = f"contribution {site + 1} of {len(layer.vectors)} (in the order of digests)"
    if found is None:
        raise ContributionError(
            f"regmean: {who} brings no Gram matrix of {layer.name} while others do. Let the site make a contribution "
            "with it, leave this contribution out, or use grams: proxy."
        )
    if tuple(found.shape) != (size, size):
        raise ContributionError(
            f"{who}: the Gram matrix of {layer.name} has shape {tuple(found.shape)}, its inputs are {size}."
        )
    if bool((found.diagonal() < 0).any()):
        raise ContributionError(f"{who}: the Gram matrix of {layer.name} has negative squares on its diagonal.")
    # Sums in float32 leave the two halves a little different; the solver reads one of them.
    doubled = found.double()
    symmetric: Tensor = (doubled + doubled.T) / 2
    return symmetric
