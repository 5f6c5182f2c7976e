from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from linear_by_hand import Weights, averaged, close, leaves, own_images, scores, start, stepped
from mixed_sites import failing, mixed_study, multi_label, passing, prepared, with_findings, without_west
from test_contract import COMPANION, same
from test_fml import LINEAR, TWO_LAYERS, divergence, the_companion_is_tested_as_central
from toys import deployed, enlarged, sites, toy_study, trained

from polyclinic.errors import SiteError, StudyError
from polyclinic.methods.fedkd import FedKDParams, factorised, first_map, multiplied
from polyclinic.models.last_layer import last_layer
from polyclinic.models.registry import start_model
from polyclinic.seeds import derive_seed

EXACT = {"energy_first": 1.0, "energy_last": 1.0}


@pytest.mark.parametrize("findings", [False, True])
def test_two_rounds_by_hand(findings: bool, tmp_path: Path) -> None:
    """Features: three of the own network, the sixteen pixels of the linear companion; all move at the same values."""
    strength, data = 0.8, with_findings() if findings else sites()
    settings = {"name": "fedkd", "rounds": 2, "companion": LINEAR, "strength": strength, **EXACT}
    study = (multi_label if findings else toy_study)(settings, model=TWO_LAYERS)
    run = trained(study, data, tmp_path)
    linear = start_model(study, study.method.companion)
    companion = [tensor.detach() for tensor in linear.parameters()]
    own = {site: start(run) for site in data}
    first = first_map(last_layer(run.bench.model)[1], last_layer(linear)[1], derive_seed(0, "map of features"))
    assert first.shape == (3, 16)
    assert first.abs().max() <= 0.25
    maps = dict.fromkeys(data, first)
    task = F.binary_cross_entropy_with_logits if findings else F.cross_entropy
    told: dict[str, float] = {}
    for _ in range(2):
        ends: dict[str, Weights] = {}
        for site, part in data.items():
            w, m, (between,) = leaves(own[site]), leaves(companion), leaves([maps[site]])
            inputs, targets = own_images(part)
            z, y = scores(w, inputs), scores(m, inputs)
            feature, mapped = scores(w[:2], inputs), inputs @ between.T
            losses = task(z, targets), task(y, targets)
            share = strength / (losses[0] + losses[1]).item()
            own_loss = losses[0] + share * (divergence(y, z, findings) + ((feature - mapped.detach()) ** 2).mean())
            its_loss = losses[1] + share * (divergence(z, y, findings) + ((feature.detach() - mapped) ** 2).mean())
            own[site] = stepped(w, own_loss)
            told[site] = losses[0].item()
            *ends[site], maps[site] = stepped([*m, between], its_loss)
        companion = averaged(ends)
    for site in data:
        close(deployed(run, site), own[site], rtol=1e-4)
        assert run.records[-1]["sites"][site]["loss"] == pytest.approx(told[site], rel=1e-5)
        kept = run.channel._sites[site].state.load("map")
        assert kept is not None
        torch.testing.assert_close(kept[0]["weight"], maps[site], rtol=1e-4, atol=1e-6)
    close(run.state.groups["companion"], companion, rtol=1e-4)


