"""Half precision on the way: what travels in 16 bits, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_LARGEST = torch.finfo(torch.float16).max


def halved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in float16; a tensor with a value too large for that stays in float32."""
    return {name: _half(tensor.detach()) for name, tensor in tensors.items()}


def _half(tensor: Tensor) -> Tensor:
    fits = tensor.numel() == 0 or bool(tensor.abs().amax() <= _LARGEST)
    return tensor.to(torch.float16 if fits else torch.float32, copy=True)


def widened(tensors: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """Float32 on a device."""
    return {name: tensor.to(device, torch.float32) for name, tensor in tensors.items()}
