"""What a merge reads: an outline of the network, the base's tensors, and what each contribution brought."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from polyclinic.models.normalisation import running_statistics, shared_names
from polyclinic.models.registry import head_name
from polyclinic.models.weights import shared_tensors

Kind = Literal["vector", "fisher", "gram", "statistics", "head"]
"""What a contribution may bring: changes of weights; diagonal Fisher information; Gram matrices of layer inputs;
running statistics of batch normalisation; sums over features for a closed-form head."""

Make = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""``make(shape, dtype)`` gives a contiguous tensor that is to be filled."""


@dataclass(frozen=True)
class Spec:
    """One floating-point tensor of the network."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    statistic: bool
    """A running mean or variance of batch normalisation: never part of a vector."""


@dataclass(frozen=True)
class Outline:
    """A network without its values.

    Attributes:
        specs: Its floating-point tensors, in the order of ``state_dict``; counters are left out.
        head: Name of its last layer, whose outputs are the classes.
        classes: In the order of the outputs.
    """

    specs: tuple[Spec, ...]
    head: str
    classes: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module, classes: Sequence[str]) -> Outline:
        """The outline of a network that was built for these classes."""
        moving = running_statistics(model)
        tensors = shared_tensors(model, shared_names(model, "batch"))
        specs = tuple(Spec(n, tuple(t.shape), t.dtype, n in moving) for n, t in tensors.items())
        return cls(specs, head_name(model), tuple(classes))

    @property
    def weights(self) -> tuple[Spec, ...]:
        """What a vector consists of: everything but running statistics."""
        return tuple(spec for spec in self.specs if not spec.statistic)

    def only(self, names: Collection[str]) -> Outline:
        """The part of the network that has these names."""
        return Outline(tuple(spec for spec in self.specs if spec.name in names), self.head, self.classes)

    def has_classes(self, name: str) -> bool:
        """Whether the first axis of this tensor is the classes."""
        return name in (f"{self.head}.weight", f"{self.head}.bias")


class Tensors(Protocol):
    """Tensors by name, read when asked for."""

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU; the caller must not write to it."""


class Source(Protocol):
    """One contribution, as a merge sees it.

    Attributes:
        digest: Hexadecimal; contributions are merged in the order of their digests.
        site: Who sent it.
        images: Training images behind it, as the site states them (binned).
        held: For each class of the outline, whether the site had training images of it.
    """

    @property
    def digest(self) -> str: ...
    @property
    def site(self) -> str: ...
    @property
    def images(self) -> int: ...
    @property
    def held(self) -> tuple[bool, ...]: ...

    def names(self, kind: Kind) -> frozenset[str]:
        """Names of the tensors of one kind; empty where the contribution has none."""

    def read(self, kind: Kind, name: str) -> Tensor:
        """One tensor, on the CPU; the caller must not write to it."""


@runtime_checkable
class Filling(Protocol):
    """A source that can read into memory which it is given."""

    def read_into(self, kind: Kind, name: str, make: Make) -> Tensor:
        """As ``read``, into a tensor that ``make`` gives."""


@dataclass(frozen=True)
class InMemory:
    """A contribution whose tensors are in memory."""

    digest: str
    site: str
    images: int
    held: tuple[bool, ...]
    tensors: Mapping[Kind, Mapping[str, Tensor]] = field(repr=False)

    def names(self, kind: Kind) -> frozenset[str]:
        """Names of the tensors of one kind."""
        return frozenset(self.tensors.get(kind, {}))

    def read(self, kind: Kind, name: str) -> Tensor:
        """One tensor."""
        return self.tensors[kind][name]


@dataclass(frozen=True)
class InMemoryTensors:
    """Tensors by name, in memory."""

    tensors: Mapping[str, Tensor]

    def read(self, name: str) -> Tensor:
        """One tensor."""
        return self.tensors[name]
