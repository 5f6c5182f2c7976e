"""Segmentation: one class a pixel, on whole images or on patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyclinic.tasks.classification import focal_loss

FOREGROUND_SHARE = 0.5
WINDOWS_AT_ONCE = 4


@dataclass(frozen=True)
class Segmentation:
    """One class a pixel: softmax; Dice + cross-entropy, cross-entropy, or focal loss.

    The Dice part leaves the background out: it fills most of an image and would hide a missed lesion. The
    cross-entropy part counts every pixel, so images without foreground still teach.
    """

    classes: tuple[str, ...]
    loss_name: str = "auto"
    patch: tuple[int, ...] | None = None
    window_overlap: float = 0.25
    kind: str = "segmentation"

    @cached_property
    def _dice_ce(self) -> Any:
        from monai.losses import DiceCELoss

        return DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss; ``logits`` [B, K, *spatial], ``targets`` uint8 class index [B, *spatial]."""
        logits, targets = logits.float(), targets.long()
        if self.loss_name == "cross-entropy":
            return F.cross_entropy(logits, targets)
        if self.loss_name == "focal":
            return focal_loss(logits, targets)
        loss: Tensor = self._dice_ce(logits, targets.unsqueeze(1))
        return loss

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return probabilities [B, K, *spatial] that sum to 1 at every pixel."""
        return logits.float().softmax(1)

    def predict(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return probabilities [B, K, *spatial].

        Images larger than the training patch are covered by overlapping windows of its size, whose probabilities are
        averaged with a Gaussian weight around each window's centre; others go through the network whole.
        """
        if self.patch is None or all(size <= part for size, part in zip(images.shape[2:], self.patch, strict=True)):
            return self.probabilities(model(images))
        from monai.inferers import sliding_window_inference

        result: Any = sliding_window_inference(
            images,
            roi_size=self.patch,
            sw_batch_size=WINDOWS_AT_ONCE,
            predictor=lambda windows: self.probabilities(model(windows)),
            overlap=self.window_overlap,
            mode="gaussian",
        )
        return torch.as_tensor(result)


def training_patches(
    images: Tensor, masks: Tensor, patch: Sequence[int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Cut one random patch from each image of a batch.

    Half of the patches, by the toss of a coin, are placed so that they contain a pixel drawn evenly from the image's
    foreground (any class above 0), at a random place within the patch; the others, and those of images without
    foreground, lie anywhere.

    Args:
        images: ``[B, C, *spatial]``.
        masks: Class index ``[B, *spatial]``.
        patch: Size in each direction, at most the image's.
        generator: Source of chance, on the CPU.

    Returns:
        ``[B, C, *patch]`` and ``[B, *patch]``.

    Raises:
        ValueError: The patch does not fit into the image.
    """
    spatial = tuple(images.shape[2:])
    if len(patch) != len(spatial) or any(p > s for p, s in zip(patch, spatial, strict=True)):
        raise ValueError(f"a patch of {tuple(patch)} does not fit into images of {spatial}")
    image_parts, mask_parts = [], []
    for image, mask in zip(images, masks, strict=True):
        starts = _patch_start(mask, patch, generator)
        window = tuple(slice(start, start + size) for start, size in zip(starts, patch, strict=True))
        image_parts.append(image[(slice(None), *window)])
        mask_parts.append(mask[window])
    return torch.stack(image_parts), torch.stack(mask_parts)


def _patch_start(mask: Tensor, patch: Sequence[int], generator: torch.Generator) -> list[int]:
    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    room = [size - part for size, part in zip(mask.shape, patch, strict=True)]
    if float(torch.rand((), generator=generator)) < FOREGROUND_SHARE:
        pixels = mask.flatten().nonzero()
        if len(pixels):
            chosen = pixels[draw(0, len(pixels) - 1), 0]
            pixel = [int(i) for i in torch.unravel_index(chosen, mask.shape)]
            return [draw(max(0, p - part + 1), min(r, p)) for p, part, r in zip(pixel, patch, room, strict=True)]
    return [draw(0, r) for r in room]
