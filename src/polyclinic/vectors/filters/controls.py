"""Controls: vectors that keep the size of a site's change and lose what it learnt.

arXiv 2408.13038 compares with random vectors and does not say how they are drawn. ``random`` is Gaussian noise with the
norm of each tensor; ``shuffled`` has exactly its values, in another order, and is the stronger control. Both ours.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from polyclinic.vectors.rules.base import Filter, Piece


class RandomControl(Filter):
    """Gaussian noise as long as the vector, tensor by tensor."""

    name: Literal["random"] = "random"

    def apply(self, piece: Piece) -> Tensor:
        """The noise; zeros for a vector of zeros. The draw depends on ``piece.seed`` alone."""
        generator = torch.Generator().manual_seed(piece.seed)
        noise = torch.randn(piece.vector.shape, generator=generator, dtype=torch.float64)
        length = float(noise.norm())
        size = float(piece.vector.double().norm())
        return noise.mul_(size / length if length > 0 else 0.0).to(piece.vector.dtype)


class ShuffledControl(Filter):
    """The vector's own values in random order, tensor by tensor."""

    name: Literal["shuffled"] = "shuffled"

    def apply(self, piece: Piece) -> Tensor:
        """The shuffled vector. The draw depends on ``piece.seed`` alone."""
        generator = torch.Generator().manual_seed(piece.seed)
        order = torch.randperm(piece.vector.numel(), generator=generator)
        return piece.vector.reshape(-1)[order].reshape(piece.vector.shape)
