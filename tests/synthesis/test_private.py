"""DP-SGD of the generator: the accountant against formulas written out here, clipping, noise, what leaves a site."""

from __future__ import annotations

import json
import math
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from painted_sites import DEVICES, Fitting, painted_study
from torch import Tensor

from polyclinic.errors import SiteError, StudyError
from polyclinic.federation.message import Message
from polyclinic.synthesis import accounting, private
from polyclinic.synthesis.accounting import Budget, epsilon_spent, noise_multiplier
from polyclinic.synthesis.private import clipped_sum, secret_stream, train_private
from polyclinic.synthesis.settings import PrivateTraining, VAESettings
from polyclinic.synthesis.vae import VAE, Lines, image_losses, start_vae
from polyclinic.synthesis.vae_training import Flips

SMALL = VAESettings(size=16, latent=4, embedding=3, batch_size=4, dp=PrivateTraining(epsilon=8.0, clip=0.7))
FINE = np.concatenate([np.arange(1.01, 64, 0.01), np.arange(64, 2000)])
Batch = tuple[Tensor, Tensor, Tensor]


# The accountant.


def converted(orders: np.ndarray, divergence: np.ndarray, delta: float) -> float:
    """Canonne, Kamath, Steinke (arXiv 2004.00010), proposition 12."""
    a = np.asarray(orders, dtype=float)
    return float(np.min(divergence + np.log1p(-1 / a) - np.log(delta * a) / (a - 1)))


def subsampled(order: int, sampling: float, noise: float) -> float:
    """Rényi divergence of one step for a whole order: Mironov, Talwar, Zhang (arXiv 1908.10530), section 3.3."""
    logs = [
        math.lgamma(order + 1)
        - math.lgamma(k + 1)
        - math.lgamma(order - k + 1)
        + (order - k) * math.log1p(-sampling)
        + k * math.log(sampling)
        + (k * k - k) / (2 * noise**2)
        for k in range(order + 1)
    ]
    largest = max(logs)
    return (largest + math.log(sum(math.exp(x - largest) for x in logs))) / (order - 1)


@pytest.mark.parametrize(("noise", "steps", "delta"), [(1.0, 1, 1e-5), (4.0, 10, 1e-5), (20.0, 600, 1e-6)])
def test_without_sampling_it_is_the_gaussian_mechanism(noise: float, steps: int, delta: float) -> None:
    wanted = converted(FINE, steps * FINE / (2 * noise**2), delta)
    assert epsilon_spent(noise, 1.0, steps, delta) == pytest.approx(wanted, rel=2e-3)


@pytest.mark.parametrize(
    ("noise", "sampling", "steps"),
    [(1.3, 250 / 60_000, 3600), (0.8, 0.1, 40), (2.0, 0.5, 200), (1.1, 256 / 60_000, 14_062)],
)
def test_with_sampling_it_is_the_binomial_sum(noise: float, sampling: float, steps: int) -> None:
    orders = np.arange(2, 256)
    divergence = steps * np.array([subsampled(int(a), sampling, noise) for a in orders])
    # The accountant also has orders between whole numbers, which can only be better.
    wanted, found = converted(orders, divergence, 1e-5), epsilon_spent(noise, sampling, steps, 1e-5)
    assert wanted * 0.98 < found <= wanted * (1 + 1e-6)


def test_number_of_the_tensorflow_privacy_tutorial() -> None:
    """MNIST: 60,000 images, batches of 250, noise 1.3, 15 epochs, δ 1e-5: "eps = 1.18".

    That number is of 2019, with the plain conversion ``divergence + log(1/δ) / (order - 1)``. From the same divergences
    the conversion of 2020 gets 0.94, which is what dp-accounting 0.6.0 says; its privacy loss distributions get 0.85.
    """
    orders = np.arange(2, 64)
    divergence = 3600 * np.array([subsampled(int(a), 250 / 60_000, 1.3) for a in orders])
    plain = float(np.min(divergence + math.log(1e5) / (orders - 1)))
    assert plain == pytest.approx(1.18, abs=0.01)
    found = epsilon_spent(1.3, 250 / 60_000, 3600, 1e-5)
    assert found == pytest.approx(0.94, abs=0.01)
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    tight = PLDAccountant()
    tight.compose(PoissonSampledDpEvent(250 / 60_000, GaussianDpEvent(1.3)), 3600)
    assert 0.85 <= tight.get_epsilon(1e-5) < found < plain


