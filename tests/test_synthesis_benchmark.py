"""The FedSSG benchmark: its metrics by hand, its plan, the cut table, and tables from finished cells."""

from __future__ import annotations

import csv
import importlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from polyclinic.study import validate_study

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_metrics_by_hand(module: Callable[[str], ModuleType]) -> None:
    scores = module("synthesis_scores")
    # Two devices, three classes; rows are truth, columns answers. The second device has no image of class 2.
    counts = np.array([[[[3, 1, 0], [0, 2, 2], [1, 0, 0]], [[1, 1, 0], [0, 1, 0], [0, 0, 0]]]], dtype=float)
    trained = np.array([[40, 0], [25, 3], [0, 0]])
    found = {name: float(value[0]) for name, value in scores.scores(counts, trained, [1, 2]).items()}
    recalls = [4 / 6, 3 / 5, 0.0]
    assert found["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert found["rare"] == pytest.approx(np.mean(recalls[1:]))
    # 2 TP / (2 TP + FP + FN): class 0 has 1 FP and 2 FN, class 1 2 FP and 2 FN, class 2 2 FP and 1 FN.
    assert found["macro_f1"] == pytest.approx((8 / 11 + 6 / 10 + 0) / 3)
    assert found["device 0"] == pytest.approx((3 / 4 + 2 / 4 + 0) / 3)
    assert found["device 1"] == pytest.approx((1 / 2 + 1) / 2)
    assert found["worst"] == pytest.approx(found["device 0"])
    assert found["unseen"] == pytest.approx((1 / 2 + 0) / 2), "class 2 of the second device has no test image"
    assert found["few"] == pytest.approx((2 / 4 + 1) / 2)
    assert found["many"] == pytest.approx(3 / 4)


def test_metrics_agree_with_scikit_learn_and_weights_repeat_images(module: Callable[[str], ModuleType]) -> None:
    from sklearn.metrics import balanced_accuracy_score, f1_score

    scores, rng = module("synthesis_scores"), np.random.default_rng(0)
    targets, weights = rng.integers(4, size=200), rng.integers(3, size=(2, 200))
    answers = scores.Answers(targets, rng.random((200, 4)), rng.integers(3, size=200), ["a", "b", "c"], weights)
    found = scores.scores(scores.confusion(answers, weights), np.ones((4, 3)), [0])
    for row in range(2):
        truth, said = (np.repeat(v, weights[row]) for v in (targets, answers.probabilities.argmax(1)))
        assert found["balanced_accuracy"][row] == pytest.approx(balanced_accuracy_score(truth, said))
        assert found["macro_f1"][row] == pytest.approx(f1_score(truth, said, average="macro"))


def test_the_phantom_has_the_published_table_divided_by_ten(module: Callable[[str], ModuleType]) -> None:
    cells = module("synthesis_cells")
    raw = cells.recipe(cells.Cell("phantom", 5, "fedavg", (), 0))
    sites = {site["name"]: site["counts"] for site in raw["data"]["phantom"]["sites"]}
    train = [n for counts in sites.values() for n in counts["train"].values()]
    assert sum(train) == 1864, "the pilot of the fact sheet had as many"
    assert (len(train), train.count(0)) == (48, 9)
    assert sites["bcn"]["train"]["NV"] == 336
    assert sites["molemax"]["train"] == {
        "MEL": 2,
        "NV": 298,
        "BCC": 1,
        "AK": 0,
        "BKL": 10,
        "DF": 2,
        "VASC": 4,
        "SCC": 0,
    }
    assert all(counts["test"] == dict.fromkeys(cells.DIAGNOSES, 25) for counts in sites.values())


def test_every_planned_study_is_valid_and_every_folder_its_own(
    module: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    cells, arms = module("synthesis_cells"), module("synthesis_arms")
    for quick in (True, False):
        planned = arms.planned(tmp_path / "public", [0], quick)
        assert len({cell.key for cell in planned}) == len(planned)
        for cell in planned:
            study = cells.study_of(cell, tmp_path, tmp_path)
            assert study.method.rounds == cell.rounds
    names = {(cell.scenario, cell.arm) for cell in planned}
    assert {scenario for scenario, _ in names} >= {"skin", "skin-cut", "phantom", "without-vienna_dias"}
    assert all(("skin-cut", arm) in names for arm in ("fedavg", "logit adjustment", "fedssg"))


def test_a_cut_leaves_a_quarter_of_the_rare_lesions_and_all_else(
    module: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    cells = module("synthesis_cells")
    (tmp_path / "pictures").mkdir()
    rows = [
        f"{label}{n}.png,{label},{label}{n // 2},home"
        for label, count in (("df", 40), ("nv", 24))
        for n in range(count)
    ]
    (tmp_path / "all.csv").write_text("\n".join(["file,label_name,lesion,domain", *rows]) + "\n", encoding="utf-8")
    columns = {"image": "file", "label": "label_name", "patient": "lesion", "site": "domain", "device": "domain"}
    raw = {"tables": [{"path": "all.csv", "images": "pictures", "columns": columns}], "root": str(tmp_path)}
    study = validate_study({"name": "a", "task": {"classes": ["df", "nv"]}, "data": raw})
    cells.write_cut(study, tmp_path / "cut.csv")
    with (tmp_path / "cut.csv").open(encoding="utf-8") as file:
        kept = list(csv.DictReader(file))
    lesions = Counter((row["label_name"], row["split"]) for row in {row["lesion"]: row for row in kept}.values())
    # 20 lesions of df: 12 train, 3 validate, 5 test; 12 of nv: 7, 2, 3.
    assert lesions["df", "train"] == 3
    assert (lesions["df", "val"], lesions["df", "test"]) == (3, 5)
    assert sum(count for (label, _), count in lesions.items() if label == "nv") == 12
    assert all(count == 2 for count in Counter(row["lesion"] for row in kept).values()), "both images of a lesion"


TINY: dict[str, Any] = {"model.width": 2, "training.steps": 1, "evaluation.every": 0}


def test_a_finished_cell_is_not_trained_again_and_gets_its_tables(
    module: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells, tables = module("synthesis_cells"), module("synthesis_tables")
    centres = {name: (device, (60, 300, 0, 0, 0, 0, 0, 0)) for name, (device, _) in list(cells.CENTRES.items())[:2]}
    monkeypatch.setattr(cells, "CENTRES", centres)
    monkeypatch.setattr(cells, "_loaded", {})
    loss = {**TINY, "task.loss": "logit-adjusted"}
    pair = {"fedavg": TINY, "logit adjustment": loss}
    made = [
        cells.Cell("phantom", 1, name, tuple((key, json.dumps(value)) for key, value in changes.items()), 0)
        for name, changes in pair.items()
    ]
    work = tmp_path / "work"
    for cell in made:
        assert cells.finished(cell, work) is None
        cells.measure(cell, work, tmp_path)
        assert cells.finished(cell, work) is not None
        assert not (work / cell.key / "state").exists()
    other = cells.Cell("phantom", 1, "fedavg", (("training.steps", "2"),), 0)
    assert cells.finished(other, work) is None, "the same folder with other settings"
    assert sorted(path.name for path in (work / "cache").glob("bcn-*-images.npy"))

    monkeypatch.setattr("sys.argv", ["fedssg.py", "--quick"])
    monkeypatch.setattr("builtins.print", lambda *args, **kwargs: None)
    tables.write_results("fedssg", made, work, tmp_path / "out", replicates=20)
    found = json.loads((tmp_path / "out" / "fedssg.json").read_text(encoding="utf-8"))
    titles = [table["title"] for table in found["tables"]]
    assert titles[0] == "phantom, 1 rounds: test images of all devices"
    assert "phantom, 1 rounds: cost" in titles
    assert all(len(row) == len(table["columns"]) for table in found["tables"] for row in table["rows"])
    numbers = found["cells"]["phantom, 1 rounds"]["measured"]
    assert numbers["trained"]["bcn"] == {"MEL": 6, "NV": 30}
    assert numbers["values"]["fedavg"]["auroc"]["low"] is None
    pair_rows = [r for r in numbers["pairs"] if r["metric"] == "balanced_accuracy" and r["baseline"] == "fedavg"]
    by_arm = {arm: numbers["values"][arm]["balanced_accuracy"]["value"] for arm in pair}
    [row] = pair_rows
    assert row["value"] == pytest.approx(by_arm["logit adjustment"] - by_arm["fedavg"])
    assert 0 < numbers["costs"]["fedavg"]["sites"] < 60


def test_points_per_second_are_gains_over_extra_seconds(module: Callable[[str], ModuleType]) -> None:
    tables = module("synthesis_tables")
    cost = {"sites": 10.0, "exchange": 0.0, "server": 1.0, "up": 100.0, "down": 50.0}
    costs = {"logit adjustment": cost, "fedssg": {**cost, "sites": 12.0, "exchange": 1.0, "up": 110.0}, "pooled": None}
    pair = {"method": "fedssg", "baseline": "logit adjustment", "metric": "balanced_accuracy", "value": 0.05}
    rows = {r[0]: r[1:] for r in tables.costs_table("x", {"costs": costs, "pairs": [pair]}, list(costs)).rows}
    assert rows["fedssg"] == ["12.0", "1.0", "1.0", "1.20 x", "1.10 x", "1.00 x", "+2.50"]
    assert rows["logit adjustment"][-1] == "-"
    assert "pooled" not in rows


def test_time_left_is_known_from_the_like(module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    fedssg, cells = module("fedssg"), module("synthesis_cells")
    three = [cells.Cell("phantom", 4, "fedavg", (), seed) for seed in range(3)]
    about = {"resumed": False, "seconds": {"wall": 9.0, "processor": 7.0}}
    monkeypatch.setattr(fedssg, "finished", lambda cell, work: about if cell.seed == 0 else None)
    assert set(fedssg.expected(three, Path()).values()) == {7.0}
    monkeypatch.setattr(fedssg, "finished", lambda cell, work: None)
    assert fedssg.expected(three, Path())[three[0]] == pytest.approx(1 + 4 * fedssg.ROUND_SECONDS["phantom"])


def test_a_failing_cell_leaves_its_reason(
    module: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fedssg = module("fedssg")

    def broken(*_: object) -> None:
        raise ValueError("no such generator")

    monkeypatch.setattr(fedssg, "measure", broken)
    cell = SimpleNamespace(key="skin/1/x-seed0")
    assert fedssg.attempt(cell, tmp_path, tmp_path, None) == "FAILED: ValueError: no such generator"
    assert "Traceback" in (tmp_path / "failed" / "skin.1.x-seed0.txt").read_text(encoding="utf-8")
    assert fedssg.attempt(cell, tmp_path, tmp_path, 0.0) == "left for later"
