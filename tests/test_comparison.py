from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import sites, toy_study

from polyclinic.comparison import planned, run_comparison, run_path
from polyclinic.errors import DataError, StudyError
from polyclinic.results import RunFolder
from polyclinic.runner import Silent


def test_every_method_runs_with_every_seed_and_the_studys_rounds() -> None:
    study = toy_study(
        {"name": "fedavg", "rounds": 7, "server_lr": 0.5},
        compare={"methods": ["local", {"name": "fedprox", "mu": 0.3, "rounds": 2}], "seeds": [4, 5]},
    )
    plans = planned(study)
    assert {name: [one.seed for one in studies] for name, studies in plans.items()} == {
        "fedavg": [4, 5],
        "local": [4, 5],
        "fedprox": [4, 5],
    }
    assert plans["fedavg"][0].method.server_lr == 0.5
    assert plans["local"][0].method.rounds == 7
    assert (plans["fedprox"][1].method.mu, plans["fedprox"][1].method.rounds) == (0.3, 2)
    assert not plans["local"][0].compare.methods


def test_what_cannot_be_compared_is_refused_before_anything_runs() -> None:
    with pytest.raises(StudyError, match="local is already there"):
        planned(toy_study("fedavg", compare={"methods": ["local", "local"]}))
    with pytest.raises(StudyError, match="scaffold"):
        planned(toy_study("fedavg", training={"momentum": 0.9}, compare={"methods": ["scaffold"]}))
    with pytest.raises(StudyError, match="mu"):
        planned(toy_study("fedavg", compare={"methods": [{"name": "fedprox", "muu": 1}]}))
    with pytest.raises(StudyError, match="Did you mean 'ditto'"):
        planned(toy_study("fedavg", compare={"methods": ["dito"]}))


def test_the_table_and_the_differences_follow_from_the_runs(tmp_path: Path) -> None:
    study = toy_study("fedavg", compare={"methods": ["local"], "seeds": [0, 1]}, training={"batch_size": 4})
    folder = RunFolder(tmp_path / "c")
    folder.create(study)
    metrics = run_comparison(study, sites(), folder)
    found = {
        (name, one.seed): json.loads((run_path(folder.path, one) / "metrics.json").read_text())
        for name, studies in planned(study).items()
        for one in studies
    }
    value = {key: run["mean"]["loss"]["value"] for key, run in found.items()}
    table = metrics["table"]["local"]["mean"]["loss"]
    assert table["value"] == pytest.approx((value["local", 0] + value["local", 1]) / 2)
    (row,) = [r for r in metrics["differences"] if r["where"] == "mean" and r["metric"] == "loss"]
    wanted = np.mean([value["local", s] - value["fedavg", s] for s in (0, 1)])
    assert (row["method"], row["baseline"]) == ("local", "fedavg")
    assert row["value"] == pytest.approx(wanted)
    assert row["low"] <= row["value"] <= row["high"]
    assert metrics["missing_controls"] == ["fedavg-ft", "pooled"]
    assert (folder.path / "report.html").is_file()


def test_finished_runs_are_not_run_again(tmp_path: Path) -> None:
    study = toy_study("fedavg", compare={"methods": ["local"]})
    folder = RunFolder(tmp_path / "c")
    folder.create(study)

    class Counter(Silent):
        started: list[str]

        def __init__(self) -> None:
            self.started = []

        def run_started(self, study: Any, sites: Any, finished: int) -> None:
            self.started.append(study.method.name)

    first, second = Counter(), Counter()
    before = run_comparison(study, sites(), folder, first)
    again = run_comparison(study, sites(), folder, second)
    assert (first.started, second.started) == (["fedavg", "local"], [])
    assert json.dumps(before, default=str) == json.dumps(again, default=str)


def test_images_that_one_method_cannot_train_on_are_refused_before_any_runs(tmp_path: Path) -> None:
    study = toy_study("fedavg", compare={"methods": ["per-fedavg"]}, training={"batch_size": 20})
    folder = RunFolder(tmp_path / "c")
    folder.create(study)
    with pytest.raises(DataError, match=r"'south': 12 training image.* make one batch of 20.*at most 6"):
        run_comparison(study, sites(), folder)
    assert not (folder.path / "runs").exists()


def test_a_method_listed_twice_needs_a_label(tmp_path: Path) -> None:
    twice: list[dict[str, Any]] = [{"name": "ditto", "strength": 0.5}, {"name": "ditto", "strength": 2.0}]
    with pytest.raises(StudyError, match=r"ditto is already there.*label: ditto-2"):
        planned(toy_study("fedavg", compare={"methods": twice}))
    with pytest.raises(StudyError, match="label"):
        planned(toy_study("fedavg", compare={"methods": [{"name": "ditto", "label": "../x"}]}))
    study = toy_study("fedavg", compare={"methods": [twice[0], {**twice[1], "label": "ditto-strong"}]})
    plans = planned(study)
    assert [(name, plans[name][0].method.strength) for name in list(plans)[1:]] == [("ditto", 0.5), ("ditto-strong", 2)]
    folder = RunFolder(tmp_path / "both")
    folder.create(study)
    metrics = run_comparison(study, sites(), folder, Silent())
    assert metrics["methods"] == ["fedavg", "ditto", "ditto-strong"]
    assert run_path(folder.path, plans["ditto-strong"][0]).name == "ditto-strong-seed0"
    assert "ditto-strong" in (folder.path / "report.html").read_text(encoding="utf-8")


