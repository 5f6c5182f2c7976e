from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_by_hand import Weights, averaged, close, leaves, own_images, scores, start, stepped
from mixed_sites import mixed_study, multi_label, passing, prepared, shapes, with_findings, without_west
from test_contract import COMPANION, same
from toys import deployed, enlarged, sites, toy_study, trained

from polyclinic.errors import SiteError, StudyError
from polyclinic.federation.site import Site
from polyclinic.models.registry import start_model
from polyclinic.runner import Run
from polyclinic.transfer.companion import Companion, first_companion

TWO_LAYERS = {"name": "toys:two_layers"}
LINEAR = {"name": "toys:linear"}


def divergence(target: torch.Tensor, logits: torch.Tensor, findings: bool) -> torch.Tensor:
    """KL(target ‖ logits) with the target a constant, mean over images (and findings), term by term."""
    target = target.detach()
    if not findings:
        p, q = target.softmax(1), logits.softmax(1)
        return (p * (p / q).log()).sum(1).mean()
    p, q = target.sigmoid(), logits.sigmoid()
    return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()


@pytest.mark.parametrize("findings", [False, True])
def test_two_rounds_by_hand(findings: bool, tmp_path: Path) -> None:
    """A linear companion, one full-batch step a round: both networks move at the same values, one is averaged."""
    alpha, beta, data = 0.3, 0.6, with_findings() if findings else sites()
    settings = {"name": "fml", "rounds": 2, "companion": LINEAR, "alpha": alpha, "beta": beta}
    study = (multi_label if findings else toy_study)(settings, model=TWO_LAYERS)
    run = trained(study, data, tmp_path)
    own = {site: start(run) for site in data}
    companion = [tensor.detach() for tensor in start_model(study, study.method.companion).parameters()]
    task = F.binary_cross_entropy_with_logits if findings else F.cross_entropy
    losses: dict[str, float] = {}
    for _ in range(2):
        ends: dict[str, Weights] = {}
        for site, part in data.items():
            w, m = leaves(own[site]), leaves(companion)
            inputs, targets = own_images(part)
            z, y = scores(w, inputs), scores(m, inputs)
            own_loss = alpha * task(z, targets) + (1 - alpha) * divergence(y, z, findings)
            its_loss = beta * task(y, targets) + (1 - beta) * divergence(z, y, findings)
            own[site], ends[site] = stepped(w, own_loss), stepped(m, its_loss)
            losses[site] = task(z, targets).item()
        companion = averaged(ends)
    for site in data:
        close(deployed(run, site), own[site])
        assert run.records[-1]["sites"][site]["loss"] == pytest.approx(losses[site], rel=1e-5)
    close(run.state.groups["companion"], companion)


def test_what_passes(tmp_path: Path) -> None:
    run = prepared(mixed_study({"name": "fml", "rounds": 2}), enlarged(), tmp_path)
    seen = passing(run)
    run.train()
    assert len(seen) == 6
    for _, down, up in seen:
        assert {name.partition("/")[2] for name in down.arrays} == COMPANION
        assert set(down.groups()) == {"model"}
        assert not down.scalars
        assert shapes(up) == {name.replace("model/", "update/"): shape for name, shape in shapes(down).items()}
        assert set(up.scalars) == {"loss", "weight/update"}
    assert shapes(seen[0][1])["model/blocks.0.weight"] == [8, 1, 3, 3]


def test_with_the_labels_alone_it_is_local_training_bit_for_bit(tmp_path: Path) -> None:
    """Dropout included: the companion, which has its own, takes nothing from the stream of the site's network."""
    network = {"name": "test_fml:with_dropout"}
    sections: dict[str, Any] = {"model": network, "training": {"batch_size": 5, "optimizer": "adam", "clip": 0.5}}
    alone = trained(toy_study("local", **sections), sites(), tmp_path / "local")
    settings = {"name": "fml", "alpha": 1.0, "companion": network}
    run = trained(toy_study(settings, **sections), sites(), tmp_path / "fml")
    taught = trained(toy_study({**settings, "alpha": 0.5}, **sections), sites(), tmp_path / "taught")
    for site in ("north", "south", "west"):
        assert same(deployed(alone, site), deployed(run, site))
        assert not same(deployed(alone, site), deployed(taught, site))


def with_dropout(in_channels: int, out_channels: int, spatial_dims: int, norm: str) -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(16 * in_channels, out_channels)
    )


def test_a_companion_that_learns_from_labels_alone_is_fedavg_bit_for_bit(tmp_path: Path) -> None:
    training = {"batch_size": 5, "momentum": 0.9, "clip": 0.5}
    plain = trained(toy_study("fedavg", model=LINEAR, training=training), sites(), tmp_path / "fedavg")
    settings = {"name": "fml", "beta": 1.0, "companion": LINEAR}
    run = trained(toy_study(settings, model=TWO_LAYERS, training=training), sites(), tmp_path / "fml")
    assert same(run.state.groups["companion"], plain.state.groups["model"])


def test_different_networks_train_and_are_tested_with_a_central_model(tmp_path: Path) -> None:
    run = trained(mixed_study("fml", models={"west": {"name": "mobilenet"}}), enlarged(), tmp_path)
    the_companion_is_tested_as_central(run)


def the_companion_is_tested_as_central(run: Run) -> None:
    settings, tensors = run.method.central(run.state)  # type: ignore[misc]
    assert settings == run.study.method.companion
    assert tensors.keys() == COMPANION
    table = run.test()
    assert set(table["sites"]) == set(table["central"]) == {"north", "south", "west"}


def test_a_site_that_drops_out(tmp_path: Path) -> None:
    run, alone = without_west("fml", tmp_path)
    assert same(run.state.groups["companion"], alone.state.groups["companion"])
    assert same(deployed(run, "west"), dict(run.bench.initial))


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="segmentation"):
        toy_study("fml", task={"kind": "segmentation", "classes": ["no", "yes"]})
    study = toy_study({"name": "fml", "companion": {"norm": "batch-local"}})
    with pytest.raises(StudyError, match=r"method\.companion\.norm: batch-local"):
        prepared(study, sites(), tmp_path / "norm")
    study = toy_study({"name": "fml", "companion": {"name": "smal-cnn"}})
    with pytest.raises(StudyError, match="no network 'smal-cnn'"):
        prepared(study, sites(), tmp_path / "name")


def test_a_companion_that_diverges_is_said_so(tmp_path: Path) -> None:
    run = prepared(toy_study({"name": "fml", "companion": LINEAR}, model=TWO_LAYERS), sites(), tmp_path)
    site: Site = run.channel._sites["north"]
    first = first_companion(site.networks, run.study.method.companion)
    broken = {name: torch.full_like(tensor, torch.inf) for name, tensor in first.items()}
    with pytest.raises(SiteError, match="companion diverged"):
        Companion(site, run.study.method.companion, broken).update()
