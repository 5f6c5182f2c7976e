"""Masked sum: every site adds masks that cancel in the sum, and nobody holds a key. Both sides of the protocol.

Bonawitz, Ivanov, Kreuter, Marcedone, McMahan, Patel, Ramage, Segal, Seth: Practical secure aggregation for
privacy-preserving machine learning. CCS 2017, the variant against active servers (signed keys, consistency check).

======  ================================================================  ===========================================
phase   a site answers                                                    the server
======  ================================================================  ===========================================
keys    fresh X25519 keys, signed with their context                      passes them on
shares  Shamir shares of its secrets, sealed for each peer                passes them on
vector  integers + own mask + sum of masks shared with each peer          adds them up
agree   its signature under the list of those whose vector arrived        collects at least t signatures
open    one kind of share of each peer: of its own mask if its vector     rebuilds the masks that did not cancel and
        arrived, of its shared masks if it did not                        subtracts them
======  ================================================================  ===========================================

A site lost before ``vector`` leaves masks behind that its peers have added: its shares rebuild them. One that is only
late cannot be unmasked with them, for then its own mask is never opened. Threshold t = floor(2n/3) + 1 of the n sites
that a round should have (``Party.least_of``), so that two openings of a round share an honest site.

Ours: what is shared for the case of a loss are the pairwise mask keys themselves, not the X25519 key behind them (a
secret that two sites shared beforehand may be part of them, and the server must not need it); the complete graph; and
``session`` for what is bound into keys and signatures.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from polyclinic.errors import MessageError, ProtocolError
from polyclinic.federation.message import Message
from polyclinic.federation.site import Leaf, Op
from polyclinic.secure.hidden import AttemptFailed, Contribution, Opened, ask, enter, own_lanes, refusal
from polyclinic.secure.keystream import Cipher, Keystream
from polyclinic.secure.session import (
    KEYS,
    REFUSAL,
    Attempt,
    answering,
    as_array,
    as_bytes,
    forward,
    forwarded,
    sign,
    statement,
    too_few,
)
from polyclinic.secure.shamir import recover, split

if TYPE_CHECKING:
    from torch import Tensor

    from polyclinic.federation.channel import Channel
    from polyclinic.federation.site import Site
    from polyclinic.secure.fixed_point import Layout
    from polyclinic.secure.identity import Roster

KEY = 32
"""Bytes of every secret here."""
SHARE = 66
"""Bytes of a share of one."""


class MaskedSum:
    """The server's side.

    Args:
        roster: Public keys, to check who sent what.
        least: Sites refuse a sum over fewer.
    """

    def __init__(self, roster: Roster, least: int) -> None:
        self._roster, self._least = roster, least

    def ops(self) -> dict[str, Op]:
        """The sites' side."""
        phases = {
            "masked-keys": (enter, KEYS),
            "masked-shares": (deal, (Leaf("shares", "array", "nothing"), *REFUSAL)),
            "masked-vector": (mask, (Leaf("lanes", "array", "images"), Leaf("signed", "array", "nothing"), *REFUSAL)),
            "masked-agree": (agree_on, (Leaf("signed", "array", "nothing"), *REFUSAL)),
            "masked-open": (
                open_masks,
                (Leaf("own", "array", "nothing"), Leaf("shared", "array", "nothing"), *REFUSAL),
            ),
        }
        return {name: Op(answering(run), leaves) for name, (run, leaves) in phases.items()}

    def add(self, channel: Channel, attempt: Attempt, layout: Layout) -> Opened:
        """One attempt at a sum.

        Raises:
            AttemptFailed: A site refused, or too few are left to open.
        """
        least = max(self._least, attempt.threshold)
        keys = ask(channel, attempt, "masked-keys", dict.fromkeys(attempt.sites, Message()), least)
        announced = forward(keys)
        dealt = ask(channel, attempt, "masked-shares", dict.fromkeys(keys, announced), least)
        letters = _letters(dealt)
        total, arrived = self._collect(channel, attempt, layout, keys, letters)
        if len(arrived) < least:
            raise AttemptFailed(too_few(arrived, least))
        agreed = ask(
            channel,
            attempt,
            "masked-agree",
            dict.fromkeys(arrived, Message(scalars={"arrived": json.dumps(arrived)})),
            least,
        )
        lost = sorted(set(dealt) - set(arrived))
        proof = forward(agreed)
        opened = ask(channel, attempt, "masked-open", dict.fromkeys(agreed, proof), least, refusals=True)
        aes = all(bool(reply.scalars["aes"]) for reply in keys.values())
        total.add_streams(self._left_over(attempt, "aes-256-ctr" if aes else "chacha20", arrived, lost, opened))
        return Opened(tuple(arrived), len(attempt.sites), total.signed())

    def _collect(
        self,
        channel: Channel,
        attempt: Attempt,
        layout: Layout,
        keys: Mapping[str, Message],
        letters: Mapping[str, Message],
    ) -> tuple[Contribution, list[str]]:
        """Add up vectors as they arrive, after checking who signed them."""
        total = Contribution({})
        arrived = []
        refused: dict[str, Message] = {}
        calls = {site: attempt.message(letter) for site, letter in letters.items()}
        for site, reply in channel.stream("masked-vector", calls):
            if refused or "refused" in reply.scalars:
                # Nothing is added any more, but the others' refusals tell whose doing it is.
                refused |= {site: reply} if "refused" in reply.scalars else {}
                continue
            try:
                vector = Contribution.unpack(reply, layout)
                context = json.loads(str(keys[site].scalars["context"]))
                said = statement(context, "vector", *vector.digests())
                self._roster.verify(site, said, as_bytes(reply.arrays["signed/vector"]))
            except (ProtocolError, MessageError, KeyError, ValueError) as error:
                reason = f"the server refused the masked vector of site {site!r}: {error}"
                raise AttemptFailed(reason, {"server": site}) from error
            total.add(vector)
            arrived.append(site)
        if refused:
            raise refusal("masked-vector", refused)
        return total, sorted(arrived)

    def _left_over(
        self,
        attempt: Attempt,
        cipher: Cipher,
        arrived: Sequence[str],
        lost: Sequence[str],
        opened: Mapping[str, Message],
    ) -> list[tuple[Keystream, int]]:
        """Masks still in the sum, with the sign that removes them: each arrived site's own, and those with the lost."""

        def rebuilt(name: str) -> Keystream:
            points = {attempt.sites.index(s) + 1: as_bytes(reply.arrays[name]) for s, reply in opened.items()}
            return Keystream(recover(points, KEY), cipher)

        try:
            own = [(rebuilt(f"own/{site}"), -1) for site in arrived]
            shared = [(rebuilt(f"shared/{gone}/{site}"), -sign(site, gone)) for gone in lost for site in arrived]
        except (ProtocolError, KeyError) as error:
            raise AttemptFailed(f"the shares that sites opened are of no use: {error}") from error
        return own + shared


