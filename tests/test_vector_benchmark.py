"""The data-vectors benchmark: controls that its tables must have, and numbers that would be misread."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def cell(division: str = "real") -> Any:
    """Two hospitals with two classes of four test patients each; the second has images of one class alone."""
    owners = ["north"] * 4 + ["south"] * 4
    cases = [SimpleNamespace(site=site, patient=str(k)) for k, site in enumerate(owners)]
    labels = torch.tensor([0, 0, 1, 1, 0, 0, 0, 0])
    everything = SimpleNamespace(splits={"test": torch.arange(8)}, cases=cases, labels=lambda split: labels)
    sizes = {"north": 30, "south": 10}
    hospitals = {site: SimpleNamespace(splits={"train": torch.arange(size)}) for site, size in sizes.items()}
    made = SimpleNamespace(seed=0, everything=everything, division=division, hospitals=hospitals, names=["w"])
    made.base = {"w": torch.zeros(2)}
    made.judged = lambda state, split: says([0.25 * float(state["w"][0])] * 8)
    return made


def says(second: list[float]) -> np.ndarray:
    """Probabilities of two classes."""
    return np.stack([1 - np.array(second), np.array(second)], axis=1).astype(np.float32)


RIGHT, ALWAYS = [0.0, 0.1, 0.9, 1.0, 0.0, 0.1, 0.2, 0.3], [0.1] * 8
SINGLES = {"single/north": RIGHT, "single/south": [1 - p for p in RIGHT]}


def measured(cells: ModuleType, path: Path, wanted: list[str]) -> None:
    found = cells.Measured(cell())
    found.test = {name: says(said) for name, said in {**SINGLES, "random, mean": ALWAYS}.items()}
    found.test |= {f"single, bn-recal/{name.partition('/')[2]}": found.test[name] for name in SINGLES}
    found.facts = {"rounds": 1}
    cells.save(found, wanted, path)


def test_a_site_with_one_class_in_its_test_images_has_no_balanced_accuracy(
    module: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    """A model that always says that class would be perfect there, and noise would beat every trained model."""
    cells, tables = module("vector_cells"), module("vector_tables")
    measured(cells, tmp_path / "real.0.0.npz", ["random, mean", "single", "single, bn-recal"])
    summary = tables.summary(tables.Config("chest", "real", 0, {0: tmp_path / "real.0.0.npz"}))
    assert summary["points"]["random, mean"]["balanced_accuracy"] == 0.5
    assert summary["values"]["random, mean"]["balanced_accuracy"]["south"]["value"] is None
    assert summary["values"]["random, mean"]["balanced_accuracy"]["worst"]["site"] == "north"


def test_single_sites_stand_there_restored_and_at_home(module: Callable[[str], ModuleType], tmp_path: Path) -> None:
    cells, tables = module("vector_cells"), module("vector_tables")
    measured(cells, tmp_path / "real.0.0.npz", list(tables.HEADLINE))
    values = tables.summary(tables.Config("chest", "real", 0, {0: tmp_path / "real.0.0.npz"}))["values"]
    # North's own model is right at north, south's wrong there: their mean is a half, north at home is right.
    for name, wanted in {"single": 0.5, "single, bn-recal": 0.5, "own site": 1.0}.items():
        assert values[name]["balanced_accuracy"]["north"]["value"] == wanted, name
        assert values[name]["balanced_accuracy"]["north"]["low"] is not None, name
    compared = {pair for pair in tables.CLAIM if pair[0] == "mean"}
    assert {("mean", "single, bn-recal"), ("mean", "own site"), ("mean", "fedavg, one round")} <= compared


def test_one_round_of_fedavg_is_the_mean_by_images(module: Callable[[str], ModuleType]) -> None:
    states = {"north": {"w": torch.tensor([1.0, -2.0])}, "south": {"w": torch.tensor([5.0, 2.0])}}
    assert torch.equal(module("vector_cells").averaged(cell(), states)["w"], torch.tensor([2.0, -1.0]))


def test_a_cell_of_older_code_gets_what_it_lacks_without_training(
    module: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = module("vector_cells")
    path = tmp_path / "real.0.0.npz"
    measured(cells, path, ["random, mean"])
    with np.load(path) as arrays:
        before = {name: arrays[name] for name in arrays.files}
    states: dict[str, dict[str, Tensor]] = {"north": {"w": torch.ones(2)}, "south": {"w": torch.ones(2)}}
    monkeypatch.setattr(cells, "trained", lambda cell, kept: ({**states, "*fedavg": states["north"]}, {}))
    monkeypatch.setattr(cells, "read_tensors", lambda path: (states["south"], {}))

    def heads(own: Any, found: Any, backbones: dict[str, dict[str, Tensor]]) -> None:
        for name, state in backbones.items():
            found.add(f"ridge head on {name}", state)

    monkeypatch.setattr(cells, "_heads", heads)
    wanted = ["random, mean", "single, bn-recal", "fedavg, one round", "ridge head on pooled"]
    assert cells.complete(cell(), wanted, tmp_path / "kept", path)
    with np.load(path) as arrays:
        after = {name: arrays[name] for name in arrays.files}
    scores = json.loads(str(after["__scores__"]))
    assert scores["fedavg, one round"]["south"]["balanced_accuracy"] == 1.0, "it says the first class, at 0.75"
    assert all(f"{name}\tnorth\tbalanced_accuracy" in after for name in wanted)
    assert json.loads(str(before["__scores__"])).items() <= scores.items()
    for name in before.keys() - {"__scores__"}:
        np.testing.assert_array_equal(after[name], before[name])
    assert not cells.complete(cell(), wanted, tmp_path / "kept", path)
