"""Norm clip: no vector is longer than a multiple of the median length.

Sun, Kairouz, Suresh, McMahan: Can you really backdoor federated learning? arXiv 1911.07963, with the bound taken from
the median over the sites (ours). It bounds how far a site can reach, not in which direction.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from polyclinic.vectors.rules.base import Filter, Piece


class NormClip(Filter):
    """Shorten vectors that are much longer than the others."""

    name: Literal["norm-clip"] = "norm-clip"
    needs_norms: ClassVar[bool] = True
    factor: float = Field(1.5, gt=0)
    """c: a vector's norm is at most so many times the median norm."""

    def apply(self, piece: Piece) -> Tensor:
        """τ min(1, c median / ‖τ‖), the norm being that of the whole vector."""
        most = self.factor * piece.median_norm
        if piece.norm <= most:
            return piece.vector
        return (piece.vector.double() * (most / piece.norm)).to(piece.vector.dtype)
