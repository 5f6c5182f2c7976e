"""Coefficient rules of data vectors, against tables worked out apart from this code."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule_layers import layer_of

from polyclinic.errors import ContributionError
from polyclinic.vectors.rules.base_only import BaseOnly
from polyclinic.vectors.rules.data_vector import DataVector, capped_shares, mean_cosine
from polyclinic.vectors.rules.elementwise import combine
from polyclinic.vectors.rules.matrix import as_layer

SITES = [2, 3, 5, 10]
NORM_OF_SUM = {0.2: [1.55, 2.05, 3.00, 5.29], 0.5: [1.73, 2.45, 3.87, 7.42], 0.8: [1.90, 2.79, 4.58, 9.06]}
KEPT_OF_MEAN = {
    0.1: [0.18, 0.25, 0.36, 0.53],
    0.3: [0.46, 0.56, 0.68, 0.81],
    0.5: [0.67, 0.75, 0.83, 0.91],
    0.8: [0.89, 0.92, 0.95, 0.98],
}


def with_cosine(sites: int, rho: float) -> list[torch.Tensor]:
    """Unit vectors that all have the cosine ``rho`` with each other."""
    rows = torch.zeros(sites, sites + 1)
    rows[:, 0] = math.sqrt(rho)
    rows[:, 1:] = torch.eye(sites) * math.sqrt(1 - rho)
    return [as_layer(row, (1, sites + 1)) for row in rows]


def cells(table: dict[float, list[float]]) -> list[tuple[float, int, float]]:
    """Rho, sites, value."""
    return [(rho, n, value) for rho, row in table.items() for n, value in zip(SITES, row, strict=True)]


@pytest.mark.parametrize(("rho", "sites", "norm"), cells(NORM_OF_SUM))
def test_norm_keep_divides_by_how_much_longer_the_sum_is(rho: float, sites: int, norm: float) -> None:
    vectors = with_cosine(sites, rho)
    assert mean_cosine(vectors) == pytest.approx(rho, rel=1e-6)
    merged = DataVector(coefficients="norm-keep").merge(layer_of(vectors), None)
    assert merged.shares is not None
    assert 1 / merged.shares[0] == pytest.approx(norm, abs=0.0051)
    assert float(merged.delta.norm()) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize(("rho", "sites", "kept"), cells(KEPT_OF_MEAN))
def test_model_stock_keeps_t_of_the_mean(rho: float, sites: int, kept: float) -> None:
    vectors = with_cosine(sites, rho)
    merged = DataVector(coefficients="model-stock").merge(layer_of(vectors), None)
    assert merged.shares is not None
    assert sum(merged.shares) == pytest.approx(kept, abs=0.0051)
    assert torch.allclose(merged.delta, torch.stack(vectors).double().mean(0) * sum(merged.shares))


def test_vectors_that_cancel_are_not_blown_up() -> None:
    layer = layer_of([[1.0, 2.0], [-1.0, -2.0 + 1e-6]])
    assert DataVector(coefficients="norm-keep").merge(layer, None).shares == (1.0, 1.0)
    assert DataVector(coefficients="model-stock").merge(layer, None).shares == (0.0, 0.0)


def test_the_cosine_to_a_vector_of_zeros_is_zero() -> None:
    assert mean_cosine([torch.ones(3), torch.ones(3), torch.zeros(3)]) == pytest.approx(1 / 3)
    assert mean_cosine([torch.ones(3)]) == 0


def test_cosines_of_long_vectors_are_summed_block_by_block() -> None:
    one = torch.arange(100_000, dtype=torch.float32)
    other = torch.ones(100_000)
    exact = torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=0)
    assert mean_cosine([one, other]) == pytest.approx(float(exact), rel=1e-12)


def test_sum_mean_and_scale() -> None:
    assert DataVector(coefficients="sum").shares([5, 1], None) == [1.0, 1.0]
    assert DataVector(coefficients="sum", scale=0.3).shares([5, 1], None) == [0.3, 0.3]
    assert DataVector(coefficients="mean").shares([5, 1, 1, 1], None) == [0.25] * 4
    assert DataVector(coefficients="norm-keep").shares([5, 1], None) is None


def test_mean_equals_the_average_of_the_models() -> None:
    base = torch.randn(4, 3).double()
    models = [base + torch.randn(4, 3).double() for _ in range(3)]
    shares = DataVector(coefficients="mean").shares([1, 2, 3], None)
    assert shares is not None
    averaged = base + combine([m - base for m in models], shares)
    assert torch.allclose(averaged, sum(models) / 3, rtol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("images", "shares"),
    [
        ([1, 1, 2], [0.25, 0.25, 0.5]),
        # 2/3 is the most; the others share a third as 1 to 3.
        ([1, 3, 96], [1 / 12, 3 / 12, 2 / 3]),
        # N = 5, at most 0.4: of 90, 7, 1, 1, 1 the first two are cut one after the other, the rest share 0.2.
        ([90, 7, 1, 1, 1], [0.4, 0.4, 0.2 / 3, 0.2 / 3, 0.2 / 3]),
        ([100, 0, 0], [2 / 3, 1 / 6, 1 / 6]),
        ([0, 0], [0.5, 0.5]),
        ([7], [1.0]),
    ],
)
def test_weighted_is_capped(images: list[int], shares: list[float]) -> None:
    assert DataVector(coefficients="weighted").shares(images, None) == pytest.approx(shares)


def test_a_cap_of_one_is_the_mean() -> None:
    assert DataVector(coefficients="weighted", cap=1).shares([9, 1, 4], None) == pytest.approx([1 / 3] * 3)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=12), st.floats(1, 5))
def test_capped_shares_sum_to_one_and_keep_the_order(images: list[int], cap: float) -> None:
    limit = cap / len(images)
    shares = capped_shares(images, limit)
    assert sum(shares) == pytest.approx(1)
    assert all(0 <= share <= limit + 1e-12 for share in shares)
    by_images = [share for _, share in sorted(zip(images, shares, strict=True))]
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(by_images))


def judged_by(best: float, seen: list[list[float]]):  # type: ignore[no-untyped-def]
    """A judge that likes shares with this sum, and notes what it is asked."""

    def judge(shares: Sequence[float]) -> float:
        seen.append(list(shares))
        return -abs(sum(shares) - best)

    return judge


def test_search_takes_the_best_total() -> None:
    seen: list[list[float]] = []
    rule = DataVector(coefficients="search")
    assert rule.judged
    assert not DataVector().judged
    assert rule.shares([1, 1, 1, 1], judged_by(1.3, seen)) == [0.3125] * 4
    assert [sum(s) for s in seen] == [0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3, 4]


def test_search_of_equal_scores_takes_the_smaller() -> None:
    assert DataVector(coefficients="search").shares([1, 1], lambda shares: 0.5) == [0.125, 0.125]
    rule = DataVector(coefficients="search", grid=(2.0, 1.0, 0.0))
    assert rule.shares([1, 1], lambda shares: min(sum(shares), 1)) == [0.5, 0.5]


def test_search_needs_a_judge() -> None:
    with pytest.raises(ContributionError, match="validation images"):
        DataVector(coefficients="search").shares([1, 1], None)


def test_base_takes_nothing() -> None:
    assert BaseOnly().shares([4, 4], None) == [0.0, 0.0]
