"""One cell of the FedSSG benchmark: a scenario, a number of rounds, a method with its settings, and a seed.

Scenarios: ``skin``, HAM10000 by its four real sources; ``skin-cut``, the same with three rare diagnoses cut to a
quarter of their training lesions; ``without-<source>``, trained on three sources and judged on all images of the
fourth; ``phantom``, made-up lesions with the class x centre table of Fed-ISIC2019 divided by ten.
"""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from cell_runs import Cell, Json, close_cell, finished_cell, train_cell
from natural_start import save_natural_start

from polyclinic.data.dataset import SiteData
from polyclinic.data.manifest import collect
from polyclinic.evaluation.inference import probabilities
from polyclinic.evaluation.predictions import Predictions, write_predictions
from polyclinic.models.registry import start_model
from polyclinic.models.weights import load_tensors, read_tensors
from polyclinic.runner import load_sites
from polyclinic.seeds import generator
from polyclinic.study import Study, validate_study
from polyclinic.tasks import make_task
from polyclinic.yaml_settings import assign

SKIN = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
SOURCES = ("rosendahl", "vidir_modern", "vidir_molemax", "vienna_dias")
DIAGNOSES = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC")
RARE = {"skin": ("akiec", "df", "vasc"), "phantom": ("DF", "VASC")}
CENTRES = {
    "bcn": ("derm-warm", (2279, 3363, 2245, 606, 923, 97, 87, 330)),
    "molemax": ("derm-video", (20, 2977, 2, 0, 96, 23, 45, 0)),
    "modern": ("derm-crisp", (533, 1470, 174, 20, 379, 40, 64, 11)),
    "rosendahl": ("derm-cool", (276, 649, 223, 86, 406, 20, 3, 144)),
    "msk": ("derm-dim", (166, 349, 0, 0, 140, 0, 0, 0)),
    "dias": ("derm-slide", (58, 276, 5, 0, 6, 4, 2, 0)),
}
"""Training images of Fed-ISIC2019 by centre and class (its official split), and the made-up device of each centre."""
SEEN_CELLS = 25
"""Cells of up to so many training images are small."""
CUT = "skin-cut.csv"
"""The table of skin-cut, in the work folder."""
NATURAL = "natural.safetensors"
"""Weights of a start on natural images, in the work folder."""
LOADED = 4
"""Data sets that a process keeps."""
_loaded: dict[str, dict[str, SiteData]] = {}


def kind_of(scenario: str) -> str:
    """``skin`` or ``phantom``."""
    return "phantom" if scenario == "phantom" else "skin"


def study_of(cell: Cell, work: Path, data: Path) -> Study:
    """The study of a cell.

    Args:
        cell: Which.
        work: Folder of the benchmark: the cut table and decoded images lie there.
        data: Folder of the real images.
    """
    raw = recipe(cell)
    for table in raw["data"].get("tables", []):
        if table["path"] == CUT:
            table["path"] = str((work / CUT).resolve())
    if raw["model"].get("weights") == NATURAL:
        raw["model"]["weights"] = str((work / NATURAL).resolve())
    raw["data"]["root"] = str(data.resolve())
    raw["data"]["image"] |= {"cache": "memmap", "cache_folder": str((work / "cache").resolve())}
    return validate_study(raw, cell.key)


def recipe(cell: Cell) -> Json:
    """All settings of a cell but where things lie."""
    raw = _phantom() if cell.scenario == "phantom" else _skin(cell.scenario)
    raw["data"]["image"] |= {"channels": 3, "fit": "crop"}
    raw |= {"name": "fedssg-benchmark", "seed": cell.seed}
    raw["training"] = {"optimizer": "adam", "lr": 0.002, "batch_size": 32, "schedule": "cosine"}
    raw["training"]["augment"] = {"flip": True, "flip_vertical": True}
    raw["method"] = {"name": "fedavg", "rounds": cell.rounds}
    raw["evaluation"] = {"bootstrap": 0, "examples": 0, "every": 10, "select": "best"}
    for key, value in cell.changes:
        assign(raw, key, json.loads(value), f"{cell.arm}, {key}")
    return raw


def _skin(scenario: str) -> Json:
    columns = {"image": "file", "label": "label_name", "patient": "lesion", "site": "domain", "device": "domain"}
    table: Json = {"path": "ham10000_4sites/dev.csv", "images": "ham10000_4sites/dev.zip", "columns": columns}
    if scenario == "skin-cut":
        table["path"] = CUT
    if scenario.startswith("without-"):
        table["where"] = {"domain": [s for s in SOURCES if s != scenario.removeprefix("without-")]}
    data = {"tables": [table], "image": {"size": [32, 32]}, "split": {"fractions": [0.6, 0.15, 0.25], "seed": 0}}
    model = {"name": "small-cnn", "width": 16, "norm": "batch"}
    return {"task": {"classes": list(SKIN), "loss": "cross-entropy"}, "data": data, "model": model}


