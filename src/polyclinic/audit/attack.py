"""What a coalition can make of a secure sum: the best linear attack on one site's update.

A coalition pools the messages that its members sent and received, their own inputs, and their secrets of the attempt.
It looks for the numbers that hold the victim's part and as few other unknown parts as it can get: the masked vector,
or the difference of two tokens of the ring, decrypted where it has the key. It then takes off its own parts and every
mask whose key it has, can derive from the shares it has, or can guess: that there are no masks, or that pairs share a
key with other pairs. What is left is a ``Finding``. A protocol that does what it says leaves the victim's part plus at
least one mask that the coalition does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyclinic.audit.judge import UNLIKELY, uniformity
from polyclinic.audit.tap import Arrays, Recording
from polyclinic.federation.message import Message
from polyclinic.secure.ckks_as_published import CkksAsPublished
from polyclinic.secure.fixed_point import WEIGHT_STEPS, Lanes, Layout, decode
from polyclinic.secure.hidden import Contribution, Pending, own_lanes
from polyclinic.secure.keystream import Keystream, add_streams
from polyclinic.secure.masked import KEY, SHARE
from polyclinic.secure.ring import BfvScheme, pack, ring_order, unpack
from polyclinic.secure.session import as_bytes, sign
from polyclinic.secure.shamir import recover
from polyclinic.secure.view import SERVER

Mask = tuple[bytes, int]
"""A key of a stream, and the sign that takes the stream off."""
NO_KEY = bytes(KEY)
"""A key that nobody need be told."""


@dataclass
class Finding:
    """What a coalition is left with.

    Attributes:
        about: Sites whose parts are in it.
        covered: Pairs of sites whose mask is still on it, as far as the coalition can know.
        shares: Sum of their shares of the weighted mean, by ``group/name``.
        weights: Sum of their weights, by group.
        residue: Its bytes, where masks would make them uniform.
        modular: Whether masks would make them uniform: integers modulo a power of two, not floating point.
        guesses: How many sets of masks were tried, the known ones first; another than the first was taken only where
            it left what is no noise.
    """

    about: tuple[str, ...]
    covered: list[tuple[str, str]]
    shares: Arrays
    weights: dict[str, float]
    residue: NDArray[np.uint8]
    modular: bool
    guesses: int = 1


@dataclass
class Spoils:
    """Outcome of an attack.

    Attributes:
        held: What the coalition had to go by, in words.
        victim: What it found out about the victim; None where it saw nothing to work on.
        why: The reason then.
        rest: What the sum less its own parts is: the sum over all who are not of the coalition. None if it does not
            know the sum.
    """

    held: list[str]
    victim: Finding | None
    why: str = ""
    rest: Finding | None = None


def attack(recording: Recording, coalition: Sequence[str], victim: str) -> Spoils:
    """Attack one site's update with what some parties hold.

    Args:
        recording: The round.
        coalition: Names of sites, ``server``; without the victim.
        victim: Name of a site.
    """
    wires: dict[str, Callable[[Recording, Sequence[str]], Any]] = {
        "plain": PlainWire,
        "masked": MaskedWire,
        "ring-he": partial(RingWire, between=bfv_difference),
        "ring-as-published": partial(RingWire, between=published_difference),
    }
    found: Spoils = wires[recording.backend](recording, coalition).attack(victim)
    return found


class PlainWire:
    """Updates in clear: whoever is the server has them."""

    def __init__(self, recording: Recording, coalition: Sequence[str]) -> None:
        self._view = recording.tap.view(*coalition)
        self._sites = recording.tap.sites

    def attack(self, victim: str) -> Spoils:
        """Read the message."""
        replies = {seen.sender: seen.message for seen in self._view if seen.sender in self._sites}
        if victim not in replies:
            return Spoils(["the model that all sites got"], None, "saw no message of the victim")
        weights = {site: _plain_weights(reply) for site, reply in replies.items()}
        whole = {group: sum(own[group] for own in weights.values()) for group in weights[victim]}
        arrays = {key: tensor.detach().cpu().numpy() for key, tensor in replies[victim].arrays.items()}
        shares = {}
        for key, array in arrays.items():
            group = key.partition("/")[0]
            shares[key] = array * (weights[victim][group] / whole[group])
        residue = np.concatenate([np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in arrays.values()])
        found = Finding((victim,), [], shares, weights[victim], residue, modular=False)
        return Spoils(["the victim's update and weight, as they were sent"], found)


def _plain_weights(reply: Message) -> dict[str, float]:
    weights = {k.removeprefix("weight/"): float(v) for k, v in reply.scalars.items() if k.startswith("weight/")}
    return {group: weights[group] for group in reply.groups()}


class _Wire:
    """What the protocols that hide updates have in common: sites, keys of pairs, guesses."""

    def __init__(self, recording: Recording, coalition: Sequence[str]) -> None:
        self.recording = recording
        self.view = recording.tap.view(*coalition)
        self.server = SERVER in coalition
        self.members = [name for name in coalition if name != SERVER]
        self.held = {name: recording.tap.held[name] for name in self.members}
        # Public: who takes part, the layout, the cipher. All parties are told.
        any_session = next(iter(recording.tap.held.values())).session
        self.attempt, self.cipher = any_session.attempt, any_session.cipher
        self.layout: Layout = Pending.of(next(iter(recording.sites.values()))).layout
        self.honest = tuple(name for name in self.attempt.sites if name not in self.members)
        self.keys = {
            frozenset((name, peer)): key for name, own in self.held.items() for peer, key in own.session.pairs.items()
        }

    def inputs(self, name: str) -> Lanes:
        """What a member itself added."""
        return own_lanes(self.recording.sites[name], self.held[name].session)

    def pair_keys(self) -> list[str]:
        """In words."""
        return [f"the mask keys of all pairs with {_listed(self.members)}"] if self.members else []

    def masks_on(self, about: Sequence[str]) -> tuple[list[Mask], list[tuple[str, str]]]:
        """Of the masks on the sum of some sites' parts: those that can be taken off, and pairs of the others."""
        pairs = [(site, peer) for site in about for peer in self.attempt.sites if peer not in about]
        known = [(self.keys[frozenset(p)], -sign(*p)) for p in pairs if frozenset(p) in self.keys]
        return known, [p for p in pairs if frozenset(p) not in self.keys]

    def guesses(self, known: list[Mask], own: list[Mask], covered: list[tuple[str, str]]) -> list[list[Mask]]:
        """Masks to take off: those that are known; then, where that is not all, as if others were missing or alike."""
        if not covered:
            return [[*own, *known]]
        alike = [[*own, *known, *((key, -sign(*p)) for p in covered)] for key in {NO_KEY, *self.keys.values()}]
        return [[*own, *known], [], list(own), *alike]

    def bare(
        self,
        parts: list[NDArray[Any]],
        guesses: list[list[Mask]],
        bytes_of: Callable[[list[NDArray[Any]]], NDArray[np.uint8]],
    ) -> list[NDArray[Any]]:
        """Without the masks of the first guess; of another, if that leaves what is no noise by any chance."""
        best: list[NDArray[Any]] = []
        for guess in guesses:
            bare = [part.copy() for part in parts]
            streams = [(Keystream(key, self.cipher), way) for key, way in guess]
            for part in bare:
                add_streams(part, streams)
            p = uniformity(bytes_of(bare)).p
            if not best:
                best = bare
            elif p is not None and p * len(guesses) < UNLIKELY:
                return bare
        return best

    def finding(self, about: Sequence[str], lanes: Lanes, residue: NDArray[np.uint8], **more: Any) -> Finding:
        """Integers as shares and weights."""
        steps, shares = decode(self.layout, lanes, sites=len(self.attempt.sites))
        weights = {group: count / WEIGHT_STEPS for group, count in steps.items()}
        return Finding(tuple(about), more.pop("covered", []), shares, weights, residue, **more)


