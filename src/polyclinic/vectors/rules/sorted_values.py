"""Sorting the sites' values, entry by entry, with whole tensors: a sorting network of minima and maxima.

Batcher's odd-even merge sort (Batcher, Sorting networks and their applications, AFIPS 1968). Compare-exchanges that
touch no wanted place are left out. For ten sites this is several times faster than sorting along an axis.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor


def sorted_places(values: Sequence[Tensor], wanted: Collection[int]) -> list[Tensor]:
    """Of the values sorted entry by entry, smallest first, the wanted places, in ascending order of place.

    Args:
        values: One tensor a site, all of the same shape; they are left alone.
        wanted: Places, from 0.
    """
    rows = list(values)
    for low, high, smaller, larger in _network(len(rows), frozenset(wanted)):
        first, second = rows[low], rows[high]
        if smaller:
            rows[low] = torch.minimum(first, second)
        if larger:
            rows[high] = torch.maximum(first, second)
    return [rows[place] for place in sorted(wanted)]


@cache
def _network(count: int, wanted: frozenset[int]) -> tuple[tuple[int, int, bool, bool], ...]:
    """Compare-exchanges in order: both places, and whether the smaller and the larger value are needed later."""
    needed = set(wanted)
    steps = []
    for low, high in reversed(list(_comparisons(count))):
        if low in needed or high in needed:
            steps.append((low, high, low in needed, high in needed))
            needed |= {low, high}
    return tuple(reversed(steps))


def _comparisons(count: int) -> Iterator[tuple[int, int]]:
    """The network that sorts ``count`` values."""
    size = 1
    while size < count:
        gap = size
        while gap >= 1:
            for start in range(gap % size, count - gap, 2 * gap):
                for low in range(start, min(start + gap, count - gap)):
                    if low // (2 * size) == (low + gap) // (2 * size):
                        yield low, low + gap
            gap //= 2
        size *= 2
