from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mixed_sites import (
    MOBILE,
    enlarged,
    failing,
    mixed_study,
    multi_label,
    passing,
    pixels,
    prepared,
    shapes,
    with_findings,
)
from test_contract import same
from torch import nn
from toys import deployed, sites, toy_study, trained

from polyclinic.errors import StudyError
from polyclinic.methods.lg_fedavg import equal_heads, head_names

NAMES = ("1.weight", "1.bias", "2.weight", "2.bias")


def test_two_rounds_by_hand(tmp_path: Path) -> None:
    """Every site makes one full-batch step of both layers; only the last layer is averaged, by images."""
    data = sites()
    run = trained(toy_study({"name": "lg-fedavg", "rounds": 2}), data, tmp_path)
    start = [run.bench.initial[name] for name in NAMES]
    bodies, head = dict.fromkeys(data, start[:2]), start[2:]
    images = {site: len(own.splits["train"]) for site, own in data.items()}
    for _ in range(2):
        ends = {}
        for site, own in data.items():
            values = [t.clone().requires_grad_() for t in (*bodies[site], *head)]
            hidden = pixels(own) @ values[0].T + values[1]
            loss = F.cross_entropy(hidden @ values[2].T + values[3], own.labels("train"))
            moved = [(t - 0.1 * g).detach() for t, g in zip(values, torch.autograd.grad(loss, values), strict=True)]
            bodies[site], ends[site] = moved[:2], moved[2:]
        head = [sum(images[s] * ends[s][i] for s in data) / sum(images.values()) for i in range(2)]
    for site in data:
        for name, wanted in zip(NAMES, (*bodies[site], *head), strict=True):
            torch.testing.assert_close(deployed(run, site)[name], wanted, rtol=1e-5, atol=1e-6)


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
        assert torch.equal(north[name], south[name]) == name.startswith("head.2."), name
    assert torch.equal(north["head.2.weight"], west["classifier.1.2.weight"])
    assert torch.equal(north["head.2.bias"], west["classifier.1.2.bias"])
    assert set(run.test()["sites"]) == {"north", "south", "west"}


def test_alone_it_is_local_training_up_to_the_rounding_of_an_update(tmp_path: Path) -> None:
    sections = {"model": {"name": "toys:two_layers"}, "training": {"batch_size": 5}}
    only = {"north": sites()["north"]}
    alone = trained(toy_study("local", **sections), only, tmp_path / "local")
    run = trained(toy_study("lg-fedavg", **sections), only, tmp_path / "lg")
    for name, wanted in deployed(alone, "north").items():
        torch.testing.assert_close(deployed(run, "north")[name], wanted, rtol=1e-6, atol=1e-7)


def test_a_site_that_drops_out_uses_the_averaged_layer_on_its_last_body(tmp_path: Path) -> None:
    study = toy_study("lg-fedavg", federation={"on_absent": "continue"})
    run = prepared(study, sites(), tmp_path / "run")
    failing(run, "west")
    run.train()
    others = {name: own for name, own in sites().items() if name != "west"}
    alone = trained(study, others, tmp_path / "others")
    assert same(run.state.groups["head"], alone.state.groups["head"])
    assert torch.equal(deployed(run, "west")["2.weight"], run.state.groups["head"]["weight"])
    assert torch.equal(deployed(run, "west")["1.weight"], run.bench.initial["1.weight"])


def test_findings_by_hand(tmp_path: Path) -> None:
    data = with_findings()
    study = multi_label({"name": "lg-fedavg", "rounds": 1})
    run = trained(study, data, tmp_path)
    start = [run.bench.initial[name] for name in NAMES]
    images = {site: len(own.splits["train"]) for site, own in data.items()}
    head = [torch.zeros_like(t) for t in start[2:]]
    for site, own in data.items():
        values = [t.clone().requires_grad_() for t in start]
        logits = (pixels(own) @ values[0].T + values[1]) @ values[2].T + values[3]
        slopes = torch.autograd.grad(F.binary_cross_entropy_with_logits(logits, own.labels("train")), values)
        share = images[site] / sum(images.values())
        head = [h + share * (t - 0.1 * g) for h, t, g in zip(head, start[2:], slopes[2:], strict=True)]
    for name, wanted in zip(("weight", "bias"), head, strict=True):
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
