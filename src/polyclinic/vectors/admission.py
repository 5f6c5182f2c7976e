"""Admission of contributions to a merge: which look like the others, and which a person should look at first.

Everything is recomputed for the whole set, so the report is a function of the set of contributions and of what people
decided, never of the order of arrival. It finds mistakes (wrong images, a forgotten learning rate) and crude attacks.
It finds no backdoor, and an honest hospital with unusual patients looks like an attacker: therefore quarantine asks a
person, and a person's decision counts. What is against the format is refused before it gets here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from pydantic import Field

from polyclinic.errors import ContributionError
from polyclinic.settings import Settings
from polyclinic.vectors.feed import in_order
from polyclinic.vectors.likeness import (
    agreement,
    beyond_chance,
    cosine,
    cosine_to_others,
    influence,
    most_alike,
    relative_norm,
)
from polyclinic.vectors.sources import Outline, Source
from polyclinic.vectors.survey import VectorSurvey, norms
from polyclinic.vectors.verdicts import notes_of, reasons_of

Decision = Literal["accept", "hold"]
Verdict = Literal["accept", "quarantine"]

HEAVY = 0.1
"""Share of a vector's squared norm that makes a small layer count."""


class AdmissionLimits(Settings):
    """Beyond what a contribution is held for a person."""

    longer: float = Field(3.5, gt=0)
    """Largest robust z-score of the logarithm of a vector's norm. A vector that drowns the others does harm."""
    shorter: float = Field(6.0, gt=0)
    """The same downwards; larger, because a short vector does little. Small sites have short ones."""
    layer_norm: float = Field(6.0, gt=0)
    """Upwards, of a layer with two axes or more, or of one with a tenth of the vector's squared norm; larger, because
    there are many layers."""
    spread: float = Field(0.35, gt=0)
    """Least standard deviation of logarithms of norms, however alike the others are: a factor of 1.4, which sites of
    unequal size differ by. With it ``longer`` begins at a factor of 3.4, ``shorter`` and ``layer_norm`` at 8.2."""
    chance: float = Field(4.0, gt=0)
    """A vector whose dot products with all others lie within so many standard deviations of those of noise is taken
    for noise, where its cosines are also below ``unlike``."""
    unlike: float = Field(0.3, ge=0, le=1)
    """Where a layer of a few values holds most of the change, chance alone allows large cosines; those speak for no
    noise."""
    agreement: float = Field(0.2, ge=-1, le=1)
    """Least median cosine among the others for there to be a common direction. Sites with opposite class mixes have
    honest vectors that point apart; then nobody is judged by ``cosine`` and ``influence``."""
    cosine: float = Field(0.05, ge=-1, le=1)
    """Least cosine to the mean direction of the others, where they have a common one."""
    influence: float = Field(0.85, gt=0)
    """Largest change of the mean by leaving this one out, relative to the mean, where the others have a common
    direction. One that drowns all others has 1; of three that are orthogonal and equally long each has 0.71."""
    duplicate: float = Field(0.999, gt=0, le=1)
    """Largest cosine to the vector of another site."""
    absent_row: float = Field(3.0, gt=0)
    """Largest change of the head's row of a class that the site has no images of, over that of the row that changed
    most among classes that it has."""
    changed: float = Field(0.01, ge=0, le=1)
    """Smallest share of values that changed, below which the report notes a mostly frozen network."""


@dataclass(frozen=True)
class Row:
    """A row of the head that changed although the site has no images of its class."""

    name: str
    norm: float


@dataclass(frozen=True)
class Admission:
    """What is known of one contribution beside the others.

    The others are all contributions but this one and those on hold.

    Attributes:
        digest, site: Of the contribution.
        verdict: Whether it goes into a merge.
        found: The verdict of the numbers alone.
        decision: What a person decided, which counts; None where nobody did.
        reasons: Why it is in quarantine, or would be.
        notes: What else a reader should know.
        norm: Of the whole vector, Euclidean.
        norm_ratio: Over the median of the others' norms; None with fewer than two others.
        norm_z: Robust z-score of its logarithm; None likewise.
        odd_layers: Layers whose norm is far larger than the others', and their z-scores, largest first.
        cosine: To the mean direction of the others: each other counts alike, however long; None without others.
        beyond_chance: Largest dot product with any other, in standard deviations of noise; None without others.
        most_alike: Largest cosine to any other, either way; None without others.
        agreement: Median cosine among the others; None with fewer than two.
        worst_layer, worst_cosine: The layer with two axes or more that agrees least.
        influence: Change of the mean by leaving it out, relative to the mean; None without others.
        nearest, nearest_cosine: Digest of the contribution of another site that is most like it.
        absent_rows: Rows of the head without images behind them.
        changed: Share of values that differ from zero, 0 to 1; None where it was not counted.
    """

    digest: str
    site: str
    verdict: Verdict
    found: Verdict
    decision: Decision | None
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    norm: float
    norm_ratio: float | None
    norm_z: float | None
    odd_layers: tuple[tuple[str, float], ...]
    cosine: float | None
    beyond_chance: float | None
    most_alike: float | None
    agreement: float | None
    worst_layer: str
    worst_cosine: float | None
    influence: float | None
    nearest: str
    nearest_cosine: float | None
    absent_rows: tuple[Row, ...]
    changed: float | None

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)


