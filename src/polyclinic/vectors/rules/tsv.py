"""TSV-Merge: the main singular directions of each site's matrix, made orthogonal to each other.

Gargiulo, Crisostomi, Bucarelli, Scardapane, Silvestri, Rodolà: Task singular vectors: reducing task interference in
model merging. CVPR 2025. arXiv 2412.00081.

Of each Δⱼ = Uⱼ Sⱼ Vⱼᵀ the first 1/N of the singular directions are kept. U = [U₁ … U_N] and V likewise are replaced
by the nearest matrices with orthonormal columns (the polar factor, orthogonal Procrustes), and Δ = α U S Vᵀ. The
result has the scale of a sum. One vector alone is returned as it is.

Ours: convolution kernels as matrices. Directions without weight (a singular value of zero, up to the rounding of
float32) are left out, and so are those that the concatenation has twice: the factors of such directions are arbitrary,
and sites with one task share many. So N equal vectors give that vector without its smaller directions, once. All else,
such as biases and normalisation, gets the mean, as published.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from polyclinic.vectors.rules.base import Layer, Merged, Rule
from polyclinic.vectors.rules.elementwise import mean
from polyclinic.vectors.rules.matrix import as_layer, as_matrix

Factors = tuple[Tensor, Tensor, Tensor]
"""U ``[out, k]``, S ``[k]`` and V ``[in, k]`` with U diag(S) Vᵀ the matrix."""


WEIGHTLESS = 1e-6
"""A singular value below so many times the largest is what rounding to float32 leaves of zero."""


class Tsv(Rule):
    """Singular directions of all sites, orthogonalised."""

    name: Literal["tsv"] = "tsv"
    scale: float = 1.0
    """α, which merged matrices are multiplied by; the mean of other tensors is not."""

    def merge(self, layer: Layer, survey: object) -> Merged:
        """Merge one layer, float64."""
        matrices = [matrix for vector in layer.vectors if (matrix := as_matrix(vector)) is not None]
        if not matrices:
            return mean(layer)
        if len(matrices) == 1:
            return Merged(layer.vectors[0].double() * self.scale, (self.scale,))
        kept = max(1, min(matrices[0].shape) // len(matrices))
        parts = [largest_directions(matrix, kept) for matrix in matrices]
        left, weights, right = (torch.cat([part[k] for part in parts], dim=-1) for k in range(3))
        merged = (polar(left) * weights) @ polar(right).T
        return Merged(as_layer(merged, tuple(layer.base.shape)).mul_(self.scale))


def main_directions(matrix: Tensor) -> Factors:
    """All singular directions with weight, largest first, float64."""
    left, weights, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    count = int((weights > WEIGHTLESS * weights[0]).sum())
    return left[:, :count], weights[:count], right[:count].T


def largest_directions(matrix: Tensor, kept: int) -> Factors:
    """The first ``kept`` of them, fewer where the others have no weight.

    From the eigenvectors of the smaller of M Mᵀ and Mᵀ M, which is several times faster than a whole decomposition and
    exact enough for directions that are not the smallest.
    """
    if matrix.shape[0] > matrix.shape[1]:
        right, weights, left = largest_directions(matrix.T, kept)
        return left, weights, right
    exact = matrix.double()
    squares, directions = torch.linalg.eigh(exact @ exact.T)
    squares, directions = squares.flip(0)[:kept], directions.flip(1)[:, :kept]
    count = int((squares > WEIGHTLESS**2 * squares[0]).sum())
    weights, directions = squares[:count].sqrt(), directions[:, :count]
    return directions, weights, exact.T @ directions / weights


def polar(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (rows, where it is wide); directions without weight stay out."""
    if matrix.shape[1] == 0:
        return matrix
    left, _, right = main_directions(matrix)
    return left @ right.T
