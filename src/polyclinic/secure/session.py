"""What the secure sums share: attempts, keys of one attempt, the site's journal, and what all parties must agree on.

One sum is one *attempt*. Every site makes fresh X25519 keys for it and signs them together with a context: the job, the
round, the roster, the model that it received, the layout of the numbers. A peer whose context differs in any field is
refused, so masks cancel only among sites that trained from the same model for the same sum. All keys of an attempt
are derived with that context and die with the attempt.

Roles. A site never believes the server about anything that it can know itself. It refuses, with the reason as its
answer, and the server starts a fresh attempt where nothing was opened.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from polyclinic.errors import ProtocolError
from polyclinic.federation.message import Message, Scalar
from polyclinic.federation.site import Leaf
from polyclinic.files import whole_file
from polyclinic.secure.identity import Credentials
from polyclinic.secure.keystream import Cipher, Keystream, agree, derive_key, has_aes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from polyclinic.federation.site import Handler, Site
    from polyclinic.secure.hidden import Pending
    from polyclinic.study import Study

VERSION = "polyclinic secure sum 1"
FEWEST = 3
"""With two sites, the sum minus one's own share is the other's, under any protocol."""
MOST = 16
"""Limbs of the ring have four spare bits; 16 also keeps the complete graph of pairs small."""

AHEAD = 86_400
"""Seconds that the clocks of server and site may be apart: attempts are numbered by the server's, in milliseconds."""

REFUSAL = (Leaf("refused", "scalar", "nothing"), Leaf("blames", "scalar", "nothing"))
KEYS = (
    Leaf("keys", "array", "nothing"),
    Leaf("context", "scalar", "nothing"),
    Leaf("aes", "scalar", "nothing"),
    *REFUSAL,
)


@dataclass(frozen=True)
class Attempt:
    """One try at one sum, as the server announces it."""

    op: str
    """The op whose answers are summed."""
    purpose: str
    """``counts``: the weights alone, first. ``values``: shares of the weighted mean."""
    round: int
    number: int
    """Grows with every attempt of a job, also over restarts."""
    sites: tuple[str, ...]
    """Who is asked, sorted."""
    totals: tuple[int, ...] = ()
    """For values: the sum of the weight steps of each group, as opened by the counts before."""

    @property
    def threshold(self) -> int:
        """More than two thirds of those that are asked; ``Party.least_of`` is what an opening needs."""
        return 2 * len(self.sites) // 3 + 1

    def message(self, more: Message | None = None) -> Message:
        """A call of this attempt, with more arrays and scalars."""
        more = more or Message()
        own: dict[str, Scalar] = {"op": self.op, "purpose": self.purpose, "round": self.round, "number": self.number}
        own |= {"sites": json.dumps(self.sites), "totals": json.dumps(self.totals)}
        return Message(more.arrays, {**more.scalars, **own})

    @classmethod
    def read(cls, message: Message) -> Attempt:
        """The attempt that a call belongs to.

        Raises:
            ProtocolError: The call does not say, or says nonsense.
        """
        given = message.scalars
        try:
            sites = tuple(map(str, json.loads(str(given["sites"]))))
            totals = tuple(map(int, json.loads(str(given["totals"]))))
            attempt = cls(
                str(given["op"]), str(given["purpose"]), int(given["round"]), int(given["number"]), sites, totals
            )
        except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise ProtocolError(f"the call says not which attempt it belongs to ({error}).") from None
        if sites != tuple(sorted(set(sites))):
            raise ProtocolError("the call's list of sites is not sorted or names one twice.")
        if attempt.purpose not in ("counts", "values") or min(totals, default=0) < 0:
            raise ProtocolError("the call asks for a sum of an unknown kind, or says that weights add up below zero.")
        return attempt


