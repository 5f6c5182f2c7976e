from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from linear_by_hand import Weights, averaged, close, naive_kl, public, scores, start, trained_alone
from test_contract import same
from test_public_images import CNN, failing, opened
from toys import IMAGES, deployed, enlarged, sites, toy_study, trained

from polyclinic.data.proxies import load_proxies
from polyclinic.errors import StudyError
from polyclinic.methods.feddf import FedDF
from polyclinic.models.normalisation import running_statistics
from polyclinic.runner import Run
from polyclinic.transfer.proxy_logits import ProxyRound

HALF: dict[str, Any] = {"north": {"name": "toy_proxies:wide"}}
"""Two sites with the study's network, one with another."""


def after_a_round_of_training(run: Run, weights: Weights | None = None) -> dict[str, Weights]:
    return {site: trained_alone(weights or start(run), own) for site, own in sites().items()}


def test_without_distillation_one_architecture_is_federated_averaging(tmp_path: Path) -> None:
    run = trained(toy_study({"name": "feddf", "steps": 0}), sites(), tmp_path / "feddf")
    plain = trained(toy_study("fedavg"), sites(), tmp_path / "fedavg")
    weights: Weights | None = None
    for _ in range(3):
        weights = averaged(after_a_round_of_training(run, weights))
    assert weights is not None
    for site in IMAGES:
        close(deployed(run, site), weights)
        for name, tensor in deployed(plain, site).items():
            torch.testing.assert_close(deployed(run, site)[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_step_of_distillation_by_hand(tmp_path: Path) -> None:
    """Adam's first step has length lr in every value; the ensemble is the mean of logits, whatever sites weigh."""
    study = toy_study({"name": "feddf", "rounds": 1, "steps": 1, "every": 1, "batch_size": 100, "lr": 1e-3})
    run = trained(study, sites(), tmp_path)
    own, shown = after_a_round_of_training(run), public(study)
    start_ = averaged(own)
    goal = (sum(scores(weights, shown) for weights in own.values()) / 3).softmax(1)
    positions = ProxyRound.draw(load_proxies(study), study, 1).positions
    held, learnt = positions[:4], positions[4:]  # a tenth of 42

    def divergence(w: Weights, rows: torch.Tensor) -> torch.Tensor:
        return naive_kl(goal[rows], scores(w, shown[rows]).softmax(1))

    leaves = [tensor.clone().requires_grad_() for tensor in start_]
    slopes = torch.autograd.grad(divergence(leaves, learnt), leaves)
    stepped = [w - 1e-3 * g / (g.abs() + 1e-8) for w, g in zip(start_, slopes, strict=True)]
    better = float(divergence(stepped, held)) < float(divergence(start_, held))
    for site in IMAGES:
        torch.testing.assert_close(
            [deployed(run, site)[name] for name in ("1.weight", "1.bias")],
            stepped if better else start_,
            rtol=1e-4,
            atol=2e-6,
        )


def test_a_distillation_that_harms_on_public_images_kept_apart_is_not_used(tmp_path: Path) -> None:
    wild = {"name": "feddf", "rounds": 2, "lr": 50.0, "steps": 20, "every": 5}
    run = trained(toy_study(wild), sites(), tmp_path / "wild")
    none = trained(toy_study({"name": "feddf", "rounds": 2, "steps": 0}), sites(), tmp_path / "none")
    assert same(deployed(run, "west"), deployed(none, "west"))


def held_out_divergence(run: Run, weights: dict[str, torch.Tensor], site: str, goal: torch.Tensor) -> float:
    study = run.study
    own = run.channel._sites[site]
    own.load(weights)
    shown = ProxyRound(load_proxies(study), torch.arange(42))
    return float(naive_kl(goal, shown.logits(own.model, 100).softmax(1)))


def test_distillation_brings_every_architecture_nearer_to_the_ensemble(tmp_path: Path) -> None:
    ends = {}
    for steps in (0, 60):
        settings = {"name": "feddf", "rounds": 1, "steps": steps, "every": 5, "lr": 0.01, "batch_size": 16}
        run = trained(toy_study(settings, models=HALF), sites(), tmp_path / str(steps))
        ends[steps] = {site: deployed(run, site) for site in IMAGES}
    for steps in (0, 60):
        assert same(ends[steps]["south"], ends[steps]["west"])
        assert ends[steps]["north"].keys() != ends[steps]["west"].keys()
    each = [_logits(run, site) for site in IMAGES]
    goal = torch.stack(each).mean(0).softmax(1)
    for site in ("north", "west"):
        before, after = (held_out_divergence(run, ends[steps][site], site, goal) for steps in (0, 60))
        assert after < 0.8 * before, site


def _logits(run: Run, site: str) -> torch.Tensor:
    """Of the site's network after its training, before anything came back; it is plain training from the start."""
    own = run.channel._sites[site]
    own.round = 1
    own.load(own.initial)
    own.train()
    return ProxyRound(load_proxies(run.study), torch.arange(42)).logits(own.model, 100)


def test_groups_are_sites_with_equal_settings(tmp_path: Path) -> None:
    models = {"north": {"name": "toy_proxies:wide"}, "west": {"name": "toy_proxies:wide"}}
    run = opened(toy_study("feddf", models=models), tmp_path)
    assert isinstance(run.method, FedDF)
    assert run.method.groups(("north", "south", "west")) == {"model.north": ["north", "west"], "model": ["south"]}
    run.train()
    assert same(deployed(run, "north"), deployed(run, "west"))
    assert same(deployed(run, "south"), run.state.groups["model"])
    assert same(deployed(run, "west"), run.state.groups["model.north"])


def test_a_group_whose_sites_are_all_absent_still_learns(tmp_path: Path) -> None:
    study = toy_study(
        {"name": "feddf", "rounds": 1, "steps": 60, "lr": 0.01}, models=HALF, federation={"on_absent": "continue"}
    )
    run = opened(study, tmp_path)
    failing(run, "north", "train", 1)
    run.train()
    initial = run.channel._sites["north"].initial
    found = deployed(run, "north")
    assert not all(torch.equal(found[name], tensor) for name, tensor in initial.items())


def test_a_site_that_misses_the_groups_model_goes_on_from_its_own(tmp_path: Path) -> None:
    study = toy_study({"name": "feddf", "rounds": 1}, federation={"on_absent": "continue"})
    run = opened(study, tmp_path / "lost")
    failing(run, "south", "receive", 1)
    run.train()
    close(deployed(run, "south"), after_a_round_of_training(run)["south"])
    assert same(deployed(run, "north"), run.state.groups["model"])


def test_running_statistics_are_the_sites_average_and_public_images_do_not_move_them(tmp_path: Path) -> None:
    sections = {"model": CNN, "data": {"image": {"size": [16, 16]}}}
    ends = []
    for steps in (0, 20):
        settings = {"name": "feddf", "rounds": 1, "steps": steps, "every": 1, "lr": 1e-5}
        ends.append(trained(toy_study(settings, **sections), enlarged(16), tmp_path / str(steps)))
    plain, distilled = (dict(run.state.groups["model"]) for run in ends)
    moved = running_statistics(ends[0].bench.model)
    assert any(name in moved for name in plain)
    for name, tensor in plain.items():
        assert torch.equal(tensor, distilled[name]) == (name in moved), name


def test_statistics_that_stay_at_a_site_are_refused() -> None:
    for section in ({"model": {**CNN, "norm": "batch-local"}}, {"models": {"west": {**CNN, "norm": "batch-local"}}}):
        with pytest.raises(StudyError, match=r"feddf.*batch-local.*norm: batch or group"):
            toy_study("feddf", data={"image": {"size": [16, 16]}}, **section)
