"""The style of a device: the low frequencies of the Fourier amplitude of its images.

As LADD (Shenaj et al., WACV 2023, arXiv 2210.02326) has it, a style is the mean window about frequency zero; mixing
leaves the phase, so shapes stay where they are (FedDG: Liu et al., CVPR 2021, arXiv 2103.06030; FDA: Yang & Soatto,
CVPR 2020). Amplitudes are divided by the number of pixels, so that the number at frequency zero is a colour's mean and
windows of images of another size mean the same.
"""

from __future__ import annotations

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
    height, width = images.shape[-2:]
    spectrum = torch.fft.fft2(images, norm="forward").abs()
    rows, columns = _places(half, height), _places(half, width)
    window: Tensor = spectrum[..., rows[:, None], columns[None, :]]
    return window


def restyle(images: Tensor, wanted: Tensor, strength: Tensor | float = 1.0) -> Tensor:
    """Images whose low amplitudes have gone over to ``wanted``; the phase stays.

    Args:
        images: Float ``[B, C, H, W]`` in 0..1.
        wanted: ``[B, C, 2 half + 1, 2 half + 1]`` or one window for all, ``[C, ...]``.
        strength: 0 leaves the images as they are, 1 takes the wanted amplitude; one number or ``[B]``.

    Returns:
        Same shape, clipped to 0..1.
    """
    half = wanted.shape[-1] // 2
    height, width = images.shape[-2:]
    if isinstance(strength, Tensor):
        strength = strength.to(images.device, images.dtype).view(-1, 1, 1, 1)
    rows, columns = _places(half, height), _places(half, width)
    spectrum = torch.fft.fft2(images, norm="forward")
    low = spectrum[..., rows[:, None], columns[None, :]]
    amplitude = low.abs()
    target = amplitude + strength * (wanted.to(images.device, images.dtype) - amplitude)
    # A frequency that is not there has no phase to keep: it stays away.
    factor = torch.where(amplitude > 1e-8, target / amplitude.clamp(min=1e-8), torch.ones_like(amplitude))
    spectrum[..., rows[:, None], columns[None, :]] = low * factor
    restyled: Tensor = torch.fft.ifft2(spectrum, norm="forward").real.clamp(0, 1)
    return restyled


def _places(half: int, size: int) -> Tensor:
    """Where frequencies ``-half`` to ``half`` stand in an axis of a spectrum."""
    return torch.arange(-half, half + 1) % size
