"""The k-th largest magnitude, exactly, against a sort."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyclinic.vectors.rules import magnitude
from polyclinic.vectors.rules.magnitude import kth_magnitude, kth_magnitudes


def by_sorting(values: torch.Tensor, rank: int) -> float:
    """What it must be."""
    return float(np.sort(np.abs(values.float().numpy().ravel()))[::-1][rank - 1])


@settings(deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=60), st.data())
def test_any_values(values: list[float], data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, len(values)))
    tensor = torch.tensor(values, dtype=torch.float32)
    assert kth_magnitude(tensor, rank) == by_sorting(tensor, rank)


@pytest.mark.parametrize("rank", [1, 2, 1000, 60_000, 299_999, 300_000])
def test_large_tensors(rank: int) -> None:
    values = torch.randn(300_000, generator=torch.Generator().manual_seed(rank))
    assert kth_magnitude(values, rank) == by_sorting(values, rank)


def misleading(count: int, first: int = 0) -> torch.Tensor:
    """The sampled values, of which the first is at ``first``, are all zero, the others are not."""
    values = torch.arange(1, count + 1, dtype=torch.float32)
    values[first :: magnitude.STEP] = 0
    return values


@pytest.mark.parametrize("rank", [1, 70_000, 200_000])
def test_a_sample_that_misleads(rank: int) -> None:
    values = misleading(200_000)
    assert kth_magnitude(values, rank) == by_sorting(values, rank)


def test_very_many_equal_values_are_counted_instead_of_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(magnitude, "MOST_KEPT", 100)
    values = torch.randn(50_000, generator=torch.Generator().manual_seed(3)).mul(4).round()
    for rank in (1, 100, 10_000, 49_000):
        assert kth_magnitude(values, rank) == by_sorting(values, rank)


def test_layers_of_several_sites_count_as_one_vector_each() -> None:
    generator = torch.Generator().manual_seed(5)
    sizes = [(3,), (400, 900), (1,), (7, 5), ()]
    layers = [[torch.randn(size, generator=generator) * 10**j for j in range(3)] for size in sizes]
    layers[1][2] = misleading(360_000, magnitude.STEP - 3).reshape(400, 900)
    started = []

    def passes() -> list[list[torch.Tensor]]:
        started.append(1)
        return layers

    found = kth_magnitudes(passes, lambda n: n // 3)
    flat = [torch.cat([layer[j].flatten() for layer in layers]) for j in range(3)]
    assert found == [by_sorting(values, len(values) // 3) for values in flat]
    assert len(started) == 4
