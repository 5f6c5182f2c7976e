"""Attempts, keys, sealed letters and the journal, party by party."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyclinic.errors import ProtocolError
from polyclinic.federation.message import Message
from polyclinic.secure.identity import Credentials, Identity, ephemeral_credentials
from polyclinic.secure.session import (
    Attempt,
    Journal,
    Party,
    Session,
    as_array,
    as_bytes,
    digest,
    forward,
    forwarded,
    sign,
    statement,
    too_few,
)

NAMES = ("east", "north", "south", "west")
FACTS = {"model": "m", "layout": "l"}


def attempt(number: int = 5, **other: Any) -> Attempt:
    return replace(Attempt("train", "values", 1, number, NAMES, (7,)), **other)


class Room:
    """Parties that know each other, in one attempt."""

    def __init__(self, folder: Path) -> None:
        self.credentials = ephemeral_credentials(NAMES)
        self.parties = {n: Party("job", self.credentials[n], folder / n / "sums.json") for n in NAMES}

    def begin(self, made: Attempt, **facts: dict[str, str]) -> dict[str, Message]:
        return {n: p.begin(made, made.round, {**FACTS, **facts.get(n, {})}) for n, p in self.parties.items()}

    def sessions(self, made: Attempt) -> dict[str, Session]:
        return {n: p.session(made.message(), "shares") for n, p in self.parties.items()}

    def met(self, made: Attempt, announced: dict[str, Message] | None = None) -> dict[str, Session]:
        told = announced or self.begin(made)
        sessions = self.sessions(made)
        for name, party in self.parties.items():
            party.meet(sessions[name], forwarded(forward(told)))
        return sessions


@pytest.fixture
def room(tmp_path: Path) -> Room:
    return Room(tmp_path)


def altered(message: Message, array: str = "", **scalars: Any) -> Message:
    """With one bit of an array turned, or other scalars."""
    arrays = dict(message.arrays)
    if array:
        arrays[array] = arrays[array].clone()
        arrays[array].view(torch.uint8)[0] ^= 1
    return Message(arrays, {**message.scalars, **scalars})


# Attempts


@pytest.mark.parametrize(("sites", "threshold"), [(3, 3), (4, 3), (5, 4), (6, 5), (7, 5), (10, 7), (15, 11), (16, 11)])
def test_more_than_two_thirds_open(sites: int, threshold: int) -> None:
    assert attempt(sites=tuple("abcdefghijklmnop"[:sites])).threshold == threshold


def test_an_attempt_survives_as_a_message() -> None:
    more = Message({"x/y": torch.ones(1)}, {"arrived": "[]"})
    sent = attempt(totals=(3, 2**60)).message(more)
    assert Attempt.read(Message.from_bytes(sent.to_bytes())) == attempt(totals=(3, 2**60))
    assert sent.scalars["arrived"] == "[]"
    assert list(sent.arrays) == ["x/y"]


@pytest.mark.parametrize(
    ("scalars", "reason"),
    [
        ({"sites": json.dumps(["b", "a", "c"])}, "not sorted or names one twice"),
        ({"sites": json.dumps(["a", "a", "b"])}, "not sorted or names one twice"),
        ({"sites": "{"}, "says not which attempt"),
        ({"sites": "[" * 100_000}, "says not which attempt"),
        ({"sites": "7"}, "says not which attempt"),
        ({"totals": '["x"]'}, "says not which attempt"),
        ({"totals": "[-1]"}, "below zero"),
        ({"number": "soon"}, "says not which attempt"),
        ({"round": float("inf")}, "says not which attempt"),
        ({"purpose": "weights"}, "a sum of an unknown kind"),
    ],
)
def test_a_call_that_makes_no_sense_is_refused(scalars: dict[str, Any], reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        Attempt.read(altered(attempt().message(), **scalars))


def test_a_call_without_its_attempt_is_refused() -> None:
    with pytest.raises(ProtocolError, match=r"says not which attempt it belongs to \('sites'\)"):
        Attempt.read(Message())


# The journal


def test_a_journal_refuses_replays_also_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "new" / "sums.json"
    journal = Journal(path)
    journal.enter(attempt(5, round=2))
    for again in (journal, Journal(path)):
        for number in (5, 4, 0):
            with pytest.raises(ProtocolError, match=f"attempt {number} is a replay: attempt 5 was seen before it"):
                again.enter(attempt(number, round=2))
        with pytest.raises(ProtocolError, match="round 1 is a replay: round 2 has begun"):
            again.enter(attempt(6, round=1))
    Journal(path).enter(attempt(6, round=2))
    with pytest.raises(ProtocolError, match="attempt 6 is a replay"):
        Journal(path).enter(attempt(6, round=3))
    Journal(path).enter(attempt(7, round=3))


@pytest.mark.parametrize("purpose", ["counts", "values"])
def test_a_sum_is_opened_for_one_set_a_round(tmp_path: Path, purpose: str) -> None:
    path = tmp_path / "sums.json"
    made = attempt(purpose=purpose)
    journal = Journal(path)
    journal.enter(made)
    journal.open(made, NAMES)
    for again in (journal, Journal(path)):
        again.enter(newer := attempt(made.number + 1, purpose=purpose))
        made = newer
        again.open(made, list(NAMES))  # a run that was resumed asks for the same
        with pytest.raises(
            ProtocolError, match=f"{purpose} of train in round 1 was opened for east, north, south, west"
        ):
            again.open(made, NAMES[1:])
    later = Journal(path)
    later.enter(attempt(9, purpose=purpose, round=2))
    later.open(attempt(9, purpose=purpose, round=2), NAMES[1:])


def test_other_sums_of_the_round_may_be_opened_for_others(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "sums.json")
    journal.enter(attempt())
    journal.open(attempt(purpose="counts"), NAMES)
    journal.open(attempt(), NAMES[1:])
    journal.open(attempt(op="statistics"), NAMES[:3])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"newest": 3}'])
def test_a_damaged_journal_is_not_forgotten(tmp_path: Path, text: str) -> None:
    path = tmp_path / "sums.json"
    path.write_text(text)
    with pytest.raises(ProtocolError, match=r"sums\.json is damaged"):
        Journal(path)


# Beginning


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"sites": NAMES[:2]}, "only two sites .east, north. are left: each would find the other's update by subtract"),
        ({"sites": NAMES[:1]}, "only 1 of at least 3 sites"),
        ({"sites": NAMES[1:]}, "'east' was asked for a sum that it has no part in"),
        ({"sites": (*NAMES, "zealand")}, "'zealand' is not on the roster"),
        ({"sites": tuple(sorted({"east", *map("s{:02}".format, range(16))}))}, "at most 16 sites"),
        ({"round": 2}, "a sum of round 2 was asked for in round 1"),
    ],
)
def test_a_party_refuses_to_begin(room: Room, other: dict[str, Any], reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        room.parties["east"].begin(attempt(**other), 1, FACTS)
    room.parties["east"].begin(attempt(), 1, FACTS)  # nothing was noted of what was refused


def test_a_party_refuses_a_replay_and_forgets_its_session(room: Room, tmp_path: Path) -> None:
    east = room.parties["east"]
    east.begin(attempt(), 1, FACTS)
    with pytest.raises(ProtocolError, match="attempt 5 is a replay"):
        east.begin(attempt(), 1, FACTS)
    with pytest.raises(ProtocolError, match="attempt 5 is not under way here"):
        east.session(attempt().message(), "shares")
    restarted = Party("job", room.credentials["east"], tmp_path / "east" / "sums.json")
    with pytest.raises(ProtocolError, match="attempt 5 is a replay"):
        restarted.begin(attempt(), 1, FACTS)
    with pytest.raises(ProtocolError, match="this site restarted, or it is an old one"):
        restarted.session(attempt().message(), "shares")


def test_keys_are_fresh_in_each_attempt(room: Room) -> None:
    first, second = (room.begin(attempt(number)) for number in (1, 2))
    public = [
        as_bytes(m.arrays[f"keys/{k}"]) for told in (first, second) for m in told.values() for k in ("mask", "seal")
    ]
    assert len(set(public)) == 16
    assert {len(key) for key in public} == {32}


def test_each_phase_is_answered_once_and_in_its_own_attempt(room: Room) -> None:
    room.begin(attempt())
    east = room.parties["east"]
    east.session(attempt().message(), "shares")
    with pytest.raises(ProtocolError, match="'shares' was answered in attempt 5 before"):
        east.session(attempt().message(), "shares")
    for other in (attempt(4), attempt(6), attempt(totals=(8,)), attempt(sites=NAMES[:3]), attempt(purpose="counts")):
        with pytest.raises(ProtocolError, match="is not under way here"):
            east.session(other.message(), "vector")
    east.session(attempt().message(), "vector")


# Meeting


def test_both_ends_of_a_pair_derive_the_same_keys_and_no_others_do(room: Room) -> None:
    sessions = room.met(attempt())
    for kind in ("pairs", "seals"):
        keys = {(a, b): getattr(sessions[a], kind)[b] for a in NAMES for b in NAMES if a != b}
        assert all(keys[a, b] == keys[b, a] for a, b in keys)
        assert len(set(keys.values())) == 6
    assert not set(sessions["east"].pairs.values()) & set(sessions["east"].seals.values())
    assert len({s.cipher for s in sessions.values()}) == 1
    other = room.met(attempt(6))
    assert not set(sessions["east"].pairs.values()) & set(other["east"].pairs.values())


def test_the_pair_s_mask_has_opposite_signs() -> None:
    assert (sign("east", "west"), sign("west", "east")) == (1, -1)


def test_no_secret_is_shown(room: Room) -> None:
    session = room.met(attempt())["east"]
    session.memory["own"] = b"secret"
    assert "secret" not in repr(session)
    assert not any(repr(key)[2:12] in repr(session) for key in session.pairs.values())
    assert "X25519" not in repr(session)


@pytest.mark.parametrize("array", ["keys/mask", "keys/seal", "keys/signature"])
def test_an_altered_key_is_refused_and_blames_its_site(room: Room, array: str) -> None:
    told = room.begin(attempt())
    told["south"] = altered(told["south"], array)
    session = room.sessions(attempt())["east"]
    with pytest.raises(ProtocolError, match="the signature of site 'south' is wrong") as refused:
        room.parties["east"].meet(session, told)
    assert refused.value.blames == "south"


def test_an_altered_choice_of_cipher_is_refused(room: Room) -> None:
    told = room.begin(attempt())
    told["south"] = altered(told["south"], aes=not told["south"].scalars["aes"])
    with pytest.raises(ProtocolError, match="signature of site 'south'"):
        room.parties["east"].meet(room.sessions(attempt())["east"], told)


def test_one_site_without_aes_makes_all_take_chacha20(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyclinic.secure.session.has_aes", lambda: True)
    assert {s.cipher for s in room.met(attempt(5)).values()} == {"aes-256-ctr"}
    told = {n: p.begin(attempt(6), 1, FACTS) for n, p in room.parties.items() if n != "west"}
    monkeypatch.setattr("polyclinic.secure.session.has_aes", lambda: False)
    told["west"] = room.parties["west"].begin(attempt(6), 1, FACTS)
    assert {s.cipher for s in room.met(attempt(6), told).values()} == {"chacha20"}


def test_keys_signed_by_a_key_that_is_not_pinned_are_refused(room: Room, tmp_path: Path) -> None:
    told = room.begin(attempt())
    stranger = Credentials(Identity.new("south"), room.credentials["south"].roster)
    told["south"] = Party("job", stranger, tmp_path / "stranger.json").begin(attempt(), 1, FACTS)
    with pytest.raises(ProtocolError, match="signature of site 'south'") as refused:
        room.parties["east"].meet(room.sessions(attempt())["east"], told)
    assert refused.value.blames == "south"


@pytest.mark.parametrize("fact", ["model", "layout"])
def test_a_peer_with_another_context_is_refused(room: Room, fact: str) -> None:
    told = room.begin(attempt(), south={fact: "other"})
    sessions = room.sessions(attempt())
    with pytest.raises(ProtocolError, match=f"site 'south' works with another {fact} than this site") as refused:
        room.parties["east"].meet(sessions["east"], told)
    assert refused.value.blames == "south"
    with pytest.raises(ProtocolError, match=f"site 'east' works with another {fact}"):
        room.parties["south"].meet(sessions["south"], told)


@pytest.mark.parametrize("what", ["job", "roster"])
def test_a_peer_of_another_job_or_roster_is_refused(room: Room, tmp_path: Path, what: str) -> None:
    told = room.begin(attempt())
    roster = room.credentials["south"].roster
    if what == "roster":
        roster = replace(roster, keys={**roster.keys, "west": Identity.new("west").public})
    own = Credentials(room.credentials["south"].identity, roster)
    job = "other" if what == "job" else "job"
    told["south"] = Party(job, own, tmp_path / "other.json").begin(attempt(), 1, FACTS)
    with pytest.raises(ProtocolError, match=f"site 'south' works with another {what} than this site"):
        room.parties["east"].meet(room.sessions(attempt())["east"], told)


def test_keys_of_an_earlier_attempt_are_refused(room: Room) -> None:
    old, told = room.begin(attempt(5)), room.begin(attempt(6))
    told["south"] = old["south"]
    with pytest.raises(ProtocolError, match="site 'south' works with another number than this site"):
        room.parties["east"].meet(room.sessions(attempt(6))["east"], told)


@pytest.mark.parametrize(
    "context", ["", "null", "[]", "{}", '{"model": "m"}', json.dumps({"x": None}), "[" * 100_000, '"text"']
)
def test_a_context_of_garbage_is_refused(room: Room, context: str) -> None:
    told = room.begin(attempt())
    told["south"] = altered(told["south"], context=context)
    with pytest.raises(ProtocolError, match="south") as refused:
        room.parties["east"].meet(room.sessions(attempt())["east"], told)
    assert refused.value.blames == "south"


def test_a_context_with_more_in_it_is_refused(room: Room) -> None:
    told = room.begin(attempt())
    more = {**json.loads(str(told["south"].scalars["context"])), "more": None}
    told["south"] = altered(told["south"], context=json.dumps(more))
    with pytest.raises(ProtocolError, match="site 'south' works with another context"):
        room.parties["east"].meet(room.sessions(attempt())["east"], told)


@pytest.mark.parametrize("missing", ["keys/mask", "keys/seal", "keys/signature", "context", "aes"])
def test_incomplete_keys_are_refused(room: Room, missing: str) -> None:
    told = room.begin(attempt())
    arrays = {k: a for k, a in told["south"].arrays.items() if k != missing}
    told["south"] = Message(arrays, {k: v for k, v in told["south"].scalars.items() if k != missing})
    with pytest.raises(ProtocolError, match="the keys of site 'south' are incomplete") as refused:
        room.parties["east"].meet(room.sessions(attempt())["east"], told)
    assert refused.value.blames == "south"


def test_a_signed_key_of_small_order_blames_its_site(room: Room) -> None:
    told = room.begin(attempt())
    sessions = room.sessions(attempt())
    zero = bytes(32)
    seal = as_bytes(told["south"].arrays["keys/seal"])
    aes = bytes([bool(told["south"].scalars["aes"])])
    signed = room.parties["south"].sign(sessions["south"], "keys", zero + seal, aes)
    arrays = {**told["south"].arrays, "keys/mask": as_array(zero), "keys/signature": as_array(signed)}
    told["south"] = Message(arrays, told["south"].scalars)
    with pytest.raises(ProtocolError, match="small order") as refused:
        room.parties["east"].meet(sessions["east"], told)
    assert refused.value.blames == "south"


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("east", "north"), "only two sites"),
        (("east",), "only 1 of at least 3 sites"),
        (("north", "south", "west"), "not those of the sites that were asked"),
        ((*NAMES, "zealand"), "not those of the sites that were asked"),
    ],
)
def test_keys_of_too_few_or_others_are_refused(room: Room, names: tuple[str, ...], reason: str) -> None:
    told = room.begin(attempt())
    with pytest.raises(ProtocolError, match=reason):
        room.parties["east"].meet(room.sessions(attempt())["east"], {n: told.get(n, told["west"]) for n in names})


# Letters


def test_a_sealed_letter_reaches_its_receiver_alone(room: Room) -> None:
    sessions, secret = room.met(attempt()), b"a share of the mask"
    sealed = room.parties["east"].seal(sessions["east"], "west", secret)
    assert secret not in sealed
    assert sealed != room.parties["east"].seal(sessions["east"], "west", secret)
    assert room.parties["west"].unseal(sessions["west"], "east", sealed) == secret
    for reader, sender in (("south", "east"), ("west", "south"), ("east", "west")):  # the last: back to its sender
        with pytest.raises(ProtocolError, match=f"site '{sender}' sealed for this site was altered") as refused:
            room.parties[reader].unseal(sessions[reader], sender, sealed)
        assert refused.value.blames == sender


def test_an_altered_letter_is_refused(room: Room) -> None:
    sessions = room.met(attempt())
    sealed = room.parties["east"].seal(sessions["east"], "west", b"share")
    for at in (0, 12, len(sealed) - 1):
        wrong = bytearray(sealed)
        wrong[at] ^= 1
        with pytest.raises(ProtocolError, match="altered on its way"):
            room.parties["west"].unseal(sessions["west"], "east", bytes(wrong))
    for short in (b"", sealed[:27]):
        with pytest.raises(ProtocolError, match="nothing sealed by site 'east'"):
            room.parties["west"].unseal(sessions["west"], "east", short)
    with pytest.raises(ProtocolError, match="nothing sealed by site 'zealand'"):
        room.parties["west"].unseal(sessions["west"], "zealand", sealed)


def test_a_letter_of_another_attempt_is_refused(room: Room) -> None:
    old = room.met(attempt(5))
    sealed = room.parties["east"].seal(old["east"], "west", b"share")
    new = room.met(attempt(6))
    with pytest.raises(ProtocolError, match="altered on its way"):
        room.parties["west"].unseal(new["west"], "east", sealed)


def test_sites_that_were_told_of_different_peers_do_not_read_each_other(room: Room) -> None:
    told = room.begin(attempt())
    sessions = room.sessions(attempt())
    fewer = {n: m for n, m in told.items() if n != "south"}
    room.parties["east"].meet(sessions["east"], told)
    room.parties["west"].meet(sessions["west"], fewer)
    sealed = room.parties["east"].seal(sessions["east"], "west", b"share")
    with pytest.raises(ProtocolError, match="altered on its way"):
        room.parties["west"].unseal(sessions["west"], "east", sealed)


def test_a_secret_of_a_pair_changes_its_keys(room: Room, tmp_path: Path) -> None:
    """With the same X25519 keys, so that nothing else changes them."""
    told = room.begin(attempt())
    sessions = room.sessions(attempt())
    room.parties["east"].meet(sessions["east"], told)
    without = dict(sessions["east"].pairs), dict(sessions["east"].seals)
    for site, peer in (("east", "west"), ("west", "east")):
        room.parties[site].credentials = replace(room.credentials[site], pair_secrets={peer: b"s" * 32})
        confirmed = room.parties[site]._confirms(sessions[site], peer, site)
        told[site] = Message({**told[site].arrays, f"keys/pair/{peer}": as_array(confirmed)}, told[site].scalars)
    for site in ("east", "west"):
        room.parties[site].meet(sessions[site], told)
    for before, after in zip(without, (sessions["east"].pairs, sessions["east"].seals), strict=True):
        assert [n for n in before if before[n] != after[n]] == ["west"]
    assert sessions["west"].pairs["east"] == sessions["east"].pairs["west"]


def test_a_secret_that_one_of_a_pair_lacks_is_refused_by_both(room: Room) -> None:
    room.parties["east"].credentials = replace(room.credentials["east"], pair_secrets={"west": b"s" * 32})
    told = room.begin(attempt())
    sessions = room.sessions(attempt())
    for site, peer in (("east", "west"), ("west", "east")):
        with pytest.raises(ProtocolError, match=f"site '{peer}' has another pair secret") as refused:
            room.parties[site].meet(sessions[site], told)
        assert refused.value.blames == peer
        assert not sessions[site].pairs


# Signatures and small things


def test_a_signature_is_bound_to_its_label_context_and_parts(room: Room) -> None:
    sessions = room.met(attempt())
    signed = room.parties["east"].sign(sessions["east"], "vector", b"ab", b"c")
    room.parties["west"].verify(sessions["west"], "east", signed, "vector", b"ab", b"c")
    other = replace(sessions["west"], context={**sessions["west"].context, "round": "2"})
    for session, who, what, parts in (
        (sessions["west"], "east", "arrived", (b"ab", b"c")),
        (sessions["west"], "east", "vector", (b"a", b"bc")),
        (sessions["west"], "east", "vector", (b"abc",)),
        (sessions["west"], "south", "vector", (b"ab", b"c")),
        (other, "east", "vector", (b"ab", b"c")),
    ):
        with pytest.raises(ProtocolError, match=f"signature of site '{who}'") as refused:
            room.parties["west"].verify(session, who, signed, what, *parts)
        assert refused.value.blames == who


def test_a_statement_holds_the_length_of_each_part() -> None:
    assert statement({"b": "2", "a": "1"}, "w", b"xyz") == (
        bytes(7) + b"\x01w" + bytes(7) + b'\x14{"a": "1", "b": "2"}' + bytes(7) + b"\x03xyz"
    )


def test_replies_of_several_sites_travel_as_one() -> None:
    replies = {
        "east": Message({"keys/a": torch.ones(2), "keys/b": torch.zeros(1)}, {"aes": True}),
        "west": Message({}, {"context": "{}"}),
        "south": Message({"keys/a": torch.zeros(3)}),
    }
    told = forwarded(attempt().message(forward(replies)))
    assert list(told) == ["east", "south", "west"]
    assert told["east"].group("keys")["a"].tolist() == [1, 1]
    assert (dict(told["east"].scalars), dict(told["west"].scalars)) == ({"aes": True}, {"context": "{}"})


def test_bytes_survive_as_arrays() -> None:
    for data in (b"", b"\x00\xff", bytes(range(256))):
        assert as_bytes(Message.from_bytes(Message({"x/y": as_array(data)}).to_bytes()).arrays["x/y"]) == data


def test_digests_are_of_little_endian_bytes() -> None:
    assert digest(np.array([1, -2], dtype="<i2")) == hashlib.sha256(b"\x01\x00\xfe\xff").digest()
    assert digest(np.empty(0, dtype="<i8")) == hashlib.sha256(b"").digest()
    assert digest(np.arange(8, dtype=np.uint8)[::2]) == hashlib.sha256(b"\x00\x02\x04\x06").digest()


def test_two_that_are_left_get_the_reason() -> None:
    assert "each would find the other's update by subtracting its own" in too_few(["a", "b"])
    assert too_few([]).startswith("only 0 of at least 3 sites (no site)")
    assert "only 3 of at least 5 sites (a, b, c)" in too_few(["a", "b", "c"], 5)
