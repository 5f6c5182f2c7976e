from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from linear_by_hand import averaged, close, leaves, own_images, scores, start, stepped, trained_alone
from mixed_sites import MOBILE, mixed_study, multi_label, passing, prepared, shapes, with_findings, without_west
from test_contract import same
from torch import nn
from toys import deployed, enlarged, sites, toy_study, trained

from polyclinic.errors import StudyError
from polyclinic.methods.lg_fedavg import equal_heads, head_names


def test_two_rounds_by_hand(tmp_path: Path) -> None:
    """Every site makes one full-batch step of both layers; only the last layer is averaged, by images."""
    data = sites()
    run = trained(toy_study({"name": "lg-fedavg", "rounds": 2}), data, tmp_path)
    bodies, head = dict.fromkeys(data, start(run)[:2]), start(run)[2:]
    for _ in range(2):
        ends = {}
        for site, own in data.items():
            moved = trained_alone([*bodies[site], *head], own)
            bodies[site], ends[site] = moved[:2], moved[2:]
        head = averaged(ends)
    for site in data:
        close(deployed(run, site), [*bodies[site], *head])


def test_what_passes(tmp_path: Path) -> None:
    run = prepared(mixed_study({"name": "lg-fedavg", "rounds": 2}), enlarged(), tmp_path)
    seen = passing(run)
    run.train()
    assert len(seen) == 6
    for _, down, up in seen:
        assert shapes(down) == {"model/weight": [2, 6], "model/bias": [2]}
        assert not down.scalars
        assert shapes(up) == {"update/weight": [2, 6], "update/bias": [2]}
        assert set(up.scalars) == {"loss", "weight/update"}
    assert [up.scalars["weight/update"] for _, _, up in seen[:3]] == [24, 12, 6]


def test_different_networks_share_the_last_layer_alone(tmp_path: Path) -> None:
    run = trained(mixed_study({"name": "lg-fedavg", "rounds": 2}), enlarged(), tmp_path)
    north, south, west = (deployed(run, site) for site in ("north", "south", "west"))
    for name in north:
        assert torch.equal(north[name], south[name]) == name.startswith("head.1."), name
    assert torch.equal(north["head.1.weight"], west["classifier.1.1.weight"])
    assert torch.equal(north["head.1.bias"], west["classifier.1.1.bias"])
    assert set(run.test()["sites"]) == {"north", "south", "west"}


def test_alone_it_is_local_training_up_to_the_rounding_of_an_update(tmp_path: Path) -> None:
    sections = {"model": {"name": "toys:two_layers"}, "training": {"batch_size": 5}}
    only = {"north": sites()["north"]}
    alone = trained(toy_study("local", **sections), only, tmp_path / "local")
    run = trained(toy_study("lg-fedavg", **sections), only, tmp_path / "lg")
    for name, wanted in deployed(alone, "north").items():
        torch.testing.assert_close(deployed(run, "north")[name], wanted, rtol=1e-6, atol=1e-7)


def test_a_site_that_drops_out_uses_the_averaged_layer_on_its_last_body(tmp_path: Path) -> None:
    run, alone = without_west("lg-fedavg", tmp_path)
    assert same(run.state.groups["head"], alone.state.groups["head"])
    assert torch.equal(deployed(run, "west")["2.weight"], run.state.groups["head"]["weight"])
    assert torch.equal(deployed(run, "west")["1.weight"], run.bench.initial["1.weight"])


def test_findings_by_hand(tmp_path: Path) -> None:
    data = with_findings()
    study = multi_label({"name": "lg-fedavg", "rounds": 1})
    run = trained(study, data, tmp_path)
    ends = {}
    for site, own in data.items():
        at, (inputs, targets) = leaves(start(run)), own_images(own)
        ends[site] = stepped(at, F.binary_cross_entropy_with_logits(scores(at, inputs), targets))[2:]
    for name, wanted in zip(("weight", "bias"), averaged(ends), strict=True):
        torch.testing.assert_close(run.state.groups["head"][name], wanted, rtol=1e-5, atol=1e-6)


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="segmentation"):
        toy_study("lg-fedavg", task={"kind": "segmentation", "classes": ["no", "yes"]})
    study = mixed_study("lg-fedavg", models={"west": {**MOBILE, "embedding": None}})
    with pytest.raises(StudyError, match="lg-fedavg.*north 6, south 6, west 1280"):
        prepared(study, enlarged(), tmp_path)
    unlike = {"north": nn.Linear(3, 2), "south": nn.Linear(3, 2, bias=False)}
    with pytest.raises(StudyError, match="no bias at south"):
        equal_heads("lg-fedavg", unlike)
    assert head_names(nn.Sequential(nn.Flatten(), nn.Linear(3, 2, bias=False))) == {"weight": "1.weight"}
