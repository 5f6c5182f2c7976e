"""Which images form a training batch: positions, drawn from a stream of their own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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


def proxy_batches(
    positions: Tensor | int,
    rng: np.random.Generator,
    batch_size: int,
    *,
    steps: int | None = None,
    passes: int = 1,
) -> Iterator[Tensor]:
    """Positions of batches of public images, int64, in shuffled passes.

    Args:
        positions: int64 ``(N,)``, or N for all of ``0 .. N - 1``.
        rng: Source of the order.
        batch_size: Images a batch; as in ``epoch_batches`` a pass may end with a short one.
        steps: So many batches, from as many passes as that takes; None: ``passes`` passes.
        passes: Ignored where ``steps`` is given.

    Raises:
        DataError: There are no positions.
    """
    indices = np.arange(positions) if isinstance(positions, int) else positions.cpu().numpy()
    if len(indices) == 0:
        raise DataError("there are no public images to draw batches from.")
    done = 0
    for _ in itertools.count() if steps is not None else range(passes):
        for batch in epoch_batches(indices, rng, batch_size):
            if done == steps:
                return
            done += 1
            yield torch.from_numpy(batch)


def _cut(order: NDArray[np.int64], batch_size: int) -> Iterator[NDArray[np.int64]]:
    if len(order) == 0:
        raise DataError("there are no training images to draw batches from.")
    starts = list(range(0, len(order), batch_size))
    if batch_size > 1 and len(starts) > 1 and len(order) - starts[-1] == 1:
        starts.pop()
    for start, end in zip(starts, [*starts[1:], len(order)], strict=True):
        yield order[start:end]
