"""The ledger's chain: one signed line an event, each naming the digest of the line before; and the state it adds up to.

A line can't be altered, taken out, added or moved without the coordinator's key. A chain that was cut short at its end
looks like an earlier one: only a head that was noted elsewhere shows that (``Ledger.verify``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import Field, RootModel

from polyclinic.errors import ContributionError
from polyclinic.secure.key_files import from_base64, to_base64
from polyclinic.settings import Settings
from polyclinic.study import SiteName
from polyclinic.vectors.folders import Digest, Moment, canonical_json, parse_json, read_small, validated

LONGEST_LINE = 2**16
LARGEST_CHAIN = 2**26
MOST_ACTIVE = 500
"""Contributions that a ledger holds at a time."""
_SIGNED = b"polyclinic ledger 1\0"

Note = Annotated[str, Field(max_length=500)]
Key = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{43}=$")]
Verdict = Literal["accept", "hold"]


class Entry(Settings):
    """What every line has."""

    index: int = Field(ge=0)
    """Counts lines from 0."""
    time: Moment
    """When, by the coordinator's clock."""
    previous: Digest
    """SHA-256 of the line before; of ``ledger.json`` for the first."""
    signature: str = Field(max_length=100)
    """Ed25519 over the rest, in base64."""


class Add(Entry):
    """A contribution came in; those that it replaces went out."""

    event: Literal["add"]
    """Which event."""
    contribution: Digest
    """Its digest."""
    site: SiteName
    """Who sent it."""
    sequence: int = Field(ge=1)
    """The site's own count."""
    replaces: list[Digest] = Field(max_length=100)
    """Revoked by it."""


class Remove(Entry):
    """A contribution went out, for good."""

    event: Literal["remove"]
    """Which event."""
    contribution: Digest
    """Its digest."""
    reason: Note
    """Why."""


class Decide(Entry):
    """A person accepted a contribution that had been flagged, or held one back."""

    event: Literal["accept", "hold"]
    """Which decision."""
    contribution: Digest
    """About which."""
    note: Note
    """Why."""


class Released(Entry):
    """A merged model was given out."""

    event: Literal["release"]
    """Which event."""
    model: Digest
    """Of the model."""
    recipe: Digest
    """Of the recipe."""
    contributions: list[Digest] = Field(max_length=MOST_ACTIVE)
    """What went in, sorted."""


class Join(Entry):
    """A further site's key was pinned."""

    event: Literal["join"]
    """Which event."""
    site: SiteName
    """Its name."""
    key: Key
    """Its public key, in base64."""


AnyEntry = Add | Remove | Decide | Released | Join


class _Line(RootModel[Annotated[AnyEntry, Field(discriminator="event")]]):
    """One line of the chain."""


@dataclass(frozen=True)
class Release:
    """A model that was given out.

    Attributes:
        removed: Contributions in it that have gone out since: it should be withdrawn.
    """

    time: str
    model: str
    recipe: str
    contributions: tuple[str, ...]
    removed: tuple[str, ...] = ()

    @property
    def stale(self) -> bool:
        """Whether it holds a contribution that has gone out."""
        return bool(self.removed)


