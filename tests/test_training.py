from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toys import linear, site_data

from polyclinic.errors import SiteError
from polyclinic.study import TaskSettings, TrainingSettings
from polyclinic.tasks import make_task
from polyclinic.training import fit as fit_batches
from polyclinic.training import learning_rate, train

TASK = TaskSettings(kind="multi-class", classes=["a", "b"])


def start() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return linear(1, 2, 2, "batch")


def fit(model: torch.nn.Module, *, lr: float = 0.1, seed: int = 0, images: int = 12, **settings: object):  # type: ignore[no-untyped-def]
    chosen = TrainingSettings.model_validate(settings)
    return train(model, site_data("north", images), make_task(TASK, chosen), chosen, lr=lr, seed=seed)


def full_batch(images: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    data = site_data("north", images)
    return ((data.images[data.splits["train"]] - 0.5) / 0.25).flatten(1), data.labels("train")


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_steps_are_those_of_torch(optimizer: str) -> None:
    ours, theirs = start(), start()
    fit(
        ours,
        optimizer=optimizer,
        epochs=3,
        batch_size=100,
        weight_decay=0.01,
        **({"momentum": 0.9} if optimizer == "sgd" else {}),
    )
    inputs, targets = full_batch()
    chosen = {
        "sgd": torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01),
        "adam": torch.optim.Adam(theirs.parameters(), lr=0.1, weight_decay=0.01),
        "adamw": torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.01),
    }[optimizer]
    for _ in range(3):
        chosen.zero_grad()
        F.cross_entropy(theirs[1](inputs), targets).backward()
        chosen.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_result_counts_steps_images_and_the_mean_loss() -> None:
    model = start()
    result = fit(model, epochs=2, batch_size=5, lr=0.0)
    inputs, targets = full_batch()
    wanted = F.cross_entropy(model[1](inputs), targets).item()
    assert (result.steps, result.images) == (6, 24)
    assert result.loss == pytest.approx(wanted, rel=1e-5)
    assert fit(start(), steps=7, batch_size=5).steps == 7


def test_a_last_batch_of_one_joins_the_one_before() -> None:
    assert fit(start(), images=11, batch_size=5).steps == 2


def test_same_seed_same_bits_and_the_global_generator_is_untouched() -> None:
    before = torch.random.get_rng_state()
    models = [start() for _ in range(3)]
    for model, seed in zip(models, (3, 3, 4), strict=True):
        fit(model, seed=seed, batch_size=4, augment={"flip": True, "intensity": 0.2})
    assert torch.equal(models[0][1].weight, models[1][1].weight)
    assert not torch.equal(models[0][1].weight, models[2][1].weight)
    assert torch.equal(before, torch.random.get_rng_state())


def test_clipping_bounds_the_step() -> None:
    model, first = start(), start()
    fit(model, lr=1.0, batch_size=100, clip=0.01)
    moved = math.sqrt(
        sum((a - b).pow(2).sum().item() for a, b in zip(model.parameters(), first.parameters(), strict=True))
    )
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_balanced_drawing_sees_classes_equally_often() -> None:
    data = site_data("north", 40)
    data.targets[data.splits["train"]] = torch.tensor([0] * 36 + [1] * 4)
    drawn = np.concatenate([b.numpy() for b in data.train_batches(np.random.default_rng(0), 10, 400, True)])
    assert abs(float(data.targets[torch.from_numpy(drawn)].float().mean()) - 0.5) < 0.03


def test_a_loss_that_explodes_is_an_error_that_says_what_to_try() -> None:
    model = start()
    torch.nn.init.constant_(model[1].weight, 1e38)
    with pytest.raises(SiteError, match=r"training diverged.*training.lr"):
        fit(model, lr=1e3, epochs=5, batch_size=100)


def test_learning_rate_schedules() -> None:
    constant, cosine = (TrainingSettings(lr=0.4, schedule=s) for s in ("constant", "cosine"))
    assert [learning_rate(constant, n, 4) for n in (1, 4)] == [0.4, 0.4]
    assert [learning_rate(cosine, n, 4) for n in (1, 3)] == pytest.approx([0.4, 0.2])
    assert 0 < learning_rate(cosine, 4, 4) < 0.1


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_fitting_batches_takes_the_steps_of_torch(optimizer: str) -> None:
    """A line through points, three batches of two: the parameter and the mean of the losses."""
    points = torch.tensor([[0.0, 1.0], [1.0, 3.0], [2.0, 4.0], [3.0, 8.0], [4.0, 9.0], [5.0, 10.0]])
    settings = TrainingSettings(optimizer=optimizer, weight_decay=0.1, clip=2.0)
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
    ours, theirs = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)

    def loss(slope: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        return (slope[0] * part[:, 0] + slope[1] - part[:, 1]).square().mean()

    mean = fit_batches([ours], points.split(2), lambda part: loss(ours, part), settings, lr=0.05, seed=0)
    chosen, seen = kind([theirs], lr=0.05, weight_decay=0.1), []
    for part in points.split(2):
        chosen.zero_grad()
        found = loss(theirs, part)
        found.backward()
        torch.nn.utils.clip_grad_norm_([theirs], 2.0)
        chosen.step()
        seen.append(float(found.detach()))
    torch.testing.assert_close(ours, theirs)
    assert mean == pytest.approx(sum(seen) / 3)
    assert ours.grad is None


def test_fitting_draws_from_its_seed_and_leaves_torchs_state_alone() -> None:
    def fitted(seed: int) -> torch.Tensor:
        value = torch.zeros(64, requires_grad=True)

        def loss(_: int) -> torch.Tensor:
            return (F.dropout(torch.ones(64)) * value).sum()

        fit_batches([value], range(3), loss, TrainingSettings(), lr=0.1, seed=seed)
        return value.detach()

    before = torch.get_rng_state()
    first = fitted(0)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, fitted(0))
    assert not torch.equal(first, fitted(1))


def test_fitting_nothing_and_fitting_what_explodes() -> None:
    value = torch.ones(1, requires_grad=True)
    assert math.isnan(fit_batches([value], [], lambda _: value.sum(), TrainingSettings(), lr=1.0, seed=0))
    with pytest.raises(SiteError, match=r"diverged .* within 60 steps at learning rate 100.*Lower it"):
        fit_batches([value], range(60), lambda _: value.square().sum(), TrainingSettings(), lr=100.0, seed=0)
