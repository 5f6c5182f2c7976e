from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mixed_sites import (
    MOBILE,
    failing,
    mixed_study,
    multi_label,
    passing,
    prepared,
    shapes,
    with_findings,
    without_west,
)
from test_contract import same
from toys import deployed, enlarged, sites, toy_study, trained

from polyclinic.errors import SiteError, StudyError
from polyclinic.methods.fedtgp import FedTGPParams, PrototypeNetwork, fit_prototypes, largest_gap, margin_loss
from polyclinic.seeds import derive_seed
from polyclinic.transfer.class_means import Means


def found_means() -> dict[str, Means]:
    """Two sites; of three classes one holds two, the other two."""
    return {
        "north": {
            "means": torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]]),
            "held": torch.tensor([True, True, False]),
        },
        "south": {
            "means": torch.tensor([[0.0, 2.0], [0.0, 0.0], [0.0, 6.0]]),
            "held": torch.tensor([True, False, True]),
        },
    }


def test_the_margin_is_the_largest_of_the_smallest_distances() -> None:
    """Means over sites: a (0, 1), b (3, 4), c (0, 6). ab √18, ac 5, bc √13."""
    assert largest_gap(found_means()) == pytest.approx(math.sqrt(18))
    one = {"north": {"means": torch.ones(2, 2), "held": torch.tensor([True, False])}}
    assert largest_gap(one) == math.inf


def test_the_loss_in_loops() -> None:
    torch.manual_seed(1)
    means, prototypes, labels = torch.randn(4, 3), torch.randn(3, 3), torch.tensor([0, 2, 2, 1])
    total = 0.0
    for mean, label in zip(means.tolist(), labels.tolist(), strict=True):
        logits = [-(math.dist(mean, p) + 1.5 * (j == label)) for j, p in enumerate(prototypes.tolist())]
        total += math.log(sum(map(math.exp, logits))) - logits[label]
    assert float(margin_loss(means, labels, prototypes, 1.5)) == pytest.approx(total / 4, rel=1e-5)


def test_a_pass_over_one_batch_is_a_step_of_gradient_descent() -> None:
    found, network = found_means(), PrototypeNetwork(3, 2, seed=4)
    start = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    hidden = F.relu(start["embedding"] @ start["hidden.weight"].T + start["hidden.bias"])
    prototypes = hidden @ start["out.weight"].T + start["out.bias"]
    torch.testing.assert_close(network(), prototypes)
    inputs, labels = torch.tensor([[0.0, 0], [3, 4], [0, 2], [0, 6]]), torch.tensor([0, 1, 0, 2])
    slopes = torch.autograd.grad(margin_loss(inputs, labels, prototypes, 2.0), list(start.values()))
    fit_prototypes(network, found, FedTGPParams(server_epochs=1, server_lr=0.5, margin=2.0), seed=0)
    for (name, tensor), slope in zip(start.items(), slopes, strict=True):
        torch.testing.assert_close(dict(network.named_parameters())[name], tensor - 0.5 * slope)


def test_trained_prototypes_are_nearest_to_their_own_means_by_the_margin() -> None:
    draws = torch.Generator().manual_seed(0)
    centres = 10 * torch.eye(8)[:3]
    found = {
        site: {"means": centres + 0.1 * torch.randn(3, 8, generator=draws), "held": torch.ones(3, dtype=torch.bool)}
        for site in ("north", "south", "west")
    }
    network = PrototypeNetwork(3, 8, seed=4)
    inputs, labels = torch.cat([own["means"] for own in found.values()]), torch.arange(3).repeat(3)
    before = margin_loss(inputs, labels, network(), 5.0).item()
    fit_prototypes(network, found, FedTGPParams(server_epochs=400, server_lr=0.05, margin=5.0), seed=0)
    assert torch.cdist(inputs, network()).argmin(1).tolist() == labels.tolist()
    assert margin_loss(inputs, labels, network(), 5.0).item() < 0.01 < before
    assert not torch.equal(PrototypeNetwork(3, 2, seed=4).embedding, PrototypeNetwork(3, 2, seed=5).embedding)


