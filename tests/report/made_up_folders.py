"""Made-up results folders: numbers and pictures that no network has seen."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from polyclinic.evaluation import (
    CaseScores,
    Predictions,
    differences,
    read_results,
    score_columns,
    site_result,
    summarise,
    table,
    write_predictions,
    write_replicates,
)
from polyclinic.study import EvaluationSettings, TaskSettings

CLASSES = {
    "multi-class": ["normal", "pneumonia", "covid-19"],
    "binary": ["normal", "pneumonia"],
    "multi-label": ["nodule", "effusion", "mass"],
    "segmentation": ["background", "lesion"],
}
OTHERS = ("multi-label", "segmentation")
"""Kinds of task of the small comparisons."""
SITES = ["north", "south", "harbor", "st-anne"]
SETTINGS = EvaluationSettings(bootstrap=100)


def make_run(folder: Path, kind: str = "multi-class", method: str = "fedavg", seed: int = 0, **options: Any) -> Path:
    """Write a run folder; ``options``: ``sites``, ``classes``, ``lift`` (how good), ``one_class`` (site),
    ``rounds``."""
    sites, rounds = options.get("sites", SITES), options.get("rounds", 6)
    task = TaskSettings(kind="multi-class" if kind == "binary" else kind, classes=options.get("classes", CLASSES[kind]))
    rng = np.random.default_rng([seed, *method.encode()])
    folder.mkdir(parents=True)
    results = {}
    for number, site in enumerate(sites):
        only = site == options.get("one_class")
        found = _predictions(number, rng, task, options.get("lift", 1.5) - 0.3 * number, only)
        write_predictions(folder / "predictions" / f"{site}.csv", found, task.classes)
        np.savez_compressed(folder / "predictions" / f"{site}.examples.npz", **_examples(number, rng, task))
        results[site] = site_result(site, found, task, SETTINGS)
        if kind == "segmentation":
            results[site] = replace(results[site], threshold=0.05 * (6 + number), distance_unit="mm")
    write_replicates(folder / "replicates.safetensors", results)
    study = _study(task, method, seed, rounds)
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (folder / "privacy.json").write_text(json.dumps(PRIVACY))
    records = [_record(n, rounds, sites, rng, task.kind) for n in range(1, rounds + 1)]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "metrics.json").write_text(json.dumps(_metrics(study, results, records), allow_nan=False))
    return folder


def make_comparison(folder: Path, kind: str = "multi-class", methods: tuple[str, ...] = (), seeds: int = 2) -> Path:
    """Write a comparison folder of several methods, some better, some worse."""
    methods = methods or ("fedavg", "local", "fedprox", "ditto", "fedavg-ft", "pooled")
    for position, method in enumerate(methods):
        for seed in range(seeds):
            lift = 1.2 + 0.5 * ((position * 2) % 5) / 2
            make_run(folder / "runs" / f"{method}-seed{seed}", kind, method, seed, lift=lift, one_class="harbor")
    runs = {m: {s: read_results(folder / "runs" / f"{m}-seed{s}") for s in range(seeds)} for m in methods}
    first = folder / "runs" / f"{methods[0]}-seed0"
    study = yaml.safe_load((first / "study.yaml").read_text())
    study["compare"] = {"methods": list(methods), "seeds": list(range(seeds))}
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    metrics = {
        "study": "made-up",
        "task": study["task"]["kind"],
        "classes": study["task"]["classes"],
        "methods": list(methods),
        "seeds": list(range(seeds)),
        "baseline": methods[0],
        "missing_controls": [],
        "table": {method: table(several) for method, several in runs.items()},
        "differences": differences(runs, methods[0]) if len(methods) > 1 else [],
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, allow_nan=False))
    return folder


def _predictions(
    number: int, rng: np.random.Generator, task: TaskSettings, lift: float, only: bool
) -> Predictions | CaseScores:
    count, classes = 60 + 20 * number, len(task.classes)
    truth = np.random.default_rng(number)
    images = [f"scan-{i:03d}.png" for i in range(count)]
    head = (
        images,
        [f"p{i // 2}" for i in range(count)],
        ["a"] * count,
        ["val" if i % 5 < 2 else "test" for i in range(count)],
    )
    if task.kind == "segmentation":
        dice = np.clip(rng.beta(6, 2, count) + 0.02 * lift, 0, 1)
        found = np.where(np.arange(count) % 6 == 0, np.nan, (dice > 0.7).astype(float))
        columns = {"dice": dice, "iou": dice / (2 - dice), "hd95": 12 * (1 - dice) + rng.random(count)}
        columns["lesion_sensitivity"] = found
        return CaseScores(*head, scores={n: columns[n.removesuffix("_lesion")] for n in score_columns(task.classes)})
    if task.kind == "multi-label":
        targets = truth.integers(0, 2, (count, classes))
        logits = rng.normal(size=(count, classes)) + lift * (2 * targets - 1)
        return Predictions(*head, targets=targets, probabilities=1 / (1 + np.exp(-logits)))
    targets = np.zeros(count, dtype=int) if only else truth.integers(0, classes, count)
    logits = rng.normal(size=(count, classes)) + lift * np.eye(classes)[targets]
    odds = np.exp(logits)
    return Predictions(*head, targets=targets, probabilities=odds / odds.sum(axis=1, keepdims=True))


def _examples(number: int, rng: np.random.Generator, task: TaskSettings, size: int = 48) -> dict[str, np.ndarray]:
    truth = np.random.default_rng([number, 7])
    grid = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"))
    centers = truth.uniform(size * 0.35, size * 0.65, (4, 2, 1, 1))
    distance = np.sqrt(((grid[None] - centers) ** 2).sum(1))
    glow = 60 + 150 * np.exp(-((distance / (size / 4)) ** 2)) + truth.normal(0, 8, distance.shape)
    found: dict[str, np.ndarray] = {"images": np.clip(glow, 0, 255).astype(np.uint8)[:, None]}
    if task.kind == "segmentation":
        shifted = np.sqrt(((grid[None] - centers - rng.uniform(0, 4)) ** 2).sum(1))
        masks = {"targets": distance < size / 5, "predictions": shifted < size / 5.5}
        return found | {name: mask.astype(np.uint8) for name, mask in masks.items()}
    probabilities = rng.dirichlet(np.ones(len(task.classes)), 4)
    if task.kind == "multi-label":
        decided = (probabilities >= 0.5).astype(np.int64)
        present = truth.integers(0, 2, (4, len(task.classes)))
        return found | {"targets": present, "predictions": decided, "probabilities": probabilities}
    guess = probabilities.argmax(1)
    return found | {
        "targets": truth.integers(0, len(task.classes), 4),
        "predictions": guess,
        "probabilities": probabilities,
    }


def _record(number: int, rounds: int, sites: list[str], rng: np.random.Generator, kind: str) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for position, site in enumerate(sites):
        falling = 1.1 * np.exp(-number / rounds * 2) + 0.08 * position + rng.normal(0, 0.02)
        entries[site] = {"loss": falling, "seconds": 0.6 + 0.1 * position, "bytes_up": 110_000, "bytes_down": 112_000}
        if number % 2 == 0 or number == rounds:
            val = {"loss": falling + 0.1, "balanced_accuracy": 1 - falling / 2, "auroc": 1 - falling / 3}
            entries[site]["val"] = {"dice": 1 - falling / 2} if kind == "segmentation" else val
    absent = {sites[-1]: "no answer within 30 s"} if number == 2 else {}
    moved = {"train": {"up": 440_000, "down": 448_000}, "evaluate": {"up": 900, "down": 448_000}}
    return {"round": number, "seconds": 3.2, "lr": 0.05, "sites": entries, "absent": absent, "bytes": moved}


def _metrics(study: dict[str, Any], results: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    summary = summarise(results)
    counts = {"train": 80, "val": 24}
    classes = study["task"]["classes"]
    return {
        "study": study["name"],
        "method": study["method"]["name"],
        "seed": study["seed"],
        "task": study["task"]["kind"],
        "classes": classes,
        "chosen_round": 4,
        "rounds": len(records),
        "sites": {
            site: {
                "device": ["scanner a"],
                "patients": {**counts, "test": result.patients},
                "images": {**counts, "test": result.images},
                "labels": {split: dict.fromkeys(classes, 7) for split in ("train", "val", "test")},
                "test": summary["sites"][site],
                **result.decided,
                "notes": result.notes,
            }
            for site, result in results.items()
        },
        "mean": summary["mean"],
        "worst": summary["worst"],
        "notes": summary["notes"],
        "bytes": {"train": {"up": 1, "down": 1}, "test": {"up": 30_000, "down": 448_000}},
        "seconds": {"rounds": 19.2},
        "process_peak_rss_mb": 512,
    }


def _study(task: TaskSettings, method: str, seed: int, rounds: int) -> dict[str, Any]:
    return {
        "name": "made-up",
        "description": "Four made-up hospitals with <different> scanners & one class that is rare.",
        "seed": seed,
        "device": "cpu",
        "task": task.model_dump(mode="json"),
        "data": {
            "tables": [],
            "phantom": {"kind": "chest-xray", "seed": 0},
            "image": {"size": [64, 64], "channels": 1},
        },
        "model": {"name": "small-cnn", "norm": "batch"},
        "training": {"optimizer": "sgd", "lr": 0.05, "batch_size": 32, "epochs": 1, "steps": None},
        "method": {"name": method, "rounds": rounds, "participation": 1.0},
        "evaluation": SETTINGS.model_dump(mode="json"),
    }


ENVIRONMENT = {
    "polyclinic": "0.1.0",
    "commit": "0123456789ab",
    "python": "3.11.2",
    "torch": "2.13.0",
    "platform": "Linux-6.1-x86_64",
    "cores": 2,
    "cuda": None,
}
PRIVACY = {
    "aggregation": "plain",
    "leaves": {"train": [{"name": "update", "kind": "sum", "derived_from": "images"}]},
}
