"""One site's images, decoded once and ready for batches."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from polyclinic.data.batches import balanced_batches, epoch_batches
from polyclinic.data.decode import Decoder, Progress, decode_all
from polyclinic.data.manifest import SPLITS, Case
from polyclinic.errors import DataError
from polyclinic.study import ImageSettings, PhantomSettings, ScannerSettings, TaskSettings


class SiteData:
    """Images, targets and splits of one site, or of several joined by ``concat``.

    Args:
        site: Name of the site.
        cases: One an image, in the order of ``images``.
        images: ``(N, C, *spatial)``, uint8 (0..255 stands for 0..1) or float32 in 0..1. Several tensors are taken as
            joined along N, without copying them.
        targets: int64 ``(N,)`` class indices, float32 ``(N, K)`` findings, or uint8 ``(N, *spatial)`` class indices.
        splits: int64 positions of the train, val and test images.
        mean: Subtracted from images in 0..1.
        std: Divided by after that.
        spacings: Millimetres per pixel of each image, in the order of its axes; None where it is not known.
    """

    def __init__(
        self,
        site: str,
        cases: list[Case],
        images: Tensor | Sequence[Tensor],
        targets: Tensor,
        splits: dict[str, Tensor],
        *,
        mean: float = 0.5,
        std: float = 0.25,
        spacings: Sequence[tuple[float, ...] | None] | None = None,
    ) -> None:
        self.site = site
        self.cases = cases
        self.targets = targets
        self.splits = splits
        self.mean = mean
        self.std = std
        self.spacings = [None] * len(cases) if spacings is None else list(spacings)
        self._blocks = (images,) if isinstance(images, Tensor) else tuple(images)
        self._ends = np.cumsum([len(block) for block in self._blocks])
        if not len(cases) == len(targets) == len(self.spacings) == self._ends[-1]:
            raise DataError(f"site '{site}': {len(cases)} cases, {self._ends[-1]} images, {len(targets)} targets.")

    @classmethod
    def load(
        cls,
        site: str,
        cases: Sequence[Case],
        task: TaskSettings,
        image: ImageSettings,
        folder: Path | None = None,
        *,
        phantom: PhantomSettings | None = None,
        scanner: ScannerSettings | None = None,
        on_progress: Progress | None = None,
    ) -> SiteData:
        """Decode all images of a site.

        Args:
            site: Name of the site.
            cases: With their splits.
            task: Kind and classes.
            image: From file to array, and where the arrays are kept.
            folder: Where memory-mapped arrays lie (``image.cache`` ``memmap``); they are used again when the images
                and settings are the same.
            phantom: Settings of made-up images, ``data.phantom`` of the study.
            scanner: The simulated scanner of the site, from ``data.scanners`` of the study.
            on_progress: Called with the number of images done and in all.

        Raises:
            DataError: Names the site, the image, the row of the table and the fault.
            StudyError: Settings of images and scanner that contradict each other.
        """
        cases = list(cases)
        if not cases:
            raise DataError(f"site '{site}' has no images.")
        if image.cache == "memmap" and folder is None:
            raise DataError("data.image.cache is 'memmap', but no folder for the arrays was given.")
        decoder = Decoder(task, image, phantom, scanner)
        decoded = decode_all(site, cases, decoder, folder if image.cache == "memmap" else None, on_progress)
        targets = torch.from_numpy(decoded.masks) if decoded.masks is not None else _targets(cases, task)
        splits = {
            part: torch.tensor([i for i, case in enumerate(cases) if case.split == part], dtype=torch.int64)
            for part in SPLITS
        }
        images = torch.from_numpy(decoded.images)
        return cls(site, cases, images, targets, splits, mean=image.mean, std=image.std, spacings=decoded.spacings)

    @classmethod
    def concat(cls, parts: Sequence[SiteData], site: str = "pooled") -> SiteData:
        """All sites as one, for pooled training; images are not copied, targets are."""
        offsets = np.cumsum([0, *(len(part) for part in parts)])
        splits = {
            name: torch.cat([part.splits[name] + int(start) for part, start in zip(parts, offsets[:-1], strict=True)])
            for name in SPLITS
        }
        return cls(
            site,
            [case for part in parts for case in part.cases],
            [block for part in parts for block in part._blocks],
            torch.cat([part.targets for part in parts]),
            splits,
            mean=parts[0].mean,
            std=parts[0].std,
            spacings=[spacing for part in parts for spacing in part.spacings],
        )

    def training_on(self, positions: Tensor) -> SiteData:
        """The same images with another training split, int64 positions; nothing is copied."""
        changed = copy.copy(self)
        changed.splits = {**self.splits, "train": positions}
        return changed

    def __len__(self) -> int:
        return len(self.cases)

    @property
    def images(self) -> Tensor:
        """All images, ``(N, C, *spatial)``; joined sites are copied into one float32 or uint8 tensor here."""
        if len(self._blocks) == 1:
            return self._blocks[0]
        if len({block.dtype for block in self._blocks}) == 1:
            return torch.cat(self._blocks)
        return torch.cat([b.float() / 255 if b.dtype == torch.uint8 else b for b in self._blocks])

    @property
    def has_foreground(self) -> bool:
        """Whether any mask of the three splits holds another class than the background."""
        used = torch.cat([self.splits[name] for name in SPLITS]).tolist()
        return any(bool(self.targets[i].any()) for i in used)

    def picture(self, i: int) -> Tensor:
        """Image ``i`` as it is kept, ``(C, *spatial)``: uint8 or float32 in 0..1, a view without a copy."""
        k = int(np.searchsorted(self._ends, i, side="right"))
        return self._blocks[k][i - int(self._ends[k]) + len(self._blocks[k])]

    def inputs(self, indices: Tensor) -> Tensor:
        """Normalised images ``(x - mean) / std`` with x in 0..1, float32 ``(B, C, *spatial)``.

        Args:
            indices: int64 ``(B,)`` positions.
        """
        if len(self._blocks) == 1:
            return self._normalized(self._blocks[0], indices)
        block_of = np.searchsorted(self._ends, indices.cpu().numpy(), side="right")
        first = self._blocks[0]
        result = torch.empty((len(indices), *first.shape[1:]), dtype=torch.float32, device=first.device)
        for k in np.unique(block_of):
            rows = torch.from_numpy(np.flatnonzero(block_of == k))
            start = int(self._ends[k]) - len(self._blocks[k])
            result[rows.to(first.device)] = self._normalized(self._blocks[k], indices[rows] - start)
        return result

    def _normalized(self, block: Tensor, indices: Tensor) -> Tensor:
        return normalized(block.index_select(0, indices.to(block.device)), self.mean, self.std)

    def labels(self, split: str) -> Tensor:
        """Targets of one split, in its order."""
        return self.targets[self.splits[split].to(self.targets.device)]

    def patients(self, split: str) -> list[str]:
        """Patient of every image of one split, in its order; ``site/patient`` where sites are joined."""
        chosen = [self.cases[i] for i in self.splits[split].tolist()]
        joined = len(self._blocks) > 1
        return [f"{case.site}/{case.patient}" if joined else case.patient for case in chosen]

    def train_batches(
        self, rng: np.random.Generator, batch_size: int, steps: int | None = None, balanced: bool = False
    ) -> Iterator[Tensor]:
        """Positions of training batches, int64.

        Without ``steps`` it is one pass over the training images; with ``steps`` so many batches from as many passes
        as that takes, each shuffled anew. A last batch of one image is joined to the one before it, because batch
        normalisation cannot train on one image. ``balanced`` draws with replacement so that the classes present are
        equally frequent; a pass then has as many draws as images.

        Raises:
            DataError: No training images, or ``balanced`` for another task than multi-class.
        """
        indices = self.splits["train"].numpy()
        if len(indices) == 0:
            raise DataError(f"site '{self.site}' has no training images.")
        if balanced and (self.targets.ndim != 1 or self.targets.dtype != torch.int64):
            raise DataError("training.balanced needs a multi-class task. Set it to false.")
        labels = self.labels("train").cpu().numpy() if balanced else None
        done = 0
        while steps is None or done < steps:
            passed = (
                epoch_batches(indices, rng, batch_size)
                if labels is None
                else balanced_batches(indices, labels, rng, batch_size)
            )
            for batch in passed:
                if done == steps:
                    return
                done += 1
                yield torch.from_numpy(batch)
            if steps is None:
                return


def normalized(pixels: Tensor, mean: float, std: float) -> Tensor:
    """``(x - mean) / std`` with x in 0..1, float32; uint8 0..255 stands for 0..1."""
    unit = 255.0 if pixels.dtype == torch.uint8 else 1.0
    return (pixels * (1 / (unit * std))).sub_(mean / std)


def _targets(cases: Sequence[Case], task: TaskSettings) -> Tensor:
    position = {name: k for k, name in enumerate(task.classes)}
    for case in cases:
        names = (case.label,) if task.kind == "multi-class" else case.labels
        for name in names:
            if name not in position:
                raise DataError(
                    f"site '{case.site}', {case.where or case.image}: label {name!r} is not a class of the study. "
                    f"The classes are: {', '.join(task.classes)}."
                )
    if task.kind == "multi-class":
        return torch.tensor([position[case.label] for case in cases], dtype=torch.int64)
    targets = torch.zeros(len(cases), len(position))
    for row, case in enumerate(cases):
        targets[row, [position[name] for name in case.labels]] = 1
    return targets
