"""Support: a site does not change the head's rows of classes that it has no images of.

Training without any image of a class only pushes its outputs down, which says nothing about the class. Ours.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from polyclinic.vectors.rules.base import Filter, Piece


class Support(Filter):
    """Zero head rows of classes that the site lacks."""

    name: Literal["support"] = "support"

    def apply(self, piece: Piece) -> Tensor:
        """The vector with zeros in ``piece.absent_rows``."""
        if not piece.absent_rows:
            return piece.vector
        return piece.vector.index_fill(0, torch.tensor(piece.absent_rows), 0.0)
