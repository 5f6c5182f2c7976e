"""The natural-image benchmark: who owns which X-ray, its plan, its verdicts, and tables from finished cells."""

from __future__ import annotations

import csv
import importlib
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_patients_are_whole_and_small_archives_are_part_of_large_ones(module: Callable[[str], ModuleType]) -> None:
    made = module("natimg_hospitals")
    # 400 patients of each class: every fourth has three images, the others one.
    pictures = [
        made.Picture(f"{label}{n}-{k}", label, f"{label}{n}")
        for label in ("ill", "well")
        for n in range(400)
        for k in range(3 if n % 4 == 0 else 1)
    ]
    hospitals = [
        made.Hospital(name, {"ill": ill, "well": 100 - ill}, {"ill": 10, "well": 10}, {"ill": 20, "well": 20})
        for name, ill in (("east", 80), ("west", 30))
    ]
    large, small, other = (
        made.nested(pictures, hospitals, seed, size, 100) for seed, size in ((0, 100), (0, 20), (1, 100))
    )

    def images(rows: list[tuple[str, ...]], split: str) -> set[tuple[str, ...]]:
        return {row for row in rows if row[4] == split}

    counts = Counter((site, split, label) for _, label, _, site, split in large)
    assert counts["east", "train", "ill"] == 80
    assert counts["west", "train", "well"] == 70
    assert counts["west", "val", "ill"] == 10
    assert counts["east", "test", "well"] == 20
    places: dict[str, set[tuple[str, str]]] = {}
    for _, _, patient, site, split in large:
        places.setdefault(patient, set()).add((site, split))
    assert all(len(own) == 1 for own in places.values())
    assert images(small, "train") < images(large, "train")
    assert Counter((site, label) for _, label, _, site, _ in images(small, "train")) == {
        ("east", "ill"): 16,
        ("east", "well"): 4,
        ("west", "ill"): 6,
        ("west", "well"): 14,
    }
    assert len(images(small, "val")) == 20, "half as many as there are to train with, at each of two"
    assert images(small, "test") == images(large, "test") == images(other, "test")
    assert images(other, "train") != images(large, "train")
    drawn = [patient for _, _, patient, _, split in small if split == "train"]
    assert len(set(drawn)) == len(drawn), "one image each while there are patients"


def test_a_class_that_runs_short_gives_what_it_has(module: Callable[[str], ModuleType]) -> None:
    made = module("natimg_hospitals")
    both = [made.Picture("a-0", "ill", "a"), made.Picture("a-1", "well", "a")]
    pictures = [*both, *(made.Picture(f"w{n}", "well", f"w{n}") for n in range(5))]
    rows = made.divide(pictures, [made.Hospital("east", {"ill": 9, "well": 9}, {}, {"well": 2})], 0)
    assert Counter((label, split) for _, label, _, _, split in rows) == {
        ("ill", "train"): 1,
        ("well", "train"): 3,
        ("well", "test"): 2,
    }, "the patient with both is drawn as ill, by the rarer class"


