"""The cyclic sum: exact, whoever holds the key and whoever fails, and closed to those who cheat."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from parties import MODEL, Consortium, consortium
from rings import RING, bent, blob, exact_sums, opened_sums, planned, purpose, relay
from torch import Tensor

from polyclinic.errors import SiteError
from polyclinic.federation.message import Message
from polyclinic.secure.bfv import open_provider
from polyclinic.secure.ckks_as_published import CkksAsPublished
from polyclinic.secure.fixed_point import Entry, Layout
from polyclinic.secure.hidden import AttemptFailed, Opened
from polyclinic.secure.identity import Credentials, Roster, ephemeral_credentials
from polyclinic.secure.ring import BfvScheme, RingSum, pack, ring_order, unpack
from polyclinic.secure.session import Attempt, Party
from polyclinic.secure.view import Recorder

HOLDERS = ("sites", "initiator", "server")
TYPES = {16: np.int16, 18: np.int32, 20: np.int32, 32: np.int32, 64: np.int64}
Integers = dict[int, list[int]]


@pytest.fixture(autouse=True)
def libraries() -> None:
    for name in ("seal", "tenseal"):
        pytest.importorskip(name)


def lanes_of(numbers: Mapping[int, list[int]]) -> dict[int, NDArray[Any]]:
    return {bits: np.array(values, dtype=TYPES[bits]) for bits, values in numbers.items()}


def layout_of(numbers: Mapping[int, list[int]]) -> Layout:
    """A layout with so many numbers of each width; the first wide one is the weight."""
    counts = {bits: len(values) - (bits == 64) for bits, values in numbers.items()}
    return Layout(tuple(Entry(f"g/{b}", (n,), b, 1.0) for b, n in counts.items() if n), ("g",))


def wrapped(value: int, bits: int) -> int:
    """As a signed number of so many bits."""
    half: int = 2 ** (bits - 1)
    return (value + half) % (2 * half) - half


# --- packing


def test_two_narrow_numbers_make_one_integer_low_field_first() -> None:
    # 5 + 3 * 2**20; then -1 borrows one from its neighbour: (2 - 1) * 2**20 + (2**20 - 1); then an odd one out
    narrow = pack(lanes_of({64: [0], 20: [5, 3, -1, 2, -7]}), 20)[4:]
    assert narrow.tolist() == [3145733, 2097151, 2**40 - 7]


def test_a_wide_number_is_cut_into_limbs_of_sixteen_bits() -> None:
    assert pack(lanes_of({64: [0x1234_5678_9ABC_DEF0]}), 20).tolist() == [0xDEF0, 0x9ABC, 0x5678, 0x1234]
    assert pack(lanes_of({64: [-1, 1]}), 20).tolist() == [0xFFFF + (1 << 20), 0xFFFF, 0xFFFF, 0xFFFF]


def test_at_a_width_of_eighteen_limbs_have_fourteen_bits() -> None:
    # 2**63 - 1 is four limbs of 14 ones and one of 7
    assert pack(lanes_of({64: [2**63 - 1]}), 18).tolist() == [0x3FFF] * 4 + [0x7F]


@pytest.mark.parametrize("width", [20, 18])
def test_sixteen_summands_at_their_worst_come_back(width: int) -> None:
    edge = (2 ** (width - 1) - 1) // 16
    one = {64: [2**58, -(2**58), -1], 32: [2**26, -(2**26), -1, 1], width: [edge, -edge, -edge, edge, -edge]}
    packed = pack(lanes_of(one), width)
    total = packed * np.uint64(16) % np.uint64(2 ** (2 * width))
    found = unpack(total, layout_of(one), width)
    assert {b: v.tolist() for b, v in found.items()} == {b: [16 * x for x in v] for b, v in one.items()}


@st.composite
def summands(draw: Any) -> tuple[int, list[Integers]]:
    """1 to 16 sets of integers, alike in their lengths, whose sums fit as the layout sees to."""
    width = draw(st.sampled_from([20, 18]))
    number = draw(st.integers(1, 16))
    room = {64: 2**63 - 1, 32: 2**31 - 1, width: (2 ** (width - 1) - 1) // number}
    sizes = {64: draw(st.integers(1, 5)), 32: draw(st.integers(0, 5)), width: draw(st.integers(0, 9))}
    one = st.fixed_dictionaries(
        {b: st.lists(st.integers(-room[b] - (b >= 32), room[b]), min_size=n, max_size=n) for b, n in sizes.items()}
    )
    return width, draw(st.lists(one, min_size=number, max_size=number))


@given(summands())
@settings(deadline=None)
def test_sums_of_packed_integers_are_sums_of_integers(case: tuple[int, list[Integers]]) -> None:
    width, parts = case
    packed = [[int(x) for x in pack(lanes_of(part), width)] for part in parts]
    total = np.array([sum(column) % 2 ** (2 * width) for column in zip(*packed, strict=True)], dtype=np.uint64)
    layout = layout_of(parts[0])
    found = unpack(total, layout, width)
    expected = {b: [wrapped(sum(c), b) for c in zip(*(p[b] for p in parts), strict=True)] for b in layout.widths}
    assert {bits: values.tolist() for bits, values in found.items()} == expected


def test_long_vectors_are_packed_in_several_pieces() -> None:
    values = np.random.default_rng(0).integers(-(2**19), 2**19, 200_001)
    lanes: dict[int, NDArray[Any]] = {64: np.arange(70_001) - 35_000, 20: values.astype(np.int32)}
    packed = pack(lanes, 20)
    assert len(packed) == 4 * 35_001 + 100_001
    assert int(packed[4 * 35_001 + 77_777]) == (int(values[155_554]) + (int(values[155_555]) << 20)) % 2**40
    found = unpack(packed, layout_of({b: v.tolist() for b, v in lanes.items()}), 20)
    assert all(np.array_equal(found[bits], lanes[bits]) for bits in lanes)


# --- sums


@pytest.mark.parametrize("sites", range(3, 17))
def test_the_sum_is_that_of_the_integers(sites: int, tmp_path: Path) -> None:
    c = consortium(tmp_path, sites, aggregation=RING | {"key_holder": HOLDERS[sites % 3]})
    total = c.sum()
    assert opened_sums(c) == exact_sums(c)
    assert c.opened["values"][0].sites == tuple(sorted(c.sites))
    assert total.weights == {"update": sum(c.weights.values())}
    assert not c.sums.incidents


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("sites", [3, 5])
def test_both_libraries_find_the_same_integers(sites: int, holder: str, tmp_path: Path) -> None:
    found = []
    for provider in ("seal", "tenseal"):
        c = consortium(tmp_path / provider, sites, aggregation=RING | {"provider": provider, "key_holder": holder})
        c.sum()
        found.append(opened_sums(c))
        assert found[-1] == exact_sums(c)
    assert found[0] == found[1]


@pytest.mark.parametrize("holder", HOLDERS)
def test_the_mean_is_as_near_to_the_plain_one_as_is_stated(holder: str, tmp_path: Path) -> None:
    weights = {"a": 1.0, "b": 700.0, "c": 33.0, "d": 2.5}
    c = consortium(tmp_path, weights, aggregation=RING | {"key_holder": holder})
    mean, plain = c.sum().mean("update"), c.mean(sorted(weights))
    width = 20 if holder == "sites" else 18
    # One step per site; bounds are the powers of two at or above the model's 0.5, and the least one, 0.25.
    for name, bound in {"w": 0.5, "b": 0.25}.items():
        step = bound / (2 ** (width - 1) - 1 - 4)
        assert float((mean[name] - plain[name]).abs().max()) <= 4 * step * (1 + 1e-9)


@pytest.mark.parametrize("size", [1e3, 1e6])
def test_running_variances_survive(size: float, tmp_path: Path) -> None:
    def arrays(name: str) -> dict[str, Tensor]:
        made = {key: torch.zeros_like(tensor) for key, tensor in MODEL.items()}
        return made | {"norm.running_var": torch.tensor([size, -size, 0.0, size * ord(name) / 99])}

    c = consortium(tmp_path, 4, aggregation=RING, arrays=arrays)
    mean, plain = c.sum().mean("update"), c.mean(sorted(c.sites))
    # Four roundings to half of 2**-26, and those of float64.
    assert float((mean["norm.running_var"] - plain["norm.running_var"]).abs().max()) <= 2 * 2**-26 + size * 2**-50
    assert float(mean["w"].abs().max()) == 0


@pytest.mark.parametrize("holder", HOLDERS)
def test_values_at_and_beyond_their_bounds_do_not_spill_into_their_neighbours(holder: str, tmp_path: Path) -> None:
    def arrays(name: str) -> dict[str, Tensor]:
        w = torch.full((15,), 0.5)
        w[1::2] = -0.5
        w[-1] = 1e30
        return {"w": w.reshape(3, 5), "b": torch.full((7,), -0.25), "norm.running_var": torch.full((4,), -(2.0**36))}

    c = consortium(tmp_path, 16, aggregation=RING | {"key_holder": holder}, arrays=arrays)
    mean = c.sum().mean("update")
    assert opened_sums(c) == exact_sums(c)
    expected = arrays("a") | {"w": arrays("a")["w"].clamp(-0.5, 0.5)}
    for name, value in expected.items():
        assert float((mean[name] - value).abs().max()) <= (2**-10 if name != "norm.running_var" else 2**-12)


# --- the ring


def calls(recorder: Recorder, op: str) -> list[str]:
    """Who was called, in order."""
    return [seen.receiver for seen in recorder.seen if seen.op == op and seen.sender == "server"]


def test_the_initiator_rotates(tmp_path: Path) -> None:
    c = consortium(tmp_path, 4, aggregation=RING)
    for number, initiator in enumerate("bcdab", start=1):
        before, recorder = c.channel, Recorder(c.channel)
        c.channel = recorder  # type: ignore[assignment]
        c.sum(number)
        assert calls(recorder, "ring-pass") == 2 * [
            chr(ord("a") + (ord(initiator) - ord("a") + i) % 4) for i in range(4)
        ]
        assert calls(recorder, "ring-open") == 2 * [initiator]
        c.channel = before


@pytest.mark.parametrize(("lost", "order"), [("", "cdab"), ("a", "cdb"), ("d", "cab"), ("c", "dab"), ("cd", "ab")])
def test_who_is_lost_leaves_the_others_in_their_places(lost: str, order: str) -> None:
    sites = tuple(s for s in "abcd" if s not in lost)
    assert "".join(ring_order(Attempt("train", "values", 2, 1, sites), "dbca")) == order


def failing(c: Consortium, name: str, at: tuple[str, str]) -> None:
    """Let a site raise in one phase of one sum."""
    handle = c.sites[name].handle

    def stumble(op: str, number: int, message: Message) -> Message:
        if (purpose(message), op) == at:
            raise OSError("power cut")
        return handle(op, number, message)

    c.sites[name].handle = stumble  # type: ignore[method-assign]


FAILURES = [
    *((site, p, f"ring-{op}") for p in ("counts", "values") for op in ("keys", "prepare", "pass") for site in "bd"),
    *(("b", p, f"ring-{op}") for p in ("counts", "values") for op in ("key", "open")),
]


@pytest.mark.parametrize(("lost", "of", "op"), FAILURES)
def test_a_site_that_fails_is_left_out_of_a_fresh_ring(lost: str, of: str, op: str, tmp_path: Path) -> None:
    c = consortium(tmp_path, 4, aggregation=RING)
    failing(c, lost, (of, op))
    c.channel = recorder = Recorder(c.channel)  # type: ignore[assignment]
    total = c.sum()
    left = [s for s in "abcd" if s != lost]
    assert c.opened["values"][0].sites == tuple(left)
    assert opened_sums(c) == exact_sums(c)
    assert total.weights["update"] == sum(c.weights[s] for s in left)
    error = (total.mean("update")["w"] - c.mean(left)["w"]).abs().max()
    # Shares are of all sites' weight where one is lost after it was counted.
    assert float(error) <= 4 * 0.5 / (2**19 - 8) * sum(c.weights.values()) / sum(c.weights[s] for s in left)
    # The initiator, b in round 1, keeps its place unless it is the one that is lost.
    assert calls(recorder, "ring-open")[-1] == ("c" if lost == "b" else "b")
    keys = [s.message.arrays["keys/mask"].numpy().tobytes() for s in recorder.seen if "keys/mask" in s.message.arrays]
    tokens = [blob(s.message) for s in recorder.seen if s.sender != "server" and blob(s.message)]
    assert len(keys) == len(set(keys)) >= 9
    assert len(tokens) == len(set(tokens)) >= 6


def test_two_of_three_sites_get_no_sum(tmp_path: Path) -> None:
    c = consortium(tmp_path, 3, aggregation=RING)
    failing(c, "c", ("values", "ring-pass"))
    with pytest.raises(SiteError, match="no sum came about"):
        c.sum()


def test_a_site_enters_no_ring_of_two(tmp_path: Path) -> None:
    c = consortium(tmp_path, 3, aggregation=RING)
    c.sum()
    with pytest.raises(AttemptFailed, match=r"only two sites \(a, b\) are left"):
        again(c, sites=("a", "b"))


# --- what nobody gets to see


def test_no_count_travels_in_clear(tmp_path: Path) -> None:
    weights = {"a": 1237.0, "b": 40013.0, "c": 2903.0, "d": 3119.0}
    c = consortium(tmp_path, weights, aggregation=RING)
    c.channel = recorder = Recorder(c.channel)  # type: ignore[assignment]
    c.sum()
    whole = sum(weights.values())
    # The scan finds what does travel: the sum, which the initiator opens and the server announces for the values.
    assert sightings(recorder, whole) > 0
    assert {name: sightings(recorder, weight) for name, weight in weights.items()} == dict.fromkeys(weights, 0)


def sightings(recorder: Recorder, weight: float) -> int:
    """How often a weight or its steps stand in any scalar or array of any message."""
    forms = [np.array(v, t).tobytes() for v in (weight, weight * 2**16) for t in (np.int64, np.float64)]
    found = 0
    for seen in recorder.seen:
        text = json.dumps({k: v for k, v in seen.message.scalars.items() if k != "number"})
        found += sum(text.count(str(int(v))) for v in (weight, weight * 2**16))
        for array in seen.message.arrays.values():
            found += sum(array.numpy().tobytes().count(form) for form in forms)
            found += int((array.double() == weight).sum()) if array.dtype != torch.uint8 else 0
    return found


@pytest.mark.parametrize("provider", ["seal", "tenseal"])
def test_what_two_neighbours_decrypt_is_uniform(provider: str, tmp_path: Path) -> None:
    """Sites before and after d hold the key and subtract what they saw; as published, d's update is what is left."""
    model = {"w": torch.full((6000,), 0.5)}
    c = consortium(
        tmp_path, 4, aggregation=RING | {"provider": provider}, arrays=lambda _: {"w": torch.full((6000,), 0.01)}
    )
    c.channel = recorder = Recorder(c.channel)  # type: ignore[assignment]
    c.sum(model=model)
    bfv, key = open_provider(provider, "secret"), c.sites["a"].party._session.memory["key"]  # type: ignore[arg-type,union-attr]
    before, after = (bfv.decrypt(np.frombuffer(t, np.uint8).copy(), key) for t in tokens(recorder)[1:3])
    parts = (after - before) % np.uint64(2**40)
    for shift in (36, 16):  # the highest bits of both fields
        counts = np.bincount((parts[4:] >> np.uint64(shift)).astype(np.int64) & 15, minlength=16)
        expected = counts.sum() / 16
        assert float(((counts - expected) ** 2).sum() / expected) < 60  # chi-square, 15 degrees: p = 2e-7


