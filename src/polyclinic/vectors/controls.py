"""The table that every merged model comes with: is it the vectors that helped?

Beside the merged model stand the base alone with the same restoration, single sites with the same restoration, vectors
of noise and shuffled vectors merged by the same rule, and the ensemble of all sites' models. If one of the first two
explains the gain, the vectors did nothing. Validation images choose the best single site, test images only report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from polyclinic.evaluation.predictions import Predictions
from polyclinic.evaluation.summary import SiteResult, summarise
from polyclinic.runner import Observer, Silent
from polyclinic.vectors.base import Base
from polyclinic.vectors.coordinator import NAME, Coordinator, ensemble
from polyclinic.vectors.filters.controls import RandomControl, ShuffledControl
from polyclinic.vectors.merge import JudgeModel, merge
from polyclinic.vectors.recipe import Recipe
from polyclinic.vectors.restoration import Restoration
from polyclinic.vectors.rules.data_vector import DataVector
from polyclinic.vectors.sources import Source

State = dict[str, Tensor]
Row = dict[str, Any]
"""``name``; ``metrics``: value, low, high and n by metric; ``images`` and ``patients`` of the test split."""


def merged_state(base: Base, sources: Sequence[Source], recipe: Recipe, coordinator: Coordinator | None) -> State:
    """A merge in memory, before restoration on images; candidates are judged after a restoration of their own."""
    state: State = {}
    merge(base.outline, base, sources, recipe, state.__setitem__, judge=judge_of(coordinator, recipe))
    return state


def judge_of(coordinator: Coordinator | None, recipe: Recipe) -> JudgeModel | None:
    """How candidates are compared: on the coordinator's validation images, after a cheap restoration or none."""
    if coordinator is None:
        return None
    restoration = recipe.restoration if recipe.restoration.mode == "bn-recal" else Restoration()
    return lambda candidate: coordinator.score(coordinator.restored(candidate, restoration))


def control_table(
    base: Base,
    sources: Sequence[Source],
    recipe: Recipe,
    coordinator: Coordinator,
    merged: Mapping[str, State],
    observer: Observer | None = None,
) -> list[Row]:
    """Judge the base, single sites, controls and merged models on the coordinator's test images.

    Args:
        base: What all vectors start from.
        sources: The contributions that were merged.
        recipe: How.
        coordinator: Restores and judges.
        merged: Finished models by the name that the table gives them.
        observer: Told of progress.

    Returns:
        A row a model: controls first, merged models last.
    """
    # A head that was solved on the base needs no vectors, and what was sent for it has none.
    sources = [one for one in sources if one.names("vector")] if recipe.rule.name != "base" else []
    restores = 1 + recipe.restoration.needs_images
    models = restores * (1 + len(sources)) + 2 * bool(sources) + len(merged)
    judged = _Judged(coordinator, observer or Silent(), models)
    judged.add("base", _tensors(base))
    restored = ", restored" if recipe.restoration.needs_images else ""
    if restored:
        judged.add("base, restored", coordinator.restored(_tensors(base), recipe.restoration))
    if sources:
        _single_sites(judged, base, sources, recipe)
        for title, noise in {"random": RandomControl(), "shuffled": ShuffledControl()}.items():
            noisy = recipe.model_copy(update={"filters": [noise, *recipe.filters]})
            state = merged_state(base, sources, noisy, coordinator)
            judged.add(f"{title} vectors{restored}", coordinator.restored(state, recipe.restoration))
    for name, state in merged.items():
        judged.add(name, state)
    return judged.rows()


def _single_sites(judged: _Judged, base: Base, sources: Sequence[Source], recipe: Recipe) -> None:
    """Each site's own model, with its own running statistics where it sent them."""
    coordinator, restores = judged.coordinator, recipe.restoration.needs_images
    names, finished, scores = [], [], []
    for source in sources:
        own = Restoration(mode="bn-pooled") if source.names("statistics") else Restoration()
        alone = Recipe(rule=DataVector(coefficients="mean"), restoration=own)
        state = merged_state(base, [source], alone, None)
        names.append(judged.add(f"site {source.site}", state))
        after = coordinator.restored(state, recipe.restoration) if restores else state
        finished.append(judged.add(f"site {source.site}, restored", after) if restores else names[-1])
        scores.append(coordinator.score(after) if len(coordinator.data.splits["val"]) else 0.0)
    judged.average("one site, mean", names)
    if restores:
        judged.average("one site restored, mean", finished)
    title = "one site restored" if restores else "one site"
    judged.average(f"{title}, best on validation", [finished[int(np.argmax(scores))]])
    if all(isinstance(judged.said[name], Predictions) for name in names):
        parts = [part for name in finished if isinstance(part := judged.said[name], Predictions)]
        judged.take(f"ensemble of the {'restored ' * restores}sites", coordinator.report(ensemble(parts)))


def _tensors(base: Base) -> State:
    return {spec.name: base.read(spec.name) for spec in base.outline.specs}


class _Judged:
    """Models by name, and how they did."""

    def __init__(self, coordinator: Coordinator, observer: Observer, models: int) -> None:
        self.coordinator, self._observer, self._models = coordinator, observer, models
        self.said: dict[str, Any] = {}
        self.results: dict[str, SiteResult] = {}

    def add(self, name: str, state: Mapping[str, Tensor]) -> str:
        self.said[name] = self.coordinator.predictions(state)
        self._observer.working("models judged", len(self.said), self._models)
        self.results[name] = self.coordinator.report(self.said[name])
        return name

    def take(self, name: str, result: SiteResult) -> None:
        self.results[name] = result

    def average(self, name: str, members: Sequence[str]) -> None:
        """The mean of several models' figures, replicate by replicate."""
        results = [self.results[member] for member in members]
        metrics = {m: float(np.mean([r.metrics[m] for r in results])) for m in results[0].metrics}
        replicates = {m: np.mean([r.replicates[m] for r in results], axis=0) for m in results[0].replicates}
        first = results[0]
        self.results[name] = SiteResult(metrics, [], replicates, first.images, first.patients)

    def rows(self) -> list[Row]:
        rows = []
        for name, result in self.results.items():
            cells = summarise({NAME: result}, self.coordinator.study.evaluation.confidence)["sites"][NAME]
            rows.append({"name": name, "images": result.images, "patients": result.patients, "metrics": cells})
        return rows