def test_every_planned_study_is_valid_and_every_folder_its_own(
    module: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    cells, arms = module("natimg_cells"), module("natimg_arms")
    for quick in (True, False):
        planned = arms.planned([0], quick)
        assert len({cell.key for cell in planned}) == len(planned)
        different = {(cells.kind_of(cell.scenario), cell.changes): cell for cell in planned}
        for cell in different.values():
            study = cells.study_of(cell, tmp_path, tmp_path)
            assert study.method.rounds == cell.rounds
    main = {cell.arm: cells.recipe(cell) for cell in planned if cell.scenario == "kermany-100"}
    private = {name: {key: raw["training"][key] for key in ("steps", "batch_size", "lr")} for name, raw in main.items()}
    assert all(own == private["local"] for own in private.values()), "the same steps on private images"
    weights = {arm: {own.get("weights", "") for own in main[arm]["models"].values()} for arm in main}
    assert weights["local"] == {""}
    assert weights["fedmd"] == weights["local, pre-trained"] == weights[arms.UNIFORM]
    assert len(weights["fedmd"]) == 3
    assert main["A14: noise as proxies, random start"]["proxies"]["manifest"] == "noise.json"
    networks = {own["name"] for own in main[arms.LEARNED]["models"].values()}
    assert networks == {"small-cnn", "small-resnet", "shufflenet"}


def test_noise_of_each_class_has_its_own_spectrum(module: Callable[[str], ModuleType], tmp_path: Path) -> None:
    cells = module("natimg_cells")
    cells.draw_noise(tmp_path, 4)
    steps: dict[str, list[float]] = {}
    for name in cells.NOISE:
        images = [np.asarray(Image.open(path), dtype=float) for path in sorted((tmp_path / name).iterdir())]
        assert images[0].shape == (64, 64)
        assert 100 < np.mean(images) < 156
        # Change from a pixel to the next one down, and to the right.
        steps[name] = [float(np.mean(np.abs(np.diff(np.stack(images), axis=axis)))) for axis in (1, 2)]
    assert steps["fine"][0] > 1.5 * steps["middle"][0] > 3 * steps["coarse"][0]
    assert steps["upright"][1] > 2 * steps["upright"][0]
    assert steps["flat"][0] > 2 * steps["flat"][1]


def test_differences_are_said_in_words(module: Callable[[str], ModuleType]) -> None:
    tables = module("natimg_tables")
    assert tables.said({"value": 0.02, "low": 0.01, "high": 0.03}) == "better"
    assert tables.said({"value": -0.02, "low": -0.03, "high": -0.01}) == "worse"
    assert tables.said({"value": 0.02, "low": -0.01, "high": 0.03}) == "not told apart"
    assert tables.said(None) == "not measured"


def fake_data(folder: Path) -> None:
    """A few images in the place of the real ones, with their tables."""
    rng = np.random.default_rng(0)

    def draw(path: Path, level: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((level + rng.integers(60, size=(16, 16))).astype(np.uint8)).save(path)

    source = folder / "kermany_cxr224"
    rows = []
    for place, name in enumerate(("normal", "bacteria", "virus")):
        for n in range(60):
            draw(source / "dev" / f"{name}{n}.png", 60 * place)
            rows.append([f"{name}{n}.png", name, f"{name}{n}"])
    _table(source / "dev.csv", ["file", "label_name", "patient"], rows)
    rows = [[f"{name}/{n}.png", name] for name in ("rose", "tulip") for n in range(8)]
    for path, _ in rows:
        draw(folder / "tf_flowers96" / "dev" / path, 100)
    _table(folder / "tf_flowers96" / "dev.csv", ["file", "label_name"], rows)


def _table(path: Path, names: list[str], rows: list[list[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([names, *rows])


NETWORKS = {
    "small-cnn": {"name": "small-cnn", "width": 2},
    "small-resnet": {"name": "small-cnn", "width": 3},
    "shufflenet": {"name": "small-cnn", "width": 4},
}


Modules = Callable[[str], ModuleType]


@pytest.fixture
def tiny(module: Modules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Modules:
    """The benchmark with a handful of images and small networks; data in ``data``."""
    cells, hospitals = module("natimg_cells"), module("natimg_hospitals")
    fake_data(tmp_path / "data")
    monkeypatch.setattr(cells, "NETWORKS", NETWORKS)
    monkeypatch.setattr(cells, "PROXIES", ("flowers",))
    monkeypatch.setattr(cells, "PRETRAIN", 1)
    monkeypatch.setattr(cells, "STEPS", {12: 2, 50: 2})
    monkeypatch.setattr(cells, "IMAGES", {"kermany": "kermany_cxr224/dev"})
    monkeypatch.setattr(cells, "PICTURES", "dev")
    monkeypatch.setattr(hospitals, "LARGEST", {"kermany": 12})
    monkeypatch.setattr(hospitals, "HELD_OUT", {"kermany": (12, 24)})
    monkeypatch.setattr(module("synthesis_cells"), "_loaded", {})
    monkeypatch.setattr("sys.argv", ["natimg_fl.py", "--quick"])
    monkeypatch.setattr("builtins.print", lambda *args, **kwargs: None)
    return module


def measured(module: Modules, folder: Path, changes: dict[str, dict[str, Any]], **other: Any) -> list[Any]:
    """Cells of two rounds, each trained below ``work``."""
    cells = module("natimg_cells")
    few: dict[str, Any] = {"evaluation.bootstrap": 20, "data.image.size": [16, 16], "training.augment": {}}
    chosen = {name: {**own, **few, **other} for name, own in changes.items()}
    made: list[Any] = module("cell_runs").cells_of("kermany-12", 2, chosen, [0])
    work, data = folder / "work", folder / "data"
    cells.prepare(made, work, data)
    for name in NETWORKS:
        cells.pretrain((name, 0), work, data)
    for cell in made:
        assert cells.finished(cell, work) is None
        cells.measure(cell, work, data)
        assert cells.finished(cell, work) is not None
    return made


def written(module: Modules, made: list[Any], folder: Path) -> dict[str, Any]:
    """What the tables of these cells say, as JSON."""
    module("natimg_tables").write_results("natimg_fl", made, folder / "work", folder / "out", folder / "data")
    found: dict[str, Any] = json.loads((folder / "out" / "natimg_fl.json").read_text(encoding="utf-8"))
    assert all(len(row) == len(table["columns"]) for table in found["tables"] for row in table["rows"])
    return found


def test_cells_are_trained_once_and_get_their_tables(tiny: Modules, tmp_path: Path) -> None:
    cells, arms, tables, runs = (tiny(n) for n in ("natimg_cells", "natimg_arms", "natimg_tables", "cell_runs"))
    work = tmp_path / "work"
    every = arms.arms("kermany")
    chosen = [arms.LOCAL, arms.PRETRAINED, "fedproto", *(name for name in every if name.startswith("pooled"))]
    made = measured(tiny, tmp_path, {name: every[name] for name in chosen})
    other = runs.Cell("kermany-12", 2, arms.LOCAL, (("training.steps", "3"),), 0)
    assert cells.finished(other, work) is None, "the same folder with other settings"

    found = written(tiny, made, tmp_path)
    numbers = found["cells"]["kermany-12"]["measured"]
    assert set(numbers["values"]) == {arms.LOCAL, arms.PRETRAINED, "fedproto", arms.POOLED}
    # Pooled training counts at each site with the network that the site has.
    east = json.loads((work / "kermany-12" / "2" / "pooled-small-cnn-seed0" / "metrics.json").read_text("utf-8"))
    west = json.loads((work / "kermany-12" / "2" / "pooled-shufflenet-seed0" / "metrics.json").read_text("utf-8"))
    both = [one["sites"][site]["test"]["auroc"]["value"] for one, site in ((east, "east"), (west, "west"))]
    assert both[0] != both[1]
    mean = numbers["by_seed"][arms.POOLED]["0"]
    north = json.loads((work / "kermany-12" / "2" / "pooled-small-resnet-seed0" / "metrics.json").read_text("utf-8"))
    assert mean == pytest.approx(np.mean([*both, north["sites"]["north"]["test"]["auroc"]["value"]]))
    values = {arm: own["mean"]["auroc"]["value"] for arm, own in numbers["values"].items()}
    row = tables.pair(numbers, "fedproto", arms.PRETRAINED)
    assert row["value"] == pytest.approx(values["fedproto"] - values[arms.PRETRAINED])
    assert numbers["costs"]["fedproto"]["up"] > 3 * 64 * 8 * 3 > numbers["costs"][arms.LOCAL]["up"]


def test_natimg_fl_gets_its_verdicts_its_central_model_and_its_bytes(
    tiny: Modules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells, arms, sizes = (tiny(name) for name in ("natimg_cells", "natimg_arms", "natimg_bytes"))
    monkeypatch.setattr(cells, "PROXIES", ("flowers", "noise"))
    monkeypatch.setattr(tiny("natimg_tables"), "BYTES", "kermany-12")
    monkeypatch.setattr(sizes, "LEARNT", 14)  # of 16, one of each class judges
    monkeypatch.setattr(sizes, "full_size", {"resnet18": 1, "resnet34": 2, "mobilenet": 3, "densenet121": 4}.get)
    cells.write_proxies("noise", tmp_path / "work" / "proxies", tmp_path / "data", 4)
    every = {**arms.arms("kermany"), **arms.ablations("kermany")}
    ours = (arms.UNIFORM, arms.LEARNED, arms.RANDOM, arms.NOISE, sizes.VECTORS)
    quick = {"method.server_steps": 2, "method.q": 1}
    made = measured(tiny, tmp_path, {arms.PRETRAINED: every[arms.PRETRAINED]})
    made += measured(tiny, tmp_path, {name: every[name] for name in ours}, **quick)
    found = written(tiny, made, tmp_path)
    rows = {table["title"]: {row[0]: row[1:] for row in table["rows"]} for table in found["tables"]}

    verdicts = rows["The three kill criteria"]
    assert [title[:3] for title in verdicts] == ["(a)", "(a)", "(b)", "(c)"]
    for scenario, value, said, _ in verdicts.values():
        assert scenario == "kermany-12"
        assert len(numbers(value)) == 3, "a difference and the ends of its interval"
        assert said in ("better", "worse", "not told apart")
    central = rows["kermany-12: the central model at the sites"]
    assert set(central) == set(ours)
    assert all(0 <= float(value) <= 1 for row in central.values() for value in row)
    travels = rows["What travels"]
    assert set(ours) & set(travels) == {arms.UNIFORM, arms.LEARNED, sizes.VECTORS}
    for arm in (arms.UNIFORM, arms.LEARNED, sizes.VECTORS):
        up, wanted_up, down, wanted_down = map(float, travels[arm])
        # Names and shapes of some tens of tensors, at most 100 bytes each.
        assert 0 < up - wanted_up < 5, arm
        assert 0 < down - wanted_down < 5, arm
    assert travels[arms.UNIFORM] != travels[sizes.VECTORS]
    moved = json.loads((tmp_path / "work" / made[2].key / "transfer" / "east.json").read_text(encoding="utf-8"))
    assert moved["rounds"][-1]["meta_steps"], "weights were learned"


def numbers(text: str) -> list[float]:
    """Finite ones in a cell of a table."""
    return [float(found) for found in re.findall(r"[-+]?\d+\.\d+", text)]


def test_a_cell_is_guessed_by_its_networks_and_steps(module: Callable[[str], ModuleType]) -> None:
    bench, runs = module("natimg_fl"), module("cell_runs")
    local = bench.guess(runs.Cell("kermany-50", 10, "local", (), 0))
    steps = 10 * module("natimg_cells").STEPS[50]
    assert local == pytest.approx(2 + 1.1 * steps * sum(bench.STEP_SECONDS[n] for n in NETWORKS))
    assert bench.guess(runs.Cell("kermany-50", 10, "natimg-fl, learned", (), 0)) > 3 * local
