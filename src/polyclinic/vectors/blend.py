"""One layer of the merged model: base plus what a rule makes of the vectors, in blocks that stay in the cache."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from polyclinic.errors import ContributionError
from polyclinic.vectors.feed import BLOCK, spans
from polyclinic.vectors.rules.base import Layer, Rule
from polyclinic.vectors.sources import Kind


@dataclass(frozen=True)
class Linear:
    """Every layer is the same combination of the vectors."""

    shares: tuple[float, ...]

    @property
    def wanted(self) -> list[int]:
        """Positions of the vectors that count."""
        return [j for j, share in enumerate(self.shares) if share != 0]


@dataclass(frozen=True)
class PerLayer:
    """A rule merges layer by layer, knowing what its survey found."""

    rule: Rule
    survey: object


Mix = Linear | PerLayer


@dataclass
class LayerTally:
    """What is noted of one layer while it is merged.

    Attributes:
        squares: Squared norm of each vector, and last that of what is added to the base.
        shares: Of each vector, where the result is a linear combination of them.
        note: What the rule says of this layer, where it did something else than its name says.
    """

    squares: list[float] = field(default_factory=list)
    shares: tuple[float, ...] | None = None
    note: str | None = None


def blend(layer: Layer, base: Tensor, mix: Mix, tally: LayerTally | None) -> Tensor:
    """Merge one layer and add it to the base in float64; rounded once to the base's type.

    Args:
        layer: The vectors; of a linear mix without a tally only those that count.
        base: The base's values in their own type.
        mix: What becomes of the vectors.
        tally: Filled, where there is one.

    Raises:
        ContributionError: The rule gave another shape.
    """
    merged = torch.empty_like(base, memory_format=torch.contiguous_format)
    flat, start = merged.view(-1), base.reshape(-1)
    vectors = [vector.reshape(-1) for vector in layer.vectors]
    total, buffer = torch.empty(BLOCK, dtype=torch.float64), torch.empty(BLOCK, dtype=torch.float64)
    delta = _per_layer(layer, mix) if isinstance(mix, PerLayer) else None
    shares = _shares(mix, tally) if isinstance(mix, Linear) else ()
    squares = [0.0] * (len(vectors) + 1)
    for span in spans(flat.numel()):
        size = span.stop - span.start
        added = total[:size].zero_()
        for j, vector in enumerate(vectors if delta is None or tally is not None else ()):
            block = buffer[:size].copy_(vector[span])
            if tally is not None:
                squares[j] += torch.dot(block, block).item()
            if delta is None:
                added.add_(block, alpha=shares[j])
        if delta is not None:
            added.copy_(delta(span))
        squares[-1] += torch.dot(added, added).item()
        flat[span] = added.add_(buffer[:size].copy_(start[span]))
    if tally is not None:
        tally.squares = squares
        tally.shares = shares if delta is None else delta.shares
        tally.note = None if delta is None else delta.note
    return merged


def _shares(mix: Linear, tally: LayerTally | None) -> tuple[float, ...]:
    return mix.shares if tally is not None else tuple(mix.shares[j] for j in mix.wanted)


class _Whole:
    """What a rule made of a whole layer."""

    def __init__(self, layer: Layer, mix: PerLayer) -> None:
        merged = mix.rule.merge(layer, mix.survey)
        if merged.delta.shape != layer.base.shape:
            raise ContributionError(
                f"rule {mix.rule.name} made shape {tuple(merged.delta.shape)} of {layer.name}, which has "
                f"{tuple(layer.base.shape)}."
            )
        self.shares, self.note = merged.shares, merged.note
        self._delta = merged.delta.reshape(-1)

    def __call__(self, span: slice) -> Tensor:
        return self._delta[span]


class _Pieces:
    """What a rule makes of one piece of a layer after the other."""

    def __init__(self, layer: Layer, mix: PerLayer) -> None:
        self._mix, self._layer = mix, layer
        self._base = layer.base.reshape(-1)
        self._vectors = [vector.reshape(-1) for vector in layer.vectors]
        self._extra: dict[tuple[int, Kind], Tensor | None] = {}
        self._found: set[tuple[float, ...] | None] = set()
        self.note: str | None = None

    @property
    def shares(self) -> tuple[float, ...] | None:
        return next(iter(self._found)) if len(self._found) == 1 else None

    def __call__(self, span: slice) -> Tensor:
        layer = self._layer
        piece = Layer(
            name=layer.name,
            base=self._base[span],
            vectors=tuple(vector[span] for vector in self._vectors),
            images=layer.images,
            extra=lambda j, kind: self._sliced(j, kind, span),
            seed=layer.seed,
        )
        merged = self._mix.rule.merge(piece, self._mix.survey)
        self._found.add(merged.shares)
        self.note = self.note or merged.note
        return merged.delta

    def _sliced(self, j: int, kind: Kind, span: slice) -> Tensor | None:
        if (j, kind) not in self._extra:
            whole = self._layer.extra(j, kind)
            self._extra[j, kind] = None if whole is None else whole.reshape(-1)
        flat = self._extra[j, kind]
        return None if flat is None else flat[span]


def _per_layer(layer: Layer, mix: PerLayer) -> _Whole | _Pieces:
    return _Pieces(layer, mix) if mix.rule.elementwise else _Whole(layer, mix)
