from __future__ import annotations

import operator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mixed_sites import MOBILE, failing, multi_label, passing, prepared, shapes, with_findings
from test_contract import same
from torch import nn
from toys import IMAGES, deployed, enlarged, sites, toy_study, trained

from polyclinic.data.dataset import SiteData
from polyclinic.errors import StudyError
from polyclinic.methods.heterofl import check_block, masked
from polyclinic.models.normalisation import norm_layer
from polyclinic.models.registry import start_model
from polyclinic.models.weights import load_tensors
from polyclinic.study import Study

WIDE = {"name": "small-cnn", "width": 4, "norm": "group"}
NARROW = {**WIDE, "width": 2}
WIDTHS = {"north": 2, "south": 4, "west": 3}


def widths_study(settings: dict[str, Any] | None = None, **sections: Any) -> Study:
    """North has half of the channels, west three quarters, south all; full batches of 16 x 16 pixels."""
    base: dict[str, Any] = {
        "model": WIDE,
        "models": {"north": NARROW, "west": {**WIDE, "width": 3}},
        "data": {"image": {"size": [16, 16]}},
    }
    return toy_study({"name": "heterofl", "rounds": 2, **(settings or {})}, **{**base, **sections})


def block(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return tensor[tuple(slice(0, n) for n in like.shape)]


def stepped(study: Study, site: str, model: dict[str, torch.Tensor], data: Any) -> dict[str, torch.Tensor]:
    """A site's network after one full-batch step from its block of the model."""
    network = start_model(study, study.model_of(site))
    own = dict(network.named_parameters())
    load_tensors(network, {name: block(model[name], p) for name, p in own.items()})
    train = data.splits["train"]
    loss = F.cross_entropy(network(data.inputs(train)), data.targets[train])
    gradients = torch.autograd.grad(loss, list(own.values()))
    return {name: (p - 0.1 * g).detach() for (name, p), g in zip(own.items(), gradients, strict=True)}


def test_two_rounds_by_hand_entry_by_entry(tmp_path: Path) -> None:
    shallow = {**WIDE, "options": {"strides": [2, 2]}}
    narrower = {site: {**shallow, "width": width} for site, width in WIDTHS.items()}
    study, data = widths_study(model=shallow, models=narrower), enlarged(16)
    run = trained(study, data, tmp_path)
    model = dict(start_model(study).state_dict())
    for _ in range(2):
        ends = {site: stepped(study, site, model, own) for site, own in data.items()}
        images = {site: len(own.splits["train"]) for site, own in data.items()}
        new = {}
        for name, tensor in model.items():
            values, moved = tensor.numpy().astype(np.float64), {s: end[name].numpy() for s, end in ends.items()}
            for at in np.ndindex(*values.shape):
                holders = [s for s, own in moved.items() if all(map(operator.lt, at, own.shape))]
                values[at] = sum(images[s] * float(moved[s][at]) for s in holders) / sum(images[s] for s in holders)
            new[name] = torch.from_numpy(values).float()
        model = new
    assert run.state.groups["model"].keys() == model.keys()
    for name, wanted in model.items():
        torch.testing.assert_close(run.state.groups["model"][name], wanted, rtol=1e-4, atol=1e-6)
    for site in data:
        for name, tensor in deployed(run, site).items():
            assert torch.equal(tensor, block(run.state.groups["model"][name], tensor))


def test_what_passes(tmp_path: Path) -> None:
    run = prepared(widths_study(), enlarged(16), tmp_path)
    seen = passing(run)
    run.train()
    assert [site for site, _, _ in seen] == ["north", "south", "west"] * 2
    for site, down, up in seen:
        width = WIDTHS[site]
        sent = shapes(down)
        assert sent["model/blocks.0.weight"] == [width, 1, 3, 3]
        assert sent["model/blocks.9.weight"] == [4 * width, 4 * width, 3, 3]
        assert sent["model/head.weight"] == [2, 4 * width]
        update = {name.replace("model/", "update/"): shape for name, shape in sent.items()}
        assert shapes(up) == {**update, "classes/held": [2]}
        assert set(up.scalars) == {"loss", "weight/update", "weight/classes"}
        assert not down.scalars


def test_entries_that_no_site_holds_stay_as_they_are(tmp_path: Path) -> None:
    study = widths_study(models=dict.fromkeys(("north", "south", "west"), NARROW))
    run = trained(study, enlarged(16), tmp_path)
    start, end = start_model(study).state_dict(), run.state.groups["model"]
    for name, tensor in end.items():
        held = torch.zeros(tensor.shape, dtype=torch.bool)
        held[tuple(slice(0, n) for n in deployed(run, "north")[name].shape)] = True
        assert torch.equal(tensor[~held], start[name][~held])
    assert not torch.equal(end["head.weight"][:, :8], start["head.weight"][:, :8])


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_with_one_network_it_is_fedavg_with_local_statistics_bit_for_bit(norm: str, tmp_path: Path) -> None:
    sections = {"data": {"image": {"size": [16, 16]}}, "training": {"batch_size": 5}}
    same_as = "batch-local" if norm == "batch" else norm
    plain = trained(toy_study("fedavg", model={**WIDE, "norm": same_as}, **sections), enlarged(16), tmp_path / "a")
    run = trained(toy_study("heterofl", model={**WIDE, "norm": norm}, **sections), enlarged(16), tmp_path / "b")
    assert same(run.state.groups["model"], plain.state.groups["model"])
    for site in ("north", "south", "west"):
        assert same(deployed(plain, site), deployed(run, site))
    assert run.method.central(run.state) is None


def test_masked_logits_are_zero_in_the_loss_and_learn_nothing() -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4)
    absent = torch.tensor([False, True, False])
    with masked(model, absent):
        logits = model(inputs)
    plain = model(inputs)
    assert torch.equal(logits[:, ~absent], plain[:, ~absent])
    assert not logits[:, 1].any()
    assert plain[:, 1].any()
    F.cross_entropy(logits, torch.tensor([0, 2, 0, 2, 0])).backward()
    gradient = model[0].weight.grad
    assert gradient is not None
    assert not gradient[1].any()
    assert gradient[0].any()