class Journal:
    """What a site remembers of its sums on disk, so that a restart cannot be used against it.

    Args:
        path: A JSON file; made when first written.

    Raises:
        ProtocolError: The file is damaged: what was opened is not known any more.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._newest, self._round, self._opened = 0, 0, dict[str, list[list[Any]]]()
        if path.is_file():
            try:
                kept = json.loads(path.read_text(encoding="utf-8"))
                self._newest, self._round, self._opened = kept["newest"], kept["round"], kept["opened"]
            except (ValueError, KeyError, TypeError):
                raise ProtocolError(
                    f"{path} is damaged, and with it what this site knows of earlier sums: start a new run."
                ) from None

    def enter(self, attempt: Attempt) -> None:
        """Note an attempt before anything is answered in it.

        Raises:
            ProtocolError: It is not newer than the newest, or of an earlier round.
        """
        if attempt.number <= self._newest:
            raise ProtocolError(
                f"attempt {attempt.number} is a replay: attempt {self._newest} was seen before it. Start a new one."
            )
        if attempt.number > (time.time() + AHEAD) * 1000:
            raise ProtocolError(
                f"attempt {attempt.number} lies in the future and would lock out all that come before it."
            )
        if attempt.round < self._round:
            raise ProtocolError(f"round {attempt.round} is a replay: round {self._round} has begun.")
        if attempt.round > self._round:
            self._opened = {}
        self._newest, self._round = attempt.number, attempt.round
        self._write()

    def open(self, attempt: Attempt, contributors: Sequence[str]) -> None:
        """Note the opening of a sum before anything that opens it is answered.

        Opened twice in a round for different sets, a site's update, or its weight, would be the difference; and opened
        twice with different totals, other multiples of the same updates.

        Raises:
            ProtocolError: This sum was opened in this round for another set of sites, or with other totals.
        """
        key = f"{attempt.purpose} of {attempt.op}"
        opening: list[list[Any]] = [list(contributors), list(attempt.totals)]
        before = self._opened.get(key)
        if before is not None and before != opening:
            again = f"for {', '.join(contributors)}" if before[0] != opening[0] else "with other totals of weights"
            raise ProtocolError(
                f"the sum of {key} in round {attempt.round} was opened for {', '.join(before[0])}; opening it again "
                f"{again} would give away the difference. Ask for the same sites again, or go on to the next round."
            )
        self._opened[key] = opening
        self._write()

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = {"newest": self._newest, "round": self._round, "opened": self._opened}
        with whole_file(self._path) as file:
            file.write(json.dumps(kept).encode())


@dataclass
class Session:
    """A site's side of the attempt under way: its secrets, and what it has already answered."""

    attempt: Attempt
    context: dict[str, str]
    mask_key: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate, repr=False)
    seal_key: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate, repr=False)
    pairs: dict[str, bytes] = field(default_factory=dict, repr=False)
    """For each peer, the key of the mask that both know."""
    seals: dict[str, bytes] = field(default_factory=dict, repr=False)
    """For each peer, the key of what they tell each other past the server."""
    cipher: Cipher = "chacha20"
    answered: set[str] = field(default_factory=set)
    """Phases that were answered: each is answered once."""
    memory: dict[str, Any] = field(default_factory=dict, repr=False)
    """What a protocol keeps between its phases."""

    @property
    def bound(self) -> bytes:
        """The context as bytes."""
        return json.dumps(self.context, sort_keys=True).encode()