def tokens(recorder: Recorder) -> list[bytes]:
    """Of the values, in the order of the ring."""
    found = [s for s in recorder.seen if s.op == "ring-pass" and s.sender != "server"]
    return [blob(s.message) for s in found[-4:]]


# --- cheats


def again(c: Consortium, **changes: Any) -> Opened:
    """One more attempt at the sum of the values, newer than the last, with changes."""
    attempt = c.opened["values"][0]
    fresh = replace(attempt, **{"number": attempt.number + 1, **changes})
    return c.sums._protocol.add(c.channel, fresh, planned(c))


def once(change: Callable[[Message], Message], op: str, to: str, of: str = "values") -> Any:
    """A hook that changes the first message of an op to a site."""
    done: list[bool] = []

    def hook(called: str, site: str, message: Message) -> Message:
        if not done and (called, site, purpose(message)) == (op, to, of):
            done.append(True)
            return change(message)
        return message

    return hook


def refused_once(c: Consortium, *words: str) -> None:
    """The sum comes about in a second attempt with all sites, after a refusal that says these words."""
    c.sum()
    assert len(c.sums.incidents) == 1
    assert all(word in c.sums.incidents[0] for word in words), c.sums.incidents
    assert c.opened["values"][0].sites == tuple(sorted(c.sites))
    assert opened_sums(c) == exact_sums(c)


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize(("reader", "sender"), [("c", "b"), ("a", "d")])
def test_a_token_altered_on_its_way_is_refused_by_the_next(
    holder: str, reader: str, sender: str, tmp_path: Path
) -> None:
    c = consortium(tmp_path, 4, aggregation=RING | {"key_holder": holder})
    relay(c, down=once(lambda m: bent(m, "token/blob"), "ring-pass", reader))
    refused_once(c, f"site {reader!r} refused 'ring-pass'", f"site {sender!r}")


