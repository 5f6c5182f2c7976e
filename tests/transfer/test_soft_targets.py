"""Soft targets against the formulas written out."""

from __future__ import annotations

import math

import torch

from polyclinic.transfer.soft_targets import distillation, soft


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_soft_is_a_softmax_or_sigmoids_of_divided_logits() -> None:
    logits = torch.tensor([[0.0, 3 * math.log(3.0)]])
    torch.testing.assert_close(soft(logits, 3.0, False), torch.tensor([[0.25, 0.75]]))
    torch.testing.assert_close(soft(logits, 3.0, True), torch.tensor([[0.5, 0.75]]))


def test_multi_class_is_the_divergence_written_out() -> None:
    ours, theirs, t = draws(5, 4), draws(5, 4, seed=1), 3.0
    total = 0.0
    for row, goal in zip(ours.tolist(), theirs.tolist(), strict=True):
        p = [math.exp(z / t) / sum(math.exp(o / t) for o in goal) for z in goal]
        q = [math.exp(z / t) / sum(math.exp(o / t) for o in row) for z in row]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    found = distillation(ours, soft(theirs, t, False), t, False)
    assert math.isclose(float(found), t * t * total / 5, rel_tol=1e-12)


def test_multi_label_is_the_mean_of_bernoulli_divergences() -> None:
    ours, theirs, t = draws(5, 4), draws(5, 4, seed=1), 2.0
    total = 0.0
    for z, goal in zip(ours.flatten().tolist(), theirs.flatten().tolist(), strict=True):
        p, q = 1 / (1 + math.exp(-goal / t)), 1 / (1 + math.exp(-z / t))
        total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    found = distillation(ours, soft(theirs, t, True), t, True)
    assert math.isclose(float(found), t * t * total / 20, rel_tol=1e-12)


def test_agreement_costs_nothing_and_certain_targets_are_finite() -> None:
    logits = draws(3, 4)
    for multi in (False, True):
        assert abs(float(distillation(logits, soft(logits, 3.0, multi), 3.0, multi))) < 1e-12
    certain = torch.tensor([[1.0, 0.0]])
    assert torch.isfinite(distillation(torch.zeros(1, 2), certain, 1.0, False))
    assert torch.isfinite(distillation(torch.zeros(1, 2), certain, 1.0, True))


def test_gradients_reach_the_learner_alone() -> None:
    ours, theirs = draws(3, 4).requires_grad_(), draws(3, 4, seed=1).requires_grad_()
    distillation(ours, soft(theirs, 3.0, False), 3.0, False).backward()
    assert theirs.grad is None
    # T² KL has the gradient T (q - p) / B.
    wanted = 3.0 * (soft(ours, 3.0, False) - soft(theirs, 3.0, False)).detach() / 3
    torch.testing.assert_close(ours.grad, wanted)
