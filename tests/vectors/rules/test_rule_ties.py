"""TIES against its definition in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_layers import layer_of, merged, random_vectors

from polyclinic.vectors.rules.ties import Ties


def by_definition(vectors: np.ndarray, thresholds: list[float]) -> np.ndarray:
    """Paper, section 4, entry by entry."""
    out = np.zeros(vectors.shape[1])
    for i in range(vectors.shape[1]):
        kept = [float(v[i]) for v, t in zip(vectors, thresholds, strict=True) if abs(v[i]) >= t]
        sign = np.sign(sum(kept))
        agreeing = [value for value in kept if np.sign(value) == sign and value != 0]
        out[i] = np.mean(agreeing) if agreeing else 0.0
    return out


def test_worked_by_hand() -> None:
    vectors = [[3.0, -1.0, 0.5, 0.0, 4.0], [1.0, -2.0, 5.0, 0.1, -6.0]]
    # Two of five are kept: [3, ., ., ., 4] and [., ., 5, ., -6]; at the last entry -6 outweighs 4.
    assert merged(Ties(density=0.4), layer_of(vectors)).tolist() == [3.0, 0.0, 5.0, 0.0, -6.0]


def test_the_mean_is_over_those_that_agree_only() -> None:
    vectors = [[4.0], [2.0], [-1.0]]
    assert merged(Ties(density=1), layer_of(vectors)).tolist() == [3.0]


def test_values_equal_to_the_threshold_are_all_kept() -> None:
    assert merged(Ties(density=0.25), layer_of([[2.0, -2.0, 1.0, 2.0]])).tolist() == [2.0, -2.0, 0.0, 2.0]


def test_no_sign_is_elected_where_the_sum_is_zero() -> None:
    assert merged(Ties(density=1), layer_of([[1.0, 5.0], [-1.0, 5.0]])).tolist() == [0.0, 5.0]


def test_zeros_are_no_votes() -> None:
    assert merged(Ties(density=1), layer_of([[0.0], [0.0], [3.0]])).tolist() == [3.0]


def test_a_small_tensor_keeps_at_least_one_value() -> None:
    assert merged(Ties(density=0.01), layer_of([[0.1, -0.3]])).tolist() == pytest.approx([0.0, -0.3])


def test_scale_multiplies() -> None:
    assert merged(Ties(density=1, scale=0.5), layer_of([[4.0], [2.0]])).tolist() == [1.5]


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 30), st.integers(0, 10_000))
def test_any_integers(sites: int, count: int, seed: int) -> None:
    vectors = np.random.default_rng(seed).integers(-4, 5, (sites, count)).astype(np.float32)
    keep = max(1, round(0.3 * count))
    thresholds = [float(np.sort(np.abs(v))[::-1][keep - 1]) for v in vectors]
    found = merged(Ties(density=0.3), layer_of(list(torch.from_numpy(vectors))))
    assert found.numpy() == pytest.approx(by_definition(vectors, thresholds))


def test_network_trims_the_vector_as_a_whole() -> None:
    small, large = [[0.1, 0.2], [0.3, -0.1]], [[5.0, 1.0, 7.0, 2.0], [9.0, 0.0, 1.0, 8.0]]
    layers = [layer_of(small, "a"), layer_of(large, "b")]
    rule = Ties(density=1 / 3, trim="network")
    survey = rule.survey(layers)
    assert survey == [5.0, 8.0]
    assert not rule.merge(layers[0], survey).delta.any()
    assert rule.merge(layers[1], survey).delta.tolist() == [7.0, 0.0, 7.0, 8.0]
    assert Ties(density=1 / 3).survey(layers) is None


def test_blocks_give_what_one_block_gives() -> None:
    vectors = random_vectors(3, (700, 400))
    thresholds = [float(v.abs().flatten().kthvalue(v.numel() - v.numel() // 5 + 1).values) for v in vectors]
    kept = torch.stack([torch.where(v.abs() >= t, v, 0).double() for v, t in zip(vectors, thresholds, strict=True)])
    agrees = kept.sign() == kept.sum(0).sign()
    expected = (kept * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    assert torch.allclose(merged(Ties(), layer_of(vectors)), expected, rtol=1e-12, atol=0)
