"""Closed-form heads: equal to pooled solutions written anew in NumPy, exact under joining, leaving and any split."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyclinic.errors import ContributionError
from polyclinic.vectors.head import HeadSums, LDAHead, RidgeHead, solve_head, solve_lda, solve_ridge

D, C = 6, 3


def pooled(seed: int = 0, images: int = 120) -> tuple[np.ndarray, np.ndarray]:
    """Features about a mean that differs from class to class, classes of unequal size."""
    draw = np.random.default_rng(seed)
    labels = draw.choice(C, size=images, p=[0.6, 0.3, 0.1])
    labels[:C] = range(C)
    centres = draw.normal(size=(C, D))
    return centres[labels] + draw.normal(size=(images, D)) @ draw.normal(size=(D, D)) + 2.0, labels


def findings(seed: int = 0, images: int = 120) -> tuple[np.ndarray, np.ndarray]:
    x, _ = pooled(seed, images)
    truth = x @ np.random.default_rng(seed + 1).normal(size=(D, C)) > 1
    return x, truth.astype(np.float64)


def sums(x: np.ndarray, y: np.ndarray) -> HeadSums:
    return HeadSums.of(torch.from_numpy(x), torch.from_numpy(y), C)


def parts(x: np.ndarray, y: np.ndarray, cuts: list[int]) -> list[HeadSums]:
    return [sums(a, b) for a, b in zip(np.split(x, cuts), np.split(y, cuts), strict=True)]


def normal_equations(x: np.ndarray, y: np.ndarray, w: np.ndarray, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """Weighted ridge of targets ``[n, K]`` with a free intercept, as one linear system over slopes and intercept."""
    mean = (w[:, None] * x).sum(0) / w.sum()
    eigenvalues = np.linalg.eigvalsh((w[:, None] * (x - mean)).T @ (x - mean))
    extended = np.hstack([x, np.ones((len(x), 1))])
    penalty = np.diag([gamma * eigenvalues.mean()] * D + [0.0])
    solution = np.linalg.solve((w[:, None] * extended).T @ extended + penalty, (w[:, None] * extended).T @ y)
    return solution[:-1].T, solution[-1]


@pytest.mark.parametrize("balanced", [False, True])
def test_ridge_over_sites_is_the_pooled_solution(balanced: bool) -> None:
    x, labels = pooled()
    total = parts(x, labels, [10, 15, 80])
    weight, bias = solve_ridge(total[2] + total[0] + total[3] + total[1], 0.05, balanced, temperature=1.0)
    counts = np.bincount(labels)
    w = len(x) / (C * counts[labels]) if balanced else np.ones(len(x))
    expected = normal_equations(x, np.eye(C)[labels], w, 0.05)
    np.testing.assert_allclose(weight.numpy(), expected[0], atol=1e-8)
    np.testing.assert_allclose(bias.numpy(), expected[1], atol=1e-8)


@pytest.mark.parametrize("balanced", [False, True])
def test_ridge_of_findings_is_the_pooled_solution_and_a_score_of_a_half_is_a_logit_of_zero(balanced: bool) -> None:
    x, truth = findings()
    total = parts(x, truth, [7, 60])
    weight, bias = solve_ridge(total[0] + total[1] + total[2], 0.05, balanced, temperature=4.0)
    for c in range(C):
        have = truth[:, c].sum()
        w = np.where(truth[:, c] > 0, len(x) / (2 * have), len(x) / (2 * (len(x) - have)))
        slopes, start = normal_equations(x, truth[:, c : c + 1], w if balanced else np.ones(len(x)), 0.05)
        np.testing.assert_allclose(weight[c].numpy(), 4 * slopes[0], atol=1e-8)
        np.testing.assert_allclose(bias[c].numpy(), 4 * (start[0] - 0.5), atol=1e-8)


@pytest.mark.parametrize("prior", ["uniform", "counts"])
def test_discriminants_over_sites_are_the_pooled_ones(prior: str) -> None:
    x, labels = pooled(3)
    total = parts(x, labels, [30, 31])
    weight, bias = solve_lda(total[0] + total[1] + total[2], 0.1, prior)
    means = np.stack([x[labels == c].mean(0) for c in range(C)])
    inner = sum((x[labels == c] - means[c]).T @ (x[labels == c] - means[c]) for c in range(C)) / len(x)
    inner = 0.9 * inner + 0.1 * np.trace(inner) / D * np.eye(D)
    slopes = np.linalg.solve(inner, means.T).T
    shares = np.bincount(labels) / len(x) if prior == "counts" else np.ones(C)
    np.testing.assert_allclose(weight.numpy(), slopes, atol=1e-8)
    np.testing.assert_allclose(bias.numpy(), -0.5 * (slopes * means).sum(1) + np.log(shares), atol=1e-8)


def test_discriminants_give_the_probabilities_of_scikit_learn() -> None:
    lda = pytest.importorskip("sklearn.discriminant_analysis")
    x, labels = pooled(5)
    weight, bias = solve_lda(sums(x, labels), 0.2, "counts")
    ours = torch.softmax(torch.from_numpy(x) @ weight.T + bias, 1).numpy()
    theirs = lda.LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.2).fit(x, labels).predict_proba(x)
    np.testing.assert_allclose(ours, theirs, atol=1e-8)


def test_discriminants_of_findings_are_those_of_two_classes() -> None:
    x, truth = findings(2)
    weight, bias = solve_lda(sums(x, truth), 0.1, "counts")
    for c in range(C):
        two = HeadSums.of(torch.from_numpy(x), torch.from_numpy(1 - truth[:, c]).long(), 2)
        w, b = solve_lda(two, 0.1, "counts")
        torch.testing.assert_close(weight[c], w[0] - w[1], atol=1e-8, rtol=0)
        torch.testing.assert_close(bias[c], b[0] - b[1], atol=1e-8, rtol=0)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(10, 100), st.booleans())
def test_leaving_is_subtraction(seed: int, cut: int, balanced: bool) -> None:
    x, labels = pooled(seed)
    labels[cut : cut + C] = range(C)  # whoever stays has every class
    stays, leaves = sums(x[cut:], labels[cut:]), sums(x[:cut], labels[:cut])
    for got, expected in (
        (solve_ridge(stays + leaves - leaves, 0.05, balanced), solve_ridge(stays, 0.05, balanced)),
        (solve_lda(stays + leaves - leaves, 0.05), solve_lda(stays, 0.05)),
    ):
        torch.testing.assert_close(got, expected, atol=1e-8, rtol=1e-8)


def test_temperature_changes_no_decision() -> None:
    x, labels = pooled(7)
    logits = [
        torch.from_numpy(x) @ w.T + b for w, b in (solve_ridge(sums(x, labels), temperature=t) for t in (1.0, 30.0))
    ]
    assert torch.equal(logits[0].argmax(1), logits[1].argmax(1))
    assert (logits[0].argmax(1).numpy() == labels).mean() > 0.6


def test_a_class_without_images_scores_zero_in_ridge_and_is_refused_by_discriminants() -> None:
    x, labels = pooled()
    without = sums(x[labels != 2], labels[labels != 2])
    weight, bias = solve_ridge(without, balanced=True)
    assert weight[2].abs().max() == 0
    assert bias[2] == 0
    assert (torch.from_numpy(x) @ weight.T + bias).argmax(1).max() < 2
    with pytest.raises(ContributionError, match="no contribution has images of output 2"):
        solve_lda(without)


def test_features_that_do_not_vary_and_no_images_are_refused() -> None:
    with pytest.raises(ContributionError, match="the same"):
        solve_ridge(sums(np.zeros((4, D)), np.array([0, 1, 2, 0])))
    empty = sums(np.zeros((0, D)), np.zeros(0, np.int64))
    with pytest.raises(ContributionError, match="no images"):
        solve_ridge(empty)


def test_sums_that_cannot_be_are_refused() -> None:
    x, labels = pooled()
    good = sums(x, labels).tensors()
    assert not HeadSums.from_tensors(**good, classes=C).multi_label
    assert HeadSums.from_tensors(**sums(*findings()).tensors(), classes=C).multi_label
    for name, at, value, message in (
        ("count", (0,), -1.0, "negative counts"),
        ("first", (0, 0), float("nan"), "not finite"),
        ("second", (0, 0, 1), 1e6, "not symmetric"),
        ("second", (1, 2, 2), -1.0, "negative sums of squares"),
        ("count", (1,), 1e4, "count the same images"),
    ):
        bad = {n: t.clone() for n, t in good.items()}
        bad[name][at] = value
        with pytest.raises(ContributionError, match=message):
            HeadSums.from_tensors(**bad, classes=C)
    with pytest.raises(ContributionError, match="have shapes"):
        HeadSums.from_tensors(**good, classes=C + 1 + 1)
    with pytest.raises(ContributionError, match="cannot be added"):
        _ = sums(x, labels) + sums(x[:, :2], labels)


def test_settings_choose_the_solution() -> None:
    x, truth = findings()
    made = HeadSums(**sums(x, truth).tensors())
    for head, expected in (
        (RidgeHead(gamma=0.3, balanced=True, temperature=2.0), solve_ridge(sums(x, truth), 0.3, True, 2.0)),
        (LDAHead(shrinkage=0.5, prior="counts"), solve_lda(sums(x, truth), 0.5, "counts")),
    ):
        solved = solve_head(made, head, "multi-label")
        assert torch.equal(solved["weight"], expected[0])
        assert torch.equal(solved["bias"], expected[1])
