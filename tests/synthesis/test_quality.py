"""The quality filter: classes in the plane, where a reader sees what is unlikely, far or there twice."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gated_sites import gated_site
from torch import Tensor

from polyclinic.errors import ContributionError
from polyclinic.federation.site import Leaf, check_declared
from polyclinic.synthesis import quality
from polyclinic.synthesis.cells import own_images
from polyclinic.synthesis.frozen import frozen_features
from polyclinic.synthesis.quality import feature_sums, keep, sums_of
from polyclinic.synthesis.vae import shrunk_images
from polyclinic.vectors.head import HeadSums


def cross(centre: tuple[float, float]) -> Tensor:
    """Four points about a centre, at distance 1."""
    return torch.tensor(centre) + torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])


CENTRES = ((0.0, 0.0), (10.0, 0.0))
REAL = torch.cat([cross(centre) for centre in CENTRES])
OF = torch.tensor([0] * 4 + [1] * 4)
SUMS = sums_of(REAL, OF, 2)


def test_sums_are_those_of_a_head_with_squares_of_all_classes_together() -> None:
    whole = HeadSums.of(REAL, OF, 2)
    assert torch.equal(SUMS.count, torch.tensor([4.0, 4.0], dtype=torch.float64))
    assert torch.equal(SUMS.first, whole.first)
    assert torch.equal(SUMS.second, whole.second.sum(0, keepdim=True))
    # Sum of squares of the first coordinate: 2 about 0, and 4 * 100 + 2 about 10.
    assert SUMS.second[0, 0, 0] == 404


def test_a_sample_on_the_side_of_another_class_is_unlikely() -> None:
    spots = torch.tensor([[0.0, 0.5], [9.0, 0.0], [0.5, 0.0], [0.0, -0.5]])
    kept = keep(spots, torch.tensor([0, 0, 0, 0]), SUMS)
    assert kept.mask.tolist() == [True, False, True, True]
    assert kept.dropped == {"unlikely": 1, "far": 0, "duplicate": 0}


def test_where_the_line_of_probability_lies() -> None:
    """Equal covariances s I: the probability of class 0 at x is 1 / (1 + exp((10 x - 50) / s)).

    Each class has variance 1/2 in either direction, so s = 1/2 (shrinkage changes nothing): it is 0.2 times as probable
    as class 1 at x = 5 + log(5) / 20 = 5.0805.
    """
    spots = torch.tensor([[5.079, 0.0], [5.082, 0.3]])
    assert keep(spots, torch.tensor([0, 0]), SUMS).mask.tolist() == [True, False]
    assert keep(spots, torch.tensor([0, 0]), SUMS, least=0.5).mask.tolist() == [False, False]


def test_the_furthest_hundredth_goes() -> None:
    """Of 201 samples at distances 0, 0.01, ..., 2.00 the quantile 0.99 is 1.98: two lie above it."""
    away = torch.arange(201) / 100
    kept = keep(torch.stack([torch.zeros(201), away * 10], dim=1), torch.zeros(201, dtype=torch.int64), SUMS)
    assert torch.nonzero(~kept.mask).flatten().tolist() == [199, 200]
    assert kept.dropped["far"] == 2


def test_a_small_class_loses_none_for_being_far() -> None:
    spots = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 50.0]])
    assert keep(spots, torch.tensor([0, 0, 0]), SUMS).mask.all()


def test_repeats_go_and_the_first_stays() -> None:
    """Two images of a class are typically sqrt(2 * (1/2 + 1/2)) = 1.414 apart: 0.0707 is too near."""
    spots = torch.tensor([[0.0, 0.0], [0.0, 0.08], [0.0, 0.0], [0.06, 0.0], [1.0, 0.0]])
    kept = keep(spots, torch.zeros(5, dtype=torch.int64), SUMS)
    assert kept.mask.tolist() == [True, True, False, False, True]
    assert kept.dropped["duplicate"] == 2


def test_samples_of_two_classes_are_no_repeats() -> None:
    spots = torch.tensor([[5.0, 0.0], [5.0, 0.0]])
    assert keep(spots, torch.tensor([0, 1]), SUMS).mask.all()


def test_a_repeat_of_what_went_stays() -> None:
    """The first is unlikely in its class; what equals it in the other class stays, and so does a chain's third link."""
    spots = torch.tensor([[10.0, 0.0], [10.0, 0.0], [10.0, 0.06], [10.0, 0.12]])
    assert keep(spots, torch.tensor([0, 1, 1, 1]), SUMS).mask.tolist() == [False, True, False, True]


@pytest.mark.parametrize("block", [1, 2, 7, 1024])
def test_blocks_do_not_show(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "_BLOCK", block)
    draw = torch.Generator().manual_seed(3)
    spots = torch.rand(60, 2, generator=draw, dtype=torch.float64)
    stays: list[int] = []
    for i in range(60):
        if all(float((spots[i] - spots[j]).norm()) > 0.1 for j in stays):
            stays.append(i)
    found = quality._first_of_equals(spots, 0.1)
    assert torch.nonzero(found).flatten().tolist() == stays
    assert 10 < len(stays) < 50


def test_a_class_that_nobody_has_is_unlikely() -> None:
    sums = sums_of(REAL, OF, 3)
    kept = keep(torch.zeros(2, 2), torch.tensor([0, 2]), sums)
    assert kept.mask.tolist() == [True, False]


def test_no_samples() -> None:
    kept = keep(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), SUMS)
    assert len(kept.mask) == 0
    assert kept.dropped == {"unlikely": 0, "far": 0, "duplicate": 0}


def test_features_that_do_not_vary_are_refused() -> None:
    with pytest.raises(ContributionError, match="are the same"):
        keep(torch.zeros(1, 2), torch.tensor([0]), sums_of(torch.ones(4, 2), torch.tensor([0, 0, 1, 1]), 2))


def test_order_of_sites_does_not_matter() -> None:
    one, other = sums_of(REAL[:3], OF[:3], 2), sums_of(REAL[3:], OF[3:], 2)
    assert torch.allclose((one + other).second, SUMS.second)
    assert torch.allclose((other + one).first, SUMS.first)


def test_a_site_sums_its_own_training_images(tmp_path: Path) -> None:
    site = gated_site(tmp_path)
    own = own_images(site.data, ("bright",), 5)
    site.load({name: torch.zeros_like(value) for name, value in site.initial.items()})  # left by an op before
    reply = feature_sums(site, own, 8)
    leaves: tuple[Any, ...] = (Leaf("features", "sum", "images"), Leaf("weight/features", "scalar", "nothing"))
    check_declared("north", "sums", leaves, reply)
    assert reply.scalars["weight/features"] == 1
    sums = HeadSums(**reply.group("features"))
    assert sums.count.tolist() == own.labels.bincount(minlength=3).tolist()
    assert sums.count[2] == 0  # keratosis: too few patients
    assert (site.data.labels("train") == 2).any()
    site.load(site.initial)
    seen = frozen_features(site.model, shrunk_images(site.data, own.positions, 8), site.study.data.image).double()
    for c in (0, 1):
        assert torch.allclose(sums.first[c, :-1], seen[own.labels == c].sum(0))
    assert sums.second[0, -1, -1] == len(own.labels)
