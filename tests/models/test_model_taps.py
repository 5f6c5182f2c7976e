"""Penultimate features: what the last layer makes the logits from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from polyclinic.errors import StudyError
from polyclinic.models.catalog import NETWORKS
from polyclinic.models.registry import build_model
from polyclinic.models.taps import feature_tap, features
from polyclinic.study import ImageSettings, ModelSettings, TaskSettings

EVERY = [(n.name, d) for n in NETWORKS.values() if "multi-class" in n.tasks for d in n.dims]
SHORT = {"small-cnn": "head", "mobilenet": "classifier", "resnet18": "fc"}


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
