"""What a site takes from the pool."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from polyclinic.synthesis.pool import Samples
from polyclinic.synthesis.settings import ShareSettings
from polyclinic.synthesis.share import choose, quota


def pool(cells: dict[tuple[int, int], int]) -> Samples:
    """So many samples of each class and device, in this order."""
    lines = [cell for cell, count in cells.items() for _ in range(count)]
    columns = [torch.tensor([line[k] for line in lines], dtype=torch.int64) for k in range(2)]
    return Samples(*columns, torch.arange(len(lines)))


def own(counts: list[list[int]]) -> np.ndarray:
    return np.array(counts, dtype=np.int64)


@pytest.mark.parametrize(
    ("images", "available", "wanted"),
    [
        (1000, 10_000, 500),  # half
        (200, 10_000, 100),  # not small
        (199, 10_000, 398),  # small: twice
        (1000, 120, 120),  # all there is
        (0, 120, 0),
        (201, 10_000, 100),  # 100.5 is not 101
    ],
)
def test_quota(images: int, available: int, wanted: int) -> None:
    assert quota(images, available, ShareSettings()) == wanted


def test_a_cell_that_is_full_is_never_drawn() -> None:
    """The site has 10 of class 0 and the level is 10; of class 1 it has 9."""
    samples = pool({(0, 0): 20, (1, 0): 5, (0, 1): 4})
    assert choose(samples, own([[10, 10], [9, 12]]), 10, 29, seed=3).tolist() == [20, 21, 22, 23, 24]


def test_other_devices_come_first() -> None:
    """Device 0 is the site's own: its samples come only when all 6 of device 1 are taken, whatever the weights."""
    samples = pool({(0, 0): 50, (1, 0): 50, (0, 1): 3, (1, 1): 3})
    counts = own([[1, 0], [0, 0]])
    for seed in range(20):
        few, more = (choose(samples, counts, 40, n, seed).tolist() for n in (4, 9))
        assert len(few) == 4
        assert min(few) >= 100
        assert [position for position in more if position >= 100] == [100, 101, 102, 103, 104, 105]
        assert len(more) == 9


def test_first_draws_follow_what_lacks() -> None:
    """At level 8 the site lacks 6 of class 0 and 2 of class 1: one draw is of class 0 in three of four cases."""
    samples = pool({(0, 0): 5, (1, 0): 5})
    hits = sum(int(choose(samples, own([[2], [6]]), 8, 1, seed)[0]) < 5 for seed in range(2000))
    assert abs(hits / 2000 - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 2000)


def test_pairs_of_draws_follow_what_lacks() -> None:
    """Weights 6 and 2, one sample of class 0: the pair has it unless both draws are of class 1, 1/4 * 1/4."""
    samples = pool({(0, 0): 1, (1, 0): 5})
    without = sum(0 not in choose(samples, own([[2], [6]]), 8, 2, seed).tolist() for seed in range(4000))
    assert abs(without / 4000 - 1 / 16) < 4 * math.sqrt(1 / 16 * 15 / 16 / 4000)


def test_samples_of_a_cell_are_equally_likely() -> None:
    samples = pool({(0, 0): 4})
    found = np.bincount([int(choose(samples, own([[0]]), 5, 1, seed)[0]) for seed in range(2000)], minlength=4)
    assert (abs(found / 2000 - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 2000)).all()


def test_sites_draw_differently_and_again_the_same() -> None:
    samples = pool({(0, 0): 100, (1, 0): 100})
    one, again, other = (choose(samples, own([[2], [6]]), 8, 30, seed).tolist() for seed in (1, 1, 2))
    assert one == again
    assert one != other


def test_an_empty_pool() -> None:
    found = choose(pool({}), own([[2], [6]]), 8, 10, seed=0)
    assert found.dtype == torch.int64
    assert found.tolist() == []


@given(
    arrays.arrays(np.int64, (3, 2), elements=st.integers(0, 12)),
    arrays.arrays(np.int64, (3, 2), elements=st.integers(0, 8)),
    st.floats(0, 15),
    st.integers(0, 60),
    st.integers(0, 1000),
)
def test_what_always_holds(counts: np.ndarray, held: np.ndarray, level: float, most: int, seed: int) -> None:
    samples = pool({cell: int(n) for cell, n in np.ndenumerate(held)})  # type: ignore[misc]
    found = choose(samples, counts, level, most, seed).tolist()
    lacking = sum(int(n) for cell, n in np.ndenumerate(held) if counts[cell] < level)
    assert len(found) == min(most, lacking)
    assert found == sorted(set(found))
    drawn = [(int(samples.labels[i]), int(samples.devices[i])) for i in found]
    assert all(counts[cell] < level for cell in drawn)
    foreign = {d for d in range(2) if counts[:, d].sum() == 0}
    if any(d not in foreign for _, d in drawn):
        of_others = sum(int(n) for (c, d), n in np.ndenumerate(held) if d in foreign and counts[c, d] < level)
        assert sum(d in foreign for _, d in drawn) == of_others
