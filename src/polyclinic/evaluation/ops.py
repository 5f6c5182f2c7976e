"""How every method is judged, over the same channel: sites judge, the server hears numbers.

``evaluate`` measures the deployed model on validation images after a round, ``keep`` makes a site remember it as the
best so far, and ``test`` reports on the test images, once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from polyclinic.errors import SiteError
from polyclinic.evaluation.central import central_ops
from polyclinic.evaluation.classification import classification_metrics
from polyclinic.evaluation.inference import (
    chosen_threshold,
    distance_unit,
    example_pictures,
    predict_cases,
    validation_dice,
)
from polyclinic.evaluation.names import AUTO_METRIC, lower_is_better
from polyclinic.evaluation.notes import NO_FOREGROUND
from polyclinic.evaluation.predictions import Predictions, write_predictions
from polyclinic.evaluation.replies import REPORT, packed, unpacked
from polyclinic.evaluation.summary import SiteResult, site_result
from polyclinic.federation.message import Message
from polyclinic.federation.site import Leaf, Op, Site
from polyclinic.models.weights import save_tensors
from polyclinic.results import RunFolder
from polyclinic.seeds import generator
from polyclinic.tasks.segmentation import Segmentation

if TYPE_CHECKING:
    from polyclinic.data.dataset import SiteData
    from polyclinic.federation.channel import Channel
    from polyclinic.federation.state import ServerState
    from polyclinic.methods.base import Method
    from polyclinic.study import Study
    from polyclinic.tasks import Task


def evaluation_ops(method: Method) -> dict[str, Op]:
    """The site's side for this method."""

    def evaluate(site: Site, message: Message) -> Message:
        if len(site.data.splits["val"]) == 0:
            return Message()
        method.deploy(site, message)
        if method.personal:
            site.state.save("candidate", site.tensors)
        found = validation_metrics(site.model, site.data, site.task, site.study)
        return Message(scalars={f"val/{name}": value for name, value in found.items()})

    def keep(site: Site, message: Message) -> Message:
        if not site.state.saved("candidate"):
            method.deploy(site, message)
            site.state.save("candidate", site.tensors)
        site.state.promote("candidate", "chosen")
        return Message()

    def test(site: Site, message: Message) -> Message:
        if method.personal:
            kept = site.state.load("chosen")
            if kept is None:
                raise SiteError(f"site {site.name!r} kept no model: it was absent when a round was chosen.")
            site.load(kept[0])
            save_tensors(_made(site, "models") / f"{site.name}.safetensors", site.tensors)
        else:
            method.deploy(site, message)
        return _test(site)

    masks = (Leaf("threshold", "scalar", "images"), Leaf("distance_unit", "scalar", "nothing"))
    metrics = (Leaf("val/*", "scalar", "images"),)
    report = (*REPORT, *(masks if method.study.task.kind == "segmentation" else ()))
    judging = {"evaluate": Op(evaluate, metrics), "keep": Op(keep, ()), "test": Op(test, report)}
    return {**judging, **central_ops(method)}


def validate(method: Method, channel: Channel, state: ServerState) -> dict[str, dict[str, float]]:
    """Metrics of the deployed model on each site's validation images; sites without any are left out."""
    message = method.deployment(state)
    found = {}
    for site, reply in channel.stream("evaluate", dict.fromkeys(channel.sites, message)):
        metrics = {name.removeprefix("val/"): float(value) for name, value in reply.scalars.items()}
        if metrics:
            found[site] = metrics
    return found


def choose(method: Method, channel: Channel, state: ServerState, found: Mapping[str, Mapping[str, float]]) -> None:
    """Keep this round's model if it is the best so far, or if the study keeps the last.

    As long as the metric was not defined at any site, the newest model counts as the best.
    """
    score = mean_score(method.study, found.values())
    best = state.scalars.get("best_score")
    number = channel.round
    better = best is None or (score is not None and score > float(best))
    if method.study.evaluation.select == "best" and not better and "chosen_round" in state.scalars:
        return
    if score is not None:
        state.scalars["best_score"] = score
    state.scalars["chosen_round"] = number
    if method.personal:
        channel.call("keep", dict.fromkeys(channel.sites, method.deployment(state)))
    else:
        state.groups["chosen"] = method.deployment(state).group("model")


def mean_score(study: Study, found: Iterable[Mapping[str, float]]) -> float | None:
    """How good validation metrics are by ``evaluation.metric``, larger is better: the mean over sites.

    Args:
        study: Names the metric.
        found: Metrics of each site.

    Returns:
        None where no site could measure it.
    """
    metric = study.evaluation.metric
    if metric == "auto":
        metric = AUTO_METRIC[study.task.kind]
    values = [metrics[metric] for metrics in found if not np.isnan(metrics.get(metric, np.nan))]
    return float(np.mean(values)) * (-1 if lower_is_better(metric) else 1) if values else None


def report_test(method: Method, channel: Channel, state: ServerState) -> dict[str, SiteResult]:
    """Let every site judge the kept model on its test images.

    Raises:
        SiteError: No site answered.
    """
    message = Message.pack({} if method.personal else {"model": state.groups["chosen"]})
    results = {}
    for site, reply in channel.stream("test", dict.fromkeys(channel.sites, message)):
        results[site] = unpacked(reply)
    if not results:
        raise SiteError(f"no site could test the model: {dict(channel.absent)}.")
    return results


def validation_metrics(model: nn.Module, data: SiteData, task: Task, study: Study) -> dict[str, float]:
    """All metrics for classification; Dice for segmentation, where distances would cost too much.

    With ``task.threshold: validation`` it is the Dice at the threshold that does best on these very images: good for
    choosing a round, too good as a promise. Test images are judged at a threshold that they had no part in.
    """
    if not isinstance(task, Segmentation):
        found = predict_cases(model, data, task, ["val"], study.evaluation.batch_size)
        assert isinstance(found, Predictions)
        values = classification_metrics(found.targets, found.probabilities, task.kind == "multi-label")
        return {name: value for name, value in values.items() if not np.isnan(value)}
    return {"dice": float(validation_dice(model, data, task, study).max())}


def _test(site: Site) -> Message:
    settings = site.study.evaluation
    threshold, notes = 0.5, list[str]()
    if isinstance(site.task, Segmentation):
        threshold, notes = chosen_threshold(site.model, site.data, site.task, site.study)
    predictions = predict_cases(site.model, site.data, site.task, ["val", "test"], settings.batch_size, threshold)
    folder = _made(site, "predictions")
    guard = RunFolder(site.folder).guard
    guard(lambda: write_predictions(folder / f"{site.name}.csv", predictions, site.study.task.classes))
    if settings.examples:
        rng = generator(0, "examples", site.name)
        pictures = example_pictures(site.model, site.data, site.task, settings.examples, rng, threshold)
        guard(lambda: np.savez_compressed(folder / f"{site.name}.examples.npz", **pictures))  # type: ignore[arg-type]
    result = site_result(site.name, predictions, site.study.task, settings)
    decided: dict[str, float | str] = {}
    if isinstance(site.task, Segmentation):
        decided = {"threshold": threshold, "distance_unit": distance_unit(site.data)}
        notes += _mask_notes(site.data)
    return packed(result, notes, **decided)


def _mask_notes(data: SiteData) -> list[str]:
    notes = []
    if distance_unit(data) != "mm":
        notes.append("HD95 is in pixels, because not every image has a spacing in millimetres")
    if not data.has_foreground:
        notes.append(NO_FOREGROUND)
    return notes


def _made(site: Site, name: str) -> Path:
    folder = site.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder
