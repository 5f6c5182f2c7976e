"""Cyclic sum under homomorphic encryption: a token goes from hospital to hospital. Both sides of the protocol.

Zhou, Li, et al.: Personalized and privacy-preserving federated heterogeneous medical image analysis with PPPML-HMI.
arXiv 2302.11571: cyclic secure aggregation with homomorphic encryption (CSAHE).

=======  ===================================================================  ======================================
phase    a site answers                                                       the server
=======  ===================================================================  ======================================
keys     fresh X25519 keys, signed with their context                         passes them on
key      the initiator alone: the key pair of this attempt (see below)        passes it on, or makes it itself
prepare  nothing: it masks, packs and encrypts, before the token comes        waits
pass     the token plus its own ciphertext, signed; each checks the one       carries the token from one to the next
         before it
open     the initiator alone: the decrypted sum                               updates the model
=======  ===================================================================  ======================================

Of the paper and its code: the ring, its rotating initiator, the token, decryption, the server that updates and
broadcasts. Reconstruction: who holds the decryption key, which the paper's text does not settle; so it is a setting,
``aggregation.key_holder``. ``sites``: all sites, none else; the initiator makes the key and seals it for each (one
context for all, as in the code). ``initiator``: that site alone. ``server``: the server alone, which then also opens.

Ours: the Gaussian mask of the initiator, which leaves a site's two neighbours in the ring able to subtract what they
saw, is replaced by masks of all pairs that sum to zero over all sites, uniform modulo the plaintext modulus. What the
token decrypts to is then uniform until the last site has added its part, for whoever holds the key. CKKS is replaced
by BFV, which is exact. ``ring_as_published.py`` has the original of both.

A site that fails breaks the ring; the sum starts afresh without it, with fresh keys and masks. The initiator keeps its
place then, and refuses to open two sums of one round over different sites. That stops a server which works alone and
tells the truth about who is there. It does not stop one that calls an initiator dead right after it opened, nor one
with a holder of the key on its side: they could open a whole token, begin again without one site, and subtract.
``masked`` has no such gap. With ``key_holder: server`` nobody but the server itself keeps it from doing so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from polyclinic.errors import MessageError, ProtocolError
from polyclinic.federation.message import Message
from polyclinic.federation.site import Leaf, Op
from polyclinic.secure.bfv import Bfv, Blob, Keys, ProviderName, open_provider
from polyclinic.secure.fixed_point import FULL, Lanes, Layout
from polyclinic.secure.hidden import AttemptFailed, Contribution, Opened, ask, enter, layout_of, own_lanes
from polyclinic.secure.keystream import add_streams
from polyclinic.secure.session import (
    KEYS,
    REFUSAL,
    Attempt,
    Session,
    answering,
    as_array,
    as_bytes,
    digest,
    forward,
    forwarded,
    statement,
)
from polyclinic.secure.view import SERVER

if TYPE_CHECKING:
    from torch import Tensor

    from polyclinic.federation.channel import Channel
    from polyclinic.federation.site import Site
    from polyclinic.secure.identity import Roster

SPARE = 4
"""Bits that a limb leaves free in its field: sums of 16 limbs fit."""


class Scheme(Protocol):
    """What turns a site's integers into something that can be added under encryption."""

    facts: dict[str, str]
    """What all sites must have alike."""
    holder: str
    """Who has the secret key: ``sites``, ``initiator`` or ``server``."""

    def new_keys(self) -> Keys:
        """A pair for one attempt."""

    def encrypt(self, site: Site, session: Session, key: bytes, maker: str) -> Blob:
        """This site's part of the token, with the key that ``maker`` made, who is to blame if it is of no use."""

    def add(self, session: Session, own: Blob, token: Blob, hop: int) -> Blob:
        """The token of ``hop`` parts with this site's own, which may be written to."""

    def decrypt(self, session: Session | None, layout: Layout, token: Blob, secret: bytes) -> Lanes:
        """The summed integers; ``session`` is that of the site that opens, None where the server does."""


class RingSum:
    """The server's side.

    Args:
        roster: Public keys of all sites of the job.
        scheme: The arithmetic under encryption.
    """

    def __init__(self, roster: Roster, scheme: Scheme) -> None:
        self._roster, self._scheme = roster, scheme

    def ops(self) -> dict[str, Op]:
        """The sites' side."""
        scheme = self._scheme
        key = (Leaf("letters", "array", "nothing"), Leaf("he", "array", "nothing"), *REFUSAL)
        token = (Leaf("token", "array", "images"), Leaf("signed", "array", "nothing"), *REFUSAL)
        summed = (Leaf("lanes", "array", "images"), Leaf("signed", "array", "nothing"), *REFUSAL)
        phases = {
            "ring-keys": (partial(begin, scheme), KEYS),
            "ring-key": (partial(make_key, scheme), key),
            "ring-prepare": (partial(prepare, scheme), REFUSAL),
            "ring-pass": (partial(pass_on, scheme), token),
            "ring-open": (partial(open_sum, scheme), summed),
        }
        return {name: Op(answering(run), leaves) for name, (run, leaves) in phases.items()}

    def add(self, channel: Channel, attempt: Attempt, layout: Layout) -> Opened:
        """One attempt at a sum.

        Raises:
            AttemptFailed: A site refused or failed: the ring is broken.
        """
        sites = attempt.sites
        everyone = len(sites)
        keys = ask(channel, attempt, "ring-keys", dict.fromkeys(sites, Message()), everyone)
        announced = forward(keys)
        order = ring_order(attempt, self._roster.keys)
        first = order[0]
        own: Keys | None = None
        if self._scheme.holder == "server":
            own = self._scheme.new_keys()
            made, maker = Message({"he/public": as_array(own.public)}), SERVER
        else:
            made, maker = ask(channel, attempt, "ring-key", {first: announced}, 1)[first], first
        calls = {
            site: Message({**announced.arrays, **_key_for(site, maker, made)}, announced.scalars) for site in sites
        }
        ask(channel, attempt, "ring-prepare", calls, everyone)
        token = Message()
        for site in order:
            token = ask(channel, attempt, "ring-pass", {site: token}, 1)[site]
        if own is not None:
            try:
                blob = _checked_token(self._roster, context, order[-1], everyone, token)
                return Opened(sites, everyone, self._scheme.decrypt(None, layout, blob, own.secret))
            except ProtocolError as error:
                raise AttemptFailed(f"the server refused the token: {error}", {"server": order[-1]}) from error
        said = self._hand(channel, attempt, "ring-open", first, order, context, token)
        try:
            total = Contribution.unpack(said, layout)
            signature = as_bytes(said.arrays["signed/sum"])
            self._roster.verify(first, statement(context, "sum", *total.digests()), signature)
        except (ProtocolError, MessageError, KeyError) as error:
            raise AttemptFailed(f"the server refused the sum of site {first!r}: {error}", {"server": first}) from error
        return Opened(sites, everyone, total.signed())


def ring_order(attempt: Attempt, roster: Iterable[str]) -> list[str]:
    """The order of a round: the roster's sites by name, begun at the round's place, without those who take no part.

    Whoever is lost in an attempt leaves the others in their places.
    """
    names = sorted(roster)
    start = attempt.round % len(names)
    return [name for name in names[start:] + names[:start] if name in attempt.sites]


def begin(scheme: Scheme, site: Site, message: Message) -> Message:
    """Phase keys."""
    return enter(site, message, **scheme.facts)


def make_key(scheme: Scheme, site: Site, message: Message) -> Message:
    """Phase key, at the initiator: a fresh pair; the secret sealed for every peer, or the public key signed for all."""
    party = site.party
    session = party.session(message, "key")
    order = _order(site, session)
    if scheme.holder == "server" or order[0] != site.name:
        raise ProtocolError(f"site {site.name!r} is not the one to make this round's key.")
    _meet(site, session, forwarded(message))
    keys = scheme.new_keys()
    session.memory["secret"] = keys.secret
    if scheme.holder == "sites":
        session.memory["key"] = keys.secret
        return Message.pack(
            {"letters": {p: as_array(party.seal(session, p, keys.secret)) for p in sorted(session.seals)}}
        )
    session.memory["key"] = keys.public
    signature = party.sign(session, "public key", keys.public)
    return Message({"he/public": as_array(keys.public), "he/signature": as_array(signature)})


def prepare(scheme: Scheme, site: Site, message: Message) -> Message:
    """Phase prepare: read the key of this attempt, then mask, pack and encrypt this site's integers."""
    party = site.party
    session = party.session(message, "prepare")
    told = forwarded(message)
    made = told.pop(SERVER, None)
    if not session.pairs:
        _meet(site, session, told)
    first = _order(site, session)[0]
    try:
        if scheme.holder == "server":
            session.memory["key"] = as_bytes((made or Message()).arrays["he/public"])
        elif first != site.name and scheme.holder == "sites":
            session.memory["key"] = party.unseal(session, first, as_bytes(told[first].arrays[f"letters/{site.name}"]))
        elif first != site.name:
            public = as_bytes(told[first].arrays["he/public"])
            party.verify(session, first, as_bytes(told[first].arrays["he/signature"]), "public key", public)
            session.memory["key"] = public
        key = session.memory["key"]
    except KeyError as error:
        raise ProtocolError(f"the call to prepare lacks the key of this attempt ({error}).", first) from None
    session.memory["part"] = scheme.encrypt(site, session, key, first=first == site.name)
    return Message()


def pass_on(scheme: Scheme, site: Site, message: Message) -> Message:
    """Phase pass: check who passed the token, add this site's part."""
    party = site.party
    session = party.session(message, "pass")
    order = _order(site, session)
    hop = order.index(site.name)
    token = session.memory.pop("part", None)
    if token is None:
        raise ProtocolError(f"site {site.name!r} has prepared nothing to add to the token.")
    if hop:
        before = _checked_token(party.credentials.roster, session.context, order[hop - 1], hop, message)
        token = scheme.add(session, token, before, hop)
    signature = party.sign(session, "token", bytes([hop + 1]), digest(token))
    return Message({"token/blob": torch.from_numpy(token), "signed/token": as_array(signature)})


def open_sum(scheme: Scheme, site: Site, message: Message) -> Message:
    """Phase open, at the initiator: decrypt the token that all have added to."""
    party = site.party
    session = party.session(message, "open")
    order = _order(site, session)
    if order[0] != site.name or "secret" not in session.memory:
        raise ProtocolError(f"site {site.name!r} is not the one to open this sum.")
    token = _checked_token(party.credentials.roster, session.context, order[-1], len(order), message)
    party.journal.open(session.attempt, session.attempt.sites)
    lanes = scheme.decrypt(session, layout_of(site, session.attempt), token, session.memory.pop("secret"))
    total = Contribution.of(lanes)
    return Message({**total.arrays(), "signed/sum": as_array(party.sign(session, "sum", *total.digests()))})


def _order(site: Site, session: Session) -> list[str]:
    return ring_order(session.attempt, site.party.credentials.roster.keys)


def _meet(site: Site, session: Session, announced: Mapping[str, Message]) -> None:
    site.party.meet(session, announced)
    missing = sorted(set(session.attempt.sites) - set(announced))
    if missing:
        raise ProtocolError(f"the keys of site {missing[0]!r} are missing, and masks cancel only over all sites.")


def _key_for(site: str, maker: str, made: Message) -> dict[str, Tensor]:
    """The part of a new key pair that is for one site."""
    return {f"{maker}/{k}": a for k, a in made.arrays.items() if k in (f"letters/{site}", "he/public", "he/signature")}


def _checked_token(
    roster: Roster, context: Mapping[str, str], sender: str, parts: int, message: Message
) -> NDArray[np.uint8]:
    """The token, if ``sender`` signed it as one of so many parts."""
    try:
        blob: NDArray[np.uint8] = message.arrays["token/blob"].numpy()
        signature = as_bytes(message.arrays["signed/token"])
    except KeyError:
        raise ProtocolError("the call holds no token.", sender) from None
    roster.verify(sender, statement(context, "token", bytes([parts]), digest(blob)), signature)
    return blob


class BfvScheme:
    """Integers in pairs modulo a power of two, masked by all pairs of sites, under BFV.

    Args:
        provider: ``auto``, ``seal`` or ``tenseal``.
        holder: ``sites``: encryption with the secret key, which all have; else with the public key.
        width: Bits of one field; two fill one integer.

    Raises:
        StudyError: The library is not installed.
    """

    def __init__(self, provider: ProviderName | Literal["auto"], holder: str, width: int) -> None:
        self.bfv: Bfv = open_provider(provider, "secret" if holder == "sites" else "public")
        if 2 * width > self.bfv.bits:
            raise ValueError(f"two fields of {width} bits do not fit {self.bfv.bits} bits.")
        self.holder, self.width = holder, width
        self.facts = {"provider": self.bfv.name, "key_holder": holder, "width": str(width)}

    def new_keys(self) -> Keys:
        """A pair for one attempt."""
        return self.bfv.new_keys()

    def encrypt(self, site: Site, session: Session, key: bytes, *, first: bool) -> Blob:
        """Pack, add the masks that all pairs share, encrypt."""
        vector = pack(own_lanes(site, session), self.width)
        add_streams(vector, [site.party.pair_stream(session, peer) for peer in sorted(session.pairs)])
        vector &= np.uint64((1 << 2 * self.width) - 1)
        return self.bfv.encrypt(vector, key)

    def add(self, session: Session, own: Blob, token: Blob, hop: int) -> Blob:
        """Add coefficient by coefficient."""
        if len(token) != len(own) or self.bfv.terms(token) != hop:
            raise ProtocolError(f"the token is not a sum of {hop} parts of the right length.")
        self.bfv.add_into(own, token)
        return own

    def decrypt(self, session: Session | None, layout: Layout, token: Blob, secret: bytes) -> Lanes:
        """Decrypt and unpack; masks have cancelled."""
        vector = self.bfv.decrypt(token, secret)
        return unpack(vector & np.uint64((1 << 2 * self.width) - 1), layout, self.width)


def pack(lanes: Lanes, width: int) -> NDArray[np.uint64]:
    """Integers of all widths as pairs of fields, modulo ``2**(2 * width)``.

    Narrow lanes fill a field each, as signed numbers. Wider ones are cut into limbs that leave ``SPARE`` bits of their
    field, so that 16 of them can be added; what a limb carries goes to the next one only when the sum is unpacked.
    """
    parts = []
    for bits in sorted(lanes, reverse=True):
        values = lanes[bits]
        if bits < FULL:
            parts.append(_pairs(values, width))
            continue
        unsigned = values.view(f"u{values.itemsize}").astype(np.uint64)
        size = width - SPARE
        low = np.uint64((1 << size) - 1)
        parts += [_pairs((unsigned >> np.uint64(at)) & low, width) for at in range(0, bits, size)]
    return np.concatenate(parts)


def unpack(vector: NDArray[np.uint64], layout: Layout, width: int) -> Lanes:
    """Lanes of a sum of at most 16 packed vectors, signed; the inverse of ``pack``."""
    lanes: Lanes = {}
    at = 0
    for bits in layout.widths:
        count = layout.count(bits)
        half = (count + 1) // 2
        if bits < FULL:
            fields = _fields(vector[at : at + half], count, width, signed=True)
            lanes[bits] = fields.astype(np.int16 if bits <= 16 else np.int32)
            at += half
            continue
        total = np.zeros(count, dtype=np.uint64)
        for shift in range(0, bits, width - SPARE):
            limbs = _fields(vector[at : at + half], count, width, signed=False).view(np.uint64)
            total += limbs << np.uint64(shift)
            at += half
        lanes[bits] = total.astype(f"u{bits // 8}").view(f"i{bits // 8}")
    return lanes


def _pairs(values: NDArray[Any], width: int) -> NDArray[np.uint64]:
    """Two numbers in one, low field first, modulo ``2**(2 * width)``."""
    pairs = np.zeros((len(values) + 1) // 2, dtype=np.int64)
    pairs[: len(values) // 2] = values[1::2]
    pairs <<= width
    pairs += values[0::2].astype(np.int64)
    pairs &= (1 << 2 * width) - 1
    return pairs.view(np.uint64)


def _fields(pairs: NDArray[np.uint64], count: int, width: int, *, signed: bool) -> NDArray[np.int64]:
    """The two numbers again; a signed low field takes its borrow back from the high one."""
    whole = pairs.view(np.int64)
    low = whole & ((1 << width) - 1)
    if signed:
        low = _signed(low, width)
    high = ((whole - low) >> width) & ((1 << width) - 1)
    fields = np.empty(2 * len(pairs), dtype=np.int64)
    fields[0::2] = low
    fields[1::2] = _signed(high, width) if signed else high
    return fields[:count]


def _signed(values: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    half = 1 << (width - 1)
    return (values ^ half) - half