def test_settings_of_the_study_can_be_changed_for_one_method() -> None:
    methods: list[dict[str, Any]] = [
        {"name": "fedavg", "label": "focal", "set": {"task.loss": "focal"}},
        {"name": "fedprox", "set": {"training.lr": 0.3, "model": {"name": "toys:two_layers"}}},
        {"name": "fedavg", "label": "styles", "set": {"synthesis.style": 0.25, "synthesis.generator": []}},
        {"name": "fedavg", "label": "hidden", "set": {"aggregation": "masked"}},
    ]
    study = toy_study("fedavg", compare={"methods": methods, "seeds": [4]}, aggregation={"weight": "uniform"})
    plans = {name: studies[0] for name, studies in planned(study).items()}
    assert {name: one.task.loss for name, one in plans.items()} == {
        "fedavg": "auto",
        "focal": "focal",
        "fedprox": "auto",
        "styles": "auto",
        "hidden": "auto",
    }
    assert [(one.training.lr, one.model.name) for one in (plans["focal"], plans["fedprox"])] == [
        (0.1, "toys:linear"),
        (0.3, "toys:two_layers"),
    ]
    assert plans["fedavg"].synthesis is plans["focal"].synthesis is None
    styled = plans["styles"].synthesis
    assert styled is not None
    assert (styled.style, styled.generator, styled.floor) == (0.25, [], 5)
    assert plans["hidden"].aggregation.backend == "masked"
    assert plans["hidden"].aggregation.weight == "uniform", "the name of a backend changes the backend alone"
    assert {one.seed for one in plans.values()} == {4}
    assert len({one.digest for one in plans.values()}) == 5


def test_a_change_is_judged_with_its_own_method_and_not_with_the_studys() -> None:
    """Scaffold, the study's own, takes no momentum; fedavg does."""
    entry: dict[str, Any] = {"name": "fedavg", "set": {"training.momentum": 0.9}}
    plans = planned(toy_study("scaffold", compare={"methods": [entry]}))
    assert plans["fedavg"][0].training.momentum == 0.9
    assert plans["scaffold"][0].training.momentum == 0
    wrong = {"name": "scaffold", "label": "again", "set": {"training.momentum": 0.9}}
    with pytest.raises(StudyError, match="scaffold"):
        planned(toy_study("fedavg", compare={"methods": [wrong]}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.split.seed": 3}, "set cannot change 'data.split.seed'.*same images and be judged alike.*task.loss"),
        ({"task.classes": ["a", "c"]}, "set cannot change 'task.classes'"),
        ({"task": {"loss": "focal"}}, "set cannot change 'task'"),
        ({"evaluation.select": "best"}, "set cannot change 'evaluation.select'"),
        ({"seed": 3}, "set cannot change 'seed'"),
        ({"method.rounds": 3}, "set cannot change 'method.rounds'"),
        ({"modell.width": 3}, "set cannot change 'modell.width'"),
        ({"training.batchsize": 3}, r"set training.batchsize.*no such key. Did you mean 'batch_size'"),
        ({"training.lr.x": 3}, "set training.lr.x: there is no training.lr.x in the study"),
        ({"training.lr": "fast"}, "set training.lr.*valid number"),
        ({"task.loss": "dice-ce"}, "dice-ce compares masks"),
        (["task.loss"], "set holds overrides as {key.path: value}"),
        ("task.loss=focal", "set holds overrides"),
    ],
)
def test_changes_that_are_refused(changes: Any, words: str) -> None:
    study = toy_study("fedavg", compare={"methods": [{"name": "fedprox", "set": changes}]})
    with pytest.raises(StudyError, match=f"(?s){words}") as caught:
        planned(study)
    assert "compare.methods" in str(caught.value) or "dice-ce" in str(caught.value)


def test_a_comparison_with_changes_runs_and_goes_on(tmp_path: Path) -> None:
    entry: dict[str, Any] = {
        "name": "fedavg",
        "label": "prior",
        "set": {"task.loss": "logit-adjusted", "training.lr": 0.2},
    }
    study = toy_study("fedavg", compare={"methods": [entry]}, training={"batch_size": 4})
    folder = RunFolder(tmp_path / "c")
    folder.create(study)
    metrics = run_comparison(study, sites(), folder)
    assert set(metrics["table"]) == {"fedavg", "prior"}
    (folder.path / "metrics.json").unlink()
    again = RunFolder(tmp_path / "c")
    assert again.study().compare == study.compare
    assert json.dumps(run_comparison(study, sites(), again)["table"]) == json.dumps(metrics["table"])
    assert RunFolder(tmp_path / "c" / "runs" / "prior-seed0").study().training.lr == 0.2