def test_a_class_that_a_site_lacks_is_not_trained_away_there(tmp_path: Path) -> None:
    """No toy site has class c: its row of the last layer moves only without the mask."""
    sections = {"task": {"classes": ["a", "b", "c"]}}
    run = trained(widths_study(**sections), enlarged(16), tmp_path / "masked")
    start = run.bench.initial["head.weight"]
    assert torch.equal(run.state.groups["model"]["head.weight"][2], start[2])
    assert not torch.equal(run.state.groups["model"]["head.weight"][1], start[1])
    plain = trained(widths_study({"masked": False}, **sections), enlarged(16), tmp_path / "plain")
    assert not torch.equal(plain.state.groups["model"]["head.weight"][2], start[2])


OF_SITES = {"north": (0, 1), "south": (1, 2), "west": (2, 1)}
"""Which two of four classes each site has; nobody has the last."""
FOUR = {"task": {"classes": ["a", "b", "c", "d"]}, "training": {"weight_decay": 0.5}}


def with_four_classes(data: dict[str, SiteData]) -> dict[str, SiteData]:
    """The sites with other labels of their two kinds of images."""
    made = {}
    for site, own in data.items():
        targets = torch.tensor(OF_SITES[site])[own.targets]
        cases = [replace(case, label="abcd"[int(y)]) for case, y in zip(own.cases, targets, strict=True)]
        made[site] = SiteData(site, cases, own.images, targets, own.splits)
    return made


def stepped_where_masked(study: Study, site: str, model: dict[str, torch.Tensor], data: Any) -> dict[str, torch.Tensor]:
    """As ``stepped``, with the site's other logits zero and weight decay."""
    network = start_model(study, study.model_of(site))
    own = dict(network.named_parameters())
    load_tensors(network, {name: block(model[name], p) for name, p in own.items()})
    train = data.splits["train"]
    logits = network(data.inputs(train)) * torch.tensor([float(c in OF_SITES[site]) for c in range(4)])
    gradients = torch.autograd.grad(F.cross_entropy(logits, data.targets[train]), list(own.values()))
    return {name: (p - 0.1 * (g + 0.5 * p)).detach() for (name, p), g in zip(own.items(), gradients, strict=True)}


@pytest.mark.parametrize("aggregation", ["plain", "masked", "several networks"])
def test_rows_of_the_last_layer_are_averaged_over_the_sites_that_have_their_class(
    aggregation: str, tmp_path: Path
) -> None:
    """By hand, a row: class a is north's alone, b is everybody's, c that of south and west, d nobody's."""
    if aggregation == "several networks":
        data, study = with_four_classes(enlarged(16)), widths_study({"rounds": 1}, **FOUR)
        names = "head.weight", "head.bias"
    else:
        data = with_four_classes(sites())
        study = toy_study({"name": "heterofl", "rounds": 2}, aggregation=aggregation, **FOUR)
        names = "1.weight", "1.bias"
    run = trained(study, data, tmp_path)
    model = dict(start_model(study).state_dict())
    for _ in range(study.method.rounds):
        ends = {site: stepped_where_masked(study, site, model, own) for site, own in data.items()}
        new = {name: model[name].clone() for name in names}
        for name in names:
            for c, *at in np.ndindex(*model[name].shape):
                there = [s for s, end in ends.items() if all(map(operator.lt, (c, *at), end[name].shape))]
                holders = [s for s in there if c in OF_SITES[s]]
                if holders:
                    moved = sum(IMAGES[s] * ends[s][name][(c, *at)] for s in holders)
                    new[name][(c, *at)] = moved / sum(IMAGES[s] for s in holders)
        model = {**model, **new}
    # Hidden sums are of fixed-point numbers.
    tolerance = {"rtol": 0, "atol": 3e-4} if aggregation == "masked" else {"rtol": 1e-5, "atol": 1e-6}
    for name in names:
        torch.testing.assert_close(run.state.groups["model"][name], model[name], **tolerance)
        assert torch.equal(run.state.groups["model"][name][3], start_model(study).state_dict()[name][3])


