"""Validation chooses, test only reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys import deployed, sites, toy_study, trained

from polyclinic.evaluation.ops import choose
from polyclinic.evaluation.predictions import Predictions, read_predictions
from polyclinic.results import RunFolder
from polyclinic.runner import Run, Silent


def scripted(tmp_path: Path, select: str, metric: str, values: list[float]) -> tuple[int, Run]:
    """Let ``choose`` hear made-up validation values, one a round."""
    study = toy_study("fedavg", evaluation={"select": select, "metric": metric})
    RunFolder(tmp_path).create(study)
    run = Run(study, sites(), RunFolder(tmp_path), Silent())
    for number, value in enumerate(values, start=1):
        run.channel.begin_round(number)
        run.state.groups["model"] = {"1.weight": torch.full((1,), float(number))}
        choose(run.method, run.channel, run.state, {"north": {metric: value}, "south": {metric: value}})
    return int(run.state.scalars["chosen_round"]), run


@pytest.mark.parametrize(
    ("select", "metric", "values", "wanted"),
    [
        ("best", "loss", [3.0, 1.0, 2.0], 2),
        ("best", "auroc", [0.6, 0.9, 0.7], 2),
        ("best", "auroc", [0.6, 0.9, 0.9], 2),
        ("last", "auroc", [0.6, 0.9, 0.7], 3),
        ("best", "auroc", [float("nan"), 0.5, 0.4], 2),
        ("best", "auroc", [float("nan"), float("nan")], 2),
    ],
)
def test_which_round_is_kept(select: str, metric: str, values: list[float], wanted: int, tmp_path: Path) -> None:
    number, run = scripted(tmp_path, select, metric, values)
    assert number == wanted
    assert float(run.state.groups["chosen"]["1.weight"]) == wanted


def test_test_images_choose_nothing(tmp_path: Path) -> None:
    study = toy_study("fedavg", training={"batch_size": 4}, evaluation={"every": 1, "select": "best"})
    ends = []
    for noise in (False, True):
        data = sites()
        for own in data.values():
            if noise:
                own.images[own.splits["test"]] = torch.rand_like(own.images[own.splits["test"]])
        run = trained(study, data, tmp_path / str(noise))
        metrics = run.test()
        ends.append((metrics["chosen_round"], run.state.groups["chosen"], metrics["mean"]["loss"]["value"]))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(ends[0][1][n], ends[1][1][n]) for n in ends[0][1])
    assert ends[0][2] != ends[1][2]


@pytest.mark.parametrize("method", ["ditto", "fedbn", "fedavg-ft", "local"])
def test_a_personal_model_is_kept_from_the_chosen_round(method: str, tmp_path: Path) -> None:
    study = toy_study(method, training={"batch_size": 4, "lr": 0.5}, evaluation={"every": 1, "select": "best"})
    seen: list[dict[str, torch.Tensor]] = []

    class Watcher(Silent):
        def round_finished(self, record: Any) -> None:
            seen.append(deployed(run, "north"))

    RunFolder(tmp_path).create(study)
    run = Run(study, sites(), RunFolder(tmp_path), Watcher())
    # Validation that gets worse after round 2, whatever the model does.
    scores = iter([0.5, 0.9, 0.1])
    import polyclinic.runner as runner

    original = runner.validate
    try:

        def fixed(*arguments: Any) -> dict[str, dict[str, float]]:
            found = original(*arguments)
            score = next(scores)
            return {site: {**values, "balanced_accuracy": score} for site, values in found.items()}

        runner.validate = fixed  # type: ignore[assignment]
        run.train()
    finally:
        runner.validate = original
    assert run.state.scalars["chosen_round"] == 2
    kept = run.channel._sites["north"].state.load("chosen")
    assert kept is not None
    assert all(torch.equal(kept[0][n], seen[1][n]) for n in kept[0])
    assert not all(torch.equal(kept[0][n], seen[2][n]) for n in kept[0])


def test_reported_numbers_follow_from_the_files(tmp_path: Path) -> None:
    """Accuracy and loss of the report recomputed from predictions by hand."""
    study = toy_study("fedavg")
    run = trained(study, sites(), tmp_path)
    metrics = run.test()
    found = read_predictions(tmp_path / "predictions" / "north.csv", ["a", "b"], "multi-class")
    assert isinstance(found, Predictions)
    test = [i for i, split in enumerate(found.splits) if split == "test"]
    p, t = found.probabilities[test], found.targets[test]
    north = metrics["sites"]["north"]["test"]
    assert north["accuracy"]["value"] == pytest.approx(np.mean(p.argmax(1) == t))
    assert north["loss"]["value"] == pytest.approx(-np.log(p[np.arange(len(t)), t]).mean())
    wanted = ((sites()["north"].images[sites()["north"].splits["test"]] - 0.5) / 0.25).flatten(1)
    model = run.state.groups["chosen"]
    logits = wanted @ model["1.weight"].T + model["1.bias"]
    np.testing.assert_allclose(p, logits.softmax(1).double().numpy(), atol=1e-6)
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert stored["mean"]["accuracy"]["value"] == pytest.approx(
        np.mean([s["test"]["accuracy"]["value"] for s in stored["sites"].values()])
    )


def test_bytes_are_those_of_the_messages(tmp_path: Path) -> None:
    run = trained(toy_study({"name": "fedavg", "rounds": 2}), sites(), tmp_path)
    floats = sum(t.numel() for t in run.state.groups["model"].values())
    for record in run.records:
        up, down = record["bytes"]["train"]["up"], record["bytes"]["train"]["down"]
        assert 3 * 4 * floats < up < 3 * (4 * floats + 600)
        assert 3 * 4 * floats < down < 3 * (4 * floats + 600)
        assert sum(s["bytes_up"] for s in record["sites"].values()) == sum(o["up"] for o in record["bytes"].values())
