"""One cell of the natural-image benchmark: hospitals with X-rays and different networks, a method, and a seed.

Scenarios, each with N training images at every hospital or as many as it has: ``kermany-N``, three hospitals of
children drawn from one, three classes; ``sources-N``, children, adults and intensive care, infection or not;
``findings-N``, three hospitals of adults, seven findings; ``small-N``, two hospitals of children at 28 pixels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cell_runs import Cell, Json, close_cell, finished_cell, train_cell
from natimg_hospitals import CHILDREN, FINDINGS, INFECTION, write_tables
from PIL import Image
from synthesis_cells import sites_of

from polyclinic.data.proxies import make_manifest
from polyclinic.models.registry import head_name, start_model
from polyclinic.models.weights import save_tensors
from polyclinic.runner import load_sites
from polyclinic.seeds import generator
from polyclinic.study import Study, validate_study
from polyclinic.yaml_settings import assign

EMBEDDING = 64
"""Features that enter the last layer, alike in all networks: fedproto, fedtgp, fedgh and lg-fedavg need it."""
NETWORKS: dict[str, Json] = {
    "small-cnn": {"name": "small-cnn", "width": 16},
    "small-resnet": {"name": "small-resnet"},
    "shufflenet": {"name": "shufflenet", "options": {"width": 0.5}},
    "mobilenet": {"name": "mobilenet", "options": {"alpha": 0.25}},
}
CLASSES = {"kermany": CHILDREN, "sources": INFECTION, "findings": FINDINGS, "small": INFECTION}
SITES: dict[str, dict[str, str]] = {
    "kermany": {"east": "small-cnn", "north": "small-resnet", "west": "shufflenet"},
    "sources": {"guangzhou": "small-cnn", "nih": "small-resnet", "hannover": "shufflenet"},
    "findings": {"adults-a": "small-cnn", "adults-b": "small-resnet", "adults-c": "shufflenet"},
    "small": {"east": "small-cnn", "north": "shufflenet"},
}
"""Hospitals and their networks."""
IMAGES = {
    "kermany": "kermany_cxr224/dev.zip",
    "nih": "nih_cxr14_subset224/dev.zip",
    "hannover": "hannover_covid_cxr/dev.zip",
    "pneumoniamnist28": "pneumoniamnist28/dev.npz",
}
SOURCES = {
    "kermany": ("kermany",),
    "sources": ("kermany", "nih", "hannover"),
    "findings": ("nih",),
    "small": ("pneumoniamnist28",),
}
STEPS = {50: 35, 100: 35, 150: 35, 500: 45, 2000: 80}
"""Gradient steps on a hospital's own images in a round, by their number; the same for every method."""
PRETRAIN = 40
"""Passes over the public images that networks start from, where they start pre-trained."""
PROXIES = ("flowers", "things", "scans", "noise")
"""Sets of 1000 labelled public images: flowers; animals and vehicles; scans of other kinds; noise with a class."""
PICTURES = "dev.zip"
"""Where a set has its images."""
NOISE = ("fine", "middle", "coarse", "upright", "flat")


def kind_of(scenario: str) -> str:
    """``kermany``, ``sources``, ``findings`` or ``small``."""
    return scenario.partition("-")[0]


def recipe(cell: Cell) -> Json:
    """All settings of a cell but where things lie."""
    kind, _, size = cell.scenario.partition("-")
    networks = {site: network(name, pretrained=True) for site, name in SITES[kind].items()}
    names = {source: f"{cell.scenario}.{cell.seed}.{source}.csv" for source in SOURCES[kind]}
    tables = [{"path": path, "images": IMAGES[source]} for source, path in names.items()]
    grid = 32 if kind == "small" else 64
    raw: Json = {
        "name": "natimg-benchmark",
        "seed": cell.seed,
        "task": {"kind": "multi-label" if kind == "findings" else "multi-class", "classes": list(CLASSES[kind])},
        "data": {"tables": tables, "image": {"size": [grid, grid], "channels": 1, "fit": "pad"}},
        "model": network("small-resnet", pretrained=True),
        "models": networks,
        "proxies": proxies("flowers"),
        "training": {"optimizer": "adam", "lr": 0.001, "weight_decay": 1e-4, "clip": 5.0},
        "method": {"name": "local", "rounds": cell.rounds},
        "evaluation": {"bootstrap": 300, "examples": 0, "select": "best", "metric": "auroc"},
    }
    raw["training"] |= {"batch_size": 16, "schedule": "cosine"}
    raw["training"] |= {"steps": STEPS[int(size)], "balanced": kind != "findings"}
    raw["training"]["augment"] = {"flip": True, "rotate_degrees": 8.0, "scale": 0.1, "intensity": 0.1}
    for key, value in cell.changes:
        assign(raw, key, json.loads(value), f"{cell.arm}, {key}")
    return raw


def proxies(name: str) -> Json:
    """Settings of a set of public images."""
    return {"manifest": f"{name}.json", "images": name if name == "noise" else f"{name}.zip"}


def network(name: str, *, pretrained: bool = False, **other: Any) -> Json:
    """Settings of a network by its name in ``NETWORKS``, with the same size of features for all."""
    start = {"weights": f"{name}.safetensors"} if pretrained else {}
    return {**NETWORKS[name], "norm": "group", "embedding": EMBEDDING, **start, **other}