@pytest.mark.parametrize("holder", HOLDERS)
def test_the_whole_token_altered_on_its_way_is_refused_by_who_opens_it(holder: str, tmp_path: Path) -> None:
    c = consortium(tmp_path, 4, aggregation=RING | {"key_holder": holder})
    if holder == "server":
        spoilt: list[bool] = []

        def up(op: str, site: str, reply: Message) -> Message:
            if (op, site) == ("ring-pass", "a") and not spoilt:
                spoilt.append(True)
                return bent(reply, "token/blob")
            return reply

        relay(c, up=up)
        refused_once(c, "the server refused the token", "site 'a'")
    else:
        relay(c, down=once(lambda m: bent(m, "token/blob"), "ring-open", "b"))
        refused_once(c, "site 'b' refused 'ring-open'", "site 'a'")


def test_a_site_that_always_sends_what_it_did_not_sign_is_left_out(tmp_path: Path) -> None:
    c = consortium(tmp_path, 4, aggregation=RING)
    relay(c, up=lambda op, site, m: bent(m, "token/blob") if (op, site) == ("ring-pass", "d") else m)
    c.sum()
    assert c.opened["values"][0].sites == ("a", "b", "c")
    assert opened_sums(c) == exact_sums(c)


def test_a_site_that_refuses_for_no_reason_is_left_out_and_not_the_one_it_blames(tmp_path: Path) -> None:
    c = consortium(tmp_path, 4, aggregation=RING)
    lie = Message(scalars={"refused": "I do not like it", "blames": "c"})
    relay(c, up=lambda op, site, m: lie if (op, site) == ("ring-pass", "d") else m)
    c.sum()
    assert c.opened["values"][0].sites == ("a", "b", "c")
    assert opened_sums(c) == exact_sums(c)


