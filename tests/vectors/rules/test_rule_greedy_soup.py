"""Greedy soups with judges that can be worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from polyclinic.errors import ContributionError
from polyclinic.vectors.rules.greedy_soup import GreedySoup


def nearest_to(points: list[float], target: float):  # type: ignore[no-untyped-def]
    """Scores how near the mixed points are to the target."""
    return lambda shares: -abs(sum(s * p for s, p in zip(shares, points, strict=True)) - target)


def test_a_vector_that_helps_is_added_and_one_that_hurts_is_not() -> None:
    # Alone 3 is best (off by 1). With 7 the mean is 5 (off by 1: no worse, stays); with -9 it would be 1/3.
    assert GreedySoup().shares([1, 1, 1], nearest_to([-9, 7, 3], 4)) == [0.0, 0.5, 0.5]
    assert GreedySoup().shares([1, 1, 1], nearest_to([-9, 11, 3], 4)) == [0.0, 0.0, 1.0]


def test_all_are_tried_also_after_one_that_hurts() -> None:
    # Alone 10 is best (off by 1). Next 9: mean 9.5, worse. Then 14: mean 12, no worse. Then 16: mean 13.3, worse.
    assert GreedySoup().shares([1] * 4, nearest_to([10, 16, 14, 9], 11)) == [0.5, 0, 0.5, 0]


def test_equal_models_are_tried_in_their_order() -> None:
    asked: list[Sequence[float]] = []

    def judge(shares: Sequence[float]) -> float:
        asked.append(list(shares))
        return 1.0 if sum(1 for s in shares if s) == 1 else 0.0

    assert GreedySoup().shares([1, 1, 1], judge) == [1.0, 0.0, 0.0]
    assert asked[3:] == [[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]]


def test_one_site_and_scale() -> None:
    assert GreedySoup().shares([3], lambda s: 0.1) == [1.0]
    assert GreedySoup(scale=2).shares([3, 3], lambda s: 0.1) == [1.0, 1.0]


def test_it_needs_a_judge() -> None:
    assert GreedySoup().judged
    with pytest.raises(ContributionError, match="validation images"):
        GreedySoup().shares([1], None)
