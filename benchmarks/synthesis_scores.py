"""From a finished cell of the FedSSG benchmark to its metrics on the pooled test images, with patient replicates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from synthesis_cells import RARE, SEEN_CELLS, Cell, kind_of

from polyclinic.evaluation.bootstrap import patient_weights
from polyclinic.evaluation.classification import classification_metrics
from polyclinic.evaluation.predictions import read_predictions
from polyclinic.evaluation.summary import SiteResult

METRICS = {
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "rare": "rare classes",
    "worst": "worst device",
    "unseen": "cells without images",
    "few": f"cells of 1 to {SEEN_CELLS}",
    "many": f"cells of more than {SEEN_CELLS}",
    "auroc": "AUROC",
}
"""What is measured on the test images of all devices together. A cell is a class on a device; its number of images is
that in training."""
ALL = "all"
"""The place of metrics that are over all devices."""


@dataclass(frozen=True)
class Answers:
    """What a model said of all test images.

    Attributes:
        targets: Class of each image, int64 ``[n]``.
        probabilities: float64 ``[n, classes]``.
        devices: Place of its device in ``names``, int64 ``[n]``.
        names: Of the devices.
        weights: How often each image counts in each replicate, ``[B, n]``: patients are drawn device by device.
    """

    targets: np.ndarray
    probabilities: np.ndarray
    devices: np.ndarray
    names: list[str]
    weights: np.ndarray


def read_answers(folder: Path, replicates: int) -> Answers:
    """The test predictions in a folder of ``<device>.csv``, with replicates."""
    paths = sorted(folder.glob("*.csv"))
    classes = [name.removeprefix("p_") for name in paths[0].read_text("utf-8").split("\n", 1)[0].split(",")[5:]]
    parts = [read_predictions(path, classes, "multi-class").of_split("test") for path in paths]
    weights = [patient_weights(p.patients, replicates, path.stem) for p, path in zip(parts, paths, strict=True)]
    return Answers(
        np.concatenate([np.asarray(part.targets) for part in parts]),
        np.concatenate([np.asarray(part.probabilities) for part in parts]),
        np.concatenate([np.full(len(part.images), k) for k, part in enumerate(parts)]),
        [path.stem for path in paths],
        np.concatenate(weights, axis=1),
    )


def confusion(answers: Answers, weights: np.ndarray) -> np.ndarray:
    """Weighted numbers of images by device, class and answer: ``[B, devices, classes, classes]``."""
    classes, devices = answers.probabilities.shape[1], len(answers.names)
    said = answers.probabilities.argmax(1)
    place = (answers.devices * classes + answers.targets) * classes + said
    spread = np.zeros((len(place), devices * classes * classes), dtype=np.float32)
    spread[np.arange(len(place)), place] = 1
    found = weights.astype(np.float32) @ spread
    return found.reshape(len(weights), devices, classes, classes).astype(np.float64)


def scores(counts: np.ndarray, trained: np.ndarray, rare: Sequence[int]) -> dict[str, np.ndarray]:
    """Metrics from confusion counts.

    * ``balanced_accuracy``: mean recall of the classes, each over all devices; ``rare``: of the rare ones.
    * ``macro_f1``: mean of the classes' 2 TP / (2 TP + FP + FN); a class that has no test image is left out.
    * ``worst``: smallest balanced accuracy of a device, over the classes that it has test images of.
    * ``unseen``, ``few``, ``many``: mean recall of the cells (class on device) by their number of training images.
    * ``device <k>``: balanced accuracy of a device.

    Args:
        counts: ``[B, devices, classes, classes]``: device, class, answer.
        trained: Training images, int64 ``[classes, devices]``.
        rare: Places of the rare classes.

    Returns:
        float64 ``[B]`` each; NaN where no test image defines it.
    """
    right = np.einsum("bdcc->bdc", counts)
    held = counts.sum(3)
    cells = _ratio(right, held)
    recall = _ratio(right.sum(1), held.sum(1))
    answered = counts.sum((1, 2))
    f1 = _ratio(2 * right.sum(1), held.sum(1) + answered)
    f1[held.sum(1) == 0] = np.nan
    devices = _mean(cells, 2)
    size = trained.T[None]
    found = {
        "balanced_accuracy": _mean(recall, 1),
        "macro_f1": _mean(f1, 1),
        "rare": _mean(recall[:, list(rare)], 1),
        "worst": np.where(np.isnan(devices).all(1), np.nan, _filled(devices).min(1)),
    }
    for name, chosen in (
        ("unseen", size == 0),
        ("few", (size > 0) & (size <= SEEN_CELLS)),
        ("many", size > SEEN_CELLS),
    ):
        found[name] = _mean(np.where(chosen, cells, np.nan).reshape(len(counts), -1), 1)
    return found | {f"device {k}": devices[:, k] for k in range(devices.shape[1])}


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def _filled(values: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(values), np.inf, values)


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    there = ~np.isnan(values)
    return _ratio(np.where(there, values, 0).sum(axis), there.sum(axis).astype(np.float64))


def judged(cell: Cell, work: Path, replicates: int) -> dict[str, SiteResult]:
    """Metrics of a finished cell: under ``all``, and the balanced accuracy of each device under its name.

    The worst device of a replicate is worse than that of the images on average: its replicates are shifted to have
    the value as their mean, as everywhere in this package.
    """
    folder = work / cell.key
    elsewhere = cell.scenario.startswith("without-")
    answers = read_answers(folder / ("elsewhere" if elsewhere else "predictions"), replicates)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    classes = metrics["classes"]
    trained = np.zeros((len(classes), len(answers.names)), dtype=np.int64)
    for place, name in enumerate(answers.names):
        held = metrics["sites"].get(name, {"labels": {"train": {}}})["labels"]["train"]
        trained[:, place] = [held.get(label, 0) for label in classes]
    rare = [classes.index(name) for name in RARE[kind_of(cell.scenario)]]
    value = scores(confusion(answers, np.ones((1, len(answers.targets)))), trained, rare)
    spread = scores(confusion(answers, answers.weights), trained, rare)
    spread["worst"] = spread["worst"] - np.nanmean(spread["worst"]) + value["worst"][0]
    found = {ALL: _result({name: value[name] for name in METRICS if name in value}, spread)}
    auroc = classification_metrics(answers.targets, answers.probabilities, False)["auroc"]
    found[ALL].metrics["auroc"] = auroc
    found[ALL].replicates["auroc"] = np.full(replicates, np.nan)
    for place, name in enumerate(answers.names):
        key = f"device {place}"
        found[name] = SiteResult(
            {"balanced_accuracy": float(value[key][0])}, replicates={"balanced_accuracy": spread[key]}
        )
    return found


def _result(value: Mapping[str, np.ndarray], spread: Mapping[str, np.ndarray]) -> SiteResult:
    return SiteResult(
        {name: float(values[0]) for name, values in value.items()}, replicates={n: spread[n] for n in value}
    )


def costs(cell: Cell, work: Path) -> dict[str, Any] | None:
    """Processor seconds of all sites together and bytes of a finished cell; None where it was resumed.

    Sites are timed by the clock. Where the process had less than a whole core, seconds are cut to its share.
    """
    folder = work / cell.key
    about = json.loads((folder / "cell.json").read_text(encoding="utf-8"))
    if about["resumed"]:
        return None
    share = min(1.0, about["seconds"]["processor"] / about["seconds"]["wall"])
    lines = (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    rounds = sum(entry["seconds"] for line in lines for entry in json.loads(line)["sites"].values())
    exchange, told = 0.0, folder / "synthesis.json"
    ops: dict[str, float] = {}
    if told.is_file():
        by_op = json.loads(told.read_text(encoding="utf-8"))["seconds"]
        ops = {op: share * sum(sites.values()) for op, sites in by_op.items()}
        exchange = sum(ops.values())
    moved = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["bytes"]
    return {
        "sites": share * rounds + exchange,
        "exchange": exchange,
        "ops": ops,
        "server": max(0.0, about["seconds"]["processor"] - share * rounds - exchange),
        "up": sum(part["up"] for part in moved.values()),
        "down": sum(part["down"] for part in moved.values()),
    }
