"""Two sets of running statistics, one network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyclinic.models.domain_statistics import NaturalStatistics, estimate_statistics, natural
from polyclinic.models.registry import build_model
from polyclinic.study import ImageSettings, ModelSettings, TaskSettings


def network(norm: str = "batch", **more: Any) -> nn.Module:
    settings = ModelSettings(**{"width": 3, "norm": norm, **more})
    return build_model(settings, TaskSettings(classes=["a", "b"]), ImageSettings(size=[8, 8]), 0)


def images(seed: int, shift: float = 0.0, count: int = 6) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) + shift


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.named_buffers() if "running" in name}


def test_each_kind_of_image_moves_its_own_statistics() -> None:
    """The first layer's are known: 0.9 of the start and 0.1 of the batch, twice for patients and once for others."""
    model = network()
    conv = model.get_submodule("blocks.0")
    public = NaturalStatistics.of(model)
    with torch.no_grad():
        ours, theirs = images(0), images(1, shift=3)
        model(ours)
        with public.natural(model):
            model(theirs)
        model(ours)
        mine, other = (conv(x).mean((0, 2, 3)) for x in (ours, theirs))
    torch.testing.assert_close(model.get_buffer("blocks.1.running_mean"), (0.1 + 0.09) * mine)
    torch.testing.assert_close(public.tensors["blocks.1.running_mean"], 0.1 * other)


def test_statistics_of_patients_are_bit_for_bit_those_of_a_network_that_saw_nothing_else() -> None:
    alone, both = network(), network()
    public = NaturalStatistics.of(both)
    for seed in range(3):
        alone(images(seed))
        both(images(seed))
        with public.natural(both):
            both(images(seed + 10, shift=2))
    assert all(torch.equal(tensor, buffers(both)[name]) for name, tensor in buffers(alone).items())


def test_evaluation_inside_uses_them() -> None:
    model = network().eval()
    public = NaturalStatistics.of(model)
    with torch.no_grad():
        before = model(images(0))
        for name, tensor in public.tensors.items():
            tensor.fill_(4.0 if name.endswith("var") else 0.0)
        with natural(model, public.tensors):
            inside = model(images(0))
        assert torch.equal(model(images(0)), before)
    assert not torch.allclose(inside, before)


def test_one_backward_pass_over_both_kinds() -> None:
    """What is swapped is not written to, so the first pass's graph is still whole."""
    model = network()
    public = NaturalStatistics.of(model)
    loss = model(images(0)).square().sum()
    with public.natural(model):
        loss = loss + model(images(1)).square().sum()
    loss.backward()
    found = model.get_submodule("blocks.1").weight.grad.clone()
    model.zero_grad()
    for seed in (0, 1):
        model(images(seed)).square().sum().backward()
    torch.testing.assert_close(found, model.get_submodule("blocks.1").weight.grad)


def test_views_of_a_workbench_keep_showing_patients() -> None:
    model = network()
    view = model.get_buffer("blocks.1.running_mean").detach()
    public = NaturalStatistics.of(model)
    with public.natural(model):
        model(images(1, shift=5))
        assert view.abs().sum() == 0
    with pytest.raises(RuntimeError), public.natural(model):
        model(torch.zeros(1, 5, 8, 8))
    assert model.get_buffer("blocks.1.running_mean").data_ptr() == view.data_ptr()


@pytest.mark.parametrize("norm", ["group", "instance"])
def test_nothing_happens_without_running_statistics(norm: str) -> None:
    model = network(norm, options={"strides": [2, 1]})
    public = NaturalStatistics.of(model)
    assert public.tensors == {}
    with public.natural(model):
        inside = model(images(0))
    assert torch.equal(inside, model(images(0)))

    def never() -> Any:
        raise AssertionError("a batch was asked for")
        yield

    estimate_statistics(model, never())
    assert not model.training


def test_estimated_statistics_are_means_over_batches() -> None:
    model = network()
    conv, layer = model.get_submodule("blocks.0"), model.get_submodule("blocks.1")
    with torch.no_grad():
        layer.running_mean.fill_(7.0)
        parts = [images(0, shift=1), images(1, shift=3, count=4)]
        estimate_statistics(model, iter(parts))
        seen = [conv(part).transpose(0, 1).flatten(1) for part in parts]
    torch.testing.assert_close(layer.running_mean, (seen[0].mean(1) + seen[1].mean(1)) / 2)
    torch.testing.assert_close(layer.running_var, (seen[0].var(1) + seen[1].var(1)) / 2)
    assert layer.momentum == 0.1
    assert not model.training
    assert not layer.training


def test_dropout_is_off_while_statistics_are_estimated() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.BatchNorm1d(64))
    estimate_statistics(model, [images(0)])
    torch.testing.assert_close(model[2].running_mean, images(0).flatten(1).mean(0))
