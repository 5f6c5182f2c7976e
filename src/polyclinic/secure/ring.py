"""Cyclic sum under homomorphic encryption: a token goes from hospital to hospital. Both sides of the protocol.

Zhou, Li, et al.: Personalized and privacy-preserving federated heterogeneous medical image analysis with PPPML-HMI.
arXiv 2302.11571: cyclic secure aggregation with homomorphic encryption (CSAHE).

=======  ===================================================================  ======================================
phase    a site answers                                                       the server
=======  ===================================================================  ======================================
keys     fresh X25519 keys, signed with their context                         passes them on
key      nothing, once it has checked all keys; the initiator: the key pair   passes it on, or makes it itself
         of this attempt (see below)
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
place then, and refuses to open two sums of one round over different sites, so a server on its own cannot call a site
dead and subtract; unless it is the initiator that it calls dead, right after that opened. A server with a holder of the
key on its side needs no initiator to open a whole token, so it can do the same for any site. ``masked`` has no such
gap. With ``key_holder: server`` the server opens by itself, and nobody else keeps it from doing so twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from polyclinic.errors import MessageError, ProtocolError
from polyclinic.federation.message import Message
from polyclinic.federation.site import Leaf, Op
from polyclinic.secure.bfv import Bfv, Blob, Keys, ProviderName, open_provider
from polyclinic.secure.fixed_point import FULL, Lanes, Layout, word
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
    blaming,
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
_CHUNK = 1 << 15  # pairs: all that is made of them stays in the cache


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
        keys = ask(channel, attempt, "ring-keys", dict.fromkeys(sites, Message()), len(sites))
        order = ring_order(attempt, self._roster.keys)
        first, last = order[0], order[-1]
        context = _context(first, keys[first])
        own = self._prepare(channel, attempt, first, forward(keys))
        hand = partial(self._hand, channel, attempt, context)
        token = Passed("", 0, Message())
        for parts, site in enumerate(order, 1):
            token = Passed(site, parts, hand("ring-pass", site, token))
        if own is not None:
            try:
                blob = token.blob(self._roster, context)
                return Opened(sites, len(sites), self._scheme.decrypt(None, layout, blob, own.secret))
            except ProtocolError as error:
                raise AttemptFailed(f"the server refused the token: {error}", {"server": last}) from error
        said = hand("ring-open", first, token)
        try:
            total = Contribution.unpack(said, layout)
            signature = as_bytes(said.arrays["signed/sum"])
            self._roster.verify(first, statement(context, "sum", *total.digests()), signature)
        except (ProtocolError, MessageError, KeyError) as error:
            raise AttemptFailed(f"the server refused the sum of site {first!r}: {error}", {"server": first}) from error
        return Opened(sites, len(sites), total.signed())

    def _prepare(self, channel: Channel, attempt: Attempt, first: str, announced: Message) -> Keys | None:
        """Have a key made and all parts encrypted; returns the server's own key, where it holds one."""
        sites = attempt.sites
        # All check all keys, so that most of them blame whoever is not of one mind with them.
        replies = ask(channel, attempt, "ring-key", dict.fromkeys(sites, announced), len(sites))
        own: Keys | None = None
        made, maker = replies[first], first
        if self._scheme.holder == "server":
            own = self._scheme.new_keys()
            made, maker = Message({"he/public": as_array(own.public)}), SERVER
        calls = {site: Message(_key_for(site, maker, made)) for site in sites}
        ask(channel, attempt, "ring-prepare", calls, len(calls))
        return own

    def _hand(
        self, channel: Channel, attempt: Attempt, context: Mapping[str, str], op: str, site: str, token: Passed
    ) -> Message:
        """Hand the token to a site. Where it refuses, the server looks for itself whether it is the sender's doing."""
        try:
            return ask(channel, attempt, op, {site: token.message}, 1)[site]
        except AttemptFailed as failure:
            if token.parts and failure.refused:
                try:
                    token.blob(self._roster, context)
                except ProtocolError as error:
                    raise AttemptFailed(str(failure), {**failure.refused, "server": token.sender}) from error
            raise


@dataclass(frozen=True)
class Passed:
    """A token on its way, and who is to have signed it as the sum of so many parts."""

    sender: str
    parts: int
    message: Message

    def blob(self, roster: Roster, context: Mapping[str, str]) -> Blob:
        """The ciphertexts.

        Raises:
            ProtocolError: ``sender`` has not signed them as such in this context; blames it.
        """
        blob, signature = self.message.arrays.get("token/blob"), self.message.arrays.get("signed/token")
        if blob is None or signature is None or blob.dtype != torch.uint8:
            raise ProtocolError(f"site {self.sender!r} was to send a token, and the call holds none.", self.sender)
        found: Blob = blob.numpy()
        with blaming(self.sender):
            signed = statement(context, "token", bytes([self.parts]), digest(found))
            roster.verify(self.sender, signed, as_bytes(signature))
        return found


def ring_order(attempt: Attempt, roster: Iterable[str]) -> list[str]:
    """The order of a round: the roster's sites by name, begun at the round's place, without those who take no part.

    Whoever is lost in an attempt leaves the others in their places.
    """
    names = sorted(roster)
    start = attempt.round % len(names)
    return [name for name in names[start:] + names[:start] if name in attempt.sites]


def begin(scheme: Scheme, site: Site, message: Message) -> Message:
    """Phase keys. The order of the ring follows from the roster, so all must have the same names on theirs."""
    return enter(site, message, **scheme.facts, ring=json.dumps(sorted(site.party.credentials.roster.keys)))


def make_key(scheme: Scheme, site: Site, message: Message) -> Message:
    """Phase key: check all keys. The initiator makes a pair and seals the secret for each, or signs the public key."""
    party = site.party
    session = party.session(message, "key")
    announced = forwarded(message)
    missing = sorted(set(session.attempt.sites) - set(announced))
    if missing:
        raise ProtocolError(f"the keys of site {missing[0]!r} are missing, and masks cancel only over all sites.")
    party.meet(session, announced)
    if scheme.holder == "server" or _order(site, session)[0] != site.name:
        return Message()
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
    session = site.party.session(message, "prepare")
    if not session.pairs:
        raise ProtocolError(f"site {site.name!r} has not checked the keys of the others yet.")
    maker = SERVER if scheme.holder == "server" else _order(site, session)[0]
    if maker != site.name:
        made = forwarded(message).get(maker, Message())
        session.memory["key"] = _read_key(scheme, site, session, maker, made)
    session.memory["part"] = scheme.encrypt(site, session, session.memory["key"], maker)
    return Message()


def pass_on(scheme: Scheme, site: Site, message: Message) -> Message:
    """Phase pass: check who passed the token, add this site's part."""
    party = site.party
    session = party.session(message, "pass")
    order = _order(site, session)
    hop = order.index(site.name)
    part = session.memory.pop("part", None)
    if part is None:
        raise ProtocolError(f"site {site.name!r} has prepared nothing to add to the token.")
    if hop:
        before = order[hop - 1]
        token = Passed(before, hop, message).blob(party.credentials.roster, session.context)
        with blaming(before):
            part = scheme.add(session, part, token, hop)
    signature = party.sign(session, "token", bytes([hop + 1]), digest(part))
    return Message({"token/blob": torch.from_numpy(part), "signed/token": as_array(signature)})


def open_sum(scheme: Scheme, site: Site, message: Message) -> Message:
    """Phase open, at the initiator: decrypt the token that all have added to."""
    party = site.party
    session = party.session(message, "open")
    order = _order(site, session)
    if order[0] != site.name or "secret" not in session.memory:
        raise ProtocolError(f"site {site.name!r} is not the one to open this sum.")
    token = Passed(order[-1], len(order), message).blob(party.credentials.roster, session.context)
    party.journal.open(session.attempt, session.attempt.sites)
    with blaming(order[-1]):
        lanes = scheme.decrypt(session, layout_of(site, session.attempt), token, session.memory.pop("secret"))
    total = Contribution.of(lanes)
    return Message({**total.arrays(), "signed/sum": as_array(party.sign(session, "sum", *total.digests()))})


def _order(site: Site, session: Session) -> list[str]:
    return ring_order(session.attempt, site.party.credentials.roster.keys)


def _read_key(scheme: Scheme, site: Site, session: Session, maker: str, made: Message) -> bytes:
    """The key that ``maker`` made, if it is meant for this site."""
    party = site.party
    with blaming(maker):
        try:
            if scheme.holder == "sites":
                return party.unseal(session, maker, as_bytes(made.arrays[f"letters/{site.name}"]))
            public = as_bytes(made.arrays["he/public"])
            if scheme.holder == "initiator":
                party.verify(session, maker, as_bytes(made.arrays["he/signature"]), "public key", public)
        except KeyError as error:
            raise ProtocolError(f"the call to prepare lacks the key of this attempt ({error}).") from None
    return public


def _key_for(site: str, maker: str, made: Message) -> dict[str, Tensor]:
    """The part of a new key pair that is for one site."""
    return {f"{maker}/{k}": a for k, a in made.arrays.items() if k in (f"letters/{site}", "he/public", "he/signature")}


def _context(site: str, keys: Message) -> dict[str, str]:
    """What a site says all are to agree on; that they do is what the sites check of each other."""
    try:
        context: dict[str, str] = json.loads(str(keys.scalars["context"]))
    except (KeyError, ValueError, RecursionError) as error:
        reason = f"the server refused the keys of site {site!r}, whose context cannot be read ({error})."
        raise AttemptFailed(reason, {"server": site}) from None
    return context


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

    def encrypt(self, site: Site, session: Session, key: bytes, maker: str) -> Blob:
        """Pack, add the masks that all pairs share, encrypt."""
        vector = pack(own_lanes(site, session), self.width)
        add_streams(vector, [site.party.pair_stream(session, peer) for peer in sorted(session.pairs)])
        vector &= np.uint64((1 << 2 * self.width) - 1)
        with blaming(maker):
            return self.bfv.encrypt(vector, key)

    def add(self, session: Session, own: Blob, token: Blob, hop: int) -> Blob:
        """Add coefficient by coefficient."""
        if len(token) != len(own) or self.bfv.terms(token) != hop:
            raise ProtocolError(f"the token is not a sum of {hop} parts of the right length.")
        self.bfv.add_into(own, token)
        return own

    def decrypt(self, session: Session | None, layout: Layout, token: Blob, secret: bytes) -> Lanes:
        """Decrypt and unpack; masks have cancelled."""
        length = _length({bits: layout.count(bits) for bits in layout.widths}, self.width)
        if len(token) != self.bfv.size(length):
            raise ProtocolError(f"the token has {len(token)} bytes and not those of {length} integers.")
        vector = self.bfv.decrypt(token, secret)
        if len(vector) != length:
            raise ProtocolError(f"the token holds {len(vector)} integers instead of {length}.")
        return unpack(vector, layout, self.width)


def pack(lanes: Lanes, width: int) -> NDArray[np.uint64]:
    """Integers of all widths as pairs of fields, modulo ``2**(2 * width)``.

    Narrow lanes fill a field each, as signed numbers. Wider ones are cut into limbs that leave ``SPARE`` bits of their
    field, so that 16 of them can be added; what a limb carries goes to the next one only when the sum is unpacked.
    """
    counts = {bits: len(values) for bits, values in lanes.items()}
    vector = np.empty(_length(counts, width), np.uint64)
    for bits, shift, start in _pieces(counts, width):
        values = lanes[bits]
        for at in range(0, len(values), 2 * _CHUNK):
            part = values[at : at + 2 * _CHUNK]
            if bits >= FULL:
                part = (part.astype(np.int64) >> shift) & ((1 << (width - SPARE)) - 1)
            into = vector[start + at // 2 :][: (len(part) + 1) // 2].view(np.int64)
            into[-1] = 0  # the upper field of an odd one out
            into[: len(part) // 2] = part[1::2]
            into <<= width
            into += part[0::2]
            into &= (1 << 2 * width) - 1
    return vector


def unpack(vector: NDArray[np.uint64], layout: Layout, width: int) -> Lanes:
    """Lanes of a sum of at most 16 packed vectors, signed; the inverse of ``pack``. Higher bits are left out."""
    counts = {bits: layout.count(bits) for bits in layout.widths}
    lanes: Lanes = {bits: np.zeros(count, np.dtype(f"i{word(bits)}")) for bits, count in counts.items()}
    for bits, shift, start in _pieces(counts, width):
        for at in range(0, counts[bits], 2 * _CHUNK):
            into = lanes[bits][at : at + 2 * _CHUNK]
            pairs = vector[start + at // 2 :][: (len(into) + 1) // 2].view(np.int64)
            low = pairs & ((1 << width) - 1)
            if bits < FULL:
                # A negative low field has borrowed from the upper one, which gets it back.
                low = _signed(low, width)
                high = _signed(((pairs - low) >> width) & ((1 << width) - 1), width)
            else:
                high = (pairs >> width) & ((1 << width) - 1)
            for field, every in ((low, into[0::2]), (high, into[1::2])):
                every += (field[: len(every)] << shift).astype(into.dtype)
    return lanes


def _pieces(counts: Mapping[int, int], width: int) -> Iterator[tuple[int, int, int]]:
    """What lies where in a packed vector: width of the lanes, lowest bit of the limbs, place of the first pair."""
    start = 0
    for bits in sorted(counts, reverse=True):
        for shift in range(0, bits, width - SPARE) if bits >= FULL else (0,):
            yield bits, shift, start
            start += (counts[bits] + 1) // 2


def _length(counts: Mapping[int, int], width: int) -> int:
    return sum((counts[bits] + 1) // 2 for bits, _, _ in _pieces(counts, width))


def _signed(values: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    half = 1 << (width - 1)
    return (values ^ half) - half
