"""Which images form a training batch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from polyclinic.errors import DataError


def epoch_batches(indices: NDArray[np.int64], rng: np.random.Generator, batch_size: int) -> Iterator[NDArray[np.int64]]:
    """One shuffled pass over the images.

    The last batch may be short. A last batch of one image is joined to the batch before it, because batch
    normalisation cannot train on one image; so a batch has at most ``batch_size + 1`` images.
    """
    yield from _cut(rng.permutation(indices), batch_size)


def balanced_batches(
    indices: NDArray[np.int64], labels: NDArray[np.int64], rng: np.random.Generator, batch_size: int
) -> Iterator[NDArray[np.int64]]:
    """As many images as one pass has, drawn with replacement so that the classes present are equally frequent."""
    _, position, counts = np.unique(labels, return_inverse=True, return_counts=True)
    weights = 1.0 / (len(counts) * counts[position])
    yield from _cut(rng.choice(indices, size=len(indices), p=weights / weights.sum()), batch_size)


def _cut(order: NDArray[np.int64], batch_size: int) -> Iterator[NDArray[np.int64]]:
    if len(order) == 0:
        raise DataError("there are no training images to draw batches from.")
    starts = list(range(0, len(order), batch_size))
    if batch_size > 1 and len(starts) > 1 and len(order) - starts[-1] == 1:
        starts.pop()
    for start, end in zip(starts, [*starts[1:], len(order)], strict=True):
        yield order[start:end]
