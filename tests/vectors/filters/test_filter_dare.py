"""DARE."""

from __future__ import annotations

import pytest
import torch
from filter_pieces import piece_of

from polyclinic.vectors.filters.dare import Dare


def test_entries_are_dropped_or_rescaled_and_the_mean_stays() -> None:
    vector = torch.full((100_000,), 3.0)
    thinned = Dare(drop=0.75).apply(piece_of(vector))
    assert set(thinned.tolist()) == {0.0, 12.0}
    # Five standard deviations of the mean of so many draws.
    assert float(thinned.mean()) == pytest.approx(3, abs=5 * 12 * (0.25 * 0.75 / 100_000) ** 0.5)


def test_the_seed_alone_decides() -> None:
    vector = torch.ones(1000)
    one, same, other = (Dare().apply(piece_of(vector, seed=s)) for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_dropping_nothing_changes_nothing() -> None:
    vector = torch.randn(50)
    assert torch.equal(Dare(drop=0).apply(piece_of(vector)), vector)