def test_what_passes(tmp_path: Path) -> None:
    run = prepared(toy_study({"name": "fedtgp", "rounds": 2}), sites(), tmp_path)
    seen = passing(run)
    run.train()
    assert [site for site, _, _ in seen] == ["north", "south", "west"] * 2
    for number, (site, down, up) in enumerate(seen):
        assert shapes(down) == ({"prototypes/means": [2, 3], "prototypes/held": [2]} if number >= 3 else {})
        assert not down.scalars
        assert shapes(up) == {"prototypes/means": [2, 3], "prototypes/held": [2]}
        assert set(up.scalars) == {"loss"}
        # West has three patients of each class, below the floor of five.
        assert up.group("prototypes")["held"].tolist() == [site != "west"] * 2
        assert bool(up.group("prototypes")["means"].any()) == (site != "west")


def test_the_server_and_a_site_follow_the_messages(tmp_path: Path) -> None:
    """Prototypes of a round are those trained on its means; a class that nobody has is sent to nobody."""
    study = toy_study({"name": "fedtgp", "floor": 1, "rounds": 1}, task={"classes": ["a", "b", "c"]})
    run = prepared(study, sites(), tmp_path)
    seen = passing(run)
    run.train()
    found = {site: up.group("prototypes") for site, _, up in seen}
    network = PrototypeNetwork(3, 3, derive_seed(0, "prototypes"))
    fit_prototypes(network, found, FedTGPParams(), derive_seed(0, "prototypes", 1))
    prototypes = run.state.groups["prototypes"]
    assert prototypes["held"].tolist() == [True, True, False]
    assert torch.equal(prototypes["means"][:2], network()[:2].detach())
    assert not prototypes["means"][2].any()


def test_without_strength_it_is_local_training_bit_for_bit(tmp_path: Path) -> None:
    sections = {"model": {"name": "toys:two_layers"}, "training": {"batch_size": 5}}
    alone = trained(toy_study("local", **sections), sites(), tmp_path / "local")
    run = trained(toy_study({"name": "fedtgp", "strength": 0}, **sections), sites(), tmp_path / "fedtgp")
    strong = trained(toy_study({"name": "fedtgp"}, **sections), sites(), tmp_path / "strong")
    for site in ("north", "south", "west"):
        assert same(deployed(alone, site), deployed(run, site))
        assert not same(deployed(alone, site), deployed(strong, site))


def test_a_site_that_drops_out(tmp_path: Path) -> None:
    run, alone = without_west({"name": "fedtgp", "floor": 1}, tmp_path)
    assert same(run.state.groups["prototypes"], alone.state.groups["prototypes"])
    none = prepared(run.study, sites(), tmp_path / "none")
    for site in sites():
        failing(none, site)
    with pytest.raises(SiteError, match=r"no site answered 'train' in round 1.*no power"):
        none.train()


def test_different_networks_train_and_are_tested(tmp_path: Path) -> None:
    run = trained(mixed_study({"name": "fedtgp", "floor": 1, "rounds": 2}), enlarged(), tmp_path)
    assert run.state.groups["prototypes"]["means"].shape == (2, 6)
    assert set(run.test()["sites"]) == {"north", "south", "west"}


def test_findings(tmp_path: Path) -> None:
    run = trained(multi_label({"name": "fedtgp", "floor": 1}), with_findings(), tmp_path)
    assert run.state.groups["prototypes"]["held"].tolist() == [True] * 3
    assert all(math.isfinite(record["sites"]["north"]["loss"]) for record in run.records)


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        StudyError, match=r"class means of each site by itself, which aggregation\.backend masked hides"
    ):
        toy_study("fedtgp", aggregation="masked")
    with pytest.raises(StudyError, match=r"there is one: \['a'\].*fedproto"):
        toy_study("fedtgp", task={"kind": "multi-label", "classes": ["a"]})
    with pytest.raises(StudyError, match="segmentation"):
        toy_study("fedtgp", task={"kind": "segmentation", "classes": ["no", "yes"]})
    study = mixed_study("fedtgp", models={"west": {**MOBILE, "embedding": None}})
    with pytest.raises(StudyError, match="north 6, south 6, west 1280"):
        prepared(study, enlarged(), tmp_path)
