"""Pieces for the tests of filters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polyclinic.vectors.rules.base import Piece


def piece_of(vector: Tensor | list[float], **changes: Any) -> Piece:
    """A piece with this vector."""
    tensor = vector if isinstance(vector, Tensor) else torch.tensor(vector)
    rest = {"name": "fc.weight", "seed": 7, "norm": 1.0, "median_norm": 1.0, "absent_rows": ()}
    return Piece(vector=tensor, **{**rest, **changes})