class Party:
    """One site in secure sums.

    Args:
        job: What all sites know the job by.
        credentials: Its identity, the pinned roster, secrets shared with single peers.
        journal: File of its journal.
        least: It takes part in no sum over fewer sites.
    """

    def __init__(self, job: str, credentials: Credentials, journal: Path, least: int = FEWEST) -> None:
        self.job, self.credentials, self.journal, self.least = job, credentials, Journal(journal), least
        self.name = credentials.identity.site
        self.held: Pending | None = None
        """What was last computed and leaves only in a sum."""
        self._session: Session | None = None

    def hold(self, pending: Pending) -> None:
        """Keep what was computed for the next sum. An attempt under way ends: its keys are bound to another model."""
        self._session, self.held = None, pending

    def least_of(self, attempt: Attempt) -> int:
        """Sites that must be left for this site to go on in an attempt."""
        return max(self.least, attempt.threshold)

    def begin(self, attempt: Attempt, number: int, facts: Mapping[str, str]) -> Message:
        """Enter an attempt with fresh keys; what came before is forgotten.

        Args:
            attempt: As announced.
            number: The round that this site is in.
            facts: What must be alike at all sites: digests of the model and of the layout, for instance.

        Returns:
            The site's signed keys.

        Raises:
            ProtocolError: A replay, another round, too few sites, or a site that is not on the pinned roster.
        """
        self._session = None
        sites = attempt.sites
        if self.name not in sites:
            raise ProtocolError(f"site {self.name!r} was asked for a sum that it has no part in.")
        if not self.least <= len(sites) <= MOST:
            few = len(sites) < self.least
            raise ProtocolError(too_few(sites, self.least) if few else f"at most {MOST} sites can be summed.")
        if attempt.round != number:
            raise ProtocolError(f"a sum of round {attempt.round} was asked for in round {number}.")
        roster = self.credentials.roster.digest(sites)
        self.journal.enter(attempt)
        own = {"op": attempt.op, "purpose": attempt.purpose, "round": str(attempt.round), "number": str(attempt.number)}
        context = {"protocol": VERSION, "job": self.job, **own, "sites": json.dumps(sites), "roster": roster, **facts}
        context["totals"] = json.dumps(attempt.totals)
        session = self._session = Session(attempt, context)
        aes = has_aes()
        keys = [key.public_key().public_bytes_raw() for key in (session.mask_key, session.seal_key)]
        signed = self.sign(session, "keys", b"".join(keys), bytes([aes]))
        arrays = {"mask": as_array(keys[0]), "seal": as_array(keys[1]), "signature": as_array(signed)}
        told = (peer for peer in sites if peer in self.credentials.pair_secrets)
        arrays |= {f"pair/{peer}": as_array(self._confirms(session, peer, self.name)) for peer in told}
        return Message.pack({"keys": arrays}, context=json.dumps(context), aes=aes)

    def session(self, message: Message, phase: str) -> Session:
        """The session that a call belongs to; each phase is answered once.

        Raises:
            ProtocolError: The call belongs to no attempt under way, or its phase was answered before.
        """
        attempt = Attempt.read(message)
        session = self._session
        if session is None or session.attempt != attempt:
            raise ProtocolError(
                f"attempt {attempt.number} is not under way here: this site restarted, or it is an old one."
            )
        if phase in session.answered:
            raise ProtocolError(f"{phase!r} was answered in attempt {attempt.number} before. Each is answered once.")
        session.answered.add(phase)
        return session

    def meet(self, session: Session, announced: Mapping[str, Message]) -> None:
        """Check the signed keys of all that answered and derive a mask key and a seal key for each peer.

        Raises:
            ProtocolError: Too few, a foreign site, another context, or a wrong signature.
        """
        attempt = session.attempt
        if not set(announced) <= set(attempt.sites) or self.name not in announced:
            raise ProtocolError("the announced keys are not those of the sites that were asked.")
        if len(announced) < self.least_of(attempt):
            raise ProtocolError(too_few(sorted(announced), self.least_of(attempt)))
        aes = True
        for peer, told in announced.items():
            self._check_keys(session, peer, told)
            aes = aes and bool(told.scalars["aes"])
        session.cipher = "aes-256-ctr" if aes else "chacha20"
        # All keys or none: a site that refused here must not go on under the masks of a few.
        pairs: dict[str, bytes] = {}
        seals: dict[str, bytes] = {}
        for peer, told in announced.items():
            if peer == self.name:
                continue
            psk = self.credentials.pair_secrets.get(peer, b"")
            keys = told.group("keys")
            info = session.bound + json.dumps(sorted((self.name, peer))).encode()
            with blaming(peer):
                shared = agree(session.mask_key, as_bytes(keys["mask"]))
                pairs[peer] = derive_key(shared, b"mask" + info, psk=psk)
                shared = agree(session.seal_key, as_bytes(keys["seal"]))
                seals[peer] = derive_key(shared, b"seal" + info, psk=psk)
        session.pairs, session.seals = pairs, seals

    def _check_keys(self, session: Session, peer: str, told: Message) -> None:
        keys = told.group("keys")
        try:
            context = json.loads(str(told.scalars["context"]))
            aes = bytes([bool(told.scalars["aes"])])
            public = as_bytes(keys["mask"]) + as_bytes(keys["seal"])
            signature = as_bytes(keys["signature"])
        except (KeyError, ValueError, RecursionError, ProtocolError) as error:
            raise ProtocolError(f"the keys of site {peer!r} are incomplete ({error}).", peer) from None
        if context != session.context:
            known = {**session.context, **context} if isinstance(context, dict) else {"context": ""}
            differs = (k for k in known if not isinstance(context, dict) or context.get(k) != session.context.get(k))
            other = next(differs, "context")
            raise ProtocolError(f"site {peer!r} works with another {other} than this site.", peer)
        self.verify(session, peer, signature, "keys", public, aes)
        confirmed = as_bytes(keys[f"pair/{self.name}"]) if f"pair/{self.name}" in keys else b""
        if peer != self.name and not hmac.compare_digest(confirmed, self._confirms(session, peer, peer)):
            raise ProtocolError(
                f"site {peer!r} has another pair secret than this site, or only one of both has one, so their masks "
                "would not cancel. Compare fingerprints with polyclinic keys show.",
                peer,
            )

    def _confirms(self, session: Session, peer: str, sender: str) -> bytes:
        """Shows that ``sender`` has the secret shared with ``peer``, for this attempt; empty where there is none."""
        secret = self.credentials.pair_secrets.get(peer)
        return hmac.digest(secret, b"pair" + sender.encode() + b"\0" + session.bound, "sha256") if secret else b""

    def sign(self, session: Session, what: str, *parts: bytes) -> bytes:
        """Sign parts in the context of an attempt."""
        return self.credentials.identity.sign(statement(session.context, what, *parts))

    def verify(self, session: Session, peer: str, signature: bytes, what: str, *parts: bytes) -> None:
        """Check what ``peer`` signed.

        Raises:
            ProtocolError: It did not; blames it.
        """
        with blaming(peer):
            self.credentials.roster.verify(peer, statement(session.context, what, *parts), signature)

    def seal(self, session: Session, peer: str, secret: bytes) -> bytes:
        """Encrypt for one peer, bound to the attempt and the direction (AES-256-GCM, random nonce)."""
        nonce = os.urandom(12)
        return nonce + AESGCM(session.seals[peer]).encrypt(nonce, secret, self._way(session, self.name, peer))

    def unseal(self, session: Session, peer: str, sealed: bytes) -> bytes:
        """Decrypt what ``peer`` sealed for this site.

        Raises:
            ProtocolError: It was altered, or sealed by another or for another.
        """
        if peer not in session.seals or len(sealed) < 28:
            raise ProtocolError(f"there is nothing sealed by site {peer!r} here.", peer)
        try:
            way = self._way(session, peer, self.name)
            return AESGCM(session.seals[peer]).decrypt(sealed[:12], sealed[12:], way)
        except InvalidTag:
            raise ProtocolError(f"what site {peer!r} sealed for this site was altered on its way.", peer) from None

    def _way(self, session: Session, sender: str, receiver: str) -> bytes:
        # With the sites whose keys were announced: who was told of others is not understood.
        return session.bound + json.dumps([sender, receiver, sorted([self.name, *session.pairs])]).encode()

    def pair_stream(self, session: Session, peer: str) -> tuple[Keystream, int]:
        """The mask that this site and ``peer`` share, and its sign here."""
        return Keystream(session.pairs[peer], session.cipher), sign(self.name, peer)


