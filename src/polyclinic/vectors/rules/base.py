"""What a merge rule and a filter are.

A rule is its own settings: frozen, with a ``name``. It sees one layer of all sites at a time, in the order of the
contributions' digests, so the result depends on the set of contributions only and memory does not grow with the
network.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from polyclinic.settings import Settings
from polyclinic.vectors.sources import Kind

Judge = Callable[[Sequence[float]], float]
"""``judge(shares)`` builds base + sum of shares[j] * vectors[j] and tells how good it is on the coordinator's
validation images; larger is better."""


@dataclass(frozen=True)
class Layer:
    """One tensor of the network, of all sites.

    Attributes:
        name: As in ``state_dict``.
        base: The base's values, any shape, float32.
        vectors: Of each site the change of these values, same shape, float32, in the order of digests.
        images: Training images of each site.
        extra: ``extra(j, "fisher")`` is this layer's Fisher information of site j, shaped as the layer, float32;
            ``extra(j, "gram")`` the Gram matrix of its inputs, ``[in, in]``. None where the site sent none.
        seed: For draws; from the digests and the name.
    """

    name: str
    base: Tensor
    vectors: tuple[Tensor, ...]
    images: tuple[int, ...]
    extra: Callable[[int, Kind], Tensor | None]
    seed: int


@dataclass(frozen=True)
class Merged:
    """One merged layer.

    Attributes:
        delta: What is added to the base, in the layer's shape, float64 (float32 where noted by the rule).
        shares: What share of each site's vector went in, where the result is a linear combination of them, else None.
        note: What a reader of the recipe must know about this layer: that the rule fell back to something else, and
            why. None where it did what its name says.
    """

    delta: Tensor
    shares: tuple[float, ...] | None = None
    note: str | None = None


class Rule(Settings):
    """How the vectors of several sites become one.

    A rule either gives one share per contribution for the whole network (``shares``), or merges layer by layer
    (``merge``).
    """

    name: str
    elementwise: ClassVar[bool] = False
    """Each value of the result depends on the same value of the vectors alone, so layers may be merged in pieces."""

    @property
    def needs(self) -> frozenset[Kind]:
        """What a contribution must bring beside its vector; a merge without it is refused."""
        return frozenset()

    @property
    def judged(self) -> bool:
        """Whether it compares candidates on the coordinator's validation images."""
        return False

    def shares(self, images: Sequence[int], judge: Judge | None) -> list[float] | None:
        """One share per contribution for all layers, or None where the rule works layer by layer.

        Args:
            images: Training images of each contribution, in the order of digests.
            judge: None where there are no validation images; never None for a rule that is ``judged``.
        """
        return None

    def survey(self, layers: Iterable[Layer]) -> object:
        """Look at all layers before merging, where a rule must; what it returns is handed to ``merge``.

        Args:
            layers: Whole layers, never pieces of them. May be iterated several times, each time from the start.
        """
        return None

    def merge(self, layer: Layer, survey: object) -> Merged:
        """Merge one layer."""
        raise NotImplementedError(f"rule {self.name} merges no single layers")


@dataclass(frozen=True)
class Piece:
    """One tensor of one contribution, as a filter sees it.

    Attributes:
        name: As in ``state_dict``.
        vector: The change, float32.
        seed: For draws; from this contribution's digest and the name, so other contributions don't matter.
        norm: Euclidean norm of this contribution's whole vector.
        median_norm: Median of these norms over all contributions.
        absent_rows: Positions along the first axis whose class the site had no images of; empty for other layers.
    """

    name: str
    vector: Tensor
    seed: int
    norm: float
    median_norm: float
    absent_rows: tuple[int, ...]


class Filter(Settings):
    """Changes each vector by itself before the rule sees it."""

    name: str
    needs_norms: ClassVar[bool] = False
    """It reads ``norm`` and ``median_norm``; they cost one more pass over the files."""

    @abstractmethod
    def apply(self, piece: Piece) -> Tensor:
        """The changed vector, same shape and dtype; ``piece.vector`` itself is left alone."""
