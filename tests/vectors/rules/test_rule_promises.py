"""What all rules promise: finite results in the layer's shape, no regard to the order, one site's own vector."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_layers import LAYERWISE, layer_of, merged, random_extra, random_vectors

from polyclinic.vectors.rules.median import Median

SHAPES = [(6, 4), (4, 3, 3, 3), (5,), (1,), (), (1, 7), (3, 40), (2, 2)]
CHANGES_ONE = {"ties", "ties-network", "iso-c"}
rules = pytest.mark.parametrize("name", LAYERWISE)


@rules
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sites", [1, 2, 3, 10])
def test_result_has_the_layers_shape_in_float64(name: str, shape: tuple[int, ...], sites: int) -> None:
    layer = layer_of(random_vectors(sites, shape), extra=random_extra(sites, shape))
    delta = merged(LAYERWISE[name], layer)
    assert delta.shape == shape
    assert delta.dtype == torch.float64
    assert bool(delta.isfinite().all())


@rules
@pytest.mark.parametrize("shape", [(6, 4), (4, 3, 3, 3), (5,), (3, 40)], ids=str)
def test_order_of_the_sites_does_not_matter_up_to_rounding(name: str, shape: tuple[int, ...]) -> None:
    vectors, extra = random_vectors(4, shape), random_extra(4, shape)
    order = [2, 0, 3, 1]
    shuffled = layer_of([vectors[j] for j in order], extra={k: [v[j] for j in order] for k, v in extra.items()})
    one, other = merged(LAYERWISE[name], layer_of(vectors, extra=extra)), merged(LAYERWISE[name], shuffled)
    assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted(set(LAYERWISE) - CHANGES_ONE))
@pytest.mark.parametrize("shape", [(6, 4), (4, 3, 3, 3), (5,), (3, 40)], ids=str)
def test_one_site_gets_its_own_vector(name: str, shape: tuple[int, ...]) -> None:
    [vector] = random_vectors(1, shape)
    delta = merged(LAYERWISE[name], layer_of([vector], extra=random_extra(1, shape)))
    assert torch.allclose(delta, vector.double(), rtol=1e-9, atol=1e-9)


@rules
@pytest.mark.parametrize("shape", [(6, 4), (5,), (3, 40)], ids=str)
def test_zero_vectors_give_zero(name: str, shape: tuple[int, ...]) -> None:
    zeros = [torch.zeros(shape)] * 3
    none = {"fisher": zeros, "gram": [torch.zeros(shape[-1], shape[-1])] * 3}
    assert not merged(LAYERWISE[name], layer_of(zeros, extra=none)).any()


@rules
def test_one_site_without_a_change_is_no_trouble(name: str) -> None:
    vectors = [torch.zeros(6, 4), *random_vectors(2, (6, 4))]
    delta = merged(LAYERWISE[name], layer_of(vectors, extra=random_extra(3, (6, 4))))
    assert bool(delta.isfinite().all())
    assert delta.any()


@rules
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_double(name: str, dtype: torch.dtype) -> None:
    vectors = [v.to(dtype) for v in random_vectors(5, (6, 4))]
    extra = random_extra(5, (6, 4))
    half = merged(LAYERWISE[name], layer_of(vectors, extra=extra))
    single = merged(LAYERWISE[name], layer_of([v.float() for v in vectors], extra=extra))
    assert half.dtype == torch.float64
    assert torch.allclose(half, single, rtol=1e-9, atol=1e-9)


@rules
def test_vectors_are_left_alone(name: str) -> None:
    vectors, extra = random_vectors(3, (6, 4)), random_extra(3, (6, 4))
    before = [v.clone() for v in (*vectors, *extra["gram"], *extra["fisher"])]
    merged(LAYERWISE[name], layer_of(vectors, extra=extra))
    assert all(torch.equal(a, b) for a, b in zip(before, (*vectors, *extra["gram"], *extra["fisher"]), strict=True))


VALUES = st.one_of(st.just(0.0), st.floats(-(2.0**90), 2.0**90, width=32), st.sampled_from([1.0, -1.0, 1e-40, 1e-20]))


@st.composite
def stacks(draw: st.DrawFn) -> torch.Tensor:
    """Changes of up to four sites."""
    shape = draw(st.sampled_from([(1,), (3,), (2, 2), (2, 5), (4, 3), (3, 1), (2, 1, 2, 2)]))
    sites = draw(st.integers(1, 4))
    count = sites * torch.Size(shape).numel()
    values = draw(st.lists(VALUES, min_size=count, max_size=count))
    return torch.tensor(values, dtype=torch.float32).reshape(sites, *shape)


@rules
@settings(max_examples=60, deadline=None)
@given(vectors=stacks())
def test_finite_vectors_never_give_nan(name: str, vectors: torch.Tensor) -> None:
    shape = tuple(vectors.shape[1:])
    extra = {"fisher": [v.abs() for v in vectors], "gram": [g.abs() for g in random_extra(len(vectors), shape)["gram"]]}
    assert bool(merged(LAYERWISE[name], layer_of(list(vectors), extra=extra)).isfinite().all())


def test_a_layer_of_many_blocks_is_put_together_in_place() -> None:
    vectors = [torch.arange(300_000, dtype=torch.float32) * k for k in (1, 2, 4)]
    assert torch.equal(merged(Median(), layer_of(vectors)), vectors[1].double())
