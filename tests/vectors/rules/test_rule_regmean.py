"""RegMean: least squares on real inputs, and the closed form of WUDI with proxies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rule_layers import layer_of, merged, random_extra, random_vectors

from polyclinic.errors import ContributionError
from polyclinic.vectors.rules.regmean import RegMean

EXACT = RegMean(alpha=1, ridge=0)


def grams_of(inputs: list[torch.Tensor]) -> dict[str, list[torch.Tensor | None]]:
    """Gram matrices as a site sends them."""
    return {"gram": [x.T @ x for x in inputs]}


def test_it_is_the_least_squares_fit_to_all_sites_outputs() -> None:
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((n, 6)) for n in (20, 5, 9)]
    deltas = [rng.standard_normal((4, 6)) for _ in inputs]
    fitted = np.linalg.lstsq(
        np.concatenate(inputs), np.concatenate([x @ d.T for x, d in zip(inputs, deltas, strict=True)]), rcond=None
    )[0].T
    layer = layer_of([torch.from_numpy(d) for d in deltas], extra=grams_of([torch.from_numpy(x) for x in inputs]))
    assert merged(EXACT, layer).numpy() == pytest.approx(fitted, rel=1e-9)
    assert merged(RegMean(alpha=1, ridge=1e-9), layer).numpy() == pytest.approx(fitted, rel=1e-6)


def test_weights_and_changes_give_the_same_model() -> None:
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(9)).double()
    changes, extra = random_vectors(3, (4, 6)), random_extra(3, (4, 6))
    for rule in (RegMean(), RegMean(ridge=0), RegMean(alpha=0.5, ridge=0.1)):
        by_changes = base + merged(rule, layer_of(changes, extra=extra))
        by_weights = merged(rule, layer_of([base + v.double() for v in changes], extra=extra))
        assert torch.allclose(by_changes, by_weights, rtol=1e-9)


def test_a_gram_matrix_whose_halves_differ_by_rounding_counts_as_their_mean() -> None:
    vectors = random_vectors(2, (3, 2))
    crooked, straight = torch.tensor([[2.0, 1.1], [0.9, 3.0]]), torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    for rule in (RegMean(), RegMean(ridge=0)):
        one = merged(rule, layer_of(vectors, extra={"gram": [crooked, straight]}))
        other = merged(rule, layer_of(vectors, extra={"gram": [straight, straight]}))
        assert torch.allclose(one, other, rtol=1e-6)


def test_alpha_zero_weights_each_column_by_its_own_square() -> None:
    grams = [torch.tensor([[1.0, 9.0], [9.0, 3.0]]), torch.tensor([[3.0, -5.0], [-5.0, 1.0]])]
    layer = layer_of([[[4.0, 4.0], [0.0, 8.0]], [[8.0, 8.0], [4.0, 0.0]]], extra={"gram": grams})
    assert torch.allclose(merged(RegMean(alpha=0, ridge=0), layer), torch.tensor([[7.0, 5], [3, 6]]).double())


def test_inputs_that_never_occur_get_the_mean() -> None:
    gram = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    layer = layer_of([[[1.0, 2.0], [0.0, 0.0]], [[3.0, 6.0], [2.0, 2.0]]], extra={"gram": [gram, gram]})
    assert torch.allclose(merged(RegMean(), layer), torch.tensor([[2.0, 4], [1, 1]]).double())


def test_a_large_ridge_is_the_mean() -> None:
    vectors = random_vectors(3, (4, 6))
    delta = merged(RegMean(ridge=1e9), layer_of(vectors, extra=random_extra(3, (4, 6))))
    assert torch.allclose(delta, torch.stack(vectors).double().mean(0), atol=1e-6)


def interference(delta: torch.Tensor, vectors: list[torch.Tensor]) -> torch.Tensor:
    """The objective of WUDI."""
    terms = [((delta - v) @ v.T).square().sum() / v.square().sum() for v in vectors]
    return torch.stack(terms).sum()


@pytest.mark.parametrize("shape", [(8, 5), (3, 40), (6, 3, 3, 3)], ids=str)
def test_the_proxy_is_the_exact_minimum_of_wudi(shape: tuple[int, ...]) -> None:
    vectors = random_vectors(3, shape)
    rows = [v.double().reshape(shape[0], -1) for v in vectors]
    delta = merged(RegMean(grams="proxy", ridge=0), layer_of(vectors)).reshape(shape[0], -1).requires_grad_()
    interference(delta, rows).backward()
    assert delta.grad is not None
    assert float(delta.grad.abs().max()) < 1e-9 * float(delta.detach().abs().max())
    start = torch.stack(rows).mean(0).requires_grad_()
    interference(start, rows).backward()
    assert start.grad is not None
    assert float(start.grad.abs().max()) > 1e-3


def test_in_a_basis_of_the_rows_and_in_full_it_is_the_same() -> None:
    vectors = random_vectors(3, (3, 40))
    for ridge in (0.0, 1e-4, 0.3):
        rule = RegMean(grams="proxy", ridge=ridge)
        small = merged(rule, layer_of(vectors))
        matrices = [v.double() for v in vectors]
        grams = [m.T @ m / m.square().sum() for m in matrices]
        added = ridge * sum(float(g.trace()) for g in grams) / 40 * torch.eye(40).double()
        target = sum(m @ (g + added / 3) for m, g in zip(matrices, grams, strict=True))
        full = target @ torch.linalg.pinv(sum(grams) + added, rtol=1e-12)
        assert torch.allclose(small, full, rtol=1e-6, atol=1e-8)


def test_proxies_do_not_depend_on_the_length_of_a_vector() -> None:
    # Two sites with disjoint rows: each keeps all of its own directions, however long its vector is.
    one, other = torch.zeros(2, 4), torch.zeros(2, 4)
    one[:, :2], other[:, 2:] = torch.randn(2, 2), 100 * torch.randn(2, 2)
    delta = merged(RegMean(grams="proxy", ridge=0), layer_of([one, other]))
    assert torch.allclose(delta, (one + other).double(), rtol=1e-4)


def test_biases_get_the_mean_and_so_do_layers_that_nobody_has_a_gram_of() -> None:
    bias = RegMean().merge(layer_of([[1.0, 2.0], [3.0, 4.0]], "conv.bias"), None)
    assert bias.delta.tolist() == [2.0, 3.0]
    assert bias.note is None
    matrix = RegMean(scale=2).merge(layer_of(random_vectors(2, (3, 2))), None)
    assert matrix.shares == (1.0, 1.0)
    assert matrix.note is not None
    assert "plain mean" in matrix.note


def test_what_cannot_be_is_refused() -> None:
    assert RegMean().needs == {"gram"}
    assert not RegMean(grams="proxy").needs
    vectors, good = random_vectors(2, (3, 2)), torch.eye(2)
    for missing in ([good, None], [None, good]):
        with pytest.raises(ContributionError, match="brings no Gram matrix of conv.weight"):
            merged(RegMean(), layer_of(vectors, extra={"gram": missing}))
    with pytest.raises(ContributionError, match="has shape"):
        merged(RegMean(), layer_of(vectors, extra={"gram": [good, torch.eye(3)]}))
    with pytest.raises(ContributionError, match="negative squares"):
        merged(RegMean(), layer_of(vectors, extra={"gram": [good, -good]}))
