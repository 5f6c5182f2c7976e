"""Cells: how many patients and images of each class each device has.

A cell of fewer training patients than ``synthesis.floor`` does not exist for anything that leaves a site: not for
counts, not for generators. Only training images are counted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyclinic.data.dataset import SiteData

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Cells:
    """Counts over all sites, as the server knows them.

    Attributes:
        classes: In the order of the network's outputs.
        devices: Sorted.
        patients: int64 ``[classes, devices]``.
        images: int64 ``[classes, devices]``.
    """

    classes: tuple[str, ...]
    devices: tuple[str, ...]
    patients: Counts
    images: Counts


@dataclass(frozen=True)
class OwnImages:
    """A site's training images in cells that are large enough to count, one entry an image.

    Attributes:
        positions: int64 ``[n]``, in ``SiteData``.
        labels: int64 ``[n]``, class.
        devices: int64 ``[n]``, place in the list of devices.
        patients: Whose.
    """

    positions: Tensor
    labels: Tensor
    devices: Tensor
    patients: list[str]


def device_name(data: SiteData, position: int) -> str:
    """The device of an image; images without one count as taken by a device with the site's name."""
    return data.cases[position].device or data.site


def own_devices(data: SiteData, floor: int) -> list[str]:
    """The devices that have a class with at least ``floor`` training patients, sorted."""
    every = tuple(sorted({device_name(data, i) for i in data.splits["train"].tolist()}))
    return [every[k] for k in sorted(set(own_images(data, every, floor).devices.tolist()))]


def own_images(data: SiteData, devices: tuple[str, ...], floor: int) -> OwnImages:
    """The training images in cells of at least ``floor`` patients.

    Args:
        data: The site's images, one class each.
        devices: All devices of the study; images of others are left out.
        floor: Fewest patients.
    """
    place = {name: k for k, name in enumerate(devices)}
    entries = [
        (i, int(data.targets[i]), place[device_name(data, i)], data.cases[i].patient)
        for i in data.splits["train"].tolist()
        if device_name(data, i) in place
    ]
    patients = Counter((c, d) for c, d, _ in {(c, d, who) for _, c, d, who in entries})
    kept = [entry for entry in entries if patients[entry[1], entry[2]] >= floor]
    columns = [torch.tensor([entry[k] for entry in kept], dtype=torch.int64) for k in range(3)]
    return OwnImages(columns[0], columns[1], columns[2], [who for *_, who in kept])


def count_cells(own: OwnImages, classes: int, devices: int) -> tuple[Counts, Counts]:
    """Patients and images of a site by class and device, int64 ``[classes, devices]``.

    A patient counts once, in the cell with most of his images (of equal ones the first), so that one patient changes
    one count by one.
    """
    images = np.zeros((classes, devices), dtype=np.int64)
    np.add.at(images, (own.labels.numpy(), own.devices.numpy()), 1)
    by_patient: dict[str, Counter[tuple[int, int]]] = {}
    for label, device, who in zip(own.labels.tolist(), own.devices.tolist(), own.patients, strict=True):
        by_patient.setdefault(who, Counter())[label, device] += 1
    patients = np.zeros_like(images)
    for cells in by_patient.values():
        most = max(cells.values())
        patients[min(cell for cell, n in cells.items() if n == most)] += 1
    return patients, images
