"""Batches of public images for one training."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from polyclinic.data.augment import augment
from polyclinic.data.proxies import Proxies
from polyclinic.seeds import derive_seed, generator
from polyclinic.study import AugmentSettings


class PublicBatch(NamedTuple):
    """Attributes: positions in the public set, on the CPU; normalised images and their classes, on the device."""

    positions: Tensor
    images: Tensor
    labels: Tensor


class PublicBatches:
    """Draws batches, each without an image twice.

    Args:
        proxies: The public set.
        positions: Which of its images are drawn, int64.
        seed: Of order and augmentation.
        changes: As training images are augmented; None: not at all.
        device: Where batches go.
    """

    def __init__(
        self, proxies: Proxies, positions: Tensor, seed: int, changes: AugmentSettings | None, device: torch.device
    ) -> None:
        self._proxies, self._positions, self._changes, self._device = proxies, positions.numpy(), changes, device
        self._order = generator(seed, "public order")
        self._draws = torch.Generator().manual_seed(derive_seed(seed, "augment public images"))

    def __len__(self) -> int:
        return len(self._positions)

    def draw(self, count: int) -> PublicBatch:
        """So many images, at least two and at most all there are."""
        count = min(max(count, 2), len(self._positions))
        # Unshuffled: the order within a batch means nothing, and shuffling touches the whole set.
        return self.at(torch.from_numpy(self._order.choice(self._positions, count, replace=False, shuffle=False)))

    def at(self, positions: Tensor) -> PublicBatch:
        """The images at these positions."""
        images = self._proxies.inputs(positions)
        if self._changes is not None:
            images, _ = augment(images, None, self._changes, self._draws)
        labels = self._proxies.labels[positions]
        return PublicBatch(positions, images.to(self._device), labels.to(self._device))