@dataclass
class State:
    """What the entries so far add up to. ``apply`` refuses an entry that does not follow, and changes nothing then.

    Attributes:
        known: Every contribution that ever came in, by digest.
        gone: Why a contribution is no longer active.
        decisions: The last one about each active contribution.
        releases: As they were recorded.
        joined: Keys pinned later, in base64.
    """

    known: dict[str, Add] = field(default_factory=dict)
    gone: dict[str, str] = field(default_factory=dict)
    decisions: dict[str, Verdict] = field(default_factory=dict)
    releases: list[Released] = field(default_factory=list)
    joined: dict[str, str] = field(default_factory=dict)

    @property
    def active(self) -> list[str]:
        """Digests of the contributions that are in, sorted."""
        return sorted(self.known.keys() - self.gone.keys())

    def apply(self, entry: AnyEntry) -> None:
        """Take in the next entry.

        Raises:
            ContributionError: It contradicts what came before.
        """
        match entry:
            case Add():
                self.check_add(entry.contribution, entry.site, entry.sequence, entry.replaces)
                self.known[entry.contribution] = entry
                self._drop(entry.replaces, f"replaced by {entry.contribution[:12]}")
            case Remove():
                self.check_active(entry.contribution)
                self._drop([entry.contribution], entry.reason)
            case Decide():
                self.check_active(entry.contribution)
                self.decisions[entry.contribution] = entry.event
            case Released():
                self.check_release(entry.contributions)
                self.releases.append(entry)
            case Join():
                if entry.site in self.joined:
                    raise ContributionError(f"site {entry.site!r} has joined already.")
                self.joined[entry.site] = entry.key

    def check_add(self, digest: str, site: str, sequence: int, replaces: Sequence[str]) -> None:
        """Whether a contribution may come in.

        Raises:
            ContributionError: It is a duplicate, was removed, is a replay, replaces what is not the site's, leaves an
                older one of the site in, or the ledger is full.
        """
        short = digest[:12]
        if digest in self.gone:
            raise ContributionError(f"contribution {short} was revoked ({self.gone[digest]}); it can't come back.")
        if digest in self.known:
            raise ContributionError(
                f"contribution {short} of site {site!r} is a duplicate: it is in the ledger already."
            )
        own = [entry for entry in self.known.values() if entry.site == site]
        if own and sequence <= (last := max(entry.sequence for entry in own)):
            raise ContributionError(
                f"contribution {short} of site {site!r} has sequence {sequence}, but {last} was seen: a replay, or a "
                "count that did not move on. The site must give a higher one."
            )
        for old in replaces:
            if old not in self.known:
                raise ContributionError(f"contribution {short} replaces {old[:12]}, which is unknown to the ledger.")
            if self.known[old].site != site:
                raise ContributionError(
                    f"contribution {short} of site {site!r} replaces {old[:12]}, which belongs to site "
                    f"{self.known[old].site!r}. A site can revoke its own only."
                )
        left = [e.contribution for e in own if e.contribution not in self.gone and e.contribution not in replaces]
        if left:
            raise ContributionError(
                f"site {site!r} has contribution {left[0][:12]} in the ledger; {short} does not name it in 'replaces'. "
                "A site counts once: replace the old one, or have it removed."
            )
        if len(set(self.active) - set(replaces)) >= MOST_ACTIVE:
            raise ContributionError(f"the ledger holds {len(self.active)} contributions; {MOST_ACTIVE} are the most.")

    def check_active(self, digest: str) -> None:
        """Whether a contribution is in.

        Raises:
            ContributionError: It is unknown or has gone out.
        """
        if digest in self.gone:
            raise ContributionError(f"contribution {digest[:12]} is no longer in the ledger: {self.gone[digest]}.")
        if digest not in self.known:
            raise ContributionError(f"there is no contribution {digest[:12]} in the ledger.")

    def check_release(self, digests: Sequence[str]) -> None:
        """Whether a model of these contributions may be given out.

        Raises:
            ContributionError: They are none, not sorted, or one is not in the ledger or held back.
        """
        if not digests or list(digests) != sorted(set(digests)):
            raise ContributionError(
                "a release must name its contributions sorted by digest, each once, and one at least."
            )
        for digest in digests:
            self.check_active(digest)
            if self.decisions.get(digest) == "hold":
                raise ContributionError(
                    f"contribution {digest[:12]} is held back: accept it before a release, or leave it out."
                )

    def _drop(self, digests: Sequence[str], reason: str) -> None:
        for digest in digests:
            self.gone.setdefault(digest, reason)
            self.decisions.pop(digest, None)


def line_digest(line: bytes) -> str:
    """SHA-256 of a line without its end, hexadecimal."""
    return hashlib.sha256(line).hexdigest()


def signed_line(fields: dict[str, object], sign: Callable[[bytes], bytes]) -> tuple[bytes, AnyEntry]:
    """An entry's line, signed, without its end; and the entry.

    Raises:
        ContributionError: A field breaks a rule, or the line is too long.
    """
    content = canonical_json(fields)
    line = canonical_json({**fields, "signature": to_base64(sign(_SIGNED + content))})
    return line, _entry(line, "the new entry")


def read_chain(path: Path, genesis: str, coordinator: bytes) -> tuple[list[bytes], list[AnyEntry]]:
    """All lines and entries, each checked: its form, its place, its link and its signature.

    Args:
        path: ``chain.jsonl``.
        genesis: What the first line must name as the one before.
        coordinator: The public key that signs.

    Raises:
        ContributionError: Names the entry and what is wrong.
    """
    content = read_small(path, LARGEST_CHAIN)
    lines = content.split(b"\n")
    if lines.pop() != b"":
        raise ContributionError(f"{path}: its last line has no end: the file was cut short.")
    entries = []
    for number, line in enumerate(lines):
        where = f"{path}: entry {number}"
        entry = _entry(line, where)
        if entry.index != number:
            raise ContributionError(f"{where} says that it is entry {entry.index}: entries were taken out or moved.")
        if entry.previous != genesis:
            raise ContributionError(f"{where} does not follow from the one before: the chain was altered.")
        _check_signature(entry, coordinator, where)
        entries.append(entry)
        genesis = line_digest(line)
    return lines, entries


def _entry(line: bytes, where: str) -> AnyEntry:
    if len(line) > LONGEST_LINE:
        raise ContributionError(f"{where} has {len(line)} bytes; at most {LONGEST_LINE} are allowed.")
    parse_json(line, where)
    entry = validated(_Line, line, where).root
    if canonical_json(entry.model_dump(mode="json")) != line:
        raise ContributionError(f"{where} is not in the canonical form: it was altered.")
    return entry


def _check_signature(entry: AnyEntry, coordinator: bytes, where: str) -> None:
    content = canonical_json(entry.model_dump(mode="json", exclude={"signature"}))
    signature = from_base64(entry.signature, f"{where}: signature")
    try:
        Ed25519PublicKey.from_public_bytes(coordinator).verify(signature, _SIGNED + content)
    except InvalidSignature:
        raise ContributionError(
            f"{where} is not signed by the ledger's coordinator: it was altered or added."
        ) from None
    if to_base64(signature) != entry.signature:
        raise ContributionError(f"{where} is not in the canonical form: it was altered.")