class MaskedWire(_Wire):
    """The masked sum: vectors reach the server alone."""

    def __init__(self, recording: Recording, coalition: Sequence[str]) -> None:
        super().__init__(recording, coalition)
        arrived = {
            seen.sender: seen.message
            for seen in self.view
            if seen.op == "masked-vector" and seen.sender in self.attempt.sites and seen.message.group("lanes")
        }
        self.vectors = {name: Contribution.unpack(m, self.layout) for name, m in arrived.items()} if self.server else {}
        self.own = {name: own.memory["own"] for name, own in self.held.items()}
        self._open_shares()

    def attack(self, victim: str) -> Spoils:
        """Take every mask off the victim's vector that the coalition can."""
        held = self.pair_keys()
        if victim not in self.vectors:
            return Spoils(held, None, "saw no vector: those go to the server alone")
        held.append("all masked vectors")
        if victim in self.own:
            held.append("the masks that sites added on their own, which the server opens")
        rest = self._bare(self.honest)
        return Spoils(held, self._bare((victim,)), rest=None if rest.covered else rest)

    def _bare(self, about: Sequence[str]) -> Finding:
        total = Contribution({})
        for name in about:
            total.add(self.vectors[name])
        known, covered = self.masks_on(about)
        own = [(self.own[name], -1) for name in about if name in self.own]
        covered += [(name, name) for name in about if name not in self.own]
        guesses = self.guesses(known, own, covered)
        bits = sorted(total.lanes, reverse=True)
        parts = self.bare([total.lanes[b] for b in bits], guesses, _all_bytes)
        lanes = Contribution(dict(zip(bits, parts, strict=True))).signed()
        return self.finding(about, lanes, _all_bytes(parts), covered=covered, modular=True, guesses=len(guesses))

    def _open_shares(self) -> None:
        """Rebuild the secrets of which the coalition has enough Shamir shares: letters to its members, openings."""
        points: dict[tuple[str, str], dict[int, bytes]] = {}
        sites = self.attempt.sites
        for name, own in self.held.items():
            at = sites.index(name) + 1
            for dealer, letter in own.memory["letters"].items():
                partners = ["", *(site for site in sites if site != dealer)]
                pieces = [letter[i : i + SHARE] for i in range(0, len(letter), SHARE)]
                for partner, piece in zip(partners, pieces, strict=True):
                    points.setdefault((dealer, partner), {})[at] = piece
        # Openings of earlier attempts, which the record has too, were replaced by those of the last.
        told = {s.sender: s.message for s in self.view if s.op == "masked-open" and s.sender in sites}
        for name, message in told.items():
            for dealer, piece in message.group("own").items():
                points.setdefault((dealer, ""), {})[sites.index(name) + 1] = as_bytes(piece)
            for pair, piece in message.group("shared").items():
                gone, _, partner = pair.partition("/")
                points.setdefault((gone, partner), {})[sites.index(name) + 1] = as_bytes(piece)
        for (dealer, partner), shares in points.items():
            if len(shares) < self.attempt.threshold:
                continue
            secret = recover(shares, KEY)
            if partner:
                self.keys.setdefault(frozenset((dealer, partner)), secret)
            else:
                self.own.setdefault(dealer, secret)