def _placed(settings: Json, seed: int, work: Path) -> Json:
    """The same settings with the file of the seed's start weights."""
    if not settings.get("weights"):
        return settings
    return {**settings, "weights": str((work / "starts" / f"{seed}.{settings['weights']}").absolute())}


def study_of(cell: Cell, work: Path, data: Path) -> Study:
    """The study of a cell.

    Args:
        cell: Which.
        work: Folder of the benchmark: tables, public images and decoded images lie there.
        data: Folder of the real images.
    """
    return _resolved(recipe(cell), cell.seed, work, data)


def _resolved(raw: Json, seed: int, work: Path, data: Path) -> Study:
    for table in raw["data"]["tables"]:
        table["path"] = str((work / "tables" / table["path"]).resolve())
    if raw["proxies"]:
        places = {part: work / "proxies" / raw["proxies"][part] for part in ("manifest", "images")}
        raw["proxies"] |= {part: str(path.absolute()) for part, path in places.items()}
    raw["model"] = _placed(raw["model"], seed, work)
    raw["models"] = {site: _placed(own, seed, work) for site, own in raw["models"].items()}
    for part in {"companion", "central"} & set(raw["method"]):
        raw["method"][part] = _placed(raw["method"][part], seed, work)
    raw["data"]["root"] = str(data.resolve())
    raw["data"]["image"] |= {"cache": "memmap", "cache_folder": str((work / "cache").resolve())}
    return validate_study(raw, raw["name"])


def prepare(cells: Sequence[Cell], work: Path, data: Path) -> None:
    """Write tables and manifests and decode the images of every scenario and seed, once, before workers start."""
    (work / "cache").mkdir(parents=True, exist_ok=True)
    for name in PROXIES:
        write_proxies(name, work / "proxies", data)
    for scenario, seed in sorted({(cell.scenario, cell.seed) for cell in cells}):
        if not list((work / "tables").glob(f"{scenario}.{seed}.*.csv")):
            write_tables(scenario, seed, work / "tables", data)
        plain = Cell(scenario, 1, "local", (), seed)
        load_sites(study_of(plain, work, data), work / "cache", None)


def pretrain(job: tuple[str, int], work: Path, data: Path) -> None:
    """Write the weights that a network starts from with a seed, all but those of its last layer, once.

    By the product's own pre-training (``proxies.pretrain``), which would do it again for every cell.
    """
    name, seed = job
    path = work / "starts" / f"{seed}.{name}.safetensors"
    if path.is_file():
        return
    plain = recipe(Cell("kermany-50", 1, "pre-training", (), seed))
    raw = {**plain, "models": {}, "model": network(name), "proxies": {**proxies("flowers"), "pretrain": PRETRAIN}}
    study = _resolved(raw, seed, work, data)
    model = start_model(study)
    path.parent.mkdir(parents=True, exist_ok=True)
    last = f"{head_name(model)}."
    save_tensors(path, {n: t for n, t in model.state_dict().items() if not n.startswith(last)})


def write_proxies(name: str, folder: Path, data: Path, per_class: int | None = None) -> None:
    """Write a manifest of 1000 public images and a link to them (noise is drawn), once."""
    if (folder / f"{name}.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if name == "noise":
        draw_noise(folder / name, per_class or 200)
        make_manifest(folder / name, folder / "noise.json", name=name)
        return
    source, count, classes = {
        "flowers": ("tf_flowers96", 200, ()),
        "things": ("cifar10_jpeg_subset", 100, ()),
        # Its chest X-rays are from the collection of one of the hospitals.
        "scans": ("mednist64", 200, ("AbdomenCT", "BreastMRI", "ChestCT", "Hand", "HeadCT")),
    }[name]
    where = data / source
    link = folder / f"{name}.zip"
    if not link.exists():
        link.symlink_to((where / PICTURES).resolve())
    make_manifest(
        where / PICTURES,
        folder / f"{name}.json",
        name=name,
        labels=where / "dev.csv",
        columns=("file", "label_name"),
        classes=classes,
        per_class=per_class or count,
    )


def draw_noise(folder: Path, per_class: int) -> None:
    """Noise images of 64 x 64 whose class is their spectrum: how coarse it is, or which way its stripes run."""
    rows, columns = np.meshgrid(np.fft.fftfreq(64), np.fft.fftfreq(64), indexing="ij")
    distance = np.hypot(rows, columns) + 1 / 64
    weights = {
        "fine": distance**0.0,
        "middle": distance**-1.0,
        "coarse": distance**-2.0,
        "upright": (np.abs(rows) + 1 / 64) ** -1.5,
        "flat": (np.abs(columns) + 1 / 64) ** -1.5,
    }
    for name in NOISE:
        (folder / name).mkdir(parents=True, exist_ok=True)
        rng = generator(0, "noise", name)
        for number in range(per_class):
            noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal((64, 64))) * weights[name]).real
            noise = 128 + 48 * (noise - noise.mean()) / noise.std()
            Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8)).save(folder / name / f"{number:04d}.png")


def measure(cell: Cell, work: Path, data: Path) -> Json:
    """Train and test a cell whose folder is not finished; what its ``cell.json`` holds."""
    study = study_of(cell, work, data)
    about = train_cell(study, work / cell.key, lambda: sites_of(study, work))
    return close_cell(work / cell.key, {"arm": cell.arm, "recipe": recipe(cell), **about})


def finished(cell: Cell, work: Path) -> Json | None:
    """What ``cell.json`` holds, or None where the cell was not measured, or with other settings."""
    return finished_cell(work / cell.key, recipe(cell))
