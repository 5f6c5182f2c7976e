"""Contributions read layer by layer, in the order of their digests, and filtered."""

from __future__ import annotations

import hashlib
import itertools
import math
import statistics
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyclinic.errors import ContributionError
from polyclinic.seeds import derive_seed
from polyclinic.vectors.rules.base import Filter, Layer, Piece
from polyclinic.vectors.sources import Filling, Kind, Outline, Source, Spec, Tensors

BLOCK = 131_072
"""Values that are handled at once in float64: few enough for a processor's cache, and so many that the fixed cost of a
tensor operation does not matter."""
SMALL = 2**17
"""Tensors of so many bytes at most take memory of their own: it comes from where other such memory just went."""


def in_order(sources: Sequence[Source]) -> tuple[Source, ...]:
    """Contributions by digest, so that whoever arrived first does not matter.

    Raises:
        ContributionError: Two have one digest.
    """
    ordered = tuple(sorted(sources, key=lambda source: source.digest))
    for one, two in itertools.pairwise(ordered):
        if one.digest == two.digest:
            raise ContributionError(
                f"contribution {one.digest[:12]} of site {one.site!r} is given twice. Give each contribution once."
            )
    return ordered


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes with one thread: sums and decompositions then do not depend on the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Feed:
    """The layers of a network with the vectors of all contributions; nothing is kept once it is handed out.

    Attributes:
        outline: The network.
        base: Its published values.
        sources: Contributions in the order of their digests.
        filters: Applied to each vector before anyone sees it, in this order.
    """

    outline: Outline
    base: Tensors
    sources: tuple[Source, ...]
    filters: tuple[Filter, ...] = ()

    def layers(self, wanted: Sequence[int] | None = None) -> Iterator[Layer]:
        """Every layer of a vector in the outline's order.

        Args:
            wanted: Positions of the contributions to read; None: all.
        """
        chosen = range(len(self.sources)) if wanted is None else wanted
        for spec in self.outline.weights:
            yield self._load(spec, chosen)

    def vector(self, j: int, spec: Spec) -> Tensor:
        """One tensor of contribution ``j`` as it was sent, float32.

        Raises:
            ContributionError: It has another shape than the network.
        """
        source = self.sources[j]
        if isinstance(source, Filling):
            sent = source.read_into("vector", spec.name, self._memory.take)
        else:
            sent = source.read("vector", spec.name)
        if tuple(sent.shape) != spec.shape:
            raise ContributionError(
                f"contribution {source.digest[:12]} of site {source.site!r}: {spec.name} has shape "
                f"{tuple(sent.shape)}, the base has {spec.shape}. It was made for another network; remove it."
            )
        return sent.float()

    def _load(self, spec: Spec, chosen: Sequence[int]) -> Layer:
        return Layer(
            name=spec.name,
            base=self.base.read(spec.name).float(),
            vectors=tuple(self._filtered(j, spec) for j in chosen),
            images=tuple(self.sources[j].images for j in chosen),
            extra=_Extra(tuple(self.sources[j] for j in chosen), spec.name),
            seed=derive_seed(0, "layer", self.set_digest, spec.name),
        )

    def _filtered(self, j: int, spec: Spec) -> Tensor:
        vector = self.vector(j, spec)
        if not self.filters:
            return vector
        source = self.sources[j]
        absent = tuple(k for k, held in enumerate(source.held) if not held)
        for order, one in enumerate(self.filters):
            piece = Piece(
                name=spec.name,
                vector=vector,
                seed=derive_seed(order, "piece", source.digest, spec.name),
                norm=self._norms[j] if self._needs_norms else math.nan,
                median_norm=statistics.median(self._norms) if self._needs_norms else math.nan,
                absent_rows=absent if self.outline.has_classes(spec.name) else (),
            )
            vector = one.apply(piece)
        return vector

    @property
    def _needs_norms(self) -> bool:
        return any(one.needs_norms for one in self.filters)

    @cached_property
    def _norms(self) -> tuple[float, ...]:
        """Euclidean norm of each whole vector, as it was sent."""
        squares: list[list[float]] = [[] for _ in self.sources]
        buffer = torch.empty(BLOCK, dtype=torch.float64)
        for spec in self.outline.weights:
            for j in range(len(self.sources)):
                squares[j].append(sum_of_squares(self.vector(j, spec), buffer))
        return tuple(math.sqrt(math.fsum(parts)) for parts in squares)

    @cached_property
    def _memory(self) -> _Memory:
        return _Memory(4 * max((math.prod(spec.shape) for spec in self.outline.weights), default=0))

    @cached_property
    def set_digest(self) -> str:
        """SHA-256 over the digests of the set."""
        return hashlib.sha256("\n".join(source.digest for source in self.sources).encode()).hexdigest()


class _Memory:
    """Memory of tensors that nobody holds any more, for the next ones: fresh memory costs more than to read into it.

    Args:
        largest: Bytes of the largest tensor.
    """

    def __init__(self, largest: int) -> None:
        self._largest = largest
        self._free: list[NDArray[np.uint8]] = []

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of any values."""
        count = math.prod(shape)
        if not SMALL < count * dtype.itemsize <= self._largest:
            return torch.empty(shape, dtype=dtype)
        block = self._free.pop() if self._free else np.empty(self._largest, np.uint8)
        # The tensor and all views of it keep this object alive, and nobody else does.
        owner = block[: count * dtype.itemsize]
        weakref.finalize(owner, self._free.append, block).atexit = False
        return torch.from_numpy(owner).view(dtype).view(shape)


@dataclass(frozen=True)
class Layers:
    """The layers of a feed, from the start each time they are iterated."""

    feed: Feed

    def __iter__(self) -> Iterator[Layer]:
        yield from self.feed.layers()


@dataclass(frozen=True)
class _Extra:
    """What contributions brought for one layer beside their vectors, read when asked for."""

    sources: tuple[Source, ...]
    name: str

    def __call__(self, j: int, kind: Kind) -> Tensor | None:
        source = self.sources[j]
        return source.read(kind, self.name).float() if self.name in source.names(kind) else None


def spans(values: int) -> Iterator[slice]:
    """Blocks of a flat tensor."""
    for start in range(0, values, BLOCK):
        yield slice(start, min(start + BLOCK, values))


def sum_of_squares(tensor: Tensor, buffer: Tensor) -> float:
    """In float64, block by block.

    Args:
        tensor: Any shape.
        buffer: Float64 ``[BLOCK]``, overwritten.
    """
    flat = tensor.reshape(-1)
    parts = []
    for span in spans(flat.numel()):
        block = buffer[: span.stop - span.start].copy_(flat[span])
        parts.append(torch.dot(block, block).item())
    return math.fsum(parts)
