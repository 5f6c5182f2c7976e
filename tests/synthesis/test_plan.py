"""Water filling: examples done by hand, and what must hold for any counts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from polyclinic.synthesis.plan import Plan, split_by_owner, water_filling

COUNTS = arrays.arrays(np.int64, arrays.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.integers(0, 60))
BUDGETS = st.integers(0, 800)
CAPS = st.sampled_from([0.0, 0.5, 1.0, 4.0, 10.0])
FLOORS = st.integers(1, 12)
BORROWS = st.sampled_from([0.0, 0.5, 1.0])


def plan(counts: list[list[int]], budget: int, cap: float = 100, floor: int = 1, borrow: float = 0.5) -> Plan:
    return water_filling(np.array(counts, dtype=np.int64), budget, cap=cap, floor=floor, borrow=borrow)


def test_cells_are_filled_to_one_level() -> None:
    """10, 4 and 1 patients and 15 samples: 6 lift to 10, 9 lift to 10, none left."""
    found = plan([[10, 4, 1]], 15)
    assert found.wanted.tolist() == [[0, 6, 9]]
    assert found.level == 10


def test_the_lowest_come_first() -> None:
    """3 samples lift the cell with 1 to the one with 4; 5 lift both to 5."""
    assert plan([[10, 4, 1]], 3).wanted.tolist() == [[0, 0, 3]]
    assert plan([[10, 4, 1]], 5).wanted.tolist() == [[0, 1, 4]]


def test_a_rest_goes_to_the_emptiest_cells() -> None:
    """Level 5 costs 5; the sixth goes to the cell with fewer patients, and the level says that half a step is paid."""
    found = plan([[10, 4, 1]], 6)
    assert found.wanted.tolist() == [[0, 1, 5]]
    assert found.level == 5.5


def test_a_rest_that_equals_would_have_to_share_stays() -> None:
    """Both cells are alike in all respects: one sample goes to neither, two go to both."""
    assert plan([[3, 3]], 1).wanted.tolist() == [[0, 0]]
    assert plan([[3, 3]], 2).wanted.tolist() == [[1, 1]]


def test_those_behind_wait_for_those_before() -> None:
    """At 3 stand two cells of class 0, alike, and one of the more frequent class 1: one sample is for none of them."""
    counts = [[3, 3, 9], [8, 8, 3]]
    assert plan(counts, 1).wanted.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert plan(counts, 2).wanted.tolist() == [[1, 1, 0], [0, 0, 0]]
    assert plan(counts, 3).wanted.tolist() == [[1, 1, 0], [0, 0, 1]]


def test_of_equally_empty_cells_the_rarer_class_comes_first() -> None:
    """Both classes have one patient on the second device; class 1 has 3 in all, class 0 has 21."""
    assert plan([[20, 1], [2, 1]], 1).wanted.tolist() == [[0, 0], [0, 1]]


def test_support_and_cap_by_hand() -> None:
    """Support of (0, 1): 1 + 0.5 * 20 = 11, so at cap 0.4 at most floor(4.4) = 4; of (1, 0): 2 + 0.5 * 8 = 6, so 2."""
    found = plan([[20, 1], [2, 8]], 1000, cap=0.4)
    assert found.limit.tolist() == [[8, 4], [2, 3]]  # 0.4 * (20.5, 11, 6, 9) = 8.2, 4.4, 2.4, 3.6
    assert found.wanted.tolist() == [[8, 4], [2, 3]]
    assert found.level == 28


def test_whole_products_are_not_rounded_down() -> None:
    assert 0.29 * 100 < 29
    assert plan([[100]], 1000, cap=0.29).limit.tolist() == [[29]]


def test_a_cell_nobody_owns_borrows() -> None:
    """Class 1 has 6 patients on device 0 and none on device 1: support 3, limit 12 at cap 4."""
    counts = [[30, 30], [6, 0]]
    found = plan(counts, 10_000, cap=4)
    assert found.limit[1].tolist() == [24, 12]
    assert plan(counts, 10_000, cap=4, borrow=0).limit[1, 1] == 0
    owned, unowned = split_by_owner(found.wanted, np.array(counts))
    assert unowned.tolist() == [[0, 0], [0, 12]]
    assert (owned + unowned == found.wanted).all()


def test_classes_and_devices_below_the_floor_get_nothing() -> None:
    found = plan([[30, 2], [4, 0], [9, 1]], 500, floor=5)
    assert found.limit[1].tolist() == [0, 0]
    assert found.limit[:, 1].tolist() == [0, 0, 0]
    assert (found.limit[[0, 2], 0] > 0).all()


def test_no_budget_no_cap_nobody() -> None:
    assert plan([[5, 0], [1, 7]], 0).wanted.sum() == 0
    assert plan([[5, 0], [1, 7]], 50, cap=0).wanted.sum() == 0
    assert plan([[0, 0], [0, 0]], 50).wanted.sum() == 0
    assert water_filling(np.zeros((0, 0), dtype=np.int64), 5, cap=4, floor=5, borrow=0.5).wanted.shape == (0, 0)


def test_negative_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        plan([[3, -1]], 5)
    with pytest.raises(ValueError, match="-5"):
        plan([[3, 1]], -5)


@given(COUNTS, BUDGETS, CAPS, FLOORS, BORROWS)
def test_budget_cap_and_floor_hold(counts: np.ndarray, budget: int, cap: float, floor: int, borrow: float) -> None:
    found = water_filling(counts, budget, cap=cap, floor=floor, borrow=borrow)
    of_class, of_device = counts.sum(axis=1), counts.sum(axis=0)
    assert found.wanted.dtype == found.limit.dtype == np.int64
    assert found.wanted.sum() <= budget
    assert (found.wanted >= 0).all()
    for (c, d), m in np.ndenumerate(found.wanted):
        behind = counts[c, d] + borrow * (of_class[c] - counts[c, d])
        assert m <= cap * behind
        if of_class[c] < floor or of_device[d] < floor or not of_class[c] or not of_device[d]:
            assert m == 0
        if m:
            assert counts[c, d] + m <= np.ceil(found.level)


@given(COUNTS, BUDGETS, CAPS, FLOORS)
def test_no_step_that_the_budget_pays_is_left_out(counts: np.ndarray, budget: int, cap: float, floor: int) -> None:
    """One step higher costs more than the budget, unless all limits are reached."""
    found = water_filling(counts, budget, cap=cap, floor=floor, borrow=0.5)
    higher = np.minimum(np.maximum(0, int(found.level) + 1 - counts), found.limit)
    assert higher.sum() > budget or (found.wanted == found.limit).all()


@given(COUNTS, BUDGETS, CAPS, FLOORS, st.randoms(use_true_random=False))
def test_order_of_classes_and_devices_does_not_matter(
    counts: np.ndarray, budget: int, cap: float, floor: int, random: object
) -> None:
    rows, columns = list(range(counts.shape[0])), list(range(counts.shape[1]))
    random.shuffle(rows)  # type: ignore[attr-defined]
    random.shuffle(columns)  # type: ignore[attr-defined]
    found = water_filling(counts, budget, cap=cap, floor=floor, borrow=0.5)
    again = water_filling(counts[rows][:, columns], budget, cap=cap, floor=floor, borrow=0.5)
    assert (again.wanted == found.wanted[rows][:, columns]).all()
    assert again.level == found.level


@given(COUNTS, BUDGETS, st.integers(0, 50), CAPS, FLOORS)
def test_more_budget_never_takes_samples_away(
    counts: np.ndarray, budget: int, more: int, cap: float, floor: int
) -> None:
    less = water_filling(counts, budget, cap=cap, floor=floor, borrow=0.5)
    found = water_filling(counts, budget + more, cap=cap, floor=floor, borrow=0.5)
    assert (found.wanted >= less.wanted).all()
    assert found.level >= less.level


@given(COUNTS, BUDGETS, CAPS, FLOORS)
def test_same_counts_same_plan(counts: np.ndarray, budget: int, cap: float, floor: int) -> None:
    before = counts.copy()
    one, two = (water_filling(counts, budget, cap=cap, floor=floor, borrow=0.5) for _ in range(2))
    assert (one.wanted == two.wanted).all()
    assert (one.limit == two.limit).all()
    assert one.level == two.level
    assert (counts == before).all()