def known_matrix(values: list[float], rows: int = 12, columns: int = 10) -> torch.Tensor:
    """A matrix with these singular values."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, len(values), dtype=torch.float64))[0] for n in (rows, columns))
    return (left * torch.tensor(values, dtype=torch.float64)) @ right.T


@pytest.mark.parametrize(("energy", "rank"), [(0.7, 1), (0.77, 2), (0.95, 2), (0.96, 3)])
def test_the_rank_holds_the_wanted_share_of_the_squares(energy: float, rank: int) -> None:
    """Singular values 4, 2, 1: squares 16, 4, 1 of 21, so 0.762, 0.952 and 1 are held by one, two and three."""
    matrix = known_matrix([4.0, 2.0, 1.0])
    parts = factorised({"w": matrix, "b": torch.arange(3.0)}, energy)
    assert parts["left"]["w"].shape == (12, rank)
    assert parts["right"]["w"].shape == (rank, 10)
    assert list(parts["whole"]) == ["b"]
    made = multiplied(parts, {"w": matrix, "b": torch.zeros(3)})
    assert list(made) == ["w", "b"]
    lost = sum(s**2 for s in [4.0, 2.0, 1.0][rank:])
    assert float((made["w"] - matrix).square().sum()) == pytest.approx(lost, abs=1e-9)
    assert torch.equal(made["b"], torch.arange(3.0).double())


def test_a_convolution_is_a_matrix_of_its_filters_and_small_ones_go_whole() -> None:
    conv = known_matrix([4.0], 8, 18).reshape(8, 2, 3, 3).float()
    full = torch.randn(4, 4)
    zero = torch.zeros(6, 6)
    parts = factorised({"conv": conv, "full": full, "zero": zero}, 0.95)
    assert parts["left"]["conv"].shape == (8, 1)
    assert parts["right"]["conv"].shape == (1, 18)
    assert set(parts["whole"]) == {"full", "zero"}
    made = multiplied(parts, {"conv": conv, "full": full, "zero": zero})
    torch.testing.assert_close(made["conv"].float(), conv)
    assert torch.equal(made["full"].float(), full)
    torch.testing.assert_close(multiplied(factorised({"w": full}, 1.0), {"w": full})["w"].float(), full)


def test_the_energy_rises_from_the_first_round_to_the_last() -> None:
    params = FedKDParams(rounds=4)
    assert [params.energy(n) for n in (1, 2, 4)] == pytest.approx([0.95, 0.96, 0.98])
    assert FedKDParams(rounds=1).energy(1) == 0.95


def test_what_passes(tmp_path: Path) -> None:
    run = prepared(mixed_study({"name": "fedkd", "rounds": 2}), enlarged(), tmp_path)
    seen = passing(run)
    run.train()
    companion = run.state.groups["companion"]
    assert len(seen) == 6
    for _, down, up in seen:
        assert {name.partition("/")[2] for name in down.arrays} == COMPANION
        assert set(down.groups()) == {"model"}
        left, right, whole = (up.group(part) for part in ("left", "right", "whole"))
        assert left.keys() == right.keys()
        assert left.keys() | whole.keys() == COMPANION
        assert set(up.groups()) <= {"left", "right", "whole"}
        for name, tensor in left.items():
            rank = tensor.shape[1]
            assert tensor.shape[0] == companion[name].shape[0]
            assert list(right[name].shape) == [rank, companion[name][0].numel()]
            assert rank * (len(tensor) + right[name].shape[1]) < companion[name].numel()
        for name, tensor in whole.items():
            assert tensor.shape == companion[name].shape
        assert set(up.scalars) == {"loss", "weight/update"}
        assert up.nbytes < down.nbytes
    assert any(up.group("left") for _, _, up in seen)


def test_without_strength_it_is_local_bit_for_bit_and_fedavg_of_the_companion(tmp_path: Path) -> None:
    training = {"batch_size": 5}
    alone = trained(toy_study("local", model=TWO_LAYERS, training=training), sites(), tmp_path / "local")
    plain = trained(toy_study("fedavg", model=LINEAR, training=training), sites(), tmp_path / "fedavg")
    settings = {"name": "fedkd", "strength": 0, "companion": LINEAR, **EXACT}
    run = trained(toy_study(settings, model=TWO_LAYERS, training=training), sites(), tmp_path / "fedkd")
    for site in ("north", "south", "west"):
        assert same(deployed(alone, site), deployed(run, site))
    for name, wanted in plain.state.groups["model"].items():
        torch.testing.assert_close(run.state.groups["companion"][name], wanted, rtol=1e-5, atol=1e-6)


def test_different_networks_train_and_are_tested_with_a_central_model(tmp_path: Path) -> None:
    run = trained(mixed_study("fedkd", models={"west": {"name": "mobilenet"}}), enlarged(), tmp_path)
    kept = [run.channel._sites[site].state.load("map") for site in ("north", "west")]
    assert [list(k[0]["weight"].shape) for k in kept if k] == [[6, 32], [1280, 32]]
    the_companion_is_tested_as_central(run)


def test_a_site_that_drops_out(tmp_path: Path) -> None:
    run, alone = without_west("fedkd", tmp_path)
    assert same(run.state.groups["companion"], alone.state.groups["companion"])
    none = prepared(run.study, sites(), tmp_path / "none")
    for site in sites():
        failing(none, site)
    with pytest.raises(SiteError, match=r"no site answered 'train' in round 1.*no power"):
        none.train()


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"factors of an update of each site by itself.*masked hides"):
        toy_study("fedkd", aggregation="masked")
    with pytest.raises(StudyError, match="segmentation"):
        toy_study("fedkd", task={"kind": "segmentation", "classes": ["no", "yes"]})
    study = toy_study("fedkd", model={"name": "test_creff:convolution"})
    with pytest.raises(StudyError, match="'0', is Conv2d"):
        prepared(study, sites(), tmp_path)
