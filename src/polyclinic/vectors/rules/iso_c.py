"""Iso-C: the sum of the vectors with all its singular values made equal.

Marczak, Magistri, Cygert, Twardowski, Bagdanov, van de Weijer: No task left behind: isotropic model merging with
common and task-specific subspaces. ICML 2025. arXiv 2502.04959.

With Σⱼ Δⱼ = U S Vᵀ the result is α mean(S) U Vᵀ. It has the scale of a sum, and it changes a single vector too: one
site does not get its own model back.

Ours: convolution kernels as matrices; directions without weight (a singular value of zero, up to the rounding
of float32) are left out of the mean and of the result, as their factors are arbitrary. All else, such as biases and
normalisation, gets the mean, as published.
"""

from __future__ import annotations

from typing import Literal

from polyclinic.vectors.rules.base import Layer, Merged, Rule
from polyclinic.vectors.rules.elementwise import combine, mean
from polyclinic.vectors.rules.matrix import as_layer, as_matrix
from polyclinic.vectors.rules.tsv import main_directions


class IsoC(Rule):
    """One strength for all singular directions of the sum."""

    name: Literal["iso-c"] = "iso-c"
    scale: float = 1.0
    """α, which merged matrices are multiplied by; published values are 1 to 1.5. The mean of other tensors is not."""

    def merge(self, layer: Layer, survey: object) -> Merged:
        """Merge one layer, float64."""
        if as_matrix(layer.base) is None:
            return mean(layer)
        total = as_matrix(combine(layer.vectors, [1.0] * len(layer.vectors)))
        assert total is not None
        left, weights, right = main_directions(total)
        strength = float(weights.mean()) if len(weights) else 0.0
        return Merged(as_layer((left @ right.T).mul_(self.scale * strength), tuple(layer.base.shape)))
