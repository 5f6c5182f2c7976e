"""Attacks of servers that lie, and of sites that help them; each worked against an earlier state of the code."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from parties import MODEL, Consortium, consortium

from polyclinic.errors import PolyclinicError, SiteError
from polyclinic.federation.local import LocalChannel
from polyclinic.federation.message import Message
from polyclinic.secure import masked, ring
from polyclinic.secure.fixed_point import WEIGHT_STEPS, Lanes
from polyclinic.secure.hidden import own_lanes
from polyclinic.secure.session import Attempt, Session, as_array, forward

OTHER = {name: tensor + 1 for name, tensor in MODEL.items()}
RING = {"backend": "ring-he", "provider": "seal", "key_holder": "server"}


def now() -> int:
    """A number for an attempt."""
    time.sleep(0.002)
    return time.time_ns() // 1_000_000


def computed(made: Consortium) -> tuple[int, ...]:
    """Let all sites train in round 1; the sum of their weights."""
    made.channel.begin_round(1)
    for site in made.sites.values():
        site.handle("train", 1, Message.pack({"model": MODEL}))
    return (sum(int(weight * WEIGHT_STEPS) for weight in made.weights.values()),)


@pytest.mark.parametrize(("backend", "phase"), [("masked", "masked-shares"), ("ring-he", "ring-key")])
def test_other_training_in_the_middle_of_an_attempt_ends_it(tmp_path: Path, backend: str, phase: str) -> None:
    """Else all but one site could be had to add what they computed from a model whose update is zero."""
    made = consortium(tmp_path, 4, aggregation=backend)

    class Liar(LocalChannel):
        def stream(self, op: str, messages: Mapping[str, Message]) -> Iterator[tuple[str, Message]]:
            if op == phase:
                for name in "abd":
                    made.sites[name].handle("train", self.round, Message.pack({"model": OTHER}))
            yield from super().stream(op, messages)

    made.channel = Liar(made.sites, tolerant=False)
    with pytest.raises(SiteError, match=f"site 'a' refused '{phase}': .* is not under way here"):
        made.sum()
    assert made.opened == {}


def test_a_site_that_refused_its_peers_keys_encrypts_nothing(tmp_path: Path) -> None:
    """Else it would go on under the masks of those whose keys came before the bad one: the server's friends."""
    made = consortium(tmp_path, 4, aggregation=RING)
    attempt = Attempt("train", "values", 1, now(), tuple("abcd"), computed(made))
    keys = {name: site.handle("ring-keys", 1, attempt.message()) for name, site in made.sites.items()}
    friend = made.sites["a"].party
    session = friend.session(attempt.message(), "unused")
    mask, seal = session.mask_key.public_key().public_bytes_raw(), bytes(32)  # of small order
    signature = friend.sign(session, "keys", mask + seal, bytes([bool(keys["a"].scalars["aes"])]))
    forged = {"mask": as_array(mask), "seal": as_array(seal), "signature": as_array(signature)}
    keys["a"] = Message.pack({"keys": forged}, **keys["a"].scalars)
    assert "refused" in made.sites["d"].handle("ring-key", 1, attempt.message(forward(keys))).scalars
    assert made.sites["d"].party.session(attempt.message(), "unused").pairs == {}
    public = ring.open_provider("seal", "public").new_keys().public
    told = attempt.message(Message({"server/he/public": as_array(public)}))
    assert "refused" in made.sites["d"].handle("ring-prepare", 1, told).scalars
    assert "refused" in made.sites["d"].handle("ring-pass", 1, attempt.message()).scalars


def shares_of(made: Consortium, sites: str, asked: str, totals: tuple[int, ...]) -> tuple[Attempt, dict[str, Message]]:
    """An attempt over ``sites`` up to its opening, at which ``asked`` are asked."""
    attempt = Attempt("train", "values", 1, now(), tuple(sites), totals)

    def call(op: str, messages: Mapping[str, Message]) -> dict[str, Message]:
        return {s: made.sites[s].handle(op, 1, attempt.message(message)) for s, message in messages.items()}

    keys = call("masked-keys", dict.fromkeys(sites, Message()))
    dealt = call("masked-shares", dict.fromkeys(sites, forward(keys)))
    call("masked-vector", masked._letters(dealt))
    signed = call("masked-agree", dict.fromkeys(sites, Message(scalars={"arrived": json.dumps(list(sites))})))
    opened = call("masked-open", dict.fromkeys(asked, forward(signed)))
    return attempt, {site: reply for site, reply in opened.items() if "refused" not in reply.scalars}


@pytest.mark.parametrize(
    ("count", "first", "second", "friends"),
    [(5, ("abcde", "acde"), ("abde", "bdea"), "de"), (10, ("abcdefg", "abcde"), ("abfghij", "fghij"), "")],
)
def test_two_sets_of_sites_are_not_opened_in_one_round(
    tmp_path: Path, count: int, first: tuple[str, str], second: tuple[str, str], friends: str
) -> None:
    """Else their difference would be one site's update. Sites that help forget what they opened."""
    made = consortium(tmp_path, count)
    totals = computed(made)
    server = masked.MaskedSum(made.sites["a"].party.credentials.roster, 2 * count // 3 + 1)

    def rebuilt(sites: str, asked: str) -> bool:
        attempt, opened = shares_of(made, sites, asked, totals)
        try:
            server._left_over(attempt, "aes-256-ctr", list(sites), [], opened)
        except PolyclinicError:
            return False
        return True

    found = [rebuilt(*first)]
    for name in friends:
        made.sites[name].party.journal._opened.clear()
    found.append(rebuilt(*second))
    assert found == [count == 5, False]


def test_weights_that_do_not_add_up_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They travel with the values once more."""

    def more(site: Any, session: Session) -> Lanes:
        lanes = own_lanes(site, session)
        if site.name == "b" and session.attempt.purpose == "values":
            lanes[64][0] += 5 * WEIGHT_STEPS
        return lanes

    made = consortium(tmp_path, 4)
    monkeypatch.setattr(masked, "own_lanes", more)
    with pytest.raises(SiteError, match="add up to another number than when they were summed alone"):
        made.sum()


def test_an_attempt_from_the_future_does_not_lock_a_site_out(tmp_path: Path) -> None:
    made = consortium(tmp_path, 4)
    totals = computed(made)
    far = Attempt("train", "values", 1, now() + 2 * 86_400_000, tuple("abcd"), totals)
    assert "lies in the future" in str(made.sites["a"].handle("masked-keys", 1, far.message()).scalars["refused"])
    total = made.sum()
    for name, tensor in made.mean(list("abcd")).items():
        torch.testing.assert_close(total.mean("update")[name], tensor, rtol=0, atol=1e-6)
