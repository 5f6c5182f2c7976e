"""What all filters promise."""

from __future__ import annotations

import pytest
import torch
from filter_pieces import piece_of
from hypothesis import given, settings
from hypothesis import strategies as st

from polyclinic.vectors.filters.breadcrumbs import Breadcrumbs
from polyclinic.vectors.filters.controls import RandomControl, ShuffledControl
from polyclinic.vectors.filters.dare import Dare
from polyclinic.vectors.filters.norm_clip import NormClip
from polyclinic.vectors.filters.support import Support

FILTERS = [Dare(), Breadcrumbs(), NormClip(), Support(), RandomControl(), ShuffledControl()]
filters = pytest.mark.parametrize("chosen", FILTERS, ids=lambda f: f.name)


@filters
@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4), (4, 3, 2, 2), (300, 900)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shape_and_dtype_stay_and_the_vector_is_left_alone(
    chosen: Dare, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    vector = torch.randn(shape).to(dtype)
    before = vector.clone()
    piece = piece_of(vector, norm=9.0, absent_rows=(0,) if shape else ())
    result = chosen.apply(piece)
    assert (result.shape, result.dtype) == (vector.shape, dtype)
    assert torch.equal(vector, before)
    assert bool(result.isfinite().all())
    assert torch.equal(result, chosen.apply(piece))


@filters
@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-(2.0**90), 2.0**90, width=32), min_size=1, max_size=20), st.integers(0, 2**62))
def test_finite_vectors_stay_finite(chosen: Dare, values: list[float], seed: int) -> None:
    norm = float(torch.tensor(values).double().norm())
    assert bool(chosen.apply(piece_of(values, seed=seed, norm=norm, median_norm=norm / 3)).isfinite().all())


@filters
def test_zeros_stay_zeros(chosen: Dare) -> None:
    assert not chosen.apply(piece_of(torch.zeros(4, 3), norm=0.0, median_norm=0.0)).any()


def test_only_norm_clip_needs_norms() -> None:
    assert [f.name for f in FILTERS if f.needs_norms] == ["norm-clip"]
