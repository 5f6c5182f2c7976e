"""Breadcrumbs, above all on small tensors."""

from __future__ import annotations

import pytest
import torch
from filter_pieces import piece_of
from hypothesis import given
from hypothesis import strategies as st

from polyclinic.vectors.filters.breadcrumbs import Breadcrumbs


def test_the_middle_band_stays() -> None:
    vector = torch.tensor([10.0, -9.0, 8.0, -7.0, 6.0, -5.0, 4.0, -3.0, 2.0, -1.0])
    kept = Breadcrumbs(density=0.3, outliers=0.2).apply(piece_of(vector))
    assert kept.tolist() == [0, 0, 8, -7, 6, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("count", [1, 2, 5, 64, 99])
def test_tensors_too_small_for_an_outlier_keep_their_largest_values(count: int) -> None:
    vector = torch.arange(1.0, count + 1)
    kept = Breadcrumbs(density=0.5, outliers=0.01).apply(piece_of(vector))
    assert int(kept.count_nonzero()) == max(1, round(count / 2))
    assert float(kept[-1]) == count


def test_with_a_hundred_values_one_outlier_goes() -> None:
    kept = Breadcrumbs(density=0.5, outliers=0.01).apply(piece_of(torch.arange(1.0, 101)))
    assert torch.nonzero(kept).flatten().tolist() == list(range(49, 99))


def test_nothing_dropped_when_all_is_wanted() -> None:
    vector = torch.randn(70)
    assert torch.equal(Breadcrumbs(density=1, outliers=0).apply(piece_of(vector)), vector)
    kept = Breadcrumbs(density=1, outliers=0.1).apply(piece_of(vector))
    assert int(kept.count_nonzero()) == 63


def test_equal_values_stay_together() -> None:
    kept = Breadcrumbs(density=0.2, outliers=0.1).apply(piece_of([2.0, -2.0, 2.0, 1.0, 1.0, 0.5, 0.1, 0.1, 0.1, 0.1]))
    assert kept.tolist() == [2.0, -2.0, 2.0, 0, 0, 0, 0, 0, 0, 0]


@given(st.integers(1, 300), st.floats(0.01, 1), st.floats(0, 0.99), st.integers(0, 100))
def test_something_always_stays(count: int, density: float, outliers: float, seed: int) -> None:
    vector = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    kept = Breadcrumbs(density=density, outliers=outliers).apply(piece_of(vector))
    wanted = max(1, round(density * count))
    assert int(kept.count_nonzero()) == min(wanted, count - int(outliers * count))
    assert torch.equal(kept[kept != 0], vector[kept != 0])