@pytest.mark.parametrize("wrong", ["length", "parts", "type", "missing"])
def test_a_token_that_is_signed_but_of_no_use_is_refused_in_words(wrong: str, tmp_path: Path) -> None:
    c = consortium(tmp_path, 4, aggregation=RING)
    party = c.sites["c"].party

    def spoil(message: Message) -> Message:
        token = message.arrays["token/blob"].clone()
        if wrong == "length":
            token = token[:-1]
        elif wrong == "parts":
            token[24] += 1  # of the header: how many were added up
        elif wrong == "type":
            token = token.to(torch.bfloat16)
        else:
            return Message({}, message.scalars)
        signed = party.sign(party._session, "token", bytes([2]), sha256(token))  # type: ignore[arg-type]
        return Message({"token/blob": token, "signed/token": torch.tensor(list(signed), dtype=torch.uint8)})

    def up(op: str, site: str, reply: Message) -> Message:
        return spoil(reply) if (op, site) == ("ring-pass", "c") and not c.sums.incidents else reply

    relay(c, up=up)
    c.sum()
    assert "site 'd' refused 'ring-pass'" in c.sums.incidents[0]
    assert c.channel.absent == {}
    assert opened_sums(c) == exact_sums(c)


def sha256(token: Tensor) -> bytes:
    return hashlib.sha256(token.view(torch.uint8).numpy().tobytes()).digest()


