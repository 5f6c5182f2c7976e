"""Fixed-point numbers: known values, the stated bounds, what is refused and what is carried over."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from polyclinic.errors import MessageError, ProtocolError
from polyclinic.secure.fixed_point import Entry, Lanes, Layout, decode, encode, error_bound, plan, weight_steps

WIDTHS = (16, 18, 20, 32, 64)
LIMIT = {16: 0.5, 18: 0.5, 20: 0.5, 32: 64.0, 64: 2.0**36}
"""Bounds used here, by width."""


def entry(bits: int, *shape: int, name: str = "update/x") -> Entry:
    return Entry(name, shape, bits, LIMIT[bits])


def layout(*entries: Entry) -> Layout:
    return Layout(entries, ("update",))


class Always:
    """Draws the same number each time."""

    def __init__(self, number: float) -> None:
        self.number = number

    def random(self, size: int, dtype: Any) -> Any:
        return np.full(size, self.number, dtype)


LOWEST, HIGHEST = Always(0.0), Always(1 - 2.0**-24)


def encoded(
    bits: int, values: list[float] | Tensor, weight: float = 1.0, total: float = 1.0, *, sites: int = 3, rng: Any = None
) -> tuple[list[int], list[float]]:
    """Lanes of one tensor and what they lost."""
    array = torch.as_tensor(values, dtype=torch.float32)
    plan_ = layout(entry(bits, *array.shape))
    steps, totals = {"update": weight_steps(weight)}, {"update": weight_steps(total)}
    lanes, lost = encode(plan_, {"update/x": array}, steps, totals, sites=sites, rng=rng or np.random.default_rng(1))
    return lanes[bits].tolist()[1 if bits == 64 else 0 :], [x for part in lost.values() for x in part.tolist()]


def test_known_values() -> None:
    # 32 bits: 2**30 steps for 64 units, so 2**24 a unit; a share of 3/4. 64 bits: 2**26 steps a unit.
    assert encoded(32, [1.5, -2.0, 0.0], 3, 4) == ([18_874_368, -25_165_824, 0], [])
    assert encoded(64, [2.5, -1000.0], 3, 4) == ([125_829_120, -50_331_648_000], [])
    # 16 bits: (2**15 - 1 - 3) / 0.5 = 65,528 steps a unit; whole steps stay what they are, whatever is drawn.
    assert encoded(16, [0.125, -0.5], rng=HIGHEST) == encoded(16, [0.125, -0.5], rng=LOWEST) == ([8191, -32764], [0, 0])
    assert encoded(20, [0.5], sites=16, rng=LOWEST) == ([2**19 - 1 - 16], [0.0])


def test_32_bits_round_to_the_nearest_step() -> None:
    step = 2.0**-24
    assert encoded(32, [0.4 * step, 0.6 * step, 1.5 * step, -2.5 * step])[0] == [0, 1, 2, -2]


def test_narrow_lanes_round_up_as_often_as_the_remainder_says() -> None:
    x = 1000.25 / 65_528
    assert encoded(16, [x], rng=Always(0.70))[0] == [1000]
    assert encoded(16, [x], rng=Always(0.80))[0] == [1001]
    many, _ = encoded(16, torch.full((20_000,), x), rng=np.random.default_rng(3))
    assert set(many) == {1000, 1001}
    # Binomial, 20,000 draws of 1/4: standard deviation 61; six of them.
    assert abs(many.count(1001) - 5000) < 370


def test_weights_take_64_bit_lanes_first() -> None:
    plan_ = Layout((Entry("a/x", (), 32, 64.0), Entry("b/y", (2,), 64, 2.0**36)), ("a", "b"))
    arrays = {"a/x": torch.tensor(2.0), "b/y": torch.tensor([1.0, -1.0])}
    lanes, _ = encode(
        plan_, arrays, {"a": weight_steps(3), "b": weight_steps(0.5)}, {"a": 4 << 16, "b": 1 << 16}, sites=3
    )
    assert {bits: part.tolist() for bits, part in lanes.items()} == {
        64: [196_608, 32_768, 2**25, -(2**25)],
        32: [3 * 2**23],
    }
    assert (plan_.count(64), plan_.count(32), plan_.widths) == (4, 1, [64, 32])
    weights, means = decode(plan_, lanes, sites=3)
    assert weights == {"a": 196_608, "b": 32_768}
    assert means["a/x"].shape == ()
    assert (float(means["a/x"]), means["b/y"].tolist()) == (1.5, [0.5, -0.5])


@pytest.mark.parametrize(
    ("weight", "steps"),
    [(0, 0), (1, 65_536), (0.5, 32_768), (2.0**40, 2**56), (1 / 3, 21_845), (123_456.75, 8090861568)],
)
def test_steps_of_weights(weight: float, steps: int) -> None:
    assert weight_steps(weight) == steps


@pytest.mark.parametrize("weight", [-1.0, -1e-9, float("nan"), float("inf"), 2.0**40 + 1, 918_273_645_546.0 * 2])
def test_a_weight_out_of_range_is_refused_and_not_told(weight: float) -> None:
    with pytest.raises(ProtocolError, match="weight cannot be summed securely: it must lie between 0 and 2") as refused:
        weight_steps(weight)
    assert f"{weight:.6g}"[:5] not in str(refused.value).replace("2**40", "")


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 5), (2, 0, 3), (70_001,)])
@pytest.mark.parametrize("bits", WIDTHS)
def test_any_shape(bits: Literal[16, 32], shape: tuple[int, ...]) -> None:
    values = torch.linspace(-0.4, 0.4, max(1, int(np.prod(shape))))[: int(np.prod(shape))].reshape(shape)
    plan_ = layout(entry(bits, *shape), Entry("update/last", (2,), bits, LIMIT[bits]))
    arrays = {"update/x": values, "update/last": torch.tensor([0.25, -0.125])}
    one = {"update": 1 << 16}
    lanes, lost = encode(plan_, arrays, one, one, sites=3, rng=np.random.default_rng(0))
    assert lanes[bits].dtype == {16: np.int16, 18: np.int32, 20: np.int32, 32: np.int32, 64: np.int64}[bits]
    assert plan_.count(bits) == lanes[bits].size == values.numel() + 2 + (bits == 64)
    weights, means = decode(plan_, lanes, sites=3)
    assert weights == one
    assert means["update/x"].shape == shape
    bound = error_bound(plan_.entries[0], 3)
    assert np.abs(means["update/x"] - values.numpy()).max(initial=0) <= bound
    assert np.abs(means["update/last"] - [0.25, -0.125]).max() <= bound
    assert {name: part.shape for name, part in lost.items()} == (
        {"update/x": (values.numel(),), "update/last": (2,)} if bits < 32 else {}
    )


def test_other_types_of_arrays() -> None:
    plan_ = layout(Entry("update/x", (3,), 64, 2.0**36))
    one = {"update": 1 << 16}
    for dtype in (torch.int64, torch.float16, torch.float64):
        lanes, _ = encode(plan_, {"update/x": torch.tensor([3, -2, 0], dtype=dtype)}, one, one, sites=3)
        assert lanes[64].tolist() == [65_536, 3 << 26, -2 << 26, 0]
    turned = torch.arange(6.0).reshape(2, 3).T
    lanes, _ = encode(layout(entry(64, 3, 2)), {"update/x": turned}, one, one, sites=3)
    assert [x >> 26 for x in lanes[64].tolist()[1:]] == [0, 3, 1, 4, 2, 5]


weights = st.lists(st.integers(0, 2**40), min_size=3, max_size=16).filter(any)


@given(st.sampled_from(WIDTHS), weights, st.data())
def test_the_sum_keeps_the_stated_bound(bits: int, weight: list[int], data: st.DataObject) -> None:
    limit = LIMIT[bits]
    numbers = st.lists(st.floats(-limit, limit, width=32), min_size=3, max_size=3)
    values = [data.draw(numbers) for _ in weight]
    own, count = entry(bits, 3), len(weight)
    total = {"update": sum(weight) << 16}
    sums = [0] * (4 if bits == 64 else 3)
    for w, x in zip(weight, values, strict=True):
        lanes, _ = encode(
            layout(own),
            {"update/x": torch.tensor(x)},
            {"update": w << 16},
            total,
            sites=count,
            rng=np.random.default_rng(w),
        )
        sums = [a + b for a, b in zip(sums, lanes[bits].tolist(), strict=True)]
    assert all(-(2 ** (bits - 1)) <= s < 2 ** (bits - 1) for s in sums)
    held: Lanes = {64: np.array([0]), bits: np.array(sums)}
    means = decode(layout(own), held, sites=count)[1]["update/x"].tolist()
    largest = max(abs(x) for row in values for x in row)
    for i, mean in enumerate(means):
        exact = sum(Fraction(w) * Fraction(x[i]) for w, x in zip(weight, values, strict=True)) / sum(weight)
        assert abs(Fraction(mean) - exact) <= Fraction(error_bound(own, count, largest))
        assert error_bound(own, count, largest) <= error_bound(own, count)


def test_the_stated_bounds_in_numbers() -> None:
    # Half a step of 2**-24 at each of ten sites; a whole one of 0.5 / 32,757; half of 2**-26.
    assert error_bound(entry(32), 10) == pytest.approx(10 * 2.0**-25, rel=1e-5)
    assert error_bound(entry(16), 10) == pytest.approx(10 * 0.5 / 32_757, rel=1e-9)
    assert error_bound(entry(64), 10, largest=1e3) == pytest.approx(10 * 2.0**-27, rel=1e-5)


@given(st.sampled_from(WIDTHS), weights, st.sampled_from([LOWEST, HIGHEST]), st.sampled_from([-1.0, 1.0]))
@example(16, [1] * 16, LOWEST, -1.0)
@example(16, [2**40] * 16, HIGHEST, 1.0)
@example(16, [1, 2**40, *[3] * 14], HIGHEST, 1.0)
def test_nothing_wraps_in_the_worst_case(bits: int, weight: list[int], rng: Always, sign: float) -> None:
    count, total = len(weight), float(sum(weight))
    if total > 2**40:
        weight, total = [w // 16 for w in weight], float(sum(w // 16 for w in weight)) or 1.0
    whole = sum(encoded(bits, [sign * LIMIT[bits]], w, total, sites=count, rng=rng)[0][0] for w in weight)
    assert -(2 ** (bits - 1)) <= whole < 2 ** (bits - 1)


def test_the_worst_case_fills_narrow_lanes() -> None:
    for rng, sign, ends in ((HIGHEST, 1.0, (32_751, 32_767)), (LOWEST, -1.0, (-32_767, -32_751))):
        shares = [(w, encoded(16, [sign * 0.5], w, 136, sites=16, rng=rng)[0][0]) for w in range(1, 17)]
        assert ends[0] <= sum(step for _, step in shares) <= ends[1]


@pytest.mark.parametrize("bits", [32, 64])
def test_the_largest_legal_value_passes_and_the_next_is_refused(bits: int) -> None:
    limit = torch.tensor(LIMIT[bits])
    beyond = torch.nextafter(limit, torch.tensor(torch.inf))
    top = 2 ** (bits - 2)
    assert encoded(bits, torch.stack([limit, -limit]))[0] == [top, -top]
    for value in (beyond, -beyond, torch.tensor(torch.inf), torch.tensor(-torch.inf), torch.tensor(torch.nan)):
        for weight in (1.0, 0.0):
            with pytest.raises(
                ProtocolError, match=f"update/x holds a value that .* {bits}-bit lanes.*nothing was sent"
            ):
                encoded(bits, torch.stack([limit, value]), weight)


def test_a_refusal_does_not_tell_the_value() -> None:
    with pytest.raises(ProtocolError, match=r"beyond 64, the most .* raise aggregation\.reach") as refused:
        encoded(32, [1.0, 717.25])
    assert "717" not in str(refused.value)
    with pytest.raises(ProtocolError) as refused:
        encoded(64, [2.0**37])
    assert "aggregation.reach" not in str(refused.value), "it does not widen 64-bit lanes"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("bits", [16, 18, 20])
def test_narrow_lanes_refuse_what_is_not_finite(bits: int, value: float) -> None:
    with pytest.raises(ProtocolError, match=r"update/x holds values that are not finite; nothing was sent"):
        encoded(bits, [0.1, value])


def test_an_overflow_in_the_last_chunk_is_seen() -> None:
    values = torch.zeros(65_536 + 1)
    values[-1] = 65.0
    with pytest.raises(ProtocolError, match="beyond 64"):
        encoded(32, values)


def test_narrow_lanes_cut_and_say_what_was_lost() -> None:
    lanes, lost = encoded(16, [0.75, -0.625, 0.5, 0.25], rng=LOWEST)
    assert lanes == [32_764, -32_764, 32_764, 16_382]
    assert lost == [0.25, -0.125, 0.0, 0.0]


@given(st.sampled_from([16, 18, 20]), st.integers(1, 12), st.integers(0, 2**32), st.floats(0.01, 1.5))
def test_what_was_lost_and_sent_add_up_to_all_updates(bits: int, weight: int, seed: int, size: float) -> None:
    draw = np.random.default_rng(seed)
    scale = (2 ** (bits - 1) - 1 - 4) / 0.5 * weight / 12
    carried, sent, wanted = np.zeros(5, np.float32), np.zeros(5), np.zeros(5)
    for _ in range(12):
        x = (size * draw.standard_normal(5)).astype(np.float32)
        wanted += x
        lanes, lost = encoded(bits, torch.from_numpy(x + carried), weight, 12, sites=4, rng=draw)
        sent += np.array(lanes) / scale
        carried = np.array(lost, np.float32)
        assert np.abs(sent + carried - wanted).max() < 1e-4
    for _ in range(200):  # without further updates all of it arrives, up to one step
        lanes, lost = encoded(bits, torch.from_numpy(carried), weight, 12, sites=4, rng=draw)
        sent += np.array(lanes) / scale
        carried = np.array(lost, np.float32)
    assert np.abs(sent - wanted).max() <= 1 / scale + 1e-3


def test_a_site_of_no_weight_adds_nothing_and_loses_nothing() -> None:
    for bits in WIDTHS:
        lanes, lost = encoded(bits, [0.3, -0.4], 0, 5, rng=HIGHEST)
        assert lanes == [0, 0]
        assert not any(lost)
        assert encoded(bits, [0.3, -0.4], 0, 0, rng=HIGHEST)[0] == [0, 0], "no site has weight"


def test_a_sum_of_weights_below_the_own_one_is_not_told_apart() -> None:
    # A refusal would let a server search for a site's weight.
    assert encoded(32, [1.0], 8, 2) == encoded(32, [1.0], 2, 2) == ([2**24], [])
    assert encoded(32, [1.0], 8, 0)[0] == [0]


def test_narrow_lanes_need_a_generator() -> None:
    one = {"update": 1 << 16}
    with pytest.raises(ValueError, match="need a generator"):
        encode(layout(entry(16, 1)), {"update/x": torch.ones(1)}, one, one, sites=3)


RECEIVED = {
    "w": torch.tensor([0.3, -0.6]),
    "b": torch.zeros(2),
    "exact": torch.tensor([-0.5]),
    "empty": torch.zeros(0),
    "big": torch.tensor([700.0]),
    "bn.running_mean": torch.zeros(3),
    "bn.running_var": torch.ones(3),
}


def planned(narrow: int, least: int = 16, reach: float = 0.25) -> dict[str, tuple[int, float]]:
    arrays = {f"update/{name}": torch.zeros_like(tensor) for name, tensor in RECEIVED.items()}
    found = plan(arrays, {"update": least}, RECEIVED, narrow=narrow, reach=reach)
    assert found.groups == ("update",)
    assert [e.shape for e in found.entries] == [tuple(t.shape) for t in RECEIVED.values()]
    return {e.name.removeprefix("update/"): (e.bits, e.bound) for e in found.entries}


def test_the_plan_follows_from_the_received_model() -> None:
    wide = {"bn.running_mean": (64, 2.0**36), "bn.running_var": (64, 2.0**36)}
    base = {"w": 1.0, "b": 0.25, "exact": 0.5, "empty": 0.25, "big": 1024.0}
    assert planned(16) == {**{n: (16, b) for n, b in base.items()}, **wide}
    assert planned(32) == planned(20, least=32) == {**{n: (32, 256 * b) for n, b in base.items()}, **wide}
    assert planned(16, least=64) == dict.fromkeys(RECEIVED, (64, 2.0**36))
    assert planned(20, reach=3.0)["w"] == (20, 4.0)


def test_a_group_that_was_not_received_is_planned_by_reach_alone() -> None:
    arrays = {"control/c": torch.ones(2), "update/w": torch.ones(2)}
    found = plan(arrays, {"control": 32, "update": 16}, {"w": torch.full((2,), 3.0)}, narrow=16, reach=0.25)
    assert [(e.name, e.bits, e.bound) for e in found.entries] == [("control/c", 32, 64.0), ("update/w", 16, 4.0)]
    assert found.groups == ("control", "update")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_that_diverged_has_no_plan(value: float) -> None:
    with pytest.raises(ProtocolError, match="w of the received model holds values that are not finite"):
        plan({"update/w": torch.ones(1)}, {"update": 16}, {"w": torch.tensor([value])}, narrow=16, reach=1.0)


def test_a_layout_survives_as_text() -> None:
    made = Layout(
        (entry(16, 2, 3), Entry("other/y.z", (), 64, 2.0**36), entry(32, 0, name="update/e")), ("update", "other")
    )
    text = made.to_text()
    assert Layout.from_text(text) == made
    assert Layout.from_text(text).digest == made.digest
    for other in (
        Layout(made.entries, ("other", "update")),
        Layout(made.entries[::-1], made.groups),
        Layout((*made.entries[:2], entry(32, 1, name="update/e")), made.groups),
        Layout((Entry("update/x", (2, 3), 16, 0.25), *made.entries[1:]), made.groups),
    ):
        assert other.digest != made.digest


GOOD = {"groups": ["g"], "entries": [["g/x", [2], 32, 64.0]]}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "3",
        "{}",
        "[" * 100_000,
        '{"groups": ["g"]}',
        '{"groups":"ab","entries":[]}',
        *(
            json.dumps({**GOOD, "entries": [row]}, separators=(",", ":"))
            for row in (
                ["g/x", [2], 32],
                ["g/x", [2], 17, 1.0],
                ["g/x", [2], 8, 1.0],
                ["g/x", [-1], 32, 1.0],
                ["g/x", [1.5], 32, 1.0],
                ["g/x", "12", 32, 1.0],
                ["g/x", [2], 32, 0.0],
                ["g/x", [2], 32, -1.0],
                ["g/x", [2], 32, float("nan")],
                ["g/x", [2], 32, float("inf")],
                ["g/x", [2], 32, 10**400],
                ["g/x", [2], float("inf"), 1.0],
                ["h/x", [2], 32, 1.0],
                [3, [2], 32, 1.0],
                "g/x",
            )
        ),
        json.dumps({**GOOD, "entries": GOOD["entries"] * 2}, separators=(",", ":")),
        json.dumps({**GOOD, "groups": ["g", "g"]}, separators=(",", ":")),
        json.dumps({**GOOD, "more": 1}, separators=(",", ":")),
        json.dumps(GOOD),
    ],
)
def test_garbage_is_no_layout(text: str) -> None:
    with pytest.raises(MessageError, match="layout"):
        Layout.from_text(text)


def test_the_good_one_is_read() -> None:
    assert Layout.from_text(json.dumps(GOOD, separators=(",", ":"))).entries == (Entry("g/x", (2,), 32, 64.0),)


@given(st.text() | st.recursive(st.none() | st.integers() | st.floats() | st.text(), st.lists).map(json.dumps))
def test_any_text_is_refused_with_our_error(text: str) -> None:
    with pytest.raises(MessageError):
        Layout.from_text(text)
