"""Sorting networks, median and trimmed mean."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from rule_layers import layer_of, merged, random_vectors

from polyclinic.errors import ContributionError
from polyclinic.vectors.rules.median import Median
from polyclinic.vectors.rules.sorted_values import sorted_places
from polyclinic.vectors.rules.trimmed_mean import TrimmedMean


@pytest.mark.parametrize("count", range(1, 13))
def test_the_network_sorts_all_zeros_and_ones_and_so_everything(count: int) -> None:
    # The 0-1 principle: a network that sorts every sequence of zeros and ones sorts every sequence.
    rows = list(torch.tensor(list(itertools.product([0.0, 1.0], repeat=count))).T)
    expected = torch.stack(rows).sort(0).values
    assert torch.equal(torch.stack(sorted_places(rows, range(count))), expected)
    for place in range(count):
        assert torch.equal(sorted_places(rows, [place])[0], expected[place])


@pytest.mark.parametrize("sites", [1, 2, 3, 4, 5, 10, 17])
def test_median_is_numpys(sites: int) -> None:
    vectors = random_vectors(sites, (40, 7))
    expected = np.median(np.stack([v.double().numpy() for v in vectors]), axis=0)
    assert merged(Median(), layer_of(vectors)).numpy() == pytest.approx(expected, rel=1e-15)
    assert merged(Median(scale=2), layer_of(vectors)).numpy() == pytest.approx(2 * expected, rel=1e-15)


def test_the_middle_of_an_even_number_is_the_mean_of_two() -> None:
    assert merged(Median(), layer_of([[1.0], [9.0], [4.0], [-3.0]])).item() == 2.5


def test_median_survives_one_vector_times_a_million() -> None:
    vectors = random_vectors(5, (40, 7))
    honest = torch.stack(vectors[:4])
    for factor in (1e6, -1e6):
        attacked = merged(Median(), layer_of([*vectors[:4], vectors[4] * factor]))
        assert bool((attacked >= honest.amin(0)).all())
        assert bool((attacked <= honest.amax(0)).all())
        assert float((attacked - merged(Median(), layer_of(vectors))).abs().max()) < 5
    plain = merged(TrimmedMean(trim=0), layer_of([*vectors[:4], vectors[4] * 1e6]))
    assert float(plain.abs().max()) > 1e5


@pytest.mark.parametrize(("sites", "trim"), [(1, 0), (3, 1), (5, 1), (5, 2), (10, 3)])
def test_trimmed_mean_is_numpys(sites: int, trim: int) -> None:
    vectors = random_vectors(sites, (40, 7))
    ordered = np.sort(np.stack([v.double().numpy() for v in vectors]), axis=0)
    expected = ordered[trim : sites - trim].mean(0)
    assert merged(TrimmedMean(trim=trim), layer_of(vectors)).numpy() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("sites", "trim"), [(2, 1), (4, 2), (1, 1)])
def test_too_few_sites_for_the_trim(sites: int, trim: int) -> None:
    with pytest.raises(ContributionError, match=f"needs at least {2 * trim + 1} contributions; there are {sites}"):
        merged(TrimmedMean(trim=trim), layer_of(random_vectors(sites, (3,))))
