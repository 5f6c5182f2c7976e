"""Samples and styles in local training: their weight by hand, gradients by hand, and what they must never touch."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import site_data

from polyclinic.data.dataset import SiteData
from polyclinic.models.normalisation import running_statistics_used, statistics_kept
from polyclinic.models.registry import build_model
from polyclinic.study import ImageSettings, ModelSettings, TaskSettings, TrainingSettings
from polyclinic.synthesis.settings import SyntheticTraining
from polyclinic.synthesis.shelf import sized
from polyclinic.synthesis.supplement import Supplement, sample_weight
from polyclinic.tasks import make_task
from polyclinic.training import train

NO_STYLES = torch.zeros(0, 1, 3, 3)


def supplement(**changes: Any) -> Supplement:
    """Two bright samples of class 1 and one dark of class 0, at full weight, one to three real images."""
    images = torch.tensor([255, 230, 20], dtype=torch.uint8).view(3, 1, 1, 1).repeat(1, 1, 4, 4)
    given: dict[str, Any] = {
        "images": images,
        "labels": torch.tensor([1, 1, 0]),
        "weight": 1.0,
        "per_sample": 3.0,
        "own_statistics": True,
        "styles": NO_STYLES,
        "chance": 0.0,
    }
    return Supplement(**{**given, **changes})


def test_the_weight_of_each_round_by_hand() -> None:
    """Ten rounds: 0.5 is reached in the third, held to the eighth, and is 0 in the last."""
    found = [sample_weight(SyntheticTraining(), number, 10) for number in range(1, 11)]
    assert found == pytest.approx([1 / 6, 1 / 3, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.25, 0])
    assert found[-1] == 0


@pytest.mark.parametrize(
    ("settings", "rounds", "wanted"),
    [
        ({"ramp": 0.0, "until": 1.0}, 4, [0.5, 0.5, 0.5, 0.5]),
        ({"ramp": 1.0, "until": 1.0}, 4, [0.125, 0.25, 0.375, 0.5]),
        ({"ramp": 0.0, "until": 0.0}, 4, [0.375, 0.25, 0.125, 0.0]),
        ({"ramp": 0.5, "until": 0.5, "weight": 2.0}, 4, [1.0, 2.0, 1.0, 0.0]),
        ({"weight": 0.0}, 3, [0.0, 0.0, 0.0]),
        ({}, 1, [0.0]),
    ],
)
def test_other_schedules_by_hand(settings: dict[str, float], rounds: int, wanted: list[float]) -> None:
    training = SyntheticTraining(**settings)
    found = [sample_weight(training, number, rounds) for number in range(1, rounds + 1)]
    assert found == pytest.approx(wanted)


def test_the_mixture_by_hand() -> None:
    """Eight images and half a sample to each: four samples, of which two thirds are of class 1."""
    found = supplement(weight=0.5).mixture(torch.tensor([6.0, 2.0], dtype=torch.float64))
    assert found.tolist() == pytest.approx([6 + 4 / 3, 2 + 8 / 3])


@pytest.mark.parametrize("changes", [{"weight": 0.0}, {"images": torch.zeros(0, 1, 4, 4), "labels": torch.zeros(0)}])
def test_samples_that_have_no_part_change_no_counts(changes: dict[str, Any]) -> None:
    counts = torch.tensor([6.0, 2.0])
    assert supplement(**changes).mixture(counts) is counts


def test_as_many_samples_as_the_ratio_says_and_two_at_least() -> None:
    for real, per_sample, wanted in ((9, 3.0, 3), (32, 3.0, 11), (2, 3.0, 2), (4, 0.5, 8)):
        inputs, targets = supplement(per_sample=per_sample).batch(real, 0.5, 0.25, np.random.default_rng(0))
        assert inputs.shape == (wanted, 1, 4, 4)
        assert len(targets) == wanted


def test_samples_are_drawn_alike_often_and_normalised_like_images() -> None:
    inputs, targets = supplement(per_sample=1.0).batch(3000, 0.5, 0.25, np.random.default_rng(0))
    wanted = [(value / 255 - 0.5) / 0.25 for value in (20, 230, 255)]
    assert inputs.flatten().unique().tolist() == pytest.approx(wanted, abs=1e-6)
    assert targets.float().mean().item() == pytest.approx(2 / 3, abs=0.03)


def test_styles_are_mixed_in_by_chance_with_any_strength() -> None:
    """A window of the mean alone: pictures of mean 0.2 go somewhere on the way to mean 0.6."""
    extra = supplement(styles=torch.full((1, 1, 1, 1), 0.6), chance=0.5)
    inputs = torch.full((2000, 1, 4, 4), (0.2 - 0.5) / 0.25)
    found = extra.restyled(inputs, 0.5, 0.25, np.random.default_rng(0))
    assert torch.equal(inputs, torch.full_like(inputs, (0.2 - 0.5) / 0.25)), "the images given are not written to"
    means = found.mean((1, 2, 3)) * 0.25 + 0.5
    moved = means > 0.2 + 1e-5
    assert moved.float().mean().item() == pytest.approx(0.5, abs=0.04)
    assert means.max() <= 0.6 + 1e-5
    strength = (means[moved] - 0.2) / 0.4
    assert strength.mean().item() == pytest.approx(0.5, abs=0.04)
    assert strength.std().item() == pytest.approx(math.sqrt(1 / 12), abs=0.03)


def test_every_style_has_its_turn_and_no_chance_is_no_change() -> None:
    styles = torch.tensor([0.4, 0.6]).view(2, 1, 1, 1)
    inputs = torch.full((400, 1, 4, 4), -2.0)  # black: only the mean has no phase, and it comes from nothing
    assert supplement(styles=styles, chance=0.0).restyled(inputs, 0.5, 0.25, np.random.default_rng(0)) is inputs
    assert supplement(chance=1.0).restyled(inputs, 0.5, 0.25, np.random.default_rng(0)) is inputs
    grey = torch.full((4000, 1, 4, 4), 0.0)
    found = supplement(styles=styles, chance=1.0).restyled(grey, 0.5, 0.25, np.random.default_rng(0))
    up = (found.mean((1, 2, 3)) > 0).float().mean().item()
    assert up == pytest.approx(0.5, abs=0.03), "means below and above 0.5 are equally frequent"


def trained(model: nn.Module, data: SiteData, loss: str = "auto", extra: Supplement | None = None, **more: Any) -> Any:
    settings = TrainingSettings(**{"lr": 0.1, "batch_size": 1000, **more})
    task = make_task(TaskSettings(classes=["a", "b"], loss=loss), settings)
    return train(model, data, task, settings, lr=settings.lr, seed=5, supplement=extra)


def linear(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 2))


@pytest.mark.parametrize("loss", ["auto", "logit-adjusted", "fedlc"])
def test_one_step_by_hand(loss: str) -> None:
    """Loss of all images plus 0.7 times that of a sample that is always the same; 24 images, 12 of each class.

    The mixture: half a sample's weight goes to class 1 alone, so counts are 12 and 12 + 0.7 * 24.
    """
    data, model = site_data("north", 24), linear()
    one = torch.full((1, 1, 4, 4), 200, dtype=torch.uint8)
    extra = supplement(images=one, labels=torch.tensor([1]), weight=0.7)
    shift = torch.zeros(2)
    counts = torch.tensor([12.0, 12 + 0.7 * 24])
    if loss == "logit-adjusted":
        shift = torch.log((counts + 0.5) / (counts + 0.5).sum())
    elif loss == "fedlc":
        shift = -(counts**-0.25)
    by_hand = copy.deepcopy(model)
    train_images = data.splits["train"]
    total = F.cross_entropy(by_hand(data.inputs(train_images)) + shift, data.targets[train_images])
    sample = torch.full((1, 1, 4, 4), (200 / 255 - 0.5) / 0.25)
    total = total + 0.7 * F.cross_entropy(by_hand(sample) + shift, torch.tensor([1]))
    gradients = torch.autograd.grad(total, list(by_hand.parameters()))
    result = trained(model, data, loss, extra)
    assert result.steps == 1
    assert result.images == 24
    assert result.loss == pytest.approx(total.item(), rel=1e-5)
    for parameter, start, gradient in zip(model.parameters(), by_hand.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter, start - 0.1 * gradient, rtol=1e-5, atol=1e-6)


def test_the_prior_is_of_images_as_they_are_drawn() -> None:
    """18 of class 0 and 6 of class 1. Drawn in balance both are as frequent, and logit adjustment shifts nothing."""
    data = site_data("north", 24)
    keep = [i for i in data.splits["train"].tolist() if data.targets[i] == 0 or i % 4 == 1]
    data.splits["train"] = torch.tensor(keep)
    assert torch.bincount(data.labels("train")).tolist() == [12, 6]
    ends = []
    for loss in ("cross-entropy", "logit-adjusted"):
        model = linear()
        trained(model, data, loss, balanced=True)
        ends.append(model[1].weight.detach())
    torch.testing.assert_close(*ends)
    plain, shifted = linear(), linear()
    trained(plain, data, "cross-entropy")
    trained(shifted, data, "logit-adjusted")
    assert not torch.allclose(plain[1].weight, shifted[1].weight, atol=1e-3)


def test_samples_without_weight_are_as_none_bit_for_bit() -> None:
    ends = []
    for extra in (None, supplement(weight=0.0)):
        model = linear()
        trained(model, site_data("north", 24), "logit-adjusted", extra, batch_size=5, epochs=2)
        ends.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def passed(extra: Supplement | None) -> tuple[list[Tensor], int]:
    """All batches that go through the network, and the number of steps."""
    batches: list[Tensor] = []
    model = linear()
    model.register_forward_pre_hook(lambda _m, given: batches.append(given[0].clone()))
    steps: int = trained(model, site_data("north", 24), extra=extra, lr=0.0, batch_size=5).steps
    return batches, steps


def test_samples_leave_the_number_of_steps_and_the_order_of_images() -> None:
    (alone, wanted), (beside, steps) = passed(None), passed(supplement())
    assert steps == wanted == len(alone) == len(beside) / 2
    assert all(torch.equal(a, b) for a, b in zip(alone, beside[::2], strict=True))
    assert {len(batch) for batch in beside[1::2]} == {2}, "of 5 images 5 / 3"


def cnn() -> nn.Module:
    settings = ModelSettings(name="small-cnn", width=4)
    return build_model(settings, TaskSettings(classes=["a", "b"]), ImageSettings(size=[8, 8]), seed=0)


def batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize("own", [True, False])
def test_samples_never_move_running_statistics(own: bool) -> None:
    """At rate 0 weights stay, so running statistics show which batches passed: they are those of images alone."""
    data = site_data("north", 24)
    data._blocks = (F.interpolate(data.images, size=(8, 8)),)
    images = torch.full((3, 1, 8, 8), 255, dtype=torch.uint8)
    ends = []
    for extra in (None, supplement(images=images, own_statistics=own)):
        model = cnn()
        trained(model, data, extra=extra, lr=0.0, batch_size=5)
        assert all(module.training and module.track_running_stats for module in batch_norms(model))
        ends.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    start = cnn().state_dict()
    moved = {name for name in start if not torch.equal(start[name], ends[0][name])}
    assert moved == {name for name in start if "running_" in name or name.endswith("num_batches_tracked")}
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in start)


@pytest.mark.parametrize("own", [True, False])
def test_samples_are_normalised_as_asked(own: bool) -> None:
    """What leaves the first batch norm for samples: mean 0 and deviation 1 by their own statistics, else not."""
    data = site_data("north", 24)
    data._blocks = (F.interpolate(data.images, size=(8, 8)),)
    draw = torch.Generator().manual_seed(0)
    images = (torch.rand(6, 1, 8, 8, generator=draw) * 60).to(torch.uint8)
    model = cnn()
    first = batch_norms(model)[0]
    outputs: list[Tensor] = []
    first.register_forward_hook(lambda _m, _i, out: outputs.append(out.detach().clone()))
    extra = supplement(images=images, labels=torch.tensor([0, 1] * 3), own_statistics=own, per_sample=4.0)
    trained(model, data, extra=extra, lr=0.0)
    real, synthetic = outputs
    assert len(synthetic) == 6
    torch.testing.assert_close(real.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
    off = synthetic.mean((0, 2, 3)).abs().max().item()
    assert off < 1e-4 if own else off > 1e-2


def test_running_statistics_are_used_inside_a_step_that_keeps_them_as_well() -> None:
    """The inner step of per-fedavg keeps statistics; samples in it are still normalised by the running ones."""
    model = cnn().train()
    inputs = torch.rand(4, 1, 8, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad(), statistics_kept(model), running_statistics_used(model):
        found = model(inputs)
    wanted = model.eval()(inputs).detach()
    torch.testing.assert_close(found, wanted)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    model.train()
    assert all(module.training and module.track_running_stats for module in batch_norms(model))


def test_samples_are_brought_to_the_size_of_the_sites_images() -> None:
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    assert sized(images, (4, 4)) is images
    larger = sized(images, (8, 6))
    assert larger.shape == (2, 3, 8, 6)
    assert larger.dtype == torch.uint8
    assert sized(images[:0], (8, 6)).shape == (0, 3, 8, 6)
    flat = torch.full((1, 1, 16, 16), 77, dtype=torch.uint8)
    assert (sized(flat, (5, 9)) == 77).all()
