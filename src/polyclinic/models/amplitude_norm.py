"""Amplitude normalisation: every image gets the Fourier amplitude that all sites share; shapes, the phase, stay.

Jiang, Wang, Dou: HarmoFL: harmonizing local and global drifts in federated learning on heterogeneous medical images.
AAAI 2022. arXiv 2112.10775. Only its first half is here: the other, a perturbation of the weights along the gradient,
which doubles the cost of a step, is left out; hence "HarmoFL-like".

For an image x in 0..1 with spectrum F(x) and common amplitude A, per colour and frequency::

    x' = F⁻¹( ((1 − share) |F(x)| + share A) · F(x) / |F(x)| )

for all frequencies, or with ``window`` for those up to so many periods per image in each direction.

A is a buffer of the network, so it is averaged over sites like every float tensor. The first training batch of a site
sets it, to the mean of the batch's amplitudes, and then it stands still: once sites have averaged it, a mean that moved
on at each site would lead each back to its own. The paper has a running mean; in the published code its momentum
is cut to 0 and the sites' first average is kept, which comes to the same as here, and its window is 0: the mean of each
colour alone (facts known from that code). Before A is set nothing is changed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from polyclinic.errors import StudyError

BUFFER = "amplitude"
"""Name of the buffer in the network, ``[C, H, W // 2 + 1]`` or ``[C, 2 window + 1, window + 1]``; all zeros as long as
it is not set."""
_ABSENT = 1e-7  # an amplitude below this, of images in 0..1, is rounding and has no phase


class AmplitudeNorm:
    """A hook before the forward pass of a network whose buffer ``amplitude`` it keeps and uses.

    A hook and not a layer, so that the network's own names stay what they are: for weights from elsewhere, the feature
    tap, the last layer.

    Attributes:
        share: How far amplitudes go over to the common one, 0..1.
        window: Half-width of the low frequencies that do; None: all.
        mean: As inputs were normalised.
        std: As inputs were normalised.
        moving: Whether a training batch may set the buffer; ``statistics_kept`` puts it to False.
    """

    def __init__(self, share: float, window: int | None, *, mean: float, std: float) -> None:
        self.share, self.window, self.mean, self.std = share, window, mean, std
        self.moving = True

    def __call__(self, model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The inputs of the forward pass, normalised: ``[B, C, H, W]`` as ``SiteData.inputs`` gives them."""
        images = inputs[0].float() * self.std + self.mean
        common: Tensor = model.get_buffer(BUFFER)
        size = (int(images.shape[-2]), int(images.shape[-1]))
        rows, columns = _frequencies(*size, self.window)
        if common.shape != (images.shape[1], len(rows), len(columns)):
            raise StudyError(
                f"model.harmonise: the common amplitude is of {tuple(common.shape)}, but images of "
                f"{tuple(images.shape[1:])} came. All images must have the size that the study says."
            )
        spectrum = torch.fft.rfft2(images, norm="forward")
        low = spectrum[..., rows[:, None], columns]
        own = low.abs()
        if model.training and self.moving:
            # No branch on values: it would halt a GPU and stop a try without arithmetic.
            common.copy_(torch.where(common.detach().sum() > 0, common, own.detach().mean(0)))
        # An absent frequency has no phase to keep, and rounding of sums can leave an amplitude just below zero.
        there = (own > _ABSENT) & (common.sum() > 0)
        factor = torch.where(there, 1 + self.share * (common.clamp(min=0) / own.clamp(min=_ABSENT) - 1), 1.0)
        spectrum = spectrum.clone()
        spectrum[..., rows[:, None], columns] = low * factor
        changed = torch.fft.irfft2(spectrum, s=size, norm="forward")
        return ((changed - self.mean) / self.std, *inputs[1:])


def _frequencies(height: int, width: int, window: int | None) -> tuple[Tensor, Tensor]:
    """Where the frequencies that are replaced stand in the two axes of a real spectrum."""
    if window is None:
        return torch.arange(height), torch.arange(width // 2 + 1)
    return torch.arange(-window, window + 1) % height, torch.arange(window + 1)


def harmonise(model: nn.Module, norm: AmplitudeNorm, shape: list[int]) -> None:
    """Put amplitude normalisation before a network, in place.

    Args:
        model: Takes ``[B, C, H, W]``.
        norm: The normalisation.
        shape: Of an input, ``[C, H, W]``.

    Raises:
        StudyError: Volumes, images smaller than the window, or a network that has something called ``amplitude``.
    """
    if len(shape) != 3:
        raise StudyError(
            "model.harmonise: amplitude normalisation is defined for flat images, but data.image.size has "
            f"{len(shape) - 1} numbers. Set harmonise: 0."
        )
    if hasattr(model, BUFFER):
        raise StudyError(f"model.harmonise keeps a buffer {BUFFER!r}, but network {type(model).__name__} has its own.")
    channels, height, width = shape
    if norm.window is not None and min(height, width) < 2 * norm.window + 1:
        raise StudyError(
            f"model.harmonise_window: {norm.window} needs images of {2 * norm.window + 1} pixels or more, but the "
            f"network sees {height} × {width}. Lower it."
        )
    rows, columns = _frequencies(height, width, norm.window)
    model.register_buffer(BUFFER, torch.zeros(channels, len(rows), len(columns)))
    model.register_forward_pre_hook(norm)


def amplitude_norms(model: nn.Module) -> list[AmplitudeNorm]:
    """The normalisation before a network, if there is one."""
    return [hook for hook in model._forward_pre_hooks.values() if isinstance(hook, AmplitudeNorm)]
