"""Working through a layer of all sites in blocks that fit a processor's cache, and the mean many rules fall back to.

Rules that need several passes over the values make them block by block, so the values come from memory once. Blocks
are worked on by several threads; as none depends on another, the result is the same for any number of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from polyclinic.vectors.rules.base import Layer, Merged

BLOCK = 1 << 17
"""Values of one site in a block: large enough that a tensor operation's fixed cost does not matter."""
THREADS = min(4, os.cpu_count() or 1)
"""More would wait for memory."""


def blocks(count: int, size: int = BLOCK) -> Iterator[slice]:
    """Where each block of so many values lies."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def each_block(tensors: Sequence[Tensor], work: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """What ``work`` makes of each block, put together in the tensors' shape, float64.

    Args:
        tensors: All of the same shape.
        work: From the same values of each tensor, flat, in float32, which it must not write to, to as many results.
            Several threads call it.
    """
    flat = [tensor.reshape(-1) for tensor in tensors]
    out = torch.empty(flat[0].numel(), dtype=torch.float64)

    def one(place: slice) -> None:
        out[place] = work([values[place].float() for values in flat])

    places = list(blocks(out.numel()))
    if len(places) < 2 or THREADS == 1:
        for place in places:
            one(place)
    else:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(one, places))
    return out.reshape(tensors[0].shape)


def combine(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """``sum_j shares[j] * tensors[j]``, added in the given order in float64; same shape."""

    def work(values: list[Tensor]) -> Tensor:
        total = torch.zeros(values[0].numel(), dtype=torch.float64)
        for share, value in zip(shares, values, strict=True):
            total.add_(value.double(), alpha=share)
        return total

    return each_block(tensors, work)


def mean(layer: Layer, scale: float = 1.0, note: str | None = None) -> Merged:
    """The plain mean of the layer's vectors, times ``scale``."""
    shares = (scale / len(layer.vectors),) * len(layer.vectors)
    return Merged(combine(layer.vectors, shares), shares, note)
