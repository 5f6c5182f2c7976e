from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from linear_by_hand import Weights, close, descended, public, scores, start, trained_alone
from test_public_images import CNN, OTHERS, opened, recorded
from toys import IMAGES, deployed, enlarged, sites, toy_study, trained

from polyclinic.methods import make_method
from polyclinic.methods.ds_fl import DSFL
from polyclinic.study import ModelSettings

WHOLE = {"epochs": 1, "batch_size": 100}
"""All public images at once."""


def test_probabilities_are_averaged_and_the_mean_is_sharpened_in_closed_form() -> None:
    method = make_method(toy_study("ds-fl"))
    assert isinstance(method, DSFL)
    found = method.sharpened(torch.tensor([[0.6, 0.4], [0.5, 0.5], [0.9, 0.1]]))
    wanted = [
        [1 / (1 + math.exp(-10 * (a - b))) for a, b in ((p, q), (q, p))]
        for p, q in ((0.6, 0.4), (0.5, 0.5), (0.9, 0.1))
    ]
    torch.testing.assert_close(found, torch.tensor(wanted))
    three = make_method(toy_study("ds-fl", task={"classes": ["a", "b", "c"]}))
    assert isinstance(three, DSFL)
    powers = [math.exp(p / 0.1) for p in (0.5, 0.3, 0.2)]
    torch.testing.assert_close(
        three.sharpened(torch.tensor([[0.5, 0.3, 0.2]])), torch.tensor([[p / sum(powers) for p in powers]])
    )


def test_findings_are_sharpened_each_for_itself_as_yes_and_no() -> None:
    method = make_method(toy_study({"name": "ds-fl", "temperature": 0.25}, task={"kind": "multi-label"}))
    assert isinstance(method, DSFL)
    chances = (0.5, 0.7, 0.05)
    wanted = [math.exp(p / 0.25) / (math.exp(p / 0.25) + math.exp((1 - p) / 0.25)) for p in chances]
    torch.testing.assert_close(method.sharpened(torch.tensor([chances])), torch.tensor([wanted]))


def cross_entropy(weights: Weights, shown: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """With soft targets, as in the paper."""
    return -(goal * scores(weights, shown).log_softmax(1)).sum(1).mean()


def test_sites_and_central_model_by_hand(tmp_path: Path) -> None:
    """Targets of the round before, then own images; the central model sees the round's own targets and nothing else."""
    data = sites()
    study = toy_study({"name": "ds-fl", "digest": WHOLE})
    run = trained(study, data, tmp_path)
    shown, own, central = public(study), {site: start(run) for site in data}, start(run)
    goal: torch.Tensor | None = None
    for _ in range(3):
        for site, weights in own.items():
            if goal is not None:
                last = goal
                weights = descended(weights, lambda w, last=last: cross_entropy(w, shown, last))
            own[site] = trained_alone(weights, data[site])
        mean = sum(scores(weights, shown).softmax(1) for weights in own.values()) / 3
        now = goal = (mean / 0.1).softmax(1)
        central = descended(central, lambda w, now=now: cross_entropy(w, shown, now))
    for site, weights in own.items():
        close(deployed(run, site), weights)
    found = run.method.central(run.state)
    assert found is not None
    assert found[0] == study.model
    close(found[1], central)


def test_the_central_model_has_a_network_of_its_own_where_asked(tmp_path: Path) -> None:
    central = {"name": "small-cnn", "width": 5, "norm": "group"}
    study = toy_study(
        {"name": "ds-fl", "rounds": 2, "proxies": 20, "central": central},
        model=CNN,
        models=OTHERS,
        data={"image": {"size": [32, 32]}},
    )
    run = opened(study, tmp_path, enlarged(32))
    assert run.method.central(run.state) is None
    calls = recorded(run)
    run.train()
    found = run.method.central(run.state)
    assert found is not None
    assert found[0] == ModelSettings(**central)
    assert found[1]["blocks.0.weight"].shape[0] == 5
    assert not any("blocks" in name for *_, came, left in calls for name in (*came.arrays, *left.arrays))


def test_the_central_model_is_tested_at_every_site(tmp_path: Path) -> None:
    run = trained(toy_study("ds-fl"), sites(), tmp_path)
    metrics = run.test()
    assert set(metrics["central"]) == set(IMAGES)
    assert (tmp_path / "models" / "central.safetensors").is_file()


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_temperature_that_blurs_is_refused(temperature: float) -> None:
    with pytest.raises(Exception, match="temperature"):
        toy_study({"name": "ds-fl", "temperature": temperature})
