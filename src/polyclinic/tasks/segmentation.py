"""Segmentation: one class a pixel, on whole images or on patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyclinic.tasks.classification import focal_loss

if TYPE_CHECKING:
    from polyclinic.data.dataset import SiteData

FOREGROUND_SHARE = 0.5
WINDOWS_AT_ONCE = 4
_PIXELS_AT_ONCE = 2**20


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

    def among(self, counts: Tensor) -> Segmentation:
        """The same: no loss of this task looks at class counts."""
        return self

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss; ``logits`` [B, K, *spatial], ``targets`` uint8 class index [B, *spatial].

        A network that learns several views of an image gives ``[V, B, K, *spatial]``: the mean over views.
        """
        if logits.ndim == targets.ndim + 2:
            return torch.stack([self.loss(view, targets) for view in logits]).mean()
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

    def mask(self, probabilities: Tensor, threshold: float) -> Tensor:
        """Decide on the class of every pixel: uint8 ``[B, *spatial]``.

        Args:
            probabilities: ``[B, K, *spatial]``.
            threshold: With two classes the smallest probability of the foreground that counts; with more classes
                the likeliest counts, whatever the threshold.
        """
        if len(self.classes) == 2:
            return (probabilities[:, 1] >= threshold).to(torch.uint8)
        # In parts: the indices that argmax gives are eight times as large as the mask.
        parts = torch.split(probabilities.flatten(2), _PIXELS_AT_ONCE, dim=2)
        likeliest = torch.cat([part.argmax(1).to(torch.uint8) for part in parts], dim=1)
        return likeliest.view(len(probabilities), *probabilities.shape[2:])

    def training_patches(self, data: SiteData, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Cut one random patch from each of some images; nothing of the images is copied but the patches.

        Half of the patches, by the toss of a coin, are placed so that they contain a pixel drawn evenly from the
        image's foreground (any class above 0), at a random place within the patch; the others, and those of images
        without foreground, lie anywhere.

        Args:
            data: The site's images.
            indices: int64 ``[B]`` positions.
            generator: Source of chance, on the CPU.

        Returns:
            Normalised ``[B, C, *patch]`` and masks ``[B, *patch]``.

        Raises:
            ValueError: There is no patch, or it does not fit into the images.
        """
        from polyclinic.data.dataset import normalized

        patch = self._fitting(data.targets.shape[1:])
        image_parts, mask_parts = [], []
        for i in indices.tolist():
            starts = self._patch_start(data, i, patch, generator)
            window = tuple(slice(start, start + size) for start, size in zip(starts, patch, strict=True))
            image_parts.append(normalized(data.picture(i)[(slice(None), *window)], data.mean, data.std))
            mask_parts.append(data.targets[i][window])
        return torch.stack(image_parts), torch.stack(mask_parts)

    def _fitting(self, spatial: Sequence[int]) -> Sequence[int]:
        patch = self.patch or ()
        if len(patch) != len(spatial) or any(p > s for p, s in zip(patch, spatial, strict=True)):
            raise ValueError(f"a patch of {patch} does not fit into images of {tuple(spatial)}")
        return patch

    def _patch_start(self, data: SiteData, i: int, patch: Sequence[int], generator: torch.Generator) -> list[int]:
        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        mask = data.targets[i]
        room = [size - part for size, part in zip(mask.shape, patch, strict=True)]
        if float(torch.rand((), generator=generator)) < FOREGROUND_SHARE:
            upto = self._foreground_upto(data, i)
            if upto[-1]:
                pixel = _foreground_pixel(mask, upto, draw(0, int(upto[-1]) - 1))
                return [draw(max(0, p - part + 1), min(r, p)) for p, part, r in zip(pixel, patch, room, strict=True)]
        return [draw(0, r) for r in room]

    @cached_property
    def _counted(self) -> WeakKeyDictionary[SiteData, dict[int, Tensor]]:
        return WeakKeyDictionary()

    def _foreground_upto(self, data: SiteData, i: int) -> Tensor:
        """Foreground pixels of a mask in its slices up to each, int64 ``[D]``, counted when first asked for.

        With it an even draw from all foreground pixels looks into one slice only.
        """
        known = self._counted.setdefault(data, {})
        if i not in known:
            known[i] = torch.stack([part.count_nonzero() for part in data.targets[i]]).cumsum(0)
        return known[i]


def _foreground_pixel(mask: Tensor, upto: Tensor, number: int) -> list[int]:
    """Position of foreground pixel ``number``, from 0, in the order of memory."""
    at = int(torch.searchsorted(upto, number, right=True))
    before = int(upto[at - 1]) if at else 0
    return [at, *mask[at].nonzero()[number - before].tolist()]