def _letters(dealt: Mapping[str, Message]) -> dict[str, Message]:
    """What each site is sent of the others' shares."""
    for by, reply in dealt.items():
        if not {f"shares/{to}" for to in dealt if to != by} <= set(reply.arrays):
            raise AttemptFailed(f"the shares of site {by!r} are incomplete.", {"server": by})
    return {
        to: Message({f"shares/{by}": reply.arrays[f"shares/{to}"] for by, reply in dealt.items() if by != to})
        for to in dealt
    }


def deal(site: Site, message: Message) -> Message:
    """Phase shares: check all keys, choose an own mask, and give each peer a share of every secret, sealed."""
    party = site.party
    session = party.session(message, "shares")
    party.meet(session, forwarded(message))
    attempt = session.attempt
    session.memory["own"] = own = os.urandom(KEY)
    secrets = [own, *(session.pairs[peer] for peer in sorted(session.pairs))]
    # Not the attempt's own threshold: a later attempt over fewer sites would need fewer, and two openings of a round
    # could do without an honest site in common.
    shares = [split(secret, party.least_of(attempt), len(attempt.sites)) for secret in secrets]
    letters = {
        peer: b"".join(of_secret[attempt.sites.index(peer)] for of_secret in shares)
        for peer in [site.name, *session.pairs]
    }
    session.memory["letters"] = {site.name: letters.pop(site.name)}
    sealed = {peer: as_array(party.seal(session, peer, letter)) for peer, letter in letters.items()}
    return Message.pack({"shares": sealed})


