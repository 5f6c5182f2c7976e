"""Contributions and a base become one model, tensor by tensor.

The result is a function of the set of contributions, bit for bit: they are taken in the order of their digests, summed
in float64 by one thread, and rounded once. Two layers of all contributions are in memory at a time, never a whole
network (but for rules that compare candidates on validation images, which need whole candidates).

Running statistics of batch normalisation are no weights: a sum of their changes can be a negative variance. They are
the base's, or pooled from the statistics that sites sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from polyclinic.errors import ContributionError
from polyclinic.vectors.blend import LayerTally, Linear, Mix, PerLayer, blend
from polyclinic.vectors.feed import Feed, Layers, in_order, one_thread
from polyclinic.vectors.head import HeadSums, add_all
from polyclinic.vectors.pooling import pooled_statistics
from polyclinic.vectors.recipe import Recipe
from polyclinic.vectors.rules.base import Judge, Layer, Rule
from polyclinic.vectors.sources import Kind, Outline, Source, Spec, Tensors

BASE_RULE = "base"
"""The rule that takes no vectors."""

Write = Callable[[str, Tensor], None]
"""``write(name, tensor)`` takes one tensor of the merged model; it must not write into it."""

JudgeModel = Callable[[Mapping[str, Tensor]], float]
"""How good a model with these tensors is on the coordinator's validation images; larger is better."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        digests: Of the contributions, in the order in which they were merged.
        sites: Who sent them, in the same order.
        recipe: The recipe's settings.
        shares: For each layer the share of each vector in the result; None where it is no linear combination.
        norms: Euclidean norm of each vector, after the filters.
        merged_norm: Norm of what was added to the base.
        layer_norms: For each layer the norms of the vectors, and last that of what was added.
        notes: What a reader must be told.
    """

    digests: tuple[str, ...]
    sites: tuple[str, ...]
    recipe: dict[str, Any]
    shares: dict[str, tuple[float, ...] | None]
    norms: tuple[float, ...]
    merged_norm: float
    layer_norms: dict[str, tuple[float, ...]]
    notes: tuple[str, ...]


def merge(
    outline: Outline,
    base: Tensors,
    sources: Sequence[Source],
    recipe: Recipe,
    write: Write,
    *,
    judge: JudgeModel | None = None,
    on_layer: Callable[[str], None] | None = None,
) -> MergeReport:
    """Merge contributions into a base, as a recipe says; restoration on images comes after it.

    Args:
        outline: The network.
        base: Its published values.
        sources: The contributions, in any order.
        recipe: Rule, filters, head, and where running statistics come from.
        write: Called once for each tensor of the outline, in its order.
        judge: For rules that compare candidates.
        on_layer: Called with each tensor's name once it is written.

    Raises:
        ContributionError: Contributions that the recipe cannot be made of, or a result that is no model.
    """
    ordered = in_order(sources)
    _check(outline, ordered, recipe, judge)
    feed = Feed(outline, base, ordered, tuple(recipe.filters))
    tally = _Tally()
    with one_thread():
        stage = _Stage(feed, _fixed(outline, ordered, recipe))
        mix = None if recipe.rule.name == BASE_RULE else _mix(stage, recipe.rule, judge)
        for name, tensor in stage.tensors(mix, tally):
            write(name, tensor)
            if on_layer is not None:
                on_layer(name)
    return tally.report(ordered, recipe)


@dataclass
class _Tally:
    """Squared norms and shares by layer."""

    layers: dict[str, LayerTally] = field(default_factory=dict)

    def report(self, ordered: Sequence[Source], recipe: Recipe) -> MergeReport:
        columns = list(zip(*(layer.squares for layer in self.layers.values()), strict=True))
        totals = [math.sqrt(math.fsum(column)) for column in columns]
        return MergeReport(
            digests=tuple(source.digest for source in ordered),
            sites=tuple(source.site for source in ordered),
            recipe=recipe.model_dump(mode="json"),
            shares={name: layer.shares for name, layer in self.layers.items()},
            norms=tuple(totals[:-1]),
            merged_norm=totals[-1] if totals else 0.0,
            layer_norms={n: tuple(math.sqrt(s) for s in layer.squares) for n, layer in self.layers.items()},
            notes=tuple(self._notes()),
        )

    def _notes(self) -> Iterator[str]:
        """What the rule said of layers, each remark once with the layers it is about."""
        for note in dict.fromkeys(layer.note for layer in self.layers.values() if layer.note):
            about = [name for name, layer in self.layers.items() if layer.note == note]
            yield f"{note} ({', '.join(about)})"


@dataclass(frozen=True)
class _Stage:
    """Makes the tensors of a model from the feed.

    Attributes:
        feed: Vectors.
        fixed: Tensors that do not come from vectors, float64.
    """

    feed: Feed
    fixed: Mapping[str, Tensor]

    def tensors(self, mix: Mix | None, tally: _Tally | None = None) -> Iterator[tuple[str, Tensor]]:
        """All tensors in the outline's order; without a mix the base's.

        One thread blends a layer while this one reads the next: two layers are in memory at a time.
        """
        with ThreadPoolExecutor(1) as blender:
            waiting: tuple[Spec, Future[Tensor] | Tensor] | None = None
            for coming in self._started(mix, tally, blender):
                if waiting is not None:
                    yield _finished(*waiting)
                waiting = coming
                del coming
            if waiting is not None:
                yield _finished(*waiting)

    def _started(
        self, mix: Mix | None, tally: _Tally | None, blender: ThreadPoolExecutor
    ) -> Iterator[tuple[Spec, Future[Tensor] | Tensor]]:
        layers = self.feed.layers(mix.wanted if isinstance(mix, Linear) and tally is None else None)
        for spec in self.feed.outline.specs:
            if spec.name in self.fixed:
                yield spec, self.fixed[spec.name].to(spec.dtype)
            elif spec.statistic or mix is None:
                yield spec, self.feed.base.read(spec.name)
            else:
                record = None if tally is None else tally.layers.setdefault(spec.name, LayerTally())
                box = [next(layers)]
                base = box[0].base if spec.dtype == torch.float32 else self.feed.base.read(spec.name)
                yield spec, blender.submit(_blend_out, box, base, mix, record)


def _blend_out(box: list[Layer], base: Tensor, mix: Mix, record: LayerTally | None) -> Tensor:
    """Blend the layer in a box, which is gone before anyone hears of the result: the next one can have its memory."""
    return blend(box.pop(), base, mix, record)


def _finished(spec: Spec, tensor: Future[Tensor] | Tensor) -> tuple[str, Tensor]:
    done = tensor.result() if isinstance(tensor, Future) else tensor
    _check_values(spec, done)
    return spec.name, done


def _mix(stage: _Stage, rule: Rule, judge: JudgeModel | None) -> Mix:
    """Ask the rule for its shares; where it works layer by layer, let it survey the layers."""
    images = [source.images for source in stage.feed.sources]
    shares = rule.shares(images, None if judge is None else _candidates(stage, judge))
    if shares is not None:
        if len(shares) != len(images) or not all(math.isfinite(share) for share in shares):
            raise ContributionError(f"rule {rule.name} gave the shares {shares} for {len(images)} contributions.")
        return Linear(tuple(shares))
    surveys = type(rule).survey is not Rule.survey
    return PerLayer(rule, rule.survey(Layers(stage.feed)) if surveys else None)


def _candidates(stage: _Stage, judge: JudgeModel) -> Judge:
    """From a judge of models to a judge of shares; each call reads the vectors with a share."""

    def judged(shares: Sequence[float]) -> float:
        return judge(dict(stage.tensors(Linear(tuple(shares)))))

    return judged


def _fixed(outline: Outline, ordered: Sequence[Source], recipe: Recipe) -> dict[str, Tensor]:
    """Pooled running statistics and the closed-form head, float64."""
    fixed: dict[str, Tensor] = {}
    if recipe.restoration.mode == "bn-pooled":
        fixed.update(pooled_statistics(outline, ordered))
    if recipe.head is not None:
        weight, bias = recipe.head.solve(_head_sums(outline, ordered))
        for spec in outline.specs:
            new = {f"{outline.head}.weight": weight, f"{outline.head}.bias": bias}.get(spec.name)
            if new is not None and tuple(new.shape) != spec.shape:
                raise ContributionError(
                    f"the head sums give a head of shape {tuple(new.shape)}, the base's {spec.name} has {spec.shape}. "
                    "They were taken on another network."
                )
            if new is not None:
                fixed[spec.name] = new
    return fixed


def _head_sums(outline: Outline, ordered: Sequence[Source]) -> HeadSums:
    parts = []
    for source in ordered:
        count, first, second = (source.read("head", name) for name in ("count", "first", "second"))
        parts.append(HeadSums.from_tensors(count, first, second, len(outline.classes)))
    return add_all(parts)


def _check(outline: Outline, ordered: Sequence[Source], recipe: Recipe, judge: JudgeModel | None) -> None:
    rule, pooled = recipe.rule, recipe.restoration.mode == "bn-pooled"
    if not ordered and (rule.name != BASE_RULE or recipe.head is not None or pooled):
        raise ContributionError("there are no contributions to merge. Add some first.")
    if recipe.head is not None:
        _check_head(outline, recipe)
    if rule.judged and judge is None:
        raise ContributionError(
            f"rule {rule.name} compares candidates on the coordinator's own images, but none were given. "
            "Give validation images, or choose a rule that needs none (ties, median, ...)."
        )
    for source in ordered:
        if len(source.held) != len(outline.classes):
            raise ContributionError(
                f"{_named(source)} speaks of {len(source.held)} classes, the base has {len(outline.classes)}."
            )
        for kind, names in _wanted(outline, recipe).items():
            if lacking := sorted(names - source.names(kind)):
                raise ContributionError(
                    f"{_named(source)} lacks {kind} of {lacking[0]} ({len(lacking)} such), which the recipe needs. "
                    "Have the site make it, leave the contribution out, or choose another rule."
                )
        if "gram" in rule.needs and not source.names("gram"):
            raise ContributionError(
                f"{_named(source)} brings no gram, which rule {rule.name} needs. Have the site make it, or leave the "
                "contribution out."
            )


def _check_head(outline: Outline, recipe: Recipe) -> None:
    if recipe.rule.name != BASE_RULE:
        raise ContributionError(
            f"recipe: a closed-form head goes with rule {BASE_RULE}, not {recipe.rule.name}: the sums must have been "
            "taken on the very backbone that the head is put on. Merge the backbone first, publish the merged model "
            f"as a base, collect head sums on it, and merge those with rule {BASE_RULE}."
        )
    specs = {spec.name: spec.shape for spec in outline.specs}
    if len(specs.get(f"{outline.head}.weight", ())) != 2 or f"{outline.head}.bias" not in specs:
        raise ContributionError(
            f"recipe.head: the network's last layer {outline.head!r} is no linear layer with a bias, so a closed-form "
            "head does not fit. Remove head."
        )


def _wanted(outline: Outline, recipe: Recipe) -> dict[Kind, frozenset[str]]:
    """What each contribution must hold; a Gram matrix need not be there for every layer."""
    weights = frozenset(spec.name for spec in outline.weights)
    wanted: dict[Kind, frozenset[str]] = {}
    if recipe.rule.name != BASE_RULE:
        wanted["vector"] = weights
    if "fisher" in recipe.rule.needs:
        wanted["fisher"] = weights
    if recipe.restoration.mode == "bn-pooled":
        wanted["statistics"] = frozenset(spec.name for spec in outline.specs if spec.statistic)
    if recipe.head is not None:
        wanted["head"] = frozenset({"count", "first", "second"})
    return wanted


def _check_values(spec: Spec, tensor: Tensor) -> None:
    if tensor.numel() == 0:
        return
    least, largest = (float(value) for value in torch.aminmax(tensor))
    if not (math.isfinite(least) and math.isfinite(largest)):
        raise ContributionError(
            f"{spec.name} is not finite after merging: a vector holds NaN or values too large for {spec.dtype}. "
            "See the admission report for vectors of unusual norm."
        )
    if spec.statistic and spec.name.endswith("running_var") and least <= 0:
        raise ContributionError(
            f"{spec.name} is not above zero ({least:g}): with this variance the network cannot compute. Choose "
            "restoration: bn-pooled or bn-recal, or publish a base whose running variances are above zero."
        )


def _named(source: Source) -> str:
    return f"contribution {source.digest[:12]} of site {source.site!r}"
