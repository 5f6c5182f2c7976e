"""Restoration: what moves, what must not, and numbers worked out in NumPy."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import site_data

from polyclinic.errors import ContributionError
from polyclinic.study import AugmentSettings, TrainingSettings
from polyclinic.tasks.classification import MultiClass
from polyclinic.vectors.restoration import Restoration, RestorationResult, restore

TASK = MultiClass(("a", "b"))


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Dropout(0.5),
        nn.Conv2d(1, 3, 2),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(27, 2),
    )


def run(
    model: nn.Module, mode: Any, *, training: TrainingSettings | None = None, seed: int = 0, **more: Any
) -> RestorationResult:
    data = more.pop("data", None) or site_data("s", 40)
    batch = more.pop("batch_size", 1000)
    settings = Restoration(mode=mode, **more)
    return restore(model, data, TASK, settings, training or TrainingSettings(), batch_size=batch, seed=seed)


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}


class TestRecalibration:
    def test_statistics_are_the_moments_of_the_images(self) -> None:
        model, data = network(), site_data("s", 40)
        model[2].running_mean.fill_(7)
        with torch.no_grad():
            x = model[1](data.inputs(data.splits["train"])).double().numpy()
        result = run(model, "bn-recal", data=data)
        np.testing.assert_allclose(model[2].running_mean.numpy(), x.mean((0, 2, 3)), atol=1e-5)
        np.testing.assert_allclose(model[2].running_var.numpy(), x.var((0, 2, 3), ddof=1), rtol=1e-4)
        assert (result.images, result.steps) == (40, 1)

    @pytest.mark.parametrize(("batch", "steps"), [(10, 4), (15, 3), (38, 2)])
    def test_images_count_alike_however_short_the_last_batch(self, batch: int, steps: int) -> None:
        model, data = network(), site_data("s", 40)
        result = run(model, "bn-recal", data=data, batch_size=batch)
        with torch.no_grad():
            x = model[1](data.inputs(data.splits["train"])).double().numpy()
        np.testing.assert_allclose(model[2].running_mean.numpy(), x.mean((0, 2, 3)), atol=1e-5)
        assert result.steps == steps

    @pytest.mark.parametrize(("trained", "asked"), [(True, None), (False, True)])
    def test_classes_count_alike_where_sites_trained_so(self, trained: bool, asked: bool | None) -> None:
        data = site_data("s", 400)
        rare = data.splits["train"][data.labels("train") == 1][:20]
        common = data.splits["train"][data.labels("train") == 0]
        data.splits["train"] = torch.cat([common, rare])
        model = network()
        with torch.no_grad():
            means = [model[1](data.inputs(part)).double().mean((0, 2, 3)).numpy() for part in (common, rare)]
        training = TrainingSettings(balanced=trained)
        run(model, "bn-recal", data=data, training=training, balanced=asked)
        balanced, natural = (means[0] + means[1]) / 2, (200 * means[0] + 20 * means[1]) / 220
        found = model[2].running_mean.numpy()
        assert np.abs(found - balanced).max() < 0.25 * np.abs(natural - balanced).max()
        run(model, "bn-recal", data=data, training=training, balanced=False)
        np.testing.assert_allclose(model[2].running_mean.numpy(), natural, atol=1e-5)

    def test_nothing_but_running_statistics_moves_and_the_layer_is_as_it_was(self) -> None:
        model = network().train()
        before = copy.deepcopy(model.state_dict())
        run(model, "bn-recal")
        assert changed(model, before) == {"2.running_mean", "2.running_var", "2.num_batches_tracked"}
        assert model[2].momentum == 0.1
        assert not any(module.training for module in model.modules())
        assert all(p.grad is None for p in model.parameters())

    def test_at_most_so_many_images_and_the_seed_decides_which(self) -> None:
        found = []
        for seed in (1, 1, 2):
            model = network()
            assert run(model, "bn-recal", images=8, seed=seed).images == 8
            found.append(model[2].running_mean)
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])

    def test_augmentation_as_in_training_unless_told_otherwise(self) -> None:
        training = TrainingSettings(augment=AugmentSettings(intensity=0.9))
        means = {}
        for name, augment, how in (("with", True, training), ("without", False, training), ("plain", True, None)):
            model = network()
            run(model, "bn-recal", augment=augment, training=how)
            means[name] = model[2].running_mean
        assert torch.equal(means["without"], means["plain"])
        assert not torch.equal(means["with"], means["plain"])

    def test_a_dead_channel_has_a_variance_above_zero(self) -> None:
        model = network()
        with torch.no_grad():
            model[1].weight[0] = 0
        run(model, "bn-recal")
        assert (model[2].running_var > 0).all()
        assert model(torch.rand(2, 1, 4, 4)).isfinite().all()

    def test_a_network_without_batch_normalisation_is_refused(self) -> None:
        with pytest.raises(ContributionError, match="head-only or finetune"):
            run(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), "bn-recal")
        assert run(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), "auto").mode == "none"
        assert run(network(), "auto").mode == "bn-recal"


def test_none_and_pooled_statistics_leave_the_model_alone() -> None:
    for mode in ("none", "bn-pooled"):
        model = network()
        before = copy.deepcopy(model.state_dict())
        assert run(model, mode) == RestorationResult(mode)
        assert not changed(model, before)


class TestFineTuning:
    def test_the_validation_loss_falls_and_the_best_state_is_kept(self) -> None:
        model = network()
        result = run(model, "finetune", lr=0.05, epochs=5, training=TrainingSettings(batch_size=8))
        assert result.loss_before is not None
        assert result.loss_after is not None
        assert result.loss_after < result.loss_before
        assert 1 <= result.epochs <= 5
        data = site_data("s", 40)
        val = data.splits["val"]
        with torch.no_grad():
            loss = TASK.loss(model.eval()(data.inputs(val)), data.targets[val])
        assert float(loss) == pytest.approx(result.loss_after, abs=1e-6)

    def test_what_gets_worse_is_taken_back(self) -> None:
        """With exchanged labels the validation loss rises, so it stops after one pass and the merged model stays."""
        model = network()
        data = site_data("s", 40)
        data.targets = data.targets.clone()
        data.targets[data.splits["train"]] = 1 - data.targets[data.splits["train"]]
        run(model, "finetune", lr=0.05, epochs=10, training=TrainingSettings(batch_size=8))  # a good start
        before = copy.deepcopy(model.state_dict())
        result = run(model, "finetune", data=data, lr=0.5, epochs=10, training=TrainingSettings(batch_size=8))
        assert (result.epochs, result.loss_after) == (0, result.loss_before)
        assert result.steps == 5
        assert changed(model, before) <= {"2.num_batches_tracked"}

    def test_the_learning_rate_is_a_tenth_of_the_study(self) -> None:
        own, given = network(), network()
        run(own, "finetune", training=TrainingSettings(lr=0.2, batch_size=8))
        run(given, "finetune", lr=0.02, training=TrainingSettings(lr=9.0, batch_size=8))
        assert all(torch.equal(a, b) for a, b in zip(own.parameters(), given.parameters(), strict=True))

    def test_head_only_moves_the_head_and_nothing_else(self) -> None:
        model = network()
        before = copy.deepcopy(model.state_dict())
        run(model, "head-only", lr=0.05, epochs=4, training=TrainingSettings(batch_size=8))
        assert changed(model, before) == {"5.weight", "5.bias"}
        assert all(p.requires_grad for p in model.parameters())

    def test_head_only_is_gradient_descent_without_dropout(self) -> None:
        """One full-batch step of softmax regression on the features, written out."""
        model, data = network(), site_data("s", 40)
        model.eval()
        weight = model[5].weight.detach().double().numpy().copy()
        with torch.no_grad():
            x = model[:5](data.inputs(data.splits["train"])).double().numpy()
            logits = model[5](torch.from_numpy(x).float()).double().numpy()
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        gradient = (p - np.eye(2)[data.labels("train").numpy()]).T @ x / len(x)
        run(model, "head-only", data=data, lr=0.01, epochs=1, training=TrainingSettings(batch_size=1000))
        np.testing.assert_allclose(model[5].weight.detach().numpy(), weight - 0.01 * gradient, atol=1e-6)

    def test_images_are_needed(self) -> None:
        data = site_data("s", 40)
        data.splits["val"] = torch.arange(0)
        with pytest.raises(ContributionError, match="no validation images"):
            run(network(), "finetune", data=data)
        data.splits["train"] = torch.arange(1)
        with pytest.raises(ContributionError, match="at least two training images"):
            run(network(), "bn-recal", data=data)
