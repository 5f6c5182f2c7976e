"""DARE: drop entries at random and rescale the rest.

Yu, Yu, Yu, Huang, Li: Language models are super Mario: absorbing abilities from homologous models as a free lunch.
ICML 2024. arXiv 2311.03099. Each entry is dropped with probability p and the others are multiplied by 1/(1−p), as
published (mergekit matches the L1 norm instead). The paper's p of 0.9 and more is meant for large networks with tiny
changes; small ones lose much by it.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from polyclinic.vectors.rules.base import Filter, Piece


class Dare(Filter):
    """Drop at random, rescale."""

    name: Literal["dare"] = "dare"
    drop: float = Field(0.5, ge=0, lt=1)
    """p: probability of each entry to be dropped."""

    def apply(self, piece: Piece) -> Tensor:
        """The thinned vector; the draw depends on ``piece.seed`` alone."""
        draw = torch.rand(piece.vector.shape, generator=torch.Generator().manual_seed(piece.seed))
        kept = piece.vector.double() * (draw >= self.drop) / (1 - self.drop)
        return kept.to(piece.vector.dtype)
