"""A made-up exchange of samples in a made-up run: phantoms as images, counts of a table, a plan, a gate's rows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from made_up_folders import make_run

from polyclinic.data.phantoms import phantom_cases, phantom_picture
from polyclinic.study import PhantomSettings, TaskSettings
from polyclinic.synthesis.plan import water_filling
from polyclinic.synthesis.settings import SynthesisSettings

CLASSES = ["nevus", "melanoma", "keratosis"]
DEVICES = ["molemax", "dermatoscope b", "dias scan", "phone"]
PATIENTS = np.array([[120, 64, 31, 9], [22, 30, 0, 6], [9, 0, 7, 0]])
SETTINGS = SynthesisSettings.model_validate({"generator": [{"name": "vae"}]})
RELEASED_OF_FIVE = 4
"""Of five wanted samples."""


def make_exchange_run(folder: Path, side: int = 48, **options: Any) -> Path:
    """Write a run folder with an exchange of samples; ``options`` are those of ``make_run``."""
    make_run(folder, **{"classes": CLASSES, **options})
    return add_exchange(folder, side)


def add_exchange(folder: Path, side: int = 48, devices: list[str] = DEVICES, patients: np.ndarray = PATIENTS) -> Path:
    """Give a run folder an exchange; ``side``: of real images in pixels, ``patients``: ``[classes, devices]``."""
    study = yaml.safe_load((folder / "study.yaml").read_text())
    metrics = json.loads((folder / "metrics.json").read_text())
    study["synthesis"] = SETTINGS.model_dump(mode="json")
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    found = _record(metrics["classes"], devices, patients, list(metrics["sites"]))
    (folder / "synthesis.json").write_text(json.dumps(found, allow_nan=False))
    metrics["bytes"] |= found["bytes"]
    (folder / "metrics.json").write_text(json.dumps(metrics, allow_nan=False))
    _write_pictures(folder, found, side)
    return folder


def _record(classes: list[str], devices: list[str], patients: np.ndarray, sites: list[str]) -> dict[str, Any]:
    images, budget = 2 * patients, int(0.3 * 2 * patients.sum())
    plan = water_filling(patients, budget, cap=4, floor=5, borrow=0.5)
    released = plan.wanted * RELEASED_OF_FIVE // 5
    made = 2 * int(plan.wanted.sum())
    dropped = {"unlikely": made // 9, "far": made // 60, "duplicate": 0}
    left = made - sum(dropped.values())
    phases = {"count": 0.2, "fit-vae": 41.5, "sum-features": 1.1, "examine": 6.3, "receive": 0.04}
    lengths = dict(zip(phases, (900, 1_320_000, 33_000, 640, 50), strict=True))
    return {
        "settings": SETTINGS.model_dump(mode="json"),
        "generator": ["vae"],
        "classes": classes,
        "devices": devices,
        "floor": 5,
        "epsilon": None,
        "before": {"patients": patients.tolist(), "images": images.tolist()},
        "budget": budget,
        "level": plan.level,
        "limit": plan.limit.tolist(),
        "wanted": plan.wanted.tolist(),
        "released": released.tolist(),
        "quality": {"candidates": made, "dropped": dropped},
        "gate": {site: _gate(k, left, classes, devices) for k, site in enumerate(sites)},
        "taken": {site: {"samples": 60 + 9 * k} for k, site in enumerate(sites[:-1])},
        "absent": {"done": {sites[-1]: "no answer within 30 s"}},
        "fit": {
            "name": "vae",
            "placement": "sites",
            "size": 32,
            "loss": [812.4, 402.1, 310.0],
            "privacy": {"epsilon": 7.93, "noise": 1.2, "delta": 1e-5, "unit": "patient"},
        },
        "notes": ["<keratosis> on phone: nobody owns it"],
        "seconds": {op: {site: s * (1 + 0.1 * k) for k, site in enumerate(sites)} for op, s in phases.items()},
        "bytes": {op: {"up": 4 * n, "down": n} for op, n in lengths.items()},
        "wall_seconds": 230.5,
    }


def _gate(number: int, candidates: int, classes: list[str], devices: list[str]) -> dict[str, Any]:
    rows = []
    for space in ("pixels", "features"):
        cells = [("all", "all"), *((name, "all") for name in classes), *(("all", name) for name in devices)]
        for place, (label, device) in enumerate(cells):
            bad = number == 1 and (space, label) == ("features", classes[-1])
            few = number == 2 and device == devices[-1]
            rows.append(_row(space, label, device, candidates // (1 + place), bad, few))
    refused = {"copy": number, "class": 31 if number == 1 else 0}
    return {"accepted": candidates - sum(refused.values()), "refused": refused, "rows": rows}


def _row(space: str, label: str, device: str, candidates: int, bad: bool, few: bool) -> dict[str, Any]:
    row = {"space": space, "class": label, "device": device, "candidates": candidates, "train": 40, "holdout": 12}
    if few:
        measures = dict.fromkeys(("dcr_ratio", "closer", "closer_low", "closer_high", "nndr", "nndr_holdout"))
        unknown = {"copies": 0, "auc": None, "tpr": None, "fpr": None, "passed": None}
        return {**row, **measures, **unknown, "why": "2 held-out patients, 5 are needed"}
    closer = 0.71 if bad else 0.512
    measures = {"dcr_ratio": 0.83 if bad else 1.012, "closer": closer, "closer_low": closer - 0.06}
    measures |= {"closer_high": closer + 0.06, "nndr": 0.81, "nndr_holdout": 0.79, "auc": 0.6 if bad else 0.507}
    why = "closer to training 0.710, at most 0.6; distance ratio 0.830, at least 0.95" if bad else ""
    return {**row, **measures, "copies": 0, "tpr": 0.02, "fpr": 0.01, "passed": not bad, "why": why}


def _write_pictures(folder: Path, found: dict[str, Any], side: int) -> None:
    """Phantoms of skin: sharp ones for the sites' examples, coarse ones of another seed for the samples."""
    rng = np.random.default_rng(5)
    for path in sorted((folder / "predictions").glob("*.examples.npz")):
        with np.load(path) as arrays:
            kept = dict(arrays)
        kept["images"] = _phantoms(int(rng.integers(1 << 30)), kept["targets"], side)
        np.savez_compressed(path, **kept)
    labels, places = (np.repeat(part, 2) for part in np.nonzero(np.array(found["released"])))
    coarse = _phantoms(7, labels, side // 2)
    (folder / "synthesis").mkdir()
    arrays = {"images": coarse, "labels": labels.astype(np.int64), "devices": places.astype(np.int64)}
    np.savez_compressed(folder / "synthesis" / "examples.npz", **arrays)


def _phantoms(seed: int, labels: np.ndarray, side: int) -> np.ndarray:
    """A picture of each label's class (of the three that there are), uint8 ``[n, 3, side, side]``."""
    settings = PhantomSettings.model_validate(
        {"kind": "skin-lesion", "seed": seed, "sites": [{"name": "made", "patients": 40}]}
    )
    cases = phantom_cases(settings, TaskSettings(kind="multi-class", classes=CLASSES))
    by_class = {name: [case for case in cases if name in case.labels] for name in CLASSES}
    used = dict.fromkeys(CLASSES, 0)
    pictures = []
    for label in labels.tolist():
        name = CLASSES[label % len(CLASSES)]
        case = by_class[name][used[name] % len(by_class[name])]
        used[name] += 1
        pictures.append(phantom_picture(settings, case, (side, side))[0])
    return np.stack(pictures)