class RingWire(_Wire):
    """The ring: a token of growing sums.

    Args:
        recording: What passed.
        coalition: Who attacks.
        between: What one token has more than another, under the backend's arithmetic.
    """

    def __init__(
        self, recording: Recording, coalition: Sequence[str], *, between: Callable[[RingWire, int, int], Finding]
    ) -> None:
        super().__init__(recording, coalition)
        self._between = between
        roster = next(iter(recording.sites.values())).party.credentials.roster.keys
        self.order = ring_order(self.attempt, roster)
        self.tokens: dict[int, NDArray[np.uint8]] = {}
        opened: Message | None = None
        for seen in self.view:
            if "token/blob" in seen.message.arrays:
                self.tokens[self._parts_in(seen.op, seen.sender, seen.receiver)] = seen.message.arrays[
                    "token/blob"
                ].numpy()
            elif seen.op == "ring-open" and seen.message.group("lanes"):
                opened = seen.message
        self.opened = Contribution.unpack(opened, self.layout) if opened else None
        self.secret = self._key()

    def _parts_in(self, op: str, sender: str, receiver: str) -> int:
        """How many parts a token holds, from who sent it to whom."""
        if op == "ring-open":
            return len(self.order)
        return self.order.index(receiver) if sender == SERVER else self.order.index(sender) + 1

    def _key(self) -> bytes | None:
        """The secret key of the attempt, if a member has it."""
        if self.server and self.recording.server_keys:
            return self.recording.server_keys[-1].secret
        for own in self.held.values():
            if "secret" in own.memory:
                return bytes(own.memory["secret"])
            if own.session.context["key_holder"] == "sites":
                return bytes(own.memory["key"])
        return None

    def attack(self, victim: str) -> Spoils:
        """Subtract the nearest token before the victim from the nearest after it."""
        hop = self.order.index(victim)
        before = max((k for k in self.tokens if k <= hop), default=0)
        after = min((k for k in self.tokens if k > hop), default=None)
        held = self.pair_keys()
        if self.tokens:
            held.append(f"the tokens after {_listed(map(str, sorted(self.tokens)))} of {len(self.order)} parts")
        held += ["the key that decrypts"] if self.secret else []
        held += ["the sum"] if self.opened or (self.secret and len(self.order) in self.tokens) else []
        rest = self._rest()
        if after is None:
            return Spoils(held, None, "saw no token with the victim's part", rest)
        if self.secret is None:
            return Spoils(held, None, "saw ciphertexts without the key", rest)
        found = self._between(self, before, after)
        if found.about != (victim,) and not found.covered:
            return Spoils(held, None, "saw a sum over several others only", rest)
        return Spoils(held, found, rest=rest)

    def _rest(self) -> Finding | None:
        """The opened sum less the members' own parts; else the last token, if it can be decrypted."""
        if self.opened:
            total = Contribution({bits: part.copy() for bits, part in self.opened.lanes.items()})
            for name in self.members:
                for bits, part in Contribution.of(self.inputs(name)).lanes.items():
                    total.lanes[bits] -= part
            return self.finding(self.honest, total.signed(), np.empty(0, np.uint8), modular=True)
        if self.secret is None or len(self.order) not in self.tokens:
            return None
        found = self._between(self, 0, len(self.order))
        return None if found.covered else found

    def inside(self, before: int, after: int) -> tuple[list[str], list[str]]:
        """Members and others whose parts one token has more than another."""
        inside = self.order[before:after]
        return [n for n in inside if n in self.members], [n for n in inside if n not in self.members]