@pytest.mark.parametrize("epsilon", [0.5, 8.0, 60.0])
@pytest.mark.parametrize(("sampling", "steps"), [(1.0, 60), (0.05, 1200)])
def test_noise_is_the_least_that_keeps_the_promise(epsilon: float, sampling: float, steps: int) -> None:
    noise = noise_multiplier(epsilon, 1e-5, sampling, steps)
    assert epsilon_spent(noise, sampling, steps, 1e-5) <= epsilon
    assert epsilon_spent(0.995 * noise, sampling, steps, 1e-5) > epsilon


def test_a_round_more_costs_more_and_all_of_them_what_was_promised() -> None:
    budget = Budget.plan(100, VAESettings(batch_size=20, epochs=2, rounds=12), PrivateTraining(epsilon=3.0))
    assert (budget.sampling, budget.steps) == (0.2, 10)
    spent = [budget.spent(rounds) for rounds in range(13)]
    assert spent[0] == 0
    assert all(a < b for a, b in pairwise(spent))
    assert 2.97 < spent[12] <= 3.0


def test_a_site_with_fewer_patients_than_a_batch_takes_all_in_every_step() -> None:
    budget = Budget.plan(7, VAESettings(batch_size=32, epochs=2, rounds=5), PrivateTraining())
    assert (budget.sampling, budget.steps) == (1.0, 2)
    assert budget.noise > Budget.plan(700, VAESettings(batch_size=32, epochs=2, rounds=5), PrivateTraining()).noise


def test_the_search_says_nothing_of_orders_that_it_leaves_out(caplog: pytest.LogCaptureFixture) -> None:
    noise_multiplier.cache_clear()
    epsilon_spent.cache_clear()
    noise_multiplier(8.0, 1e-5, 0.2, 60)
    assert not caplog.records


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    monkeypatch.setitem(sys.modules, "dp_accounting.rdp", None)
    with pytest.raises(StudyError, match=r"pip install 'polyclinic\[dp\]'"):
        accounting.check_installed()
    with pytest.raises(StudyError, match="dp-accounting"):
        Fitting(painted_study(dp={}), tmp_path)
    Fitting(painted_study(), tmp_path)


# Clipping.


def random_batch(count: int, seed: int = 0) -> tuple[VAE, Batch, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, 16, 16, generator=draw)
    labels, devices = (torch.randint(0, 2, (count,), generator=draw) for _ in range(2))
    return start_vae(SMALL, 1, (2, 2), 0), (images, labels, devices), torch.randn(count, 4, generator=draw)