def test_a_token_of_another_hop_is_refused(tmp_path: Path) -> None:
    c = consortium(tmp_path, 4, aggregation=RING)
    seen: list[Message] = []

    def down(op: str, site: str, message: Message) -> Message:
        if op == "ring-pass" and purpose(message) == "values" and not c.sums.incidents:
            seen.append(message)
            if site == "d":  # gets what c got: the part of b alone
                return Message({**message.arrays, **seen[1].arrays}, message.scalars)
        return message

    relay(c, down=down)
    refused_once(c, "site 'd' refused 'ring-pass'", "site 'c'")


def test_a_token_of_an_earlier_attempt_is_refused(tmp_path: Path) -> None:
    c = consortium(tmp_path, 4, aggregation=RING)
    old: list[Message] = []

    def down(op: str, site: str, message: Message) -> Message:
        if (op, site, purpose(message)) == ("ring-pass", "c", "values"):
            old.append(message)
            if len(old) == 2:
                return Message(old[0].arrays, message.scalars)
        if (op, site) == ("ring-pass", "d") and purpose(message) == "values" and len(old) == 1:
            return bent(message, "token/blob")  # to make a second attempt necessary
        return message

    relay(c, down=down)
    c.sum()
    assert "site 'd' refused" in c.sums.incidents[0]
    assert "site 'c' refused 'ring-pass'" in c.sums.incidents[1]
    assert opened_sums(c) == exact_sums(c)


def test_a_forged_public_key_of_the_initiator_is_refused(tmp_path: Path) -> None:
    c = consortium(tmp_path, 4, aggregation=RING | {"key_holder": "initiator"})
    public = np.frombuffer(open_provider("seal", "public").new_keys().public, np.uint8).copy()
    forged = torch.from_numpy(public)
    relay(c, down=once(lambda m: Message({**m.arrays, "b/he/public": forged}, m.scalars), "ring-prepare", "d"))
    refused_once(c, "site 'd' refused 'ring-prepare'", "site 'b'")


def test_a_sealed_key_that_was_altered_is_refused(tmp_path: Path) -> None:
    c = consortium(tmp_path, 4, aggregation=RING)
    relay(c, down=once(lambda m: bent(m, "b/letters/c"), "ring-prepare", "c"))
    refused_once(c, "site 'c' refused 'ring-prepare'", "site 'b'", "altered")


