"""What travels in a round, measured, beside what it should be by the numbers of parameters, images and classes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cell_runs import Cell
from natimg_arms import LEARNED, PRETRAINED, UNIFORM
from natimg_cells import EMBEDDING, study_of
from tables import Table
from torch import nn

from polyclinic.models.registry import describe, untrained_model
from polyclinic.study import ModelSettings, Study, validate_study
from polyclinic.transfer.teachers import Shape

Json = dict[str, Any]
VECTORS = "A20: pooled vectors travel"
HALF, SINGLE = 2, 4
"""Bytes of a value."""
SHOWN = 500
"""Public images of a round, by default."""
LEARNT = 900
"""Public images of a round of natimg-fl: all but the tenth that judges."""


def reckoned(study: Study, arm: str) -> tuple[float, float] | None:
    """Bytes up and down of all sites in a round, without names and losses; None for methods not reckoned here."""
    sites, classes = list(study.models), len(study.task.classes)
    if arm in (UNIFORM, LEARNED, VECTORS):
        values = _said if arm == VECTORS else _parameters
        up = sum(values(study, study.model_of(site)) for site in sites)
        return HALF * up, HALF * len(sites) * values(study, study.model)
    per_site = {
        "fedmd": SINGLE * SHOWN * classes,
        "ds-fl": SINGLE * SHOWN * classes,
        "kt-pfl": SINGLE * SHOWN * classes,
        "lg-fedavg": SINGLE * classes * (EMBEDDING + 1),
        PRETRAINED: 0,
    }.get(arm)
    return None if per_site is None else (len(sites) * per_site, len(sites) * per_site)


def _parameters(study: Study, settings: ModelSettings) -> int:
    return describe(_plain(study, settings))["parameters"]


def _said(study: Study, settings: ModelSettings) -> int:
    """Values that a network says of the public images of a round: means of its taps, and logits."""
    shape = Shape.of(_plain(study, settings), study.data.image)
    return LEARNT * (sum(shape.channels) + shape.outputs)


def _plain(study: Study, settings: ModelSettings) -> nn.Module:
    return untrained_model(study, settings.model_copy(update={"weights": ""}))


def bytes_table(cells: list[Cell], costs: Mapping[str, Json], data: Path) -> Table:
    """Measured and reckoned bytes of one scenario, and the same for networks of full size."""
    rows = []
    for arm, cell in {cell.arm: cell for cell in cells}.items():
        study = study_of(cell, data, data)
        wanted = reckoned(study, arm)
        if wanted is None or arm not in costs:
            continue
        count = len(study.models)
        told = [(costs[arm][way], value) for way, value in zip(("up", "down"), wanted, strict=True)]
        rows.append([arm, *(f"{value / count / 2**10:.1f}" for pair in told for value in pair)])
    for site, central in (("resnet18", "resnet34"), ("mobilenet", "resnet34"), ("densenet121", "resnet34")):
        up, down = (HALF * full_size(name) / 2**10 for name in (site, central))
        rows.append([f"natimg-fl, {site} and {central}, 224 px, 14 findings", "-", f"{up:.1f}", "-", f"{down:.1f}"])
    columns = ["method", "up, KiB", "reckoned", "down, KiB", "reckoned"]
    note = "Of a site in a round. Measured ones hold names, shapes, a loss and a weight as well."
    return Table("What travels", columns, rows, note)


def full_size(name: str) -> int:
    """Parameters of a network for 14 findings on grey images of 224 pixels."""
    raw = {
        "name": "full-size",
        "task": {"kind": "multi-label", "classes": [f"finding-{k}" for k in range(14)]},
        "data": {"tables": [{"path": "none.csv"}], "image": {"size": [224, 224]}},
        "model": {"name": name, "norm": "group"},
    }
    study = validate_study(raw)
    return _parameters(study, study.model)
