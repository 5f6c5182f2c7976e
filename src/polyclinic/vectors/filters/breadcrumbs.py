"""Breadcrumbs: drop the few largest values of each tensor and the many small ones.

Davari, Belilovsky: Model breadcrumbs: scaling multi-task model merging with sparse masks. ECCV 2024. arXiv 2312.06795.

Of n values the γ n of largest magnitude (rounded down) are dropped as outliers, and of the others the largest are kept
until ``density`` n are. Small tensors, where γ n is below one, lose no outlier, and every tensor keeps at least one
value. Values equal to either end of the kept band are kept, so that nothing depends on their order (ours).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from polyclinic.vectors.rules.base import Filter, Piece
from polyclinic.vectors.rules.magnitude import kth_magnitude


class Breadcrumbs(Filter):
    """Keep the middle band of magnitudes."""

    name: Literal["breadcrumbs"] = "breadcrumbs"
    density: float = Field(0.2, gt=0, le=1)
    """Share of the values that is kept."""
    outliers: float = Field(0.01, ge=0, lt=1)
    """γ: share of the values that is dropped because they are the largest."""

    def apply(self, piece: Piece) -> Tensor:
        """The vector with zeros outside the band."""
        count = piece.vector.numel()
        if count == 0:
            return piece.vector
        first = int(self.outliers * count)
        last = min(count, first + max(1, round(self.density * count)))
        magnitude = piece.vector.abs()
        band = magnitude >= kth_magnitude(piece.vector, last)
        if first:
            band &= magnitude <= kth_magnitude(piece.vector, first + 1)
        return piece.vector * band