def test_a_key_is_sealed_for_one_site_and_told_to_no_other(tmp_path: Path) -> None:
    c = consortium(tmp_path, 4, aggregation=RING)
    c.channel = recorder = Recorder(c.channel)  # type: ignore[assignment]
    c.sum()
    key = c.sites["b"].party._session.memory["key"]  # type: ignore[union-attr]
    assert key == c.sites["d"].party._session.memory["key"]  # type: ignore[union-attr]
    for seen in recorder.seen:
        letters = [name for name in seen.message.arrays if "/letters/" in name]
        assert letters in ([], [f"b/letters/{seen.receiver}"])
        assert not any(key[-64:] in array.numpy().tobytes() for array in seen.message.arrays.values())


@pytest.mark.parametrize("holder", ["sites", "initiator"])
def test_an_initiator_whose_key_is_of_no_use_to_all_is_left_out(holder: str, tmp_path: Path) -> None:
    c = consortium(tmp_path, 4, aggregation=RING | {"key_holder": holder})
    name = "letters/" if holder == "sites" else "he/public"

    def up(op: str, site: str, reply: Message) -> Message:
        if (op, site) != ("ring-key", "b"):
            return reply
        return Message({k: a[:40] if k.startswith(name) else a for k, a in reply.arrays.items()})

    relay(c, up=up)
    c.sum()
    assert c.opened["values"][0].sites == ("a", "c", "d")
    assert opened_sums(c) == exact_sums(c)


def with_roster(c: Consortium, name: str, keys: Mapping[str, bytes]) -> None:
    """Give a site another roster."""
    own = c.sites[name].party
    credentials = Credentials(own.credentials.identity, Roster(dict(keys)), {})
    c.sites[name].party = Party(own.job, credentials, own.journal._path)


def test_a_foreign_roster_is_refused(tmp_path: Path) -> None:
    c = consortium(tmp_path, 5, aggregation=RING)
    other = ephemeral_credentials(["d"])["d"].identity.public
    with_roster(c, "e", {**c.sites["e"].party.credentials.roster.keys, "d": other})
    c.sum()
    assert "another roster" in c.sums.incidents[0]
    assert c.opened["values"][0].sites == ("a", "b", "c", "d")


def test_rosters_with_other_names_make_another_ring_and_are_refused_as_such(tmp_path: Path) -> None:
    c = consortium(tmp_path, 5, aggregation=RING)
    other = ephemeral_credentials(["aa"])["aa"].identity.public
    with_roster(c, "e", {**c.sites["e"].party.credentials.roster.keys, "aa": other})
    c.sum()
    assert "another ring" in c.sums.incidents[0]
    assert c.opened["values"][0].sites == ("a", "b", "c", "d")


def test_a_site_that_trained_from_another_model_is_refused(tmp_path: Path) -> None:
    c = consortium(tmp_path, 4, aggregation=RING)
    other = Message.pack({"model": {**MODEL, "w": torch.full((3, 5), 0.4)}})
    relay(c, down=lambda op, site, m: other if (op, site) == ("train", "d") else m)
    c.sum()
    assert "another model" in c.sums.incidents[0]
    assert c.opened["counts"][0].sites == ("a", "b", "c")
    assert opened_sums(c) == exact_sums(c)


@pytest.mark.parametrize(
    ("scheme", "what"),
    [
        (("tenseal", "sites", 20), "provider"),
        (("seal", "initiator", 18), "key_holder"),
        (("seal", "sites", 18), "width"),
    ],
)
def test_a_site_with_other_settings_is_refused(scheme: tuple[Any, str, int], what: str, tmp_path: Path) -> None:
    c = consortium(tmp_path, 4, aggregation=RING)
    site = c.sites["a"]
    site._ops = {**site._ops, **RingSum(site.party.credentials.roster, BfvScheme(*scheme)).ops()}
    c.sum()
    assert f"another {what}" in c.sums.incidents[0]
    assert c.opened["values"][0].sites == ("b", "c", "d")
    assert opened_sums(c) == exact_sums(c)


def test_an_attempt_and_a_round_are_entered_once(tmp_path: Path) -> None:
    c = consortium(tmp_path, 4, aggregation=RING)
    c.sum(1)
    c.sum(2)
    attempt = c.opened["values"][0]
    with pytest.raises(AttemptFailed, match=f"attempt {attempt.number} is a replay"):
        again(c, number=attempt.number)
    with pytest.raises(AttemptFailed, match="a sum of round 1 was asked for in round 2"):
        again(c, round=1)


