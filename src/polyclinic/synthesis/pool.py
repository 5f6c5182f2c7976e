"""Samples: lines of class, device and seed, with or without the images that they stand for.

What comes from elsewhere is not trusted: ``unpack`` looks at every shape, type and range before anything is used.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from polyclinic.errors import MessageError
from polyclinic.federation.message import Message

MOST_SAMPLES = 200_000
MOST_BYTES = 1 << 30
_LINE = ("labels", "devices", "seeds")


@dataclass(frozen=True)
class Bounds:
    """What received samples may hold.

    Attributes:
        classes: Labels are below this.
        devices: Devices are below this.
        channels: Colours of an image.
        side: Largest height and width of an image in pixels.
        samples: Most samples in a message.
        nbytes: Most bytes of all images of a message together.
    """

    classes: int
    devices: int
    channels: int
    side: int = 512
    samples: int = MOST_SAMPLES
    nbytes: int = MOST_BYTES


@dataclass(frozen=True, eq=False)
class Samples:
    """Synthetic samples; the same line of label, device and seed gives the same image wherever it is decoded.

    Attributes:
        labels: int64 ``[m]``, class.
        devices: int64 ``[m]``, place in the list of devices.
        seeds: int64 ``[m]``, not negative.
        images: uint8 ``[m, C, s, s]``, or None where only the lines are known.
    """

    labels: Tensor
    devices: Tensor
    seeds: Tensor
    images: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def ids(self) -> list[str]:
        """A name for each sample: 16 hexadecimal digits of the SHA-256 of class, device, seed and pixels.

        Raises:
            ValueError: The samples have no images; decode them first, for an id stands for what is seen.
        """
        rows = zip(self.labels.tolist(), self.devices.tolist(), self.seeds.tolist(), self._pixels(), strict=True)
        return [hashlib.sha256(struct.pack("<3q", *line) + pixels).hexdigest()[:16] for *line, pixels in rows]

    def pixel_digests(self) -> list[str]:
        """SHA-256 of the pixels of each sample, hexadecimal.

        Raises:
            ValueError: The samples have no images.
        """
        return [hashlib.sha256(pixels).hexdigest() for pixels in self._pixels()]

    def only(self, keep: Tensor) -> Samples:
        """Some of the samples: ``keep`` is bool ``[m]`` or int64 positions, whose order counts."""
        images = None if self.images is None else self.images[keep]
        return Samples(self.labels[keep], self.devices[keep], self.seeds[keep], images)

    def with_images(self, images: Tensor) -> Samples:
        """The same lines with their images, uint8 ``[m, C, s, s]``."""
        return Samples(self.labels, self.devices, self.seeds, images)

    def without_images(self) -> Samples:
        """The lines alone."""
        return Samples(self.labels, self.devices, self.seeds)

    def arrays(self) -> dict[str, Tensor]:
        """As a group of a message, or of a state: ``labels``, ``devices``, ``seeds`` and, where known, ``images``."""
        lines = {"labels": self.labels, "devices": self.devices, "seeds": self.seeds}
        return lines if self.images is None else lines | {"images": self.images}

    @classmethod
    def of(cls, arrays: Mapping[str, Tensor]) -> Samples:
        """What ``arrays`` made, unchecked: for what this process wrote itself."""
        return cls(arrays["labels"], arrays["devices"], arrays["seeds"], arrays.get("images"))

    def _pixels(self) -> Iterator[bytes]:
        if self.images is None:
            raise ValueError("samples without images have no id: decode them first.")
        for image in self.images.cpu().numpy():
            yield image.tobytes()


def unpack(message: Message, bounds: Bounds, group: str = "samples") -> Samples:
    """Samples from a received message.

    Args:
        message: Holds the arrays of ``Samples.arrays`` as one group.
        bounds: What they may hold.
        group: Name of the group.

    Raises:
        MessageError: An array is missing, unknown, of another type or shape, out of range, or too large.
    """
    arrays = message.group(group)
    unknown = sorted(set(arrays) - {*_LINE, "images"})
    missing = [name for name in _LINE if name not in arrays]
    if unknown or missing:
        wrong = f"lacks {missing[0]!r}" if missing else f"holds {unknown[0]!r}, which no sample has"
        raise MessageError(f"samples in group {group!r}: the message {wrong}. It was not used.")
    count = len(arrays["labels"]) if arrays["labels"].ndim == 1 else -1
    if count > bounds.samples:
        raise MessageError(f"{count} samples came, at most {bounds.samples} are taken. The message was not used.")
    limits = {"labels": bounds.classes, "devices": bounds.devices, "seeds": 1 << 63}
    for name, below in limits.items():
        _check_column(name, arrays[name], count, below)
    if "images" in arrays:
        _check_images(arrays["images"], count, bounds)
    return Samples.of(arrays)


def _check_column(name: str, column: Tensor, count: int, below: int) -> None:
    if column.dtype != torch.int64 or tuple(column.shape) != (count,):
        raise MessageError(
            f"{name} of samples are {column.dtype} of shape {tuple(column.shape)}, wanted torch.int64 of one shape [m]."
        )
    if count and (int(column.min()) < 0 or int(column.max()) >= below):
        raise MessageError(
            f"{name} of samples go from {int(column.min())} to {int(column.max())}, wanted 0 to {below - 1}."
        )


def _check_images(images: Tensor, count: int, bounds: Bounds) -> None:
    shape = tuple(images.shape)
    wanted = f"torch.uint8 of shape ({count}, {bounds.channels}, s, s), s from 1 to {bounds.side}"
    square = len(shape) == 4 and shape[:2] == (count, bounds.channels) and shape[2] == shape[3]
    if images.dtype != torch.uint8 or not square or not 1 <= shape[2] <= bounds.side:
        raise MessageError(f"images of samples are {images.dtype} of shape {shape}, wanted {wanted}.")
    if images.numel() > bounds.nbytes:
        raise MessageError(f"images of samples have {images.numel()} bytes, at most {bounds.nbytes} are taken.")