@contextmanager
def blaming(peer: str) -> Iterator[None]:
    """What is refused in here is ``peer``'s doing."""
    try:
        yield
    except ProtocolError as error:
        raise ProtocolError(str(error), peer) from None


def sign(site: str, peer: str) -> int:
    """+1 or -1: of two peers, the one whose name sorts first adds their common mask, the other subtracts it."""
    return 1 if site < peer else -1


def statement(context: Mapping[str, str], what: str, *parts: bytes) -> bytes:
    """What is signed: a label, the context and parts, each with its length."""
    pieces = (what.encode(), json.dumps(context, sort_keys=True).encode(), *parts)
    return b"".join(len(piece).to_bytes(8, "big") + piece for piece in pieces)


def least_sites(study: Study, roster: int) -> int:
    """Sites that a sum needs in the eyes of a site that knows the study and how many are on its roster."""
    cohort = study.cohort_size(roster)
    return max(FEWEST, study.aggregation.fewest or 2 * cohort // 3 + 1)


def too_few(sites: Sequence[str], wanted: int = FEWEST) -> str:
    """Why a sum over these sites is refused."""
    named = ", ".join(sites) or "no site"
    if len(sites) == 2:
        return (
            f"only two sites ({named}) are left: each would find the other's update by subtracting its own from the "
            f"sum, under any protocol. A secure sum needs {FEWEST}."
        )
    return f"only {len(sites)} of at least {max(wanted, FEWEST)} sites ({named}) are left: the sum is not opened."


def answering(phase: Callable[[Site, Message], Message]) -> Handler:
    """A site's handler of one phase, whose refusals are answers: who hears only silence cannot mend anything."""

    @wraps(phase)
    def handle(site: Site, message: Message) -> Message:
        try:
            return phase(site, message)
        except ProtocolError as error:
            return Message(scalars={"refused": str(error), "blames": error.blames or ""})

    return handle


def forward(replies: Mapping[str, Message]) -> Message:
    """Replies of several sites as one message to a site, which ``forwarded`` takes apart again."""
    arrays = {f"{site}/{name}": array for site, reply in replies.items() for name, array in reply.arrays.items()}
    scalars = {f"{site}/{name}": value for site, reply in replies.items() for name, value in reply.scalars.items()}
    return Message(arrays, scalars)


def forwarded(message: Message) -> dict[str, Message]:
    """``{site: its reply}`` of what ``forward`` put together; other scalars of the message are left out."""
    arrays: dict[str, dict[str, torch.Tensor]] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for key, array in message.arrays.items():
        site, _, name = key.partition("/")
        arrays.setdefault(site, {})[name] = array
    for key, value in message.scalars.items():
        site, slash, name = key.partition("/")
        if slash:
            scalars.setdefault(site, {})[name] = value
    return {site: Message(arrays.get(site, {}), scalars.get(site, {})) for site in sorted({*arrays, *scalars})}


def as_array(data: bytes) -> torch.Tensor:
    """Bytes as an array of a message."""
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())


def as_bytes(array: torch.Tensor) -> bytes:
    """Bytes of an array made by ``as_array``.

    Raises:
        ProtocolError: It is an array of something else.
    """
    if array.dtype != torch.uint8:
        raise ProtocolError(f"{array.dtype} came where bytes were due.")
    return bytes(array.contiguous().numpy().data)


def digest(array: NDArray[Any]) -> bytes:
    """SHA-256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).data).digest()
