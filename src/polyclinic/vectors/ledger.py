"""The coordinator's ledger: which contributions are in, who decided what, which models were given out.

A folder: ``ledger.json`` (what it is, and the coordinator's key), ``base``, ``roster.json`` (the sites' keys at its
start), ``chain.jsonl`` (every event, signed and chained) and ``contributions``, one folder for each digest. The chain
decides: a folder that it does not name is left over from a crash, is ignored, and goes at the next writing.

Crash safety: a contribution is complete on disk before the line that names it; tensor files go after the line that
removes them. The line itself is written by exchanging the whole file. So a kill at any moment leaves the old state or
the new one.

What can't be seen from inside: somebody who puts back an older copy of the whole folder. Note ``head`` elsewhere, and
give it to ``verify``.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field

from polyclinic.errors import ContributionError, PolyclinicError
from polyclinic.secure.identity import Identity, Roster, fingerprint
from polyclinic.secure.key_files import from_base64, to_base64
from polyclinic.settings import Settings
from polyclinic.study import SiteName
from polyclinic.vectors.base import SPEC_FILE, WEIGHTS_FILE, Base
from polyclinic.vectors.chain import (
    LARGEST_CHAIN,
    Add,
    AnyEntry,
    Key,
    Release,
    State,
    Verdict,
    line_digest,
    read_chain,
    signed_line,
)
from polyclinic.vectors.contribution import ALLOWED, MANIFEST_FILE, SIGNATURE_FILE, Contribution
from polyclinic.vectors.folders import (
    Digest,
    Moment,
    canonical_json,
    is_digest,
    now,
    opened,
    plain_names,
    read_small,
    sync_folder,
    validated,
    whole_folder,
    write_whole,
)
from polyclinic.vectors.manifest import FILES, LARGEST, Manifest, digest
from polyclinic.vectors.tensor_file import sha256_of

ABOUT, ROSTER, CHAIN, BASE, CONTRIBUTIONS = "ledger.json", "roster.json", "chain.jsonl", "base", "contributions"
INCOMING = ".incoming-"
SHORTEST_PREFIX = 6
PATIENCE_S = 30.0
"""How long a writer waits for another."""
_SMALL = 2**20

Made = TypeVar("Made")


class About(Settings):
    """``ledger.json``."""

    schema_: Literal["polyclinic-ledger/1"] = Field(alias="schema")
    """Which form."""
    created: Moment
    """When, in UTC."""
    base: Digest
    """Digest of the base that all contributions start from."""
    coordinator: SiteName
    """Who signs."""
    key: Key
    """The coordinator's public key, in base64."""
    roster: Digest
    """SHA-256 of ``roster.json``: keys that join later are in the chain."""


