"""The k-th largest magnitude of each site's values, exactly, while they stream by.

Two passes: a regular sample brackets the answer; then all values above the bracket are counted and those inside are
kept, about one in a hundred. Where the sample misled (values in a pattern, or very many equal ones), two more passes
count exactly by the upper and then the lower 16 bits. Magnitudes of float32 are ordered as their bits are, so all of
it compares integers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from polyclinic.vectors.rules.elementwise import THREADS, blocks

Bits = NDArray[np.uint32]
Pass = Callable[[], Iterable[Sequence[Tensor]]]
"""Starts a pass over the network: for each layer, its tensor of each site."""

STEP = 257
"""One value in so many is sampled. A prime, so that it is in step with no row length."""
MARGIN = 6.0
"""Half the bracket, in standard deviations of a rank in a random sample."""
BLOCK = 1 << 18
MOST_KEPT = 1 << 20
"""More values than this, and than one in 64, are not kept: the exact count takes over, in little memory."""
MAGNITUDE = np.uint32(0x7FFFFFFF)
LARGEST = np.uint32(0x7F800000)


def kth_magnitudes(passes: Pass, rank: Callable[[int], int]) -> list[float]:
    """For each site, the magnitude that ``rank(n)`` of its ``n`` values reach or exceed, ties counted one by one.

    Args:
        passes: Called for each pass; at most four times.
        rank: From the number of values of a site, 1 to ``n``: 1 asks for the largest magnitude.
    """
    samples, count = _sample(passes())
    place = rank(count)
    searches = [_Search(sample, count, place) for sample in samples]
    _each(passes(), searches, _Search.look)
    found = [search.result() for search in searches]
    missed = [j for j, bits in enumerate(found) if bits is None]
    if missed:
        counted = _count_exactly(passes, missed, place)
        for j, bits in zip(missed, counted, strict=True):
            found[j] = bits
    return [float(np.uint32(bits).view(np.float32)) for bits in found if bits is not None]


def kth_magnitude(values: Tensor, rank: int) -> float:
    """The same for one tensor."""
    return kth_magnitudes(lambda: [[values]], lambda _: rank)[0]


def _bits(values: Tensor) -> Bits:
    """The values' magnitudes as integers that are ordered alike."""
    return values.reshape(-1).float().numpy().view(np.uint32) & MAGNITUDE


def _bit_blocks(values: Tensor) -> Iterator[Bits]:
    """The same block by block."""
    flat = values.reshape(-1)
    for place in blocks(flat.numel(), BLOCK):
        yield _bits(flat[place])


def _sample(layers: Iterable[Sequence[Tensor]]) -> tuple[list[Bits], int]:
    """Every ``STEP``-th value of each site, sorted, and how many values a site has."""
    parts: list[list[Bits]] = []
    count = 0
    for tensors in layers:
        first = -count % STEP
        parts.append([_bits(tensor.reshape(-1)[first::STEP]) for tensor in tensors])
        count += tensors[0].numel()
    return [np.sort(np.concatenate(of_site)) for of_site in zip(*parts, strict=True)], count


class _Search:
    """One site's second pass.

    Args:
        sample: Sorted bits of the sampled values.
        count: Number of values of the site.
        place: Rank that is asked for, from the largest.
    """

    def __init__(self, sample: Bits, count: int, place: int) -> None:
        share = 1 - place / count
        middle = share * len(sample)
        margin = MARGIN * (len(sample) * share * (1 - share)) ** 0.5 + MARGIN
        low, high = int(middle - margin), int(middle + margin) + 1
        self.low = sample[low] if low >= 0 else np.uint32(0)
        self.high = sample[high] if high < len(sample) else LARGEST
        self.place = place
        self.most = max(MOST_KEPT, count // 64)
        self.above = 0
        self.inside: list[Bits] = []
        self.size = 0

    def look(self, values: Tensor) -> None:
        """Count what is above the bracket, keep what is inside."""
        for bits in _bit_blocks(values):
            if self.size > self.most:
                self.inside = []
                return
            self.above += int(np.count_nonzero(bits > self.high))
            # Below the bracket the difference wraps round to a huge number: one comparison does for both ends.
            self.inside.append(bits[(bits - self.low) <= self.high - self.low])
            self.size += len(self.inside[-1])

    def result(self) -> int | None:
        """Bits of the answer, or None where the bracket missed it or held too many values."""
        left = self.place - self.above
        if self.size > self.most or not 1 <= left <= self.size:
            return None
        inside = np.concatenate(self.inside)
        return int(np.partition(inside, self.size - left)[self.size - left])


def _count_exactly(passes: Pass, sites: Sequence[int], place: int) -> list[int]:
    """Bits of the answer for these sites, by counting the upper 16 bits and then the lower ones."""
    upper = [np.zeros(1 << 15, np.int64) for _ in sites]
    for tensors in passes():
        for counts, j in zip(upper, sites, strict=True):
            for bits in _bit_blocks(tensors[j]):
                counts += np.bincount(bits >> np.uint32(16), minlength=1 << 15)
    bins = [_from_the_top(counts, place) for counts in upper]
    lower = [np.zeros(1 << 16, np.int64) for _ in sites]
    for tensors in passes():
        for counts, j, (head, _) in zip(lower, sites, bins, strict=True):
            for bits in _bit_blocks(tensors[j]):
                inside = bits[(bits >> np.uint32(16)) == head] & np.uint32(0xFFFF)
                counts += np.bincount(inside, minlength=1 << 16)
    return [head << 16 | _from_the_top(counts, left)[0] for counts, (head, left) in zip(lower, bins, strict=True)]


def _from_the_top(counts: NDArray[np.int64], place: int) -> tuple[int, int]:
    """The bin that the value of rank ``place`` lies in, counted from the last bin, and its rank within it."""
    reached = np.cumsum(counts[::-1])
    position = int(np.searchsorted(reached, place))
    before = int(reached[position - 1]) if position else 0
    return len(counts) - 1 - position, place - before


def _each(
    layers: Iterable[Sequence[Tensor]], searches: Sequence[_Search], look: Callable[[_Search, Tensor], None]
) -> None:
    """Let every site's search look at its tensors, several sites at a time."""
    with ThreadPoolExecutor(THREADS) as pool:
        for tensors in layers:
            if tensors[0].numel() < BLOCK:
                for search, tensor in zip(searches, tensors, strict=True):
                    look(search, tensor)
            else:
                list(pool.map(look, searches, tensors))