def test_without_masks_which_classes_a_site_has_is_not_sent(tmp_path: Path) -> None:
    run = prepared(widths_study({"masked": False, "rounds": 1}, **FOUR), with_four_classes(enlarged(16)), tmp_path)
    seen = passing(run)
    run.train()
    assert all(up.groups() == ["update"] and set(up.scalars) == {"loss", "weight/update"} for _, _, up in seen)


@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
def test_a_scaler_before_a_normalisation_has_no_effect(norm: str) -> None:
    """Which is why there is none: what follows a convolution does not see a common factor, but for its epsilon."""
    torch.manual_seed(0)
    layer, maps = norm_layer(norm, 8, 2).train(), 10 * torch.randn(4, 8, 6, 6)
    torch.testing.assert_close(layer(2 * maps), layer(maps), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_widths_of_every_family_are_tested_with_a_central_model(norm: str, tmp_path: Path) -> None:
    for number, (wide, narrow) in enumerate(
        [
            ({"name": "small-cnn", "width": 4}, {"name": "small-cnn", "width": 2}),
            ({"name": "small-resnet", "width": 4}, {"name": "small-resnet", "width": 2}),
            ({"name": "mobilenet", "options": {"alpha": 0.5}}, {"name": "mobilenet", "options": {"alpha": 0.25}}),
        ]
    ):
        study = widths_study(
            {"rounds": 1},
            model={**wide, "norm": norm},
            models={"west": {**narrow, "norm": norm}},
            data={"image": {"size": [32, 32]}},
            training={"batch_size": 6, "lr": 0.01},
        )
        run = trained(study, enlarged(), tmp_path / str(number))
        found = run.method.central(run.state)
        assert found is not None
        assert found[0] == study.model
        assert not any("running" in name for name in found[1])
        table = run.test()
        assert set(table["sites"]) == set(table["central"]) == {"north", "south", "west"}


def test_findings_are_not_masked(tmp_path: Path) -> None:
    settings = {"name": "heterofl", "rounds": 1}
    sections: dict[str, Any] = {"model": WIDE, "models": {"north": NARROW}, "data": {"image": {"size": [16, 16]}}}
    run = trained(multi_label(settings, **sections), with_findings(16), tmp_path)
    assert not run.method.absent(run.channel._sites["west"]).any()  # type: ignore[attr-defined]
    assert not torch.equal(run.state.groups["model"]["head.weight"], run.bench.initial["head.weight"])


def test_a_site_that_drops_out(tmp_path: Path) -> None:
    study = widths_study(federation={"on_absent": "continue"})
    run = prepared(study, enlarged(16), tmp_path / "run")
    failing(run, "south")
    run.train()
    start, end = start_model(study).state_dict(), run.state.groups["model"]
    # South alone holds the last quarter.
    assert torch.equal(end["blocks.0.weight"][3], start["blocks.0.weight"][3])
    assert not torch.equal(end["blocks.0.weight"][2], start["blocks.0.weight"][2])


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(StudyError, match=r"updates of different shapes of each site by itself.*masked hides"):
        widths_study(aggregation="masked")
    with pytest.raises(StudyError, match=r"keep their place.*'north' has 'mobilenet', model is 'small-cnn'.*fml"):
        widths_study(models={"north": MOBILE})
    resnet = {"name": "resnet18", "options": {"widen_factor": 2}}
    with pytest.raises(StudyError, match="keep their place"):
        widths_study(model={"name": "resnet18"}, models={"north": resnet})
    with pytest.raises(StudyError, match=r"'north' may differ from model in width alone, but norm is batch"):
        widths_study(models={"north": {**NARROW, "norm": "batch"}})
    with pytest.raises(StudyError, match="in width alone, but options is"):
        widths_study(models={"north": {**NARROW, "options": {"strides": [2, 2, 1, 1]}}})


def test_a_network_wider_than_the_servers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"'north' is no leading block.*blocks\.0\.weight has shape \[5, 1, 3, 3\]"):
        prepared(widths_study(models={"north": {**WIDE, "width": 5}}), enlarged(16), tmp_path)
    with pytest.raises(StudyError, match="None there"):
        check_block("north", nn.Sequential(nn.Linear(2, 2, bias=False)), nn.Sequential(nn.Linear(2, 2)))
    check_block("north", nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(3, 2)))
