from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_contract import same
from toys import deployed, site_data, sites, toy_study, trained

from polyclinic.data.dataset import SiteData
from polyclinic.data.manifest import Case
from polyclinic.errors import StudyError
from polyclinic.methods import creff
from polyclinic.methods.creff import CReFFParams, fit_head, match

NAMES = ("1.weight", "1.bias")


def inputs_of(data: SiteData) -> torch.Tensor:
    """Pixels of the training images as the linear network gets them."""
    return ((data.images[data.splits["train"]] - 0.5) / 0.25).flatten(1)


def gradient_of_class(number: int, parts: list[SiteData], head: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of the mean cross-entropy over all images of a class at some sites, by autograd."""
    inputs = torch.cat([inputs_of(own) for own in parts])
    targets = torch.cat([own.labels("train") for own in parts])
    leaves = [t.clone().requires_grad_() for t in head]
    chosen = targets == number
    loss = F.cross_entropy(inputs[chosen] @ leaves[0].T + leaves[1], targets[chosen])
    return list(torch.autograd.grad(loss, leaves))


def test_the_server_gets_the_gradients_of_all_images_of_a_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start weights' head in the first round, at the re-trained head in the second; the body has no weights."""
    heads: list[Any] = []
    goals: list[Any] = []

    def spy(features: torch.Tensor, labels: torch.Tensor, head: Any, goal: Any, params: Any) -> torch.Tensor:
        heads.append(head)
        goals.append(goal)
        return features

    monkeypatch.setattr(creff, "match", spy)
    data = sites()
    run = trained(toy_study({"name": "creff", "rounds": 2, "head_epochs": 5}), data, tmp_path)
    assert torch.equal(heads[0]["weight"], run.bench.initial["1.weight"])
    assert not torch.allclose(heads[1]["weight"], heads[0]["weight"], atol=0.05)
    for head, goal in zip(heads, goals, strict=True):
        for number in (0, 1):
            weight, bias = gradient_of_class(number, list(data.values()), [head["weight"], head["bias"]])
            torch.testing.assert_close(goal["weight"][number], weight, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(goal["bias"][number], bias, rtol=1e-5, atol=1e-6)


def head_and_features() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    head = {"weight": 0.3 * torch.randn(3, 5, generator=draw), "bias": 0.1 * torch.randn(3, generator=draw)}
    return head, torch.randn(2, 7, 5, generator=draw)


def gradients(head: dict[str, torch.Tensor], features: torch.Tensor, labels: list[int]) -> dict[str, torch.Tensor]:
    """Gradients that sets of features give, by autograd."""
    found: list[list[torch.Tensor]] = []
    for own, label in zip(features, labels, strict=True):
        leaves = [head["weight"].clone().requires_grad_(), head["bias"].clone().requires_grad_()]
        loss = F.cross_entropy(own @ leaves[0].T + leaves[1], torch.full((len(own),), label))
        found.append(list(torch.autograd.grad(loss, leaves)))
    return {"weight": torch.stack([g[0] for g in found]), "bias": torch.stack([g[1] for g in found])}


def test_features_come_to_give_the_wanted_gradients() -> None:
    head, features = head_and_features()
    labels = torch.tensor([0, 2])
    wanted = gradients(head, features + 2.0, [0, 2])
    before = gradients(head, features, [0, 2])
    found = match(features, labels, head, wanted, CReFFParams(match_steps=400))
    after = gradients(head, found, [0, 2])
    cosines = [F.cosine_similarity(g["weight"], wanted["weight"], dim=2) for g in (before, after)]
    assert cosines[0].min() < 0.5
    assert cosines[1].min() > 0.95


def test_features_that_give_the_wanted_gradients_stay() -> None:
    head, features = head_and_features()
    found = match(features, torch.tensor([0, 2]), head, gradients(head, features, [0, 2]), CReFFParams())
    torch.testing.assert_close(found, features, rtol=0, atol=1e-3)
    assert torch.equal(match(features, torch.tensor([0, 2]), head, head, CReFFParams(match_steps=0)), features)


def test_a_pass_over_one_batch_is_a_step_of_gradient_descent() -> None:
    head, features = head_and_features()
    labels = torch.tensor([0, 2])
    start = fit_head(features, labels, head, CReFFParams(head_epochs=0), seed=5)
    leaves = [start[key].clone().requires_grad_() for key in ("weight", "bias")]
    loss = F.cross_entropy(features.flatten(0, 1) @ leaves[0].T + leaves[1], torch.tensor([0] * 7 + [2] * 7))
    slopes = torch.autograd.grad(loss, leaves)
    found = fit_head(features, labels, head, CReFFParams(head_epochs=1, head_lr=0.5), seed=5)
    for key, leaf, slope in zip(("weight", "bias"), leaves, slopes, strict=True):
        torch.testing.assert_close(found[key], (leaf - 0.5 * slope).detach())
    assert start["weight"].abs().max() <= 5**-0.5
    assert not torch.equal(
        start["weight"], fit_head(features, labels, head, CReFFParams(head_epochs=0), seed=6)["weight"]
    )


def test_the_averaged_model_is_fedavgs_and_only_the_last_layer_is_another(tmp_path: Path) -> None:
    sections = {"model": {"name": "toys:two_layers"}, "training": {"batch_size": 5}}
    plain = trained(toy_study("fedavg", **sections), sites(), tmp_path / "fedavg")
    run = trained(toy_study("creff", **sections), sites(), tmp_path / "creff")
    assert same(plain.state.groups["model"], run.state.groups["model"])
    used = deployed(run, "north")
    for name, tensor in run.state.groups["model"].items():
        assert torch.equal(used[name], tensor) == name.startswith("1."), name
    assert same(used, run.state.groups["chosen"])
    assert list(run.state.groups["head"]) == ["2.weight", "2.bias"]


def test_without_re_training_it_is_fedavg(tmp_path: Path) -> None:
    plain = trained(toy_study("fedavg"), sites(), tmp_path / "fedavg")
    run = trained(toy_study({"name": "creff", "head_epochs": 0}), sites(), tmp_path / "creff")
    assert same(deployed(plain, "west"), deployed(run, "west"))


def test_a_class_that_nobody_has_is_left_out(tmp_path: Path) -> None:
    run = trained(toy_study("creff", task={"classes": ["a", "b", "c"]}), sites(), tmp_path)
    assert run.state.groups["features"]["fitted"].tolist() == [3, 3, 0]
    inputs = torch.cat([inputs_of(own) for own in sites().values()])
    used = deployed(run, "north")
    assert 2 not in (inputs @ used["1.weight"].T + used["1.bias"]).argmax(1).tolist()


def rare_data(site: str, seed: int) -> SiteData:
    """One image in ten is of class b, a little brighter on average."""
    draw = torch.Generator().manual_seed(seed)
    targets = (torch.arange(100) % 10 == 0).long()
    pixels = (0.4 + 0.1 * torch.randn(100, 1, 4, 4, generator=draw) + 0.05 * targets[:, None, None, None]).clamp(0, 1)
    cases = [Case(f"{i}.png", f"{site}-{i}", site, label="ab"[t], split="train") for i, t in enumerate(targets)]
    splits = {"train": torch.arange(100), "val": torch.arange(0), "test": torch.arange(0)}
    return SiteData(site, cases, pixels, targets, splits)


def test_the_re_trained_layer_finds_a_rare_class_that_averaging_overlooks(tmp_path: Path) -> None:
    data = {site: rare_data(site, k) for k, site in enumerate(("north", "south", "west"))}
    study = toy_study("creff", training={"batch_size": 20})
    run = trained(study, data, tmp_path)
    inputs = torch.cat([inputs_of(own) for own in data.values()])
    targets = torch.cat([own.labels("train") for own in data.values()])
    recall = {}
    for name, model in {"averaged": run.state.groups["model"], "used": deployed(run, "north")}.items():
        found = (inputs @ model["1.weight"].T + model["1.bias"]).argmax(1)
        recall[name] = (found[targets == 1] == 1).float().mean().item()
    assert recall["averaged"] < 0.2
    assert recall["used"] > 0.5


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"creff has gradients by class.*multi-label"):
        toy_study("creff", task={"kind": "multi-label"})
    with pytest.raises(StudyError, match="both re-train the last layer"):
        toy_study("creff", synthesis={"generator": "features"})
    study = toy_study("creff", model={"name": "test_creff:without_bias"})
    with pytest.raises(StudyError, match="'1' has no bias"):
        trained(study, {"north": site_data("north", 6)}, tmp_path / "bias")
    study = toy_study("creff", model={"name": "test_creff:convolution"})
    with pytest.raises(StudyError, match="'0', is Conv2d"):
        trained(study, {"north": site_data("north", 6)}, tmp_path / "convolution")


def without_bias(in_channels: int, out_channels: int, spatial_dims: int, norm: str) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(in_channels * 16, out_channels, bias=False))


def convolution(in_channels: int, out_channels: int, spatial_dims: int, norm: str) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Conv2d(in_channels, out_channels, 4), torch.nn.Flatten())