def test_a_sum_is_opened_once_and_by_the_initiator_alone(tmp_path: Path) -> None:
    c = consortium(tmp_path, 4, aggregation=RING)
    c.channel = recorder = Recorder(c.channel)  # type: ignore[assignment]
    c.sum()
    asked = next(s.message for s in reversed(recorder.seen) if s.op == "ring-open" and s.sender == "server")
    answer = c.sites["b"].handle("ring-open", 1, asked)
    assert "answered" in str(answer.scalars["refused"])
    assert not answer.arrays
    answer = c.sites["c"].handle("ring-open", 1, asked)
    assert "not the one to open" in str(answer.scalars["refused"])
    assert not answer.arrays


@pytest.mark.parametrize("holder", HOLDERS)
def test_the_key_is_made_by_the_initiator_alone(holder: str, tmp_path: Path) -> None:
    c = consortium(tmp_path, 4, aggregation=RING | {"key_holder": holder})
    c.channel = recorder = Recorder(c.channel)  # type: ignore[assignment]
    c.sum()
    made = {s.sender: s.message for s in recorder.seen if s.op == "ring-key" and s.sender != "server"}
    assert {name for name, message in made.items() if message.arrays} == ({"b"} if holder != "server" else set())


def test_keys_must_be_those_of_all_sites(tmp_path: Path) -> None:
    c = consortium(tmp_path, 5, aggregation=RING)

    def down(op: str, site: str, message: Message) -> Message:
        if op != "ring-key" or site != "a" or c.sums.incidents:
            return message
        few = {name: array for name, array in message.arrays.items() if not name.startswith("e/")}
        return Message(few, {k: v for k, v in message.scalars.items() if not k.startswith("e/")})

    relay(c, down=down)
    c.sum()
    assert "site 'a' refused 'ring-key': the keys of site 'e' are missing" in c.sums.incidents[0]
    assert len(c.sums.incidents) == 1
    assert opened_sums(c) == exact_sums(c)


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("holder", ["sites", "initiator"])
def test_two_sums_of_a_round_over_different_sites_are_not_opened(holder: str, restarted: bool, tmp_path: Path) -> None:
    c = consortium(tmp_path, 4, aggregation=RING | {"key_holder": holder})
    c.sum()
    if restarted:
        vars(c.sites["b"]).pop("party")  # the journal is on disk; its update is computed again
        c.sites["b"].state.round = 0
        c.channel.call("train", {"b": Message.pack({"model": MODEL})})
    with pytest.raises(AttemptFailed, match="opened for a, b, c, d"):
        again(c, sites=("a", "b", "c"))
    later = c.opened["values"][0].number + 10
    again(c, number=later)  # the same sites once more give nothing new
    assert opened_sums(c) == exact_sums(c)


def test_tokens_are_for_those_who_prepared(tmp_path: Path) -> None:
    c = consortium(tmp_path, 4, aggregation=RING)
    c.sum()
    fresh = replace(c.opened["values"][0], number=c.opened["values"][0].number + 1).message(Message())
    c.sites["a"].handle("ring-keys", 1, fresh)
    assert "prepared nothing" in str(c.sites["a"].handle("ring-pass", 1, fresh).scalars["refused"])


def test_nothing_is_encrypted_before_keys_are_checked(tmp_path: Path) -> None:
    c = consortium(tmp_path, 4, aggregation=RING)
    c.sum()
    fresh = replace(c.opened["values"][0], number=c.opened["values"][0].number + 1).message(Message())
    c.sites["a"].handle("ring-keys", 1, fresh)
    assert "has not checked the keys" in str(c.sites["a"].handle("ring-prepare", 1, fresh).scalars["refused"])


@pytest.mark.parametrize(
    ("op", "site", "name"),
    [("ring-keys", "d", "keys/mask"), ("ring-key", "b", "letters/"), ("ring-pass", "d", "signed/")],
)
def test_numbers_in_place_of_bytes_are_refused_and_laid_at_the_senders_door(
    op: str, site: str, name: str, tmp_path: Path
) -> None:
    c = consortium(tmp_path, 4, aggregation=RING)

    def up(called: str, by: str, reply: Message) -> Message:
        if (called, by) != (op, site):
            return reply
        arrays = {k: a.to(torch.bfloat16) if k.startswith(name) else a for k, a in reply.arrays.items()}
        return Message(arrays, reply.scalars)

    relay(c, up=up)
    c.sum()
    assert c.channel.absent == {}
    assert c.opened["values"][0].sites == tuple(s for s in "abcd" if s != site)
    assert opened_sums(c) == exact_sums(c)


def test_an_initiator_whose_context_is_no_json_is_left_out(tmp_path: Path) -> None:
    c = consortium(tmp_path, 4, aggregation=RING)

    def up(op: str, site: str, reply: Message) -> Message:
        return Message(reply.arrays, {**reply.scalars, "context": "{"}) if (op, site) == ("ring-keys", "b") else reply

    relay(c, up=up)
    c.sum()
    assert c.opened["values"][0].sites == ("a", "c", "d")