def bfv_difference(ring: RingWire, before: int, after: int) -> Finding:
    """Integers modulo a power of two under masks of all pairs."""
    settings = ring.recording.study.aggregation
    scheme = BfvScheme(settings.provider, settings.key_holder, settings.width)
    assert ring.secret is not None

    def both_fields(parts: list[NDArray[Any]]) -> NDArray[np.uint8]:
        # The whole bytes of both fields: five of 40 bits, four of 36.
        words = np.ascontiguousarray(parts[0]).view(np.uint8).reshape(-1, 8)
        return np.ascontiguousarray(words[:, : 2 * scheme.width // 8]).reshape(-1)

    vector = scheme.bfv.decrypt(ring.tokens[after], ring.secret)
    if before:
        vector -= scheme.bfv.decrypt(ring.tokens[before], ring.secret)
    members, about = ring.inside(before, after)
    for name in members:
        vector -= pack(ring.inputs(name), scheme.width)
    known, covered = ring.masks_on([*members, *about])
    guesses = ring.guesses(known, [], covered)
    (vector,) = ring.bare([vector], guesses, both_fields)
    vector &= np.uint64((1 << 2 * scheme.width) - 1)
    lanes = unpack(vector, ring.layout, scheme.width)
    return ring.finding(about, lanes, both_fields([vector]), covered=covered, modular=True, guesses=len(guesses))


def published_difference(ring: RingWire, before: int, after: int) -> Finding:
    """Floating point under one Gaussian mask of the initiator."""
    assert ring.secret is not None
    context = CkksAsPublished(ring.secret)
    entries = [entry for entry in ring.layout.entries if entry.size]
    sizes = [len(ring.layout.groups), *(entry.size for entry in entries)]
    tensors = context.load(ring.tokens[after].tobytes(), sizes).decrypt()
    if before:
        earlier = context.load(ring.tokens[before].tobytes(), sizes).decrypt()
        tensors = [a - b for a, b in zip(tensors, earlier, strict=True)]
    members, about = ring.inside(before, after)
    for name in members:
        steps, shares = decode(ring.layout, ring.inputs(name), sites=len(ring.attempt.sites))
        own = [np.array([count / WEIGHT_STEPS for count in steps.values()])]
        own += [shares[entry.name].reshape(-1) for entry in entries]
        mask = ring.held[name].memory.get("mask", [np.float32(0)] * len(own))
        tensors = [t - o - m for t, o, m in zip(tensors, own, mask, strict=True)]
    covered = [(ring.order[0], ring.order[0])] if ring.order[0] in about else []
    weights = dict(zip(ring.layout.groups, tensors[0].tolist(), strict=True))
    shares = {e.name: t.reshape(e.shape) for e, t in zip(entries, tensors[1:], strict=True)}
    residue = np.concatenate([t.astype(np.float32).view(np.uint8) for t in tensors])
    return Finding(tuple(about), covered, shares, weights, residue, modular=False)


def _listed(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def _all_bytes(parts: list[NDArray[Any]]) -> NDArray[np.uint8]:
    return np.concatenate([part.view(np.uint8) for part in parts])
