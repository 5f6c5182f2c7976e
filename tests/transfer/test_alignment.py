"""Alignment losses against double loops, closed forms and derivatives taken by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from polyclinic.transfer.alignment import DomainJudge, aligned, coral, make_judge, mk_mmd, supervised_contrast


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_mmd(first: Tensor, second: Tensor) -> float:
    def apart(a: list[float], b: list[float]) -> float:
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))

    def mean_kernel(left: list[list[float]], right: list[list[float]]) -> float:
        total = sum(math.exp(-apart(x, y) / width) for x in left for y in right for width in (0.5, 1, 2, 4, 8))
        return total / (len(left) * len(right))

    x, y = first.tolist(), second.tolist()
    return mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)


def test_mmd_is_the_double_loop() -> None:
    first, second = draws(5, 3), draws(7, 3, seed=1) + 0.5
    assert math.isclose(float(mk_mmd(first, second)), naive_mmd(first, second), rel_tol=1e-10)


@pytest.mark.parametrize("shift", [0.0, 1e-4, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mmd_is_never_negative_and_zero_for_equal_sets(shift: float, dtype: torch.dtype) -> None:
    for seed in range(10):
        first = draws(16, 4, seed=seed).to(dtype)
        found = mk_mmd(first, first.flip(0) + shift)
        assert torch.isfinite(found)
        assert found >= 0
    assert float(mk_mmd(first, first)) < 1e-6
    assert float(mk_mmd(torch.ones(4, 3), torch.ones(5, 3))) < 1e-6


def slope(kind: str, first: Tensor, second: Tensor) -> tuple[float, Tensor, Tensor]:
    left, right = first.clone().requires_grad_(), second.clone().requires_grad_()
    found = aligned(kind, (left, torch.zeros(0)), (right, torch.zeros(0)), 1.0, None)  # type: ignore[arg-type]
    found.backward()  # type: ignore[no-untyped-call]
    assert left.grad is not None
    assert right.grad is not None
    return float(found.detach()), left.grad, right.grad


@pytest.mark.parametrize("kind", ["mmd", "coral"])
def test_sets_are_not_brought_together_by_shrinking_them(kind: str) -> None:
    first, second = draws(6, 4), draws(5, 4, seed=1) + 1
    found, *slopes = slope(kind, first, second)
    for features, gradient in zip((first, second), slopes, strict=True):
        assert float(gradient.abs().max()) > 1e-4
        torch.testing.assert_close((features * gradient).sum(1), torch.zeros(len(features), dtype=torch.float64))
    assert math.isclose(slope(kind, 7 * first, 0.01 * second)[0], found, rel_tol=1e-9)


@pytest.mark.parametrize("kind", ["mmd", "coral"])
def test_features_that_hardly_differ_are_not_pulled_harder(kind: str) -> None:
    # Averages over space of a small network: much in common, little of each image.
    common = torch.full((4,), 1.0, dtype=torch.float64)
    pulls = []
    for spread in (0.3, 0.03, 0.003):
        _, left, right = slope(kind, common + spread * draws(6, 4), common + spread * (draws(5, 4, seed=1) + 1))
        pulls.append(float(left.norm() + right.norm()))
    assert pulls[0] > pulls[1] > pulls[2]


def test_coral_is_the_distance_of_covariances_and_means() -> None:
    # Covariances diag(2, 0) and diag(0, 8), means (1, 0) and (0, 2).
    first = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    second = torch.tensor([[0.0, 0.0], [0.0, 4.0]])
    assert math.isclose(float(coral(first, second)), (2**2 + 8**2) / (4 * 2**2) + 1 + 4, rel_tol=1e-6)


def test_the_judge_learns_and_features_get_its_gradient_turned_around() -> None:
    torch.manual_seed(0)
    judge = DomainJudge(3).double()
    first, second = draws(4, 3), draws(6, 3, seed=1)

    def gradients(strength: float) -> tuple[Tensor, Tensor]:
        leaf = first.clone().requires_grad_()
        judge.zero_grad()
        judge(leaf, second, strength).backward()
        assert leaf.grad is not None
        weight = judge.layers[0].weight.grad
        assert weight is not None
        return leaf.grad, weight.clone()

    plain = first.clone().requires_grad_()
    scores = judge.layers(plain).squeeze(1), judge.layers(second).squeeze(1)
    truth = [torch.ones(4, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)]
    losses = [torch.nn.functional.binary_cross_entropy_with_logits(s, t) for s, t in zip(scores, truth, strict=True)]
    ((losses[0] + losses[1]) / 2).backward()
    assert plain.grad is not None
    turned, own = gradients(0.3)
    torch.testing.assert_close(turned, -0.3 * plain.grad)
    torch.testing.assert_close(own, gradients(0.0)[1])  # the judge learns at full strength
    torch.testing.assert_close(gradients(0.0)[0], torch.zeros_like(first))


def test_supervised_contrast_is_the_loop() -> None:
    first, second = draws(3, 4), draws(4, 4, seed=1)
    labels, public = torch.tensor([0, 1, 0]), torch.tensor([0, 0, 2, 2])
    ours, theirs = (t / t.norm(dim=1, keepdim=True) for t in (first, second))

    def loop(anchors: Tensor, a: Tensor, others: Tensor, o: Tensor) -> float:
        each = []
        for i in range(len(anchors)):
            scores = {j: float(anchors[i] @ others[j]) / 0.07 for j in range(len(others)) if j != i}
            total = math.log(sum(math.exp(s) for s in scores.values()))
            likes = [j for j in scores if o[j] == a[i]]
            if likes:
                each.append(-sum(scores[j] - total for j in likes) / len(likes))
        return sum(each) / len(each)

    wanted = loop(ours, labels, torch.cat([ours, theirs]), torch.cat([labels, public]))
    wanted += 0.1 * loop(theirs, public, theirs, public)
    assert math.isclose(float(supervised_contrast(first, second, labels, public)), wanted, rel_tol=1e-10)


def test_public_features_are_goals_of_the_contrast_not_pupils() -> None:
    first, second = draws(3, 4).requires_grad_(), draws(2, 4, seed=1).requires_grad_()
    # Public classes that are all different have no contrast among themselves.
    supervised_contrast(first, second, torch.tensor([0, 0, 1]), torch.tensor([0, 1])).backward()
    assert first.grad is not None
    assert first.grad.abs().sum() > 0
    assert second.grad is None or second.grad.abs().sum() == 0


@pytest.mark.parametrize("kind", ["mmd", "coral", "dann", "supcon"])
def test_every_alignment_moves_features_and_none_does_nothing(kind: str) -> None:
    own = draws(6, 4).float().requires_grad_(), torch.tensor([0, 1] * 3)
    public = draws(6, 4, seed=1).float().requires_grad_(), torch.tensor([0, 1, 2] * 2)
    judge = make_judge(kind, 4)  # type: ignore[arg-type]
    assert (judge is not None) == (kind == "dann")
    aligned(kind, own, public, 0.1, judge).backward()  # type: ignore[arg-type]
    for features, _ in (own, public):
        assert features.grad is not None
        assert features.grad.isfinite().all()
        assert features.grad.abs().sum() > 0
    assert float(aligned("none", own, public, 0.1, None).detach()) == 0