def test_a_sum_that_the_initiator_did_not_sign_is_refused_by_the_server(tmp_path: Path) -> None:
    c = consortium(tmp_path, 4, aggregation=RING)
    spoilt: list[bool] = []

    def up(op: str, site: str, reply: Message) -> Message:
        if op == "ring-open" and not spoilt:
            spoilt.append(True)
            return bent(reply, "lanes/64")
        return reply

    relay(c, up=up)
    c.sum()
    assert "the server refused the sum of site 'b'" in c.sums.incidents[0]
    assert opened_sums(c) == exact_sums(c)


# --- as published

PUBLISHED = "ring-as-published"
LONG = {"w": torch.full((5000,), 0.5)}


def long_arrays(name: str) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(ord(name))
    return {"w": 0.02 * torch.randn(5000, generator=draw)}


def test_as_published_the_mask_rounds_updates(tmp_path: Path) -> None:
    c = consortium(tmp_path, 4, aggregation=PUBLISHED, arrays=long_arrays, lanes=32)
    mean = c.sum(model=LONG).mean("update")["w"]
    whole = sum(c.weights.values())
    plain = sum(c.arrays[s]["w"].double() * (c.weights[s] / whole) for s in c.sites)
    error = (mean - plain).numpy()
    # A float32 of the mask's size is rounded to half its spacing; that of normal numbers of 10,000 is drawn afresh.
    spacing = np.spacing(np.random.default_rng(0).normal(0, 1e4, 100_000).astype(np.float32)).astype(np.float64)
    rounding = float(np.sqrt((spacing**2).mean() / 12))
    # CKKS itself: measured for these parameters without a mask, 4.6e-5 in root mean square, 4e-4 at most.
    assert 0.9 * rounding < float(np.sqrt((error**2).mean())) < 1.15 * float(np.hypot(rounding, 1e-4))
    assert float(np.abs(error).max()) < 2**-9 + 1e-3  # no mask is above 2**16


def test_as_published_two_neighbours_find_the_update_between_them(tmp_path: Path) -> None:
    c = consortium(tmp_path, 4, aggregation=PUBLISHED, arrays=long_arrays, lanes=32)
    c.channel = recorder = Recorder(c.channel)  # type: ignore[assignment]
    c.sum(model=LONG)
    context = CkksAsPublished(c.sites["a"].party._session.memory["key"])  # type: ignore[union-attr]
    # Of the order b, c, d, a: what c passed on and what d passed on.
    before, after = (context.load(token, [1, 5000]).decrypt() for token in tokens(recorder)[1:3])
    share = c.arrays["d"]["w"].double().numpy() * (c.weights["d"] / sum(c.weights.values()))
    assert float(np.abs(after[1] - before[1] - share).max()) < 1e-3
    assert float(np.abs(share).max()) > 1e-2
    assert abs(float(after[0][0] - before[0][0]) - c.weights["d"]) < 1e-2


def test_as_published_values_at_the_edge_of_their_lanes_do_not_wrap(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"backend": PUBLISHED, "lanes": 16, "reach": 0.25}
    c = consortium(tmp_path, 4, aggregation=settings, arrays=lambda _: {"w": torch.full((2000,), 0.5)})
    mean = c.sum(model=LONG).mean("update")["w"]
    assert float((mean - 0.5).abs().max()) < 5e-3


def test_as_published_weights_of_zero_stay_zero(tmp_path: Path) -> None:
    c = consortium(tmp_path, dict.fromkeys("abcd", 0.0), aggregation=PUBLISHED)
    for number in (1, 2):
        assert 0 <= c.sum(number).weights["update"] < 1e-2


def test_as_published_a_site_that_fails_is_left_out(tmp_path: Path) -> None:
    c = consortium(tmp_path, 4, aggregation=PUBLISHED)
    failing(c, "b", ("values", "ring-pass"))
    total = c.sum()
    assert c.opened["values"][0].sites == ("a", "c", "d")
    error = (total.mean("update")["w"] - c.mean(list("acd"))["w"]).abs().max()
    assert float(error) < (2**-9 + 1e-3) * sum(c.weights.values()) / sum(c.weights[s] for s in "acd") + 1e-4


def test_as_published_a_damaged_token_is_refused(tmp_path: Path) -> None:
    c = consortium(tmp_path, 4, aggregation=PUBLISHED)
    relay(c, down=once(lambda m: bent(m, "token/blob"), "ring-pass", "d"))
    c.sum()
    assert "site 'd' refused 'ring-pass'" in c.sums.incidents[0]