def admission(
    outline: Outline,
    sources: Sequence[Source],
    survey: VectorSurvey,
    decisions: Mapping[str, Decision],
    limits: AdmissionLimits | None = None,
    changed: Mapping[str, float] | None = None,
) -> dict[str, Admission]:
    """Judge every contribution of a set.

    Args:
        outline: Of the base.
        sources: All contributions with a vector, those on hold too.
        survey: Of the same contributions.
        decisions: By digest, what people decided; digests of other contributions are ignored.
        limits: Beyond what a contribution is held.
        changed: Share of the values of each vector that changed, by digest, where that is known.

    Returns:
        By digest, in the order of digests.

    Raises:
        ContributionError: The survey is of another set.
    """
    limits = limits or AdmissionLimits()
    ordered = in_order(sources)
    if tuple(source.digest for source in ordered) != survey.digests:
        raise ContributionError("the survey of vectors is of another set of contributions. Survey them again.")
    held = {digest for digest, decided in decisions.items() if decided == "hold"}
    table = _Table(outline, ordered, survey, held, changed or {})
    return {s.digest: _judged(table, j, decisions.get(s.digest), limits) for j, s in enumerate(ordered)}


class _Table:
    """Products of all pairs of vectors, and who is compared with whom."""

    def __init__(
        self,
        outline: Outline,
        sources: Sequence[Source],
        survey: VectorSurvey,
        held: set[str],
        changed: Mapping[str, float],
    ) -> None:
        self.outline, self.sources, self.changed = outline, sources, changed
        self.layers, self.whole = survey.products, survey.total
        self.sizes = {spec.name: math.prod(spec.shape) for spec in outline.weights}
        self.deep = {spec.name for spec in outline.weights if len(spec.shape) > 1}
        self._free = [k for k, source in enumerate(sources) if source.digest not in held]

    def others(self, j: int) -> list[int]:
        """Positions of all but j and those on hold."""
        return [k for k in self._free if k != j]


def _judged(table: _Table, j: int, decision: Decision | None, limits: AdmissionLimits) -> Admission:
    source, others = table.sources[j], table.others(j)
    ratio, norm_z = relative_norm(table.whole, j, others, limits.spread)
    chances = [abs(beyond_chance(table.layers, table.sizes, j, k)) for k in others]
    by_layer = [(name, cosine_to_others(table.layers[name], j, others)) for name in table.layers if name in table.deep]
    agreeing = [(cosine, name) for name, cosine in by_layer if cosine is not None]
    worst_cosine, worst_layer = min(agreeing, default=(None, ""))
    rows, largest_held = absent_rows(table.outline, source)
    nearest, nearest_cosine = _nearest(table, j)
    found = Admission(
        digest=source.digest,
        site=source.site,
        verdict="accept",
        found="accept",
        decision=decision,
        reasons=(),
        notes=(),
        norm=float(norms(table.whole)[j]),
        norm_ratio=ratio,
        norm_z=norm_z,
        odd_layers=_odd_layers(table, j, others, limits),
        cosine=cosine_to_others(table.whole, j, others),
        beyond_chance=max(chances, default=None),
        most_alike=most_alike(table.whole, j, others),
        agreement=agreement(table.whole, others),
        worst_layer=worst_layer,
        worst_cosine=worst_cosine,
        influence=influence(table.whole, j, others),
        nearest=nearest,
        nearest_cosine=nearest_cosine,
        absent_rows=rows,
        changed=table.changed.get(source.digest),
    )
    reasons = reasons_of(found, len(others), largest_held, limits)
    own: Verdict = "quarantine" if reasons else "accept"
    decided: dict[Decision | None, Verdict] = {"accept": "accept", "hold": "quarantine", None: own}
    more = {"reasons": tuple(reasons), "notes": tuple(notes_of(found, len(others), limits))}
    return Admission(**{**vars(found), **more, "found": own, "verdict": decided[decision]})


def _odd_layers(table: _Table, j: int, others: Sequence[int], limits: AdmissionLimits) -> tuple[tuple[str, float], ...]:
    """Small layers count only where they carry weight: a bias of two values varies by chance and with the class mix."""
    odd = []
    for name, dots in table.layers.items():
        z = relative_norm(dots, j, others, limits.spread)[1]
        heavy = name in table.deep or dots[j, j] > HEAVY * table.whole[j, j]
        if z is not None and z > limits.layer_norm and heavy:
            odd.append((name, z))
    return tuple(sorted(odd, key=lambda pair: (-pair[1], pair[0])))


def absent_rows(outline: Outline, source: Source) -> tuple[tuple[Row, ...], float]:
    """Rows of the head that changed without images of their class, and the largest change of any other row.

    A row is the class's weights and bias; its norm is Euclidean. Softmax training always moves the rows of absent
    classes a little: it pushes them down.
    """
    count = len(outline.classes)
    squares = torch.zeros(count, dtype=torch.float64)
    for name in sorted(filter(outline.has_classes, source.names("vector"))):
        squares += source.read("vector", name).double().reshape(count, -1).square().sum(1)
    norms = squares.sqrt().tolist()
    held = max((norm for norm, have in zip(norms, source.held, strict=True) if have), default=0.0)
    named = zip(outline.classes, norms, source.held, strict=True)
    return tuple(Row(name, norm) for name, norm, have in named if not have and norm > 0), held


def _nearest(table: _Table, j: int) -> tuple[str, float | None]:
    """Among all of other sites, those on hold too: a copy stays a copy."""
    squares = table.whole.diagonal()
    best: tuple[float, str] | None = None
    for k, source in enumerate(table.sources):
        if source.site != table.sources[j].site and squares[k] > 0 and squares[j] > 0:
            found = (cosine(table.whole, j, k), source.digest)
            best = max(best or found, found)
    return ("", None) if best is None else (best[1], best[0])
