"""TSV and Iso-C on matrices whose singular vectors are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rule_layers import layer_of, merged, random_vectors

from polyclinic.vectors.rules.iso_c import IsoC
from polyclinic.vectors.rules.tsv import Tsv, largest_directions, main_directions, polar


def test_tsv_of_vectors_that_do_not_meet_is_their_sum_of_main_directions() -> None:
    one = torch.diag(torch.tensor([5.0, 1.0, 0, 0]))
    other = torch.diag(torch.tensor([0, 0, 7.0, 2.0]))
    assert torch.allclose(merged(Tsv(), layer_of([one, other])), (one + other).double(), atol=1e-12)
    # Of three sites each keeps one direction of four.
    third = torch.zeros(4, 4)
    third[1, 3] = 3.0
    one[1, 1] = 0.5
    expected = torch.zeros(4, 4).double()
    expected[0, 0], expected[2, 2], expected[1, 3] = 5, 7, 3
    assert torch.allclose(merged(Tsv(), layer_of([one, other, third])), expected, atol=1e-12)


def test_tsv_is_its_formula() -> None:
    vectors = [v.double() for v in random_vectors(2, (6, 8), seed=4)]
    parts = [np.linalg.svd(v.numpy(), full_matrices=False) for v in vectors]
    left = np.concatenate([u[:, :3] for u, _, _ in parts], axis=1)
    right = np.concatenate([vt[:3].T for _, _, vt in parts], axis=1)
    weights = np.concatenate([s[:3] for _, s, _ in parts])

    def nearest(matrix: np.ndarray) -> np.ndarray:
        p, _, qt = np.linalg.svd(matrix, full_matrices=False)
        return p @ qt

    expected = nearest(left) @ np.diag(weights) @ nearest(right).T
    assert merged(Tsv(scale=1.5), layer_of(vectors)).numpy() == pytest.approx(1.5 * expected, rel=1e-9)


def test_equal_vectors_give_their_main_directions_once() -> None:
    [vector] = random_vectors(1, (6, 4))
    u, s, vt = np.linalg.svd(vector.double().numpy(), full_matrices=False)
    main = u[:, :2] @ np.diag(s[:2]) @ vt[:2]
    assert merged(Tsv(), layer_of([vector] * 2)).numpy() == pytest.approx(main, rel=1e-6, abs=1e-6)


def test_a_site_without_a_change_takes_up_no_direction() -> None:
    one = torch.diag(torch.tensor([5.0, 1.0, 0, 0]))
    assert torch.allclose(merged(Tsv(), layer_of([one, torch.zeros(4, 4)])), one.double(), atol=1e-12)


def test_more_sites_than_directions() -> None:
    delta = merged(Tsv(), layer_of(random_vectors(7, (2, 3))))
    assert delta.shape == (2, 3)
    assert bool(delta.isfinite().all())


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (4, 4)])
def test_polar_is_orthonormal(shape: tuple[int, int]) -> None:
    factor = polar(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    gram = factor.T @ factor if shape[0] >= shape[1] else factor @ factor.T
    assert torch.allclose(gram, torch.eye(min(shape)).double(), atol=1e-12)


def test_directions_of_nothing() -> None:
    for left, weights, right in (main_directions(torch.zeros(3, 2)), largest_directions(torch.zeros(3, 2), 1)):
        assert (left.shape, weights.shape, right.shape) == ((3, 0), (0,), (2, 0))


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (6, 6)])
def test_largest_directions_are_the_first_of_a_whole_decomposition(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()
    left, weights, right = largest_directions(matrix, 3)
    u, s, vt = np.linalg.svd(matrix.numpy(), full_matrices=False)
    assert weights.numpy() == pytest.approx(s[:3], rel=1e-10)
    assert ((left * weights) @ right.T).numpy() == pytest.approx(u[:, :3] @ np.diag(s[:3]) @ vt[:3], abs=1e-9)
    for basis in (left, right):
        assert torch.allclose(basis.T @ basis, torch.eye(3).double(), atol=1e-10)


def test_a_matrix_of_low_rank_has_fewer_directions_than_asked() -> None:
    matrix = torch.outer(torch.arange(1.0, 9), torch.arange(2.0, 12))
    left, weights, right = largest_directions(matrix, 4)
    assert len(weights) == 1
    assert torch.allclose((left * weights) @ right.T, matrix.double(), rtol=1e-9)


def test_iso_c_gives_every_direction_the_mean_strength() -> None:
    vectors = [v.double() for v in random_vectors(3, (6, 4))]
    strengths = torch.linalg.svdvals(sum(vectors))
    delta = merged(IsoC(scale=1.3), layer_of(vectors))
    assert torch.allclose(torch.linalg.svdvals(delta), 1.3 * strengths.mean().expand(4), rtol=1e-9)
    # U Vᵀ is the polar factor: it makes the product with the sum symmetric and positive.
    product = delta.T @ sum(vectors)
    assert torch.allclose(product, product.T, atol=1e-6)
    assert float(torch.linalg.eigvalsh(product).min()) > 0


def test_iso_c_by_hand_and_one_site_does_not_get_its_vector_back() -> None:
    one = torch.diag(torch.tensor([1.0, -3.0]))
    assert torch.allclose(merged(IsoC(), layer_of([one])), torch.diag(torch.tensor([2.0, -2.0])).double())


def test_iso_c_leaves_directions_without_weight_alone() -> None:
    one = torch.diag(torch.tensor([1.0, 3.0, 0.0]))
    assert torch.allclose(merged(IsoC(), layer_of([one])), torch.diag(torch.tensor([2.0, 2.0, 0.0])).double())


@pytest.mark.parametrize("rule", [Tsv(scale=3), IsoC(scale=3)])
def test_convolutions_are_matrices_and_the_rest_gets_the_mean(rule: Tsv | IsoC) -> None:
    kernels = random_vectors(2, (4, 3, 2, 2))
    flat = merged(rule, layer_of([k.reshape(4, 12) for k in kernels]))
    assert torch.allclose(merged(rule, layer_of(kernels)), flat.reshape(4, 3, 2, 2))
    assert not torch.allclose(flat, torch.stack(kernels).double().mean(0).reshape(4, 12) * 3)
    assert merged(rule, layer_of([[1.0, 2.0], [3.0, 6.0]])).tolist() == [2.0, 4.0]
    assert merged(rule, layer_of([[[1.0, 2.0]], [[3.0, 6.0]]])).tolist() == [[2.0, 4.0]]
