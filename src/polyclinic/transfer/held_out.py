"""Patients of a site's training images that are kept apart, to judge by while training."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyclinic.data.dataset import SiteData
from polyclinic.errors import DataError

LEAST = 2
"""Images of each class that are kept apart, as far as half of its patients have so many."""


def held_out(data: SiteData, share: float, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Divide the training images by patients.

    Patients are taken in random order until the part has its share of the images and two of each class. Of each class
    at least half of the patients stay.

    Args:
        data: A site's images, of a classification task.
        share: Of the training images that are kept apart.
        rng: Source of chance.

    Returns:
        Positions to train with and positions kept apart, int64 and sorted; no patient is in both.

    Raises:
        DataError: There are too few patients to divide.
    """
    positions = data.splits["train"].numpy()
    names, patient = np.unique(np.array(data.patients("train"), dtype=object), return_inverse=True)
    labels = _labels(data)
    images, own = np.bincount(patient), np.zeros((len(names), labels.shape[1]), dtype=np.int64)
    np.add.at(own, patient, labels)
    apart = _chosen(images, own, share, np.searchsorted(names, rng.permutation(names)))[patient]
    if not apart.any():
        raise DataError(
            f"site {data.site!r} has too few patients among its training images ({len(names)}) to keep some "
            "apart, by which weights could be learned. Set method.weights: uniform."
        )
    return torch.from_numpy(positions[~apart]), torch.from_numpy(positions[apart])


def _chosen(
    images: NDArray[np.int64], own: NDArray[np.int64], share: float, order: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Which patients are kept apart, ``[P]``.

    Args:
        images: Of each patient, ``[P]``.
        own: Those of each class, ``[P, K]``.
        share: As in ``held_out``.
        order: In which patients are looked at.
    """
    wanted, has = share * images.sum(), own > 0
    there, most = has.any(0), has.sum(0) / 2
    count, held, gone = 0, np.zeros_like(own[0]), np.zeros_like(own[0])
    chosen = np.zeros(len(images), dtype=bool)
    for one in order:
        lacking = (held < LEAST) & there
        if count >= wanted and not lacking.any():
            break
        if (count < wanted or has[one, lacking].any()) and (gone + has[one] <= most).all():
            chosen[one] = True
            count, held, gone = count + images[one], held + own[one], gone + has[one]
    return chosen


def _labels(data: SiteData) -> NDArray[np.bool_]:
    """Whether each training image has each class, ``[n, K]``."""
    targets: NDArray[np.int64] = data.labels("train").cpu().numpy()
    return targets > 0 if targets.ndim == 2 else targets[:, None] == np.unique(targets)[None]
