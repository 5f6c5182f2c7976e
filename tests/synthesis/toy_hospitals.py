"""Hospitals whose images show class and device in plain colours, some of them held out, and a study of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from painted_sites import CLASSES, GROUND, SIDE, painted
from toys import toy_study

from polyclinic.data.dataset import SiteData
from polyclinic.data.manifest import Case
from polyclinic.results import RunFolder
from polyclinic.runner import Run, Silent
from polyclinic.study import Study

Owned = Mapping[tuple[str, str], int]
OWNED: dict[str, Owned] = {
    "north": {("a", "bright"): 10, ("b", "bright"): 8},
    "south": {("a", "dark"): 12},
    "west": {("a", "bright"): 6, ("a", "dark"): 6},
}
"""Training patients by class and device: nobody owns class b on the dark device."""
HELD = 6
"""Validation patients, and test patients, of each cell."""
VAE = {"name": "vae", "size": 16, "latent": 4, "rounds": 2, "epochs": 1, "batch_size": 16}
OPEN = {"dcr_ratio": 0.0, "closer": 1.0, "nndr_gap": 1.0, "membership_auc": 1.0, "membership_tpr": 1.0}
"""A gate that refuses nothing but copies."""
NOTHING = {"generator": [], "style": 0.0}
"""Synthesis that changes nothing."""


def hospital(site: str, owned: Owned, images: int = 1, held: int = HELD) -> SiteData:
    """uint8 images: so many of each training patient, one of each other."""
    draw = torch.Generator().manual_seed(sum(map(ord, site)))
    cases, pixels, labels = [], [torch.zeros(0, 3, SIDE, SIDE)], []
    for (label, device), patients in owned.items():
        for split, count, each in (("train", patients, images), ("val", held, 1), ("test", held, 1)):
            for k in range(count * each):
                who = f"{site}-{label}-{device}-{split}-{k // each}"
                cases.append(Case(f"{who}-{k}.png", who, site, device=device, label=label, split=split))
                labels.append(CLASSES.index(label))
            pixels.append(painted(label, device if device in GROUND else "bright", count * each, draw))
    splits = {
        part: torch.tensor([i for i, case in enumerate(cases) if case.split == part], dtype=torch.int64)
        for part in ("train", "val", "test")
    }
    stored = (torch.cat(pixels) * 255).round().to(torch.uint8)
    return SiteData(site, cases, stored, torch.tensor(labels, dtype=torch.int64), splits)


def hospitals(owned: Mapping[str, Owned] | None = None) -> dict[str, SiteData]:
    """One for each entry of ``OWNED``, or those given."""
    return {site: hospital(site, own) for site, own in (owned or OWNED).items()}


def hospital_study(method: str | dict[str, Any] = "fedavg", **sections: Any) -> Study:
    """A small convolutional network on 16 pixels, batches of 8, two rounds, unless ``sections`` say otherwise."""
    given = {"name": method} if isinstance(method, str) else method
    ours: dict[str, Any] = {
        "data": {"image": {"size": [SIDE, SIDE], "channels": 3}},
        "model": {"name": "small-cnn", "width": 4},
        "training": {"lr": 0.05, "batch_size": 8},
    }
    for name, section in sections.items():
        merge = isinstance(section, dict) and name in ours
        ours[name] = {**ours[name], **section} if merge else section
    return toy_study({"rounds": 2, **given}, **ours)


def started(study: Study, folder: Path, data: Mapping[str, SiteData] | None = None) -> Run:
    """A run that has not begun, or goes on where the folder's was."""
    opened = RunFolder(folder)
    if not (folder / "study.yaml").exists():
        opened.create(study)
    return Run(study, data or hospitals(), opened, Silent())