def by_hand(model: VAE, batch: Batch, noise: Tensor, clip: float) -> dict[str, Tensor]:
    """One backward pass per image."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for k in range(len(noise)):
        one = tuple(column[k : k + 1] for column in batch)
        gradients = torch.autograd.grad(image_losses(model, one, noise[k : k + 1], SMALL)[0], list(model.parameters()))
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        for into, gradient in zip(total.values(), gradients, strict=True):
            into += gradient * min(1.0, clip / norm)
    return total


def norm_of(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


@pytest.mark.parametrize("clip", [0.7, 3000.0, 1e9])
def test_each_gradient_is_clipped_over_all_tensors_together(clip: float) -> None:
    model, batch, noise = random_batch(37)
    found, wanted = clipped_sum(model, batch, noise, SMALL, clip), by_hand(model, batch, noise, clip)
    apart = norm_of({name: found[name] - wanted[name] for name in wanted})
    assert apart < 1e-4 * norm_of(wanted)


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(0, 4),
    clip=st.floats(1e-3, 1e3),
    scale=st.sampled_from([0.0, 1.0, 1e4, 1e30, math.inf, math.nan]),
    seed=st.integers(0, 99),
)
def test_one_patient_more_moves_the_sum_by_at_most_clip(count: int, clip: float, scale: float, seed: int) -> None:
    model, (images, labels, devices), noise = random_batch(count + 1, seed)
    images[-1] *= scale
    whole = clipped_sum(model, (images, labels, devices), noise, SMALL, clip)
    without = clipped_sum(model, (images[:-1], labels[:-1], devices[:-1]), noise[:-1], SMALL, clip)
    assert all(bool(tensor.isfinite().all()) for tensor in whole.values())
    moved = norm_of({name: whole[name].double() - without[name].double() for name in whole})
    # Sums of up to five clipped gradients are rounded to float32.
    assert moved <= clip * (1 + 1e-5)
    if count == 0:
        assert norm_of(whole) <= clip


# Training.


def sgd(parameters: Any, lr: float, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr)


def two_patients() -> tuple[VAE, Lines, list[str]]:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8, generator=draw)
    return (
        start_vae(SMALL, 1, (2, 2), 0),
        Lines(images, torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])),
        ["p", "q", "q"],
    )


def test_noise_has_the_deviation_that_was_accounted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lines, patients = two_patients()
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    monkeypatch.setattr(
        private, "clipped_sum", lambda model, *_: {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    )
    monkeypatch.setattr(private.torch.optim, "Adam", sgd)
    budget = Budget(sampling=0.5, steps=1, rounds=1, noise=1.5, delta=1e-5)
    train_private(model, lines, patients, SMALL, Flips(), budget, lr=1.0, rng=np.random.default_rng(0))
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    # Noise 1.5 times clip 0.7, over the expected batch of 0.5 times two patients.
    assert len(moved) > 100_000
    assert float(moved.std()) == pytest.approx(1.5 * 0.7 / 1.0, rel=0.01)
    assert abs(float(moved.mean())) < 4 * 1.05 / math.sqrt(len(moved))


def test_without_noise_a_step_is_the_mean_of_clipped_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lines, _ = two_patients()
    seen = []
    real = clipped_sum
    monkeypatch.setattr(private, "clipped_sum", lambda *args: seen.append(real(*args)) or seen[-1])
    monkeypatch.setattr(private.torch.optim, "Adam", sgd)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    budget = Budget(sampling=1.0, steps=1, rounds=1, noise=0.0, delta=1e-5)
    train_private(model, lines, ["p", "q", "r"], SMALL, Flips(), budget, lr=0.5, rng=np.random.default_rng(0))
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, before[name] - 0.5 * seen[0][name] / 3, atol=1e-6), name


def test_each_patient_is_in_a_step_with_one_image_and_the_same_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    model = start_vae(SMALL, 1, (2, 2), 0)
    # Patient k has k + 1 images, all of the grey value k.
    owners = [k for k in range(10) for _ in range(k + 1)]
    images = torch.tensor(owners, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 16, 16)
    lines = Lines(images, torch.zeros(55, dtype=torch.int64), torch.zeros(55, dtype=torch.int64))
    steps: list[list[int]] = []

    def note(model: VAE, batch: Batch, *_: Any) -> dict[str, Tensor]:
        steps.append((batch[0][:, 0, 0, 0] * 255).round().int().tolist())
        return {n: torch.zeros_like(p) for n, p in model.named_parameters()}

    monkeypatch.setattr(private, "clipped_sum", note)
    optimizer = SimpleNamespace(step=lambda: None, zero_grad=lambda **_: None)
    monkeypatch.setattr(private.torch.optim, "Adam", lambda *_, **__: optimizer)
    budget = Budget(sampling=0.3, steps=600, rounds=1, noise=0.0, delta=1e-5)
    monkeypatch.setattr(model, "named_parameters", lambda **_: iter([("class_rows", model.class_rows)]))
    train_private(model, lines, [f"p{k}" for k in owners], SMALL, Flips(), budget, lr=0.1, rng=np.random.default_rng(1))
    assert len(steps) == 600
    assert all(len(set(step)) == len(step) for step in steps)
    often = np.bincount([k for step in steps for k in step], minlength=10) / 600
    # Four standard errors.
    assert np.abs(often - 0.3).max() < 4 * math.sqrt(0.3 * 0.7 / 600)
    assert {len(step) for step in steps} > {1, 2, 3, 4, 5}  # Poisson samples, not batches of one size


# The noise's source.


def test_the_same_call_gets_the_same_noise_and_another_call_other_noise(tmp_path: Path) -> None:
    first = secret_stream(tmp_path, "ab", 2).standard_normal(4)
    other = secret_stream(tmp_path, "cd", 2).standard_normal(4)
    assert np.array_equal(secret_stream(tmp_path, "ab", 2).standard_normal(4), first)
    assert not np.array_equal(first, other)
    assert not np.array_equal(secret_stream(tmp_path / "elsewhere", "ab", 2).standard_normal(4), first)


def test_calls_beyond_the_budget_are_refused(tmp_path: Path) -> None:
    for call in ("ab", "cd", "ab"):
        secret_stream(tmp_path, call, 2)
    with pytest.raises(SiteError, match="privacy budget is spent: 2 calls"):
        secret_stream(tmp_path, "ef", 2)


@pytest.mark.parametrize("text", ["", "[]", '{"key": "xyz"}', '{"key": "ab", "calls": 3}'])
def test_a_damaged_journal_is_no_reason_to_begin_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / "generator_privacy.json").write_text(text, encoding="utf-8")
    with pytest.raises(SiteError, match="journal of private training is damaged"):
        secret_stream(tmp_path, "ab", 2)


# What leaves a site.


def private_reply(fitting: Fitting, site: str) -> Message:
    tensors = start_vae(fitting.generator.settings, 3, (2, 2), 0).state_dict()
    message = Message.pack({"model": dict(tensors)}, devices=json.dumps(DEVICES), number=1)
    return fitting.sites[site].handle("fit-generator", 1, message)


def test_no_loss_and_no_count_leaves(tmp_path: Path) -> None:
    owned = {"north": {("a", "bright"): 6}, "south": {("a", "bright"): 2, ("b", "dark"): 4}}
    fitting = Fitting(painted_study(dp={"epsilon": 4.0}), tmp_path, owned)
    replies = [private_reply(fitting, site) for site in owned]
    # Six patients each: only values of arrays differ, although classes, devices and cells below the floor do.
    assert replies[0].scalars == replies[1].scalars
    said = replies[0].scalars
    assert set(said) == {"weight/body", "weight/rows", "epsilon", "noise", "sampling", "steps"}
    assert (said["weight/body"], said["weight/rows"], said["sampling"], said["steps"]) == (1.0, 1.0, 1.0, 1)
    for reply in replies:
        rows = reply.group("rows")
        assert rows["class_rows_weight"].tolist() == rows["device_rows_weight"].tolist() == [1, 1]
        # Noise moves the vector of a class that the site does not own as well.
        assert bool((rows["class_rows"] != 0).all())


def test_site_without_patients_answers_zeros_of_no_weight(tmp_path: Path) -> None:
    fitting = Fitting(painted_study(dp={}), tmp_path, {"south": {("a", "bright"): 1}})
    every, none = torch.arange(2), torch.arange(0)
    fitting.data["south"].splits = {"train": none, "val": none, "test": every}
    reply = private_reply(fitting, "south")
    assert reply.scalars == {"weight/body": 0.0, "weight/rows": 1.0}
    assert not any(array.any() for array in reply.arrays.values())


@pytest.mark.parametrize("backend", ["plain", "masked"])
def test_summary_tells_what_was_spent_at_the_worst_site(tmp_path: Path, backend: str) -> None:
    dp = {"epsilon": 4.0, "delta": 1e-4, "clip": 2.0}
    fitting = Fitting(painted_study(backend, dp=dp, rounds=3, batch_size=8), tmp_path)
    spent = []
    for _ in range(3):
        fitting.fit(rounds=1)
        spent.append(fitting.generator.summary(fitting.state)["privacy"]["epsilon"])
    assert spent[0] < spent[1] < spent[2] <= 4.0
    privacy = fitting.generator.summary(fitting.state)["privacy"]
    # south has the fewest patients, 12: two thirds of them a step, and two steps a round. north: 24, three steps.
    assert privacy["sampling"] == pytest.approx(8 / 12)
    assert privacy["steps"] == 9
    assert (privacy["delta"], privacy["clip"], privacy["unit"]) == (1e-4, 2.0, "patient")
    wanted = max(noise_multiplier(4.0, 1e-4, 8 / patients, 3 * math.ceil(patients / 8)) for patients in (24, 12, 16))
    assert privacy["noise"] == wanted
    assert fitting.generator.summary(fitting.state)["loss"] == []
    assert fitting.samples("a", "bright", 2).shape == (2, 3, 16, 16)


def test_a_killed_private_fit_repeats_its_round(tmp_path: Path) -> None:
    study = painted_study(dp={}, rounds=2)
    first = Fitting(study, tmp_path)
    first.fit(rounds=1)
    vae = first.state.groups["vae"]
    again = Fitting(study, tmp_path)
    again.fit(rounds=1)
    assert all(torch.equal(again.state.groups["vae"][name], tensor) for name, tensor in vae.items())
    other = Fitting(study, tmp_path / "other")
    other.fit(rounds=1)
    assert not torch.equal(other.state.groups["vae"]["posterior.weight"], vae["posterior.weight"])
