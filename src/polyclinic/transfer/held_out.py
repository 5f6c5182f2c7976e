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
    patients = np.array(data.patients("train"), dtype=object)
    labels = _labels(data)
    apart = np.zeros(len(positions), dtype=bool)
    for name in rng.permutation(np.unique(patients)):
        lacking = (labels[apart].sum(0) < LEAST) & (labels.sum(0) > 0)
        if apart.sum() >= share * len(positions) and not lacking.any():
            break
        own = patients == name
        wanted = apart.sum() < share * len(positions) or labels[own][:, lacking].any()
        if wanted and _half_stay(labels, patients, apart | own):
            apart |= own
    if not apart.any():
        raise DataError(
            f"site {data.site!r} has too few patients among its training images ({len(set(patients))}) to keep some "
            "apart, by which weights could be learned. Set method.weights: uniform."
        )
    return torch.from_numpy(positions[~apart]), torch.from_numpy(positions[apart])


def _labels(data: SiteData) -> NDArray[np.bool_]:
    """Whether each training image has each class, ``[n, K]``."""
    targets: NDArray[np.int64] = data.labels("train").cpu().numpy()
    return targets > 0 if targets.ndim == 2 else targets[:, None] == np.unique(targets)[None]


def _half_stay(labels: NDArray[np.bool_], patients: NDArray[np.object_], gone: NDArray[np.bool_]) -> bool:
    return all(len(set(patients[has & gone])) <= len(set(patients[has])) / 2 for has in labels.T if has.any())
