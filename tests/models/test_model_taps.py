"""Penultimate features, from which the last layer makes the logits, and the maps on the way to them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from polyclinic.errors import StudyError
from polyclinic.models.catalog import NETWORKS
from polyclinic.models.last_layer import last_layer
from polyclinic.models.registry import build_model
from polyclinic.models.taps import feature_size, feature_tap, features, level_taps, tapped
from polyclinic.models.weights import save_tensors
from polyclinic.study import ImageSettings, ModelSettings, TaskSettings

EVERY = [(n.name, d) for n in NETWORKS.values() if "multi-class" in n.tasks for d in n.dims]
SHORT = {"small-cnn": "head", "mobilenet": "classifier", "efficientnet-b0": "_fc"}
SHORT |= dict.fromkeys(("resnet18", "resnet34", "resnet50", "small-resnet", "shufflenet"), "fc")


@pytest.mark.parametrize(("name", "dims"), EVERY)
def test_the_last_layer_turns_features_into_logits(name: str, dims: int) -> None:
    size = [32] * dims if "dense" in name else [16, 20, 17][:dims]
    model = build_model(ModelSettings(name=name), TaskSettings(classes=["a", "b"]), ImageSettings(size=size), 0).eval()
    images = torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = features(model, images)
        logits = model.get_submodule(SHORT.get(name, "class_layers.out"))(found)
        torch.testing.assert_close(logits, model(images))
    assert found.ndim == 2
    assert not model.get_submodule(feature_tap(model))._forward_hooks


def test_gradients_flow_through_features() -> None:
    model = build_model(ModelSettings(width=2), TaskSettings(classes=["a", "b"]), ImageSettings(size=[8, 8]), 0)
    features(model, torch.rand(2, 1, 8, 8)).sum().backward()
    assert model.get_submodule("blocks.0").weight.grad is not None


def test_networks_without_a_tap_are_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(StudyError, match="Sequential does not say where its features are"):
        feature_tap(model)
    model.feature_tap = "trunk"  # type: ignore[assignment]
    with pytest.raises(StudyError, match="has no module 'trunk'"):
        feature_tap(model)
    model.feature_tap = "0"  # type: ignore[assignment]
    assert features(model, torch.ones(1, 1, 2, 2)).tolist() == [[1, 1, 1, 1]]


EVERY_LEVEL = [(n.name, d) for n in NETWORKS.values() if n.taps for d in n.dims]
CHANNELS = {
    "small-cnn": [16, 32, 64, 64],
    "mobilenet": [16, 16, 48, 160],
    "resnet18": [64, 128, 256, 512],
    "resnet34": [64, 128, 256, 512],
    "resnet50": [256, 512, 1024, 2048],
    "small-resnet": [16, 32, 64],
    "shufflenet": [24, 48, 96, 192],
    "efficientnet-b0": [24, 40, 112, 320],
    "densenet121": [256, 512, 1024, 1024],
    "densenet3d": [64, 128, 256, 256],
}
"""From the papers' tables; densenet3d: half of what the block before has, and 32 more a layer."""


@pytest.mark.parametrize(("name", "dims"), EVERY_LEVEL)
def test_levels_are_maps_of_rising_depth(name: str, dims: int) -> None:
    size = [32] * dims
    model = build_model(ModelSettings(name=name), TaskSettings(classes=["a", "b"]), ImageSettings(size=size), 0).eval()
    taps = level_taps(model)
    assert taps == NETWORKS[name].taps
    with torch.no_grad(), tapped(model, taps) as seen:
        model(torch.zeros(2, 1, *size))
    maps = [seen[tap][0] for tap in taps]
    assert all(len(seen[tap]) == 1 for tap in taps)
    assert [m.shape[1] for m in maps] == CHANNELS[name]
    assert all(m.shape[0] == 2 and m.ndim == 2 + dims for m in maps)
    sides = [m.shape[-1] for m in maps]
    assert sides == sorted(sides, reverse=True)
    assert not any(module._forward_hooks for module in model.modules())


