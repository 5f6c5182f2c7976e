"""Fisher merging by hand."""

from __future__ import annotations

import pytest
import torch
from rule_layers import layer_of, merged, random_extra, random_vectors

from polyclinic.errors import ContributionError
from polyclinic.vectors.rules.fisher import Fisher


def test_each_entry_is_weighted_by_its_own_information() -> None:
    layer = layer_of([[2.0, 2.0], [6.0, 6.0]], extra={"fisher": [torch.tensor([3.0, 0.0]), torch.tensor([1.0, 5.0])]})
    assert merged(Fisher(), layer).tolist() == [3.0, 6.0]
    assert merged(Fisher(scale=2), layer).tolist() == [6.0, 12.0]


def test_where_nobody_knows_anything_it_is_the_mean() -> None:
    layer = layer_of([[2.0], [6.0]], extra={"fisher": [torch.zeros(1)] * 2})
    assert merged(Fisher(), layer).tolist() == [4.0]


def test_equal_information_is_the_mean_however_small_it_is() -> None:
    vectors = random_vectors(3, (6, 4))
    layer = layer_of(vectors, extra={"fisher": [torch.full((6, 4), 1e-40)] * 3})
    assert torch.allclose(merged(Fisher(), layer), torch.stack(vectors).double().mean(0), rtol=1e-12)


def test_it_minimises_the_sum_of_the_sites_quadratic_losses() -> None:
    vectors, extra = random_vectors(4, (5, 3)), random_extra(4, (5, 3))
    delta = merged(Fisher(), layer_of(vectors, extra=extra)).requires_grad_()
    loss = sum(
        (f.double() * (delta - v.double()).square()).sum() for f, v in zip(extra["fisher"], vectors, strict=True)
    )
    loss.backward()  # type: ignore[union-attr]
    assert delta.grad is not None
    assert float(delta.grad.abs().max()) < 1e-12


def test_the_floor_counts_for_less() -> None:
    layer = layer_of([[2.0], [6.0]], extra={"fisher": [torch.tensor([0.0]), torch.tensor([3.0])]})
    assert merged(Fisher(floor=1.0), layer).tolist() == [5.0]


def test_what_cannot_be_is_refused() -> None:
    assert Fisher().needs == {"fisher"}
    vectors, good = [[1.0], [2.0]], torch.ones(1)
    with pytest.raises(ContributionError, match="contribution 2 of 2 .* brings none"):
        merged(Fisher(), layer_of(vectors, extra={"fisher": [good, None]}))
    with pytest.raises(ContributionError, match="has shape"):
        merged(Fisher(), layer_of(vectors, extra={"fisher": [good, torch.ones(2)]}))
    with pytest.raises(ContributionError, match="negative"):
        merged(Fisher(), layer_of(vectors, extra={"fisher": [good, -good]}))
