"""Norm clip, support and controls."""

from __future__ import annotations

import pytest
import torch
from filter_pieces import piece_of

from polyclinic.vectors.filters.controls import RandomControl, ShuffledControl
from polyclinic.vectors.filters.norm_clip import NormClip
from polyclinic.vectors.filters.support import Support


def test_a_long_vector_is_shortened_to_the_bound() -> None:
    # Whole vector: norm 30, median 4, so the most is 1.5 * 4 = 6: a fifth of it.
    clipped = NormClip().apply(piece_of([10.0, -20.0], norm=30.0, median_norm=4.0))
    assert clipped.tolist() == [2.0, -4.0]


@pytest.mark.parametrize("norm", [0.0, 1.0, 6.0])
def test_a_vector_within_the_bound_stays(norm: float) -> None:
    vector = torch.randn(4)
    assert torch.equal(NormClip().apply(piece_of(vector, norm=norm, median_norm=4.0)), vector)


def test_rows_of_absent_classes_become_zero() -> None:
    vector = torch.arange(1.0, 7).reshape(3, 2)
    assert Support().apply(piece_of(vector, absent_rows=(0, 2))).tolist() == [[0, 0], [3, 4], [0, 0]]
    assert Support().apply(piece_of([1.0, 2.0, 3.0], absent_rows=(1,))).tolist() == [1, 0, 3]
    assert torch.equal(Support().apply(piece_of(vector)), vector)


def test_random_has_the_length_and_nothing_else() -> None:
    vector = torch.randn(200, 50) * 3
    noise = RandomControl().apply(piece_of(vector))
    assert float(noise.double().norm()) == pytest.approx(float(vector.double().norm()), rel=1e-6)
    cosine = torch.nn.functional.cosine_similarity(noise.flatten(), vector.flatten(), dim=0)
    assert abs(float(cosine)) < 5 / 100
    assert not torch.equal(noise, RandomControl().apply(piece_of(vector, seed=8)))


def test_shuffled_has_exactly_the_values() -> None:
    vector = torch.randn(20, 50)
    shuffled = ShuffledControl().apply(piece_of(vector))
    assert torch.equal(shuffled.flatten().sort().values, vector.flatten().sort().values)
    assert int((shuffled == vector).sum()) < 20
    assert not torch.equal(shuffled, ShuffledControl().apply(piece_of(vector, seed=8)))