class Ledger:
    """A ledger, as it was when it was opened or last written to by this object."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        about = read_small(folder / ABOUT, _SMALL)
        self.about = validated(About, about, str(folder / ABOUT))
        self._genesis = line_digest(about)
        self._coordinator = from_base64(self.about.key, f"{folder / ABOUT}: key")
        self.base = Base.load(folder / BASE)
        if self.base.digest != self.about.base:
            raise ContributionError(f"{folder / BASE} is another base than the ledger was made for.")
        if sha256_of(folder / ROSTER) != self.about.roster:
            raise ContributionError(
                f"{folder / ROSTER} was altered. Sites that come later join by an entry of the chain."
            )
        self._first_roster = _refusing(lambda: Roster.load(folder / ROSTER))
        self._lines: list[bytes]
        self.entries: list[AnyEntry]
        self.state: State
        self._read()

    @classmethod
    def create(cls, folder: Path, base_folder: Path, identity: Identity, roster: Roster) -> Ledger:
        """Make a ledger for a base.

        Args:
            folder: A new folder, written whole or not at all.
            base_folder: Copied into it.
            identity: The coordinator's, which signs every entry from now on.
            roster: The sites that may contribute.

        Raises:
            ContributionError: The folder exists, or the base is refused.
        """
        base = Base.load(base_folder)
        with whole_folder(folder) as staged:
            (staged / BASE).mkdir()
            for name in (SPEC_FILE, WEIGHTS_FILE):
                _copy(base_folder / name, staged / BASE / name, (base_folder / name).stat().st_size)
            sync_folder(staged / BASE)
            (staged / CONTRIBUTIONS).mkdir()
            _refusing(lambda: roster.save(staged / ROSTER))
            about = About(
                schema="polyclinic-ledger/1",
                created=now(),
                base=base.digest,
                coordinator=identity.site,
                key=to_base64(identity.public),
                roster=sha256_of(staged / ROSTER),
            )
            write_whole(staged / ABOUT, canonical_json(about.model_dump(mode="json", by_alias=True)))
            write_whole(staged / CHAIN, b"")
        return cls(folder)

    @classmethod
    def open(cls, folder: Path) -> Ledger:
        """Open a ledger: its base and every entry of the chain are checked, contributions when they are asked for.

        Raises:
            ContributionError: What is wrong.
        """
        return cls(folder)

    @property
    def head(self) -> str:
        """Digest of the last entry: note it elsewhere, and ``verify`` finds a ledger that was put back."""
        return line_digest(self._lines[-1]) if self._lines else self._genesis

    @property
    def heads(self) -> list[str]:
        """The head as it was at the beginning and after each entry."""
        return [self._genesis, *map(line_digest, self._lines)]

    @property
    def roster(self) -> Roster:
        """The sites whose contributions count."""
        later = {site: from_base64(key, f"key of {site!r}") for site, key in self.state.joined.items()}
        return _refusing(lambda: Roster({**self._first_roster.keys, **later}))

    @property
    def contributions(self) -> tuple[Contribution, ...]:
        """What is in, by digest. Signatures and headers are checked, values by ``verify`` and ``verify_files``."""
        roster = self.roster
        return tuple(self.load(name, roster, contents=False) for name in self.state.active)

    @property
    def decisions(self) -> dict[str, Verdict]:
        """What a person decided last about contributions that are in; most need none."""
        return dict(self.state.decisions)

    @property
    def releases(self) -> tuple[Release, ...]:
        """Models that were given out, with what has gone out of the ledger since."""
        gone = self.state.gone
        return tuple(
            Release(r.time, r.model, r.recipe, tuple(r.contributions), tuple(d for d in r.contributions if d in gone))
            for r in self.state.releases
        )

    def find(self, prefix: str) -> str:
        """The digest of the one active contribution that begins so.

        Raises:
            ContributionError: None or several do, or fewer than six characters are given.
        """
        if len(prefix) < SHORTEST_PREFIX:
            raise ContributionError(
                f"{prefix!r} is too short: give {SHORTEST_PREFIX} characters of the digest at least."
            )
        if prefix in self.state.known:
            self.state.check_active(prefix)
            return prefix
        found = [name for name in self.state.active if name.startswith(prefix)]
        if len(found) != 1:
            gone = [name for name in self.state.gone if name.startswith(prefix)]
            if not found and gone:
                self.state.check_active(gone[0])
            raise ContributionError(f"{len(found)} contributions of the ledger begin with {prefix[:64]!r}.")
        return found[0]

    def add(self, contribution_folder: Path, identity: Identity) -> Contribution:
        """Check a contribution and take a copy in; what it replaces goes out in the same entry.

        Raises:
            ContributionError: Why it is refused. The ledger is as before then.
        """
        with self._writing(identity):
            sent = Contribution.load(contribution_folder, self.base, self.roster, contents=False)
            self._check(sent)
            staged = self.folder / CONTRIBUTIONS / f"{INCOMING}{os.getpid()}"
            try:
                copied = self._stage(contribution_folder, staged, sent.manifest)
                self._check(copied)
                kept = self.folder / CONTRIBUTIONS / copied.digest
                staged.rename(kept)
                sync_folder(kept.parent)
                manifest = copied.manifest
                try:
                    self._append(
                        identity,
                        event="add",
                        contribution=copied.digest,
                        site=copied.site,
                        sequence=manifest.sequence,
                        replaces=list(manifest.replaces),
                    )
                except BaseException:
                    if copied.digest not in self.state.known:
                        shutil.rmtree(kept, ignore_errors=True)
                    raise
            finally:
                shutil.rmtree(staged, ignore_errors=True)
            self._tidy()
            return self.load(copied.digest, self.roster, contents=False)

    def remove(self, digest_or_prefix: str, reason: str, identity: Identity) -> None:
        """Take a contribution out for good: its tensors are deleted, its manifest and signature stay as evidence.

        Raises:
            ContributionError: There is no such contribution in the ledger.
        """
        with self._writing(identity):
            self._append(identity, event="remove", contribution=self.find(digest_or_prefix), reason=reason)
            self._tidy()

    def accept(self, digest_or_prefix: str, note: str, identity: Identity) -> None:
        """A person lets a contribution in that the admission report had flagged."""
        with self._writing(identity):
            self._append(identity, event="accept", contribution=self.find(digest_or_prefix), note=note)

    def hold(self, digest_or_prefix: str, note: str, identity: Identity) -> None:
        """A person holds a contribution back: it stays in the ledger and out of releases."""
        with self._writing(identity):
            self._append(identity, event="hold", contribution=self.find(digest_or_prefix), note=note)

    def join(self, site: str, public: bytes, identity: Identity) -> None:
        """Pin a further site's key, which has been compared outside the system.

        Raises:
            ContributionError: The site or the key is on the roster already, or is none.
        """
        with self._writing(identity):
            if site in self.roster.keys:
                raise ContributionError(f"site {site!r} is on the ledger's roster already.")
            _refusing(lambda: self.roster.trust(site, public))
            self._append(identity, event="join", site=site, key=to_base64(public))

    def record_release(
        self, model_digest: str, recipe_digest: str, digests: Sequence[str], identity: Identity
    ) -> Release:
        """Record that a merged model was given out.

        Args:
            model_digest: SHA-256 of the model, hexadecimal.
            recipe_digest: Of the recipe.
            digests: The contributions in it, sorted.
            identity: The coordinator's.

        Raises:
            ContributionError: A contribution is not in the ledger, or held back.
        """
        with self._writing(identity):
            self._append(
                identity, event="release", model=model_digest, recipe=recipe_digest, contributions=list(digests)
            )
        return self.releases[-1]

    def verify(self, head: str | None = None) -> list[str]:
        """Check everything again, from the files.

        Args:
            head: A head that was noted elsewhere; the chain must have grown from it.

        Returns:
            What was checked, and what a crash left over, for people to read.

        Raises:
            ContributionError: The first thing that is wrong.
        """
        from polyclinic.vectors.ledger_check import check_ledger

        fresh = Ledger(self.folder)
        self._lines, self.entries, self.state = fresh._lines, fresh.entries, fresh.state
        return check_ledger(fresh, head)

    def load(self, name: str, roster: Roster, *, contents: bool) -> Contribution:
        """An active contribution by its whole digest; ``contents`` as in ``Contribution.load``.

        Raises:
            ContributionError: It is damaged, or another one than the chain says.
        """
        folder = self.folder / CONTRIBUTIONS / name
        found = Contribution.load(folder, self.base, roster, contents=contents)
        check_entry(folder, found.manifest, self.state.known[name])
        return found

    def _check(self, sent: Contribution) -> None:
        self.state.check_add(sent.digest, sent.site, sent.manifest.sequence, sent.manifest.replaces)

    def _stage(self, folder: Path, staged: Path, manifest: Manifest) -> Contribution:
        """A copy that nobody else writes to, checked in full. Whoever sent the folder may still be writing to it."""
        most = {MANIFEST_FILE: LARGEST, SIGNATURE_FILE: LARGEST, **{file.name: file.bytes for file in manifest.files}}
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        for name in sorted(plain_names(folder, ALLOWED)):
            _copy(folder / name, staged / name, most.get(name, 0))
        sync_folder(staged)
        return Contribution.load(staged, self.base, self.roster)

    def _read(self) -> None:
        self._lines, self.entries = read_chain(self.folder / CHAIN, self._genesis, self._coordinator)
        self.state = State()
        for entry in self.entries:
            self.state.apply(entry)

    def _append(self, identity: Identity, **fields: object) -> None:
        entry: AnyEntry
        own = {"index": len(self._lines), "time": now(), "previous": self.head, **fields}
        line, entry = signed_line(own, identity.sign)
        self.state.apply(entry)
        if sum(len(part) + 1 for part in (*self._lines, line)) > LARGEST_CHAIN:
            self._read()
            raise ContributionError(f"{self.folder / CHAIN} is full: {LARGEST_CHAIN} bytes. Begin a new ledger.")
        try:
            write_whole(self.folder / CHAIN, b"".join(part + b"\n" for part in (*self._lines, line)))
        except BaseException:
            self._read()
            raise
        self._lines.append(line)
        self.entries.append(entry)

    @contextmanager
    def _writing(self, identity: Identity) -> Iterator[None]:
        """Alone: the lock of the folder, the chain as it is now, nothing left over."""
        if identity.public != self._coordinator:
            wanted = fingerprint(self.about.coordinator, self._coordinator)
            raise ContributionError(
                f"{self.folder} is signed by {self.about.coordinator!r}, {wanted}; the key is {identity.fingerprint}."
            )
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            _lock(descriptor, self.folder)
            self._read()
            self._tidy()
            yield
        except OSError as error:
            raise ContributionError(f"{self.folder} can't be written: {error.strerror or error}.") from None
        finally:
            os.close(descriptor)

    def _tidy(self) -> None:
        """Delete what the chain does not name, and tensors of what has gone out."""
        for path in self.folder.iterdir():
            if is_temporary(path):
                path.unlink(missing_ok=True)
        for path in (self.folder / CONTRIBUTIONS).iterdir():
            if path.name not in self.state.known and (is_digest(path.name) or path.name.startswith(INCOMING)):
                shutil.rmtree(path)
        for name in self.state.gone:
            for file in FILES:
                (self.folder / CONTRIBUTIONS / name / file).unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """What ``whole_file`` leaves when it is killed."""
    return path.name.startswith(f".{CHAIN}.") and path.name.endswith(".tmp")


def check_entry(folder: Path, manifest: Manifest, entry: Add) -> None:
    """Whether a folder holds the contribution that the chain names, and the chain says of it what it says itself.

    Raises:
        ContributionError: It holds another one, or the entry says something else.
    """
    if (found := digest(manifest)) != entry.contribution:
        raise ContributionError(f"{folder} holds another contribution ({found[:12]}) than the chain says.")
    own = manifest.site, manifest.sequence, manifest.replaces
    if own != (entry.site, entry.sequence, entry.replaces):
        raise ContributionError(f"{folder}: entry {entry.index} of the chain has another site, sequence or replaces.")


def _lock(descriptor: int, folder: Path) -> None:
    """Held until the descriptor is closed, by whatever: a kill frees it."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise ContributionError(
                    f"{folder}: another process is writing to the ledger. Try again later."
                ) from None
            time.sleep(0.05)
        else:
            return


def _copy(source: Path, target: Path, most: int) -> None:
    with opened(source) as descriptor, open(descriptor, "rb", closefd=False) as file, target.open("xb") as out:
        if (left := os.fstat(descriptor).st_size) > most:
            raise ContributionError(f"{source} has {left} bytes, {most} at most were right: it changed meanwhile.")
        while left and (piece := file.read(min(left, 2**20))):
            out.write(piece)
            left -= len(piece)
        out.flush()
        os.fsync(out.fileno())


def _refusing(make: Callable[[], Made]) -> Made:
    """The same refusal, as one of ours."""
    try:
        return make()
    except PolyclinicError as error:
        raise ContributionError(str(error)) from None