def test_networks_of_other_depth_have_other_levels() -> None:
    settings = ModelSettings(width=2, options={"strides": [2, 1]})
    model = build_model(settings, TaskSettings(classes=["a", "b"]), ImageSettings(size=[8, 8]), 0)
    assert level_taps(model) == ("blocks.2", "blocks.5")


def test_tapped_maps_carry_gradients_and_one_entry_a_pass() -> None:
    model = build_model(ModelSettings(width=2), TaskSettings(classes=["a", "b"]), ImageSettings(size=[8, 8]), 0)
    with tapped(model, ["blocks.2", "blocks.8"]) as seen:
        model(torch.rand(2, 1, 8, 8))
        model(torch.rand(3, 1, 8, 8))
    assert [len(m) for m in seen["blocks.8"]] == [2, 3]
    seen["blocks.8"][1].sum().backward()
    assert model.get_submodule("blocks.0").weight.grad is not None
    assert model.get_submodule("head").weight.grad is None
    model(torch.rand(2, 1, 8, 8))
    assert len(seen["blocks.2"]) == 2


def test_levels_that_do_not_exist_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten())
    with pytest.raises(StudyError, match=r"Sequential does not say where its maps are.*'taps'.*Its modules are: 0, 1"):
        level_taps(model)
    model.taps = ("0", "trunk")  # type: ignore[assignment]
    with pytest.raises(StudyError, match="no module 'trunk', which its 'taps' name"):
        level_taps(model)
    model.taps = ["0"]  # type: ignore[assignment]
    assert level_taps(model) == ("0",)
    with pytest.raises(StudyError, match="has no module '7' to tap"), tapped(model, ["7"]):
        pass
    for wrong in ("0", (), (3,)):
        model.taps = wrong  # type: ignore[assignment]
        with pytest.raises(StudyError, match="does not say where its maps are"):
            level_taps(model)


@pytest.mark.parametrize("name", ["small-cnn", "mobilenet", "resnet18", "shufflenet", "efficientnet-b0", "densenet121"])
def test_an_embedding_gives_different_networks_features_alike(name: str) -> None:
    task, image = TaskSettings(classes=["a", "b", "c"]), ImageSettings(size=[32, 32])
    plain = build_model(ModelSettings(name=name), task, image, 0)
    model = build_model(ModelSettings(name=name, embedding=5), task, image, 0).eval()
    assert feature_size(model) == 5
    images = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = features(model, images)
        _, last = last_layer(model)
        torch.testing.assert_close(last(found), model(images))
    assert found.shape == (2, 5)
    # Every feature passes its gradient on whatever its sign: no activation that could die.
    bias = model.get_submodule(feature_tap(model)).get_parameter("bias")
    (slope,) = torch.autograd.grad(features(model, images).sum(), bias)
    torch.testing.assert_close(slope, torch.full((5,), 2.0))
    before = feature_size(plain)
    added = before * 5 + 5 + 5 * 3 + 3 - (before * 3 + 3)
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters()) == added


def test_an_embedding_is_found_by_weights_with_and_without_it(tmp_path: Path) -> None:
    task, image = TaskSettings(classes=["a", "b"]), ImageSettings(size=[8, 8])
    settings = ModelSettings(width=2, embedding=3)
    saved = build_model(settings, task, image, 9).state_dict()
    fresh = build_model(settings, task, image, 0).state_dict()
    save_tensors(tmp_path / "all.safetensors", saved)
    loaded = build_model(settings, task, image, 0, weights_path=tmp_path / "all.safetensors").state_dict()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    trunk = {name: tensor for name, tensor in saved.items() if not name.startswith("head.")}
    save_tensors(tmp_path / "trunk.safetensors", trunk)
    loaded = build_model(settings, task, image, 0, weights_path=tmp_path / "trunk.safetensors").state_dict()
    assert all(torch.equal(loaded[name], (saved if name in trunk else fresh)[name]) for name in saved)
    save_tensors(tmp_path / "half.safetensors", trunk | {"head.0.weight": saved["head.0.weight"]})
    with pytest.raises(StudyError, match="lacks 'head"):
        build_model(settings, task, image, 0, weights_path=tmp_path / "half.safetensors")
