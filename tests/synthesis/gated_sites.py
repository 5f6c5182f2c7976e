"""A made-up hospital with everything that a site's side of the gate needs."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from tiny import TINY, changed

from polyclinic.data.dataset import SiteData
from polyclinic.federation.site import Site, Workbench
from polyclinic.models.registry import start_model
from polyclinic.runner import load_sites
from polyclinic.study import Study, validate_study
from polyclinic.tasks import make_task

CLASSES = ["nevus", "melanoma", "keratosis"]


def gated_study(**synthesis: Any) -> Study:
    """140 patients with skin lesions at one hospital with one device; of keratosis there are fewer than the floor."""
    phantom = {
        "kind": "skin-lesion",
        "sites": [
            {
                "name": "north",
                "patients": 140,
                "device": "bright",
                "prevalence": {"nevus": 0.57, "melanoma": 0.4, "keratosis": 0.03},
            }
        ],
    }
    image = {"size": [16, 16], "channels": 3}
    split = {"fractions": [0.6, 0.3, 0.1]}
    task = {"kind": "multi-class", "classes": CLASSES}
    raw = changed(TINY, {"task": task, "data": {"phantom": phantom, "image": image, "split": split}})
    return validate_study({**raw, "synthesis": synthesis})


@cache
def _data() -> SiteData:
    return load_sites(gated_study(), Path("unused"))["north"]


def gated_site(folder: Path, **synthesis: Any) -> Site:
    """The hospital; ``synthesis`` are settings."""
    study = gated_study(**synthesis)
    bench = Workbench(lambda: start_model(study), "cpu")
    task = make_task(study.task, study.training)
    return Site("north", study, _data(), task, workbench=bench, ops={}, folder=folder)
