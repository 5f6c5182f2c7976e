"""Reading a results folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from polyclinic.errors import RunError
from polyclinic.evaluation.predictions import CaseScores, Predictions, read_predictions

Json = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What one finished run left behind."""

    folder: Path
    study: Json
    environment: Json
    rounds: list[Json]
    metrics: Json
    privacy: Json
    """Empty where the run wrote none."""
    predictions: dict[str, Predictions | CaseScores]
    """By site."""
    examples: dict[str, dict[str, np.ndarray]]
    """By site; empty where the study keeps images out of the folder."""
    synthesis: Json
    """What an exchange of synthetic samples did; empty where there was none."""
    samples: dict[str, np.ndarray]
    """Some of the released samples; empty as ``examples``."""
    transfer: Json = field(default_factory=dict)
    """What sites and a central model learnt from each other: ``central``, and ``sites`` by name; else empty."""

    @classmethod
    def read(cls, folder: Path, details: bool = True) -> Run:
        """Read a run folder; without ``details`` predictions and pictures are left unread.

        Raises:
            RunError: Names the file that is missing or damaged.
        """
        metrics = read_json(folder / "metrics.json")
        predictions: dict[str, Predictions | CaseScores] = {}
        examples: dict[str, dict[str, np.ndarray]] = {}
        for site in metrics["sites"] if details else ():
            path = folder / "predictions" / f"{site}.csv"
            predictions[site] = read_predictions(path, metrics["classes"], metrics["task"])
            pictures = path.with_suffix(".examples.npz")
            if pictures.is_file():
                examples[site] = _read_arrays(pictures)
        privacy, synthesis = folder / "privacy.json", folder / "synthesis.json"
        samples = folder / "synthesis" / "examples.npz"
        return cls(
            folder=folder,
            study=read_yaml(folder / "study.yaml"),
            environment=read_json(folder / "environment.json"),
            rounds=_read_lines(folder / "rounds.jsonl"),
            metrics=metrics,
            privacy=read_json(privacy) if privacy.is_file() else {},
            predictions=predictions,
            examples=examples,
            synthesis=read_json(synthesis) if synthesis.is_file() else {},
            samples=_read_arrays(samples) if details and samples.is_file() else {},
            transfer=_read_transfer(folder),
        )

    @property
    def sites(self) -> list[str]:
        """Names of the sites that were tested."""
        return list(self.metrics["sites"])


@dataclass(frozen=True)
class Comparison:
    """What a finished comparison left behind."""

    folder: Path
    study: Json
    environment: Json
    metrics: Json
    runs: dict[str, list[Run]]
    """By method, in the order of the seeds; predictions and pictures of the first seed alone."""

    @classmethod
    def read(cls, folder: Path) -> Comparison:
        """Read a comparison folder and the records of its runs.

        Raises:
            RunError: Names the file that is missing or damaged.
        """
        metrics = read_json(folder / "metrics.json")
        runs = {
            method: [
                Run.read(folder / "runs" / f"{method}-seed{seed}", details=seed == metrics["seeds"][0])
                for seed in metrics["seeds"]
            ]
            for method in metrics["methods"]
        }
        environment = folder / "environment.json"
        return cls(
            folder=folder,
            study=read_yaml(folder / "study.yaml"),
            environment=read_json(environment) if environment.is_file() else next(iter(runs.values()))[0].environment,
            metrics=metrics,
            runs=runs,
        )


def _read_transfer(folder: Path) -> Json:
    central = folder / "transfer.json"
    if not central.is_file():
        return {}
    sites = {path.stem: read_json(path) for path in sorted((folder / "transfer").glob("*.json"))}
    return {"central": read_json(central), "sites": sites}


def read_json(path: Path) -> Json:
    """A JSON object; RunError names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read: {error}. Is the run finished?") from error
    if not isinstance(value, dict):
        raise RunError(f"{path}: holds {type(value).__name__}, wanted a JSON object")
    return value


def read_yaml(path: Path) -> Json:
    """A YAML mapping; RunError names the file."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise RunError(f"{path}: holds {type(value).__name__}, wanted a mapping")
    return value


def _read_lines(path: Path) -> list[Json]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error}") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise RunError(f"{path} line {number}: is no JSON: {error}") from error
    return records


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from error