def mask(site: Site, message: Message) -> Message:
    """Phase vector: read the peers' letters, then send this site's integers under all masks."""
    party = site.party
    session = party.session(message, "vector")
    sealed = {peer: as_bytes(a) for peer, a in message.group("shares").items()}
    if not set(sealed) <= set(session.pairs):
        raise ProtocolError("shares came from a site that announced no keys.")
    if len(sealed) + 1 < party.least_of(session.attempt):
        raise ProtocolError(too_few(sorted([site.name, *sealed]), party.least_of(session.attempt)))
    letters = {peer: party.unseal(session, peer, letter) for peer, letter in sealed.items()}
    for peer, letter in letters.items():
        if len(letter) != SHARE * (len(session.pairs) + 1):
            raise ProtocolError(f"site {peer!r} sealed {len(letter)} bytes of shares, too few or too many.", peer)
    session.memory["letters"] |= letters
    vector = Contribution.of(own_lanes(site, session))
    streams = [(Keystream(session.memory["own"], session.cipher), 1)]
    streams += [party.pair_stream(session, peer) for peer in sorted(sealed)]
    vector.add_streams(streams)
    signature = party.sign(session, "vector", *vector.digests())
    session.memory["sent"] = True
    return Message({**vector.arrays(), "signed/vector": as_array(signature)})


def agree_on(site: Site, message: Message) -> Message:
    """Phase agree: sign the list of those whose vector arrived; one list an attempt."""
    session = site.party.session(message, "agree")
    arrived = _names(message, "arrived")
    dealt = session.memory.get("letters", {})
    if "sent" not in session.memory or site.name not in arrived or not set(arrived) <= set(dealt):
        raise ProtocolError("the list of those whose vector arrived holds others than those that were asked.")
    if arrived != sorted(set(arrived)):
        raise ProtocolError("the list of those whose vector arrived is not sorted or names one twice.")
    if len(arrived) < site.party.least_of(session.attempt):
        raise ProtocolError(too_few(arrived, site.party.least_of(session.attempt)))
    session.memory["arrived"] = arrived
    signature = site.party.sign(session, "arrived", json.dumps(arrived).encode())
    return Message({"signed/arrived": as_array(signature)})


def open_masks(site: Site, message: Message) -> Message:
    """Phase open: once t sites have signed one list, tell the shares that remove what is left in that sum."""
    party = site.party
    session = party.session(message, "open")
    attempt = session.attempt
    arrived = session.memory.get("arrived")
    if arrived is None:
        raise ProtocolError("this site has signed no list of those whose vector arrived.")
    told = {peer: reply.group("signed") for peer, reply in forwarded(message).items()}
    signed = {peer: as_bytes(arrays["arrived"]) for peer, arrays in told.items() if "arrived" in arrays}
    for peer, signature in signed.items():
        party.verify(session, peer, signature, "arrived", json.dumps(arrived).encode())
    if len(set(signed) & set(arrived)) < party.least_of(attempt):
        raise ProtocolError(
            f"{len(signed)} sites signed the list of those whose vector arrived, and {party.least_of(attempt)} must: "
            "another list may be in use."
        )
    party.journal.open(attempt, arrived)
    own: dict[str, Tensor] = {}
    shared: dict[str, Tensor] = {}
    for peer, letter in session.memory.pop("letters").items():
        first, *others = [letter[i : i + SHARE] for i in range(0, len(letter), SHARE)]
        if peer in arrived:
            own[peer] = as_array(first)
        else:
            partners = sorted({site.name, *session.pairs} - {peer})
            of = dict(zip(partners, others, strict=True))
            shared |= {f"{peer}/{partner}": as_array(of[partner]) for partner in arrived}
    return Message.pack({"own": own, "shared": shared})


def _names(message: Message, key: str) -> list[str]:
    try:
        names = json.loads(str(message.scalars[key]))
        return [str(name) for name in names]
    except (KeyError, ValueError, TypeError, RecursionError):
        raise ProtocolError(f"the call holds no list {key!r}.") from None