def _phantom() -> Json:
    sites = []
    for name, (device, row) in CENTRES.items():
        train = {c: max(1, round(n / 10)) if n else 0 for c, n in zip(DIAGNOSES, row, strict=True)}
        counts = {"train": train, "val": {c: round(n / 5) for c, n in train.items()}}
        counts["test"] = dict.fromkeys(DIAGNOSES, 25)
        sites.append({"name": name, "device": device, "counts": counts})
    data = {"phantom": {"kind": "skin-diagnoses", "sites": sites}, "image": {"size": [24, 24]}}
    model = {"name": "small-cnn", "width": 16, "norm": "group"}
    return {"task": {"classes": list(DIAGNOSES), "loss": "cross-entropy"}, "data": data, "model": model}


def prepare(scenarios: Sequence[str], work: Path, data: Path) -> None:
    """Write the cut table and the natural start, decode the images of every scenario, once, before workers start."""
    work.mkdir(parents=True, exist_ok=True)
    plain = Cell("skin", 1, "fedavg", (), 0)
    if "skin-cut" in scenarios and not (work / CUT).is_file():
        write_cut(study_of(plain, work, data), work / CUT)
    save_natural_start(study_of(plain, work, data), work / NATURAL)
    wanted = {*scenarios, *("skin" for s in scenarios if s.startswith("without-"))}
    for scenario in sorted(wanted):
        study = study_of(Cell(scenario, 1, "fedavg", (), 0), work, data)
        load_sites(study, work / "cache", None)


def write_cut(study: Study, path: Path) -> None:
    """The table of a study with its splits, where each source keeps a quarter of the rare diagnoses' training lesions.

    A quarter is rounded up, so that no cell is emptied. Validation and test stay as they are.
    """
    [table] = study.data.tables
    root = Path(study.data.root)
    cases = [case for own in collect(study.data, study.task, root).values() for case in own]
    lesions: dict[tuple[str, str], set[str]] = defaultdict(set)
    for case in cases:
        if case.split == "train" and case.label in RARE["skin"]:
            lesions[case.site, case.label].add(case.patient)
    kept: set[tuple[str, str]] = set()
    for (site, label), names in sorted(lesions.items()):
        order = generator(0, "cut", site, label).permutation(len(names))
        kept |= {(label, sorted(names)[k]) for k in order[: math.ceil(len(names) / 4)]}
    columns = table.columns
    with path.with_suffix(".part").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([columns.image, columns.label, columns.patient, columns.site, "split"])
        for case in cases:
            cut = case.split == "train" and case.label in RARE["skin"] and (case.label, case.patient) not in kept
            if not cut:
                writer.writerow([case.image, case.label, case.patient, case.site, case.split])
    path.with_suffix(".part").replace(path)


def sites_of(study: Study, work: Path) -> dict[str, SiteData]:
    """The sites of a study, decoded once in a process; those of a few studies are kept."""
    key = study.data.model_dump_json()
    if key not in _loaded:
        while len(_loaded) >= LOADED:
            del _loaded[next(iter(_loaded))]
        _loaded[key] = load_sites(study, work / "cache", None)
    return _loaded[key]


def measure(cell: Cell, work: Path, data: Path) -> Json:
    """Train and test a cell whose folder is not finished; what its ``cell.json`` holds."""
    study = study_of(cell, work, data)
    about = train_cell(study, work / cell.key, lambda: sites_of(study, work))
    if cell.scenario.startswith("without-"):
        judge_elsewhere(cell, study, work, data)
    return close_cell(work / cell.key, {"arm": cell.arm, "recipe": recipe(cell), **about})


def finished(cell: Cell, work: Path) -> Json | None:
    """What ``cell.json`` holds, or None where the cell was not measured, or with other settings."""
    return finished_cell(work / cell.key, recipe(cell))


def judge_elsewhere(cell: Cell, study: Study, work: Path, data: Path) -> None:
    """Let the global model of a cell look at all images of the source that it was trained without."""
    source = cell.scenario.removeprefix("without-")
    own = sites_of(study_of(Cell("skin", 1, "fedavg", (), 0), work, data), work)[source]
    model = start_model(study)
    load_tensors(model, read_tensors(work / cell.key / "models" / "global.safetensors")[0])
    positions = torch.arange(len(own))
    task = make_task(study.task, study.training)
    said = torch.cat([part for _, part in probabilities(model, own, task, positions, 256)])
    found = Predictions(
        images=[case.image_id for case in own.cases],
        patients=[case.patient for case in own.cases],
        devices=[case.device for case in own.cases],
        splits=["test"] * len(own),
        targets=own.targets.numpy(),
        probabilities=said.double().numpy(),
    )
    write_predictions(work / cell.key / "elsewhere" / f"{source}.csv", found, study.task.classes)


def train_counts(folder: Path) -> Mapping[str, Mapping[str, int]]:
    """Training images by site and class of a finished run."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return {site: entry["labels"]["train"] for site, entry in metrics["sites"].items()}
