from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from linear_by_hand import Weights, close, descended, public, scores, start, trained_alone
from test_public_images import failing, opened, recorded
from toy_proxies import MIXED
from toys import IMAGES, deployed, enlarged, sites, toy_study, trained

from polyclinic.errors import StudyError
from polyclinic.federation.site import Site
from polyclinic.methods import fedmd
from polyclinic.methods.fedmd import warm_up
from polyclinic.models.taps import features

WHOLE = {"epochs": 1, "batch_size": 100}
"""All public images at once."""


def test_three_rounds_by_hand(tmp_path: Path) -> None:
    """Digest with the mean absolute error to equally weighted mean scores, then training; none in the first round."""
    data = sites()
    study = toy_study({"name": "fedmd", "warm_up": 0, "digest": {**WHOLE, "lr": 0.05}})
    run = trained(study, data, tmp_path)
    shown, own = public(study), {site: start(run) for site in data}
    mean: torch.Tensor | None = None
    for _ in range(3):
        for site, weights in own.items():
            if mean is not None:
                goal = mean

                def digest(w: Weights, goal: torch.Tensor = goal) -> torch.Tensor:
                    return (scores(w, shown) - goal).abs().sum() / goal.numel()

                weights = descended(weights, digest, 0.05)
            own[site] = trained_alone(weights, data[site])
        mean = sum(scores(weights, shown) for weights in own.values()) / 3
    for site, weights in own.items():
        close(deployed(run, site), weights)


def test_the_mean_gives_every_site_the_same_weight(tmp_path: Path) -> None:
    run = opened(toy_study({"name": "fedmd", "rounds": 2, "proxies": 10}, models=MIXED), tmp_path)
    calls = recorded(run)
    run.train()
    said = [left.arrays["answers/scores"] for number, op, _, _, left in calls if (number, op) == (1, "train")]
    told = [came.arrays["targets/scores"] for number, op, _, came, _ in calls if (number, op) == (2, "train")]
    assert len(said) == len(told) == len(IMAGES)
    for mean in told:
        torch.testing.assert_close(mean, (said[0] + said[1] + said[2]) / 3)


def test_the_warm_up_teaches_the_body_public_classes_and_leaves_the_last_layer(tmp_path: Path) -> None:
    study = toy_study(
        {"name": "fedmd", "digest": {"batch_size": 8}},
        model={"name": "toy_proxies:wide"},
        data={"image": {"size": [8, 8]}},
    )
    run = opened(study, tmp_path, enlarged(8))
    site = run.channel._sites["north"]
    site.round, site.agreed = 1, site.own_proxies.digest
    inputs, labels = site.proxies.inputs(torch.arange(len(site.proxies))), site.proxies.labels

    def unexplained() -> float:
        """Squared error of the best linear map from features to one-hot classes."""
        with torch.no_grad():
            found = features(site.model, inputs)
        design = torch.cat([found, torch.ones(len(found), 1)], 1).double()
        wanted = F.one_hot(labels, 3).double()
        solved = torch.linalg.lstsq(design, wanted).solution
        return float((design @ solved - wanted).square().mean())

    site.load(site.initial)
    before = unexplained()
    warm_up(site, 40)
    assert unexplained() < 0.5 * before
    for name, tensor in site.tensors.items():
        assert torch.equal(tensor, site.initial[name]) == name.startswith("6."), name


def test_every_site_warms_up_once_before_its_first_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warmed: list[tuple[int, str, bool]] = []

    def spy(site: Site, passes: int) -> None:
        fresh = all(torch.equal(tensor, site.initial[name]) for name, tensor in site.tensors.items())
        warmed.append((site.round, site.name, fresh))
        assert passes == 7

    monkeypatch.setattr(fedmd, "warm_up", spy)
    run = opened(toy_study({"name": "fedmd", "warm_up": 7}, federation={"on_absent": "continue"}), tmp_path)
    failing(run, "south", "train", 1)
    run.train()
    assert warmed == [(1, "north", True), (1, "west", True), (2, "south", True)]


def test_a_network_that_cannot_be_warmed_up_is_refused(tmp_path: Path) -> None:
    sections = {"model": {"name": "test_creff:convolution"}}
    with pytest.raises(StudyError, match="a linear last layer is needed"):
        opened(toy_study("fedmd", **sections), tmp_path / "a")
    opened(toy_study({"name": "fedmd", "warm_up": 0}, **sections), tmp_path / "b")
