"""The style of a device: the low frequencies of the Fourier amplitude of its images.

As LADD (Shenaj et al., WACV 2023, arXiv 2210.02326) has it, a style is the mean window about frequency zero; mixing
leaves the phase, so shapes stay where they are (FedDG: Liu et al., CVPR 2021, arXiv 2103.06030; FDA: Yang & Soatto,
CVPR 2020). Amplitudes are divided by the number of pixels, so that the number at frequency zero is a colour's mean and
windows of images of another size mean the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def windows(images: Tensor, half: int) -> Tensor:
    """The amplitude window of each image.

    Args:
        images: Float ``[B, C, H, W]`` in 0..1; H and W of at least ``2 half + 1``.
        half: Frequencies from ``-half`` to ``half`` in each direction.

    Returns:
        ``[B, C, 2 half + 1, 2 half + 1]``, not negative, frequency zero in the middle. Its squares add up to at most 1
        per colour (Parseval).
    """
    return _low(images, half)[0].abs()


def restyle(images: Tensor, wanted: Tensor, strength: Tensor | float = 1.0) -> Tensor:
    """Images whose low amplitudes have gone over to ``wanted``; the phase stays.

    Args:
        images: Float ``[B, C, H, W]`` in 0..1.
        wanted: ``[B, C, 2 half + 1, 2 half + 1]`` or one window for all, ``[C, ...]``.
        strength: 0 leaves the images as they are, 1 takes the wanted amplitude; one number or ``[B]``.

    Returns:
        Same shape, clipped to 0..1.
    """
    if isinstance(strength, Tensor):
        strength = strength.to(images.device, images.dtype).view(-1, 1, 1, 1)
    low, rows, columns = _low(images, wanted.shape[-1] // 2)
    amplitude = low.abs()
    target = amplitude + strength * (wanted.to(images.device, images.dtype) - amplitude)
    # A frequency that is not there has no phase to keep: it stays away.
    factor = torch.where(amplitude > 1e-8, target / amplitude.clamp(min=1e-8), torch.ones_like(amplitude))
    change = rows.conj().T @ (low * (factor - 1)) @ columns.conj()
    restyled: Tensor = (images + change.real).clamp(0, 1)
    return restyled


def _low(images: Tensor, half: int) -> tuple[Tensor, Tensor, Tensor]:
    """Frequencies ``-half`` to ``half`` of images, and the waves of each axis.

    Two products with a few rows instead of a whole Fourier transform, of which next to nothing is looked at.
    """
    rows, columns = (_waves(size, half, images) for size in images.shape[-2:])
    low = rows @ images.to(rows.dtype) @ columns.T / (images.shape[-2] * images.shape[-1])
    return low, rows, columns


def _waves(size: int, half: int, like: Tensor) -> Tensor:
    """``exp(-2 pi i k x / size)`` for k from ``-half`` to ``half``, complex ``[2 half + 1, size]``."""
    k = torch.arange(-half, half + 1, dtype=torch.float64)[:, None]
    angle = -2 * math.pi * k * torch.arange(size, dtype=torch.float64) / size
    waves = torch.complex(angle.cos(), angle.sin())
    return waves.to(like.device, torch.complex128 if like.dtype == torch.float64 else torch.complex64)
