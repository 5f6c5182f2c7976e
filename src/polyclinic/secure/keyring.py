"""What ``polyclinic keys`` does with a folder of keys: make one, show all, pin one."""

from __future__ import annotations

from pathlib import Path

from polyclinic.errors import SiteError
from polyclinic.secure.identity import (
    Identity,
    Roster,
    fingerprint,
    is_encrypted,
    key_path,
    public_path,
    read_public,
)
from polyclinic.secure.key_files import read_secret, refuse_existing
from polyclinic.secure.pair_secrets import describe_pair_secret


def new_key(site: str, folder: Path, passphrase: str | None) -> Identity:
    """Make a site's key: ``<site>.key`` to keep and ``<site>.pub`` to give away, in a folder that is made if need be.

    Raises:
        SiteError: One of the files is there already, the folder can't be written, or the passphrase is too short.
        DataError: The site's name is not a plain name.
    """
    identity, private, public = Identity.new(site), key_path(folder, site), public_path(folder, site)
    refuse_existing(private)
    refuse_existing(public)
    identity.save(private, passphrase)
    identity.save_public(public)
    return identity


def trust_file(roster: Path, public: Path, compared: str) -> str:
    """Pin the key of a public key file in a roster file, which is made if need be.

    Args:
        roster: The roster file.
        public: The site's ``.pub``.
        compared: The fingerprint that the site told outside the system; spaces, colons and capitals do not matter.

    Returns:
        The site's name.

    Raises:
        SiteError: The file holds a key of another fingerprint, or a file is damaged.
        ProtocolError: The roster pins another key for this site.
    """
    site, key = read_public(public)
    found = fingerprint(site, key)
    if _bare(compared) != _bare(found):
        raise SiteError(
            f"{public}: the key of site {site!r} is {found}, not {compared}. Do not trust it: ask the site."
        )
    before = Roster.load(roster) if roster.exists() else Roster({})
    before.trust(site, key).save(roster)
    return site


def describe_keys(path: Path) -> list[dict[str, str]]:
    """What a file, or every key file of a folder, holds: ``file``, ``site``, ``what`` and ``fingerprint``.

    Of an encrypted private key only that it is encrypted; its ``.pub`` has the fingerprint.

    Raises:
        SiteError, DataError: Nothing is there, or a file can't be read or is damaged.
    """
    if not path.is_dir():
        return _described(path)
    found = sorted(p for p in path.iterdir() if p.suffix in {".key", ".pub", ".secret"} or p.name == "roster.json")
    if not found:
        raise SiteError(f"{path} has no keys. Make one with polyclinic keys new.")
    return [row for file in found for row in _described(file)]


def _described(path: Path) -> list[dict[str, str]]:
    if path.suffix == ".key":
        encrypted = is_encrypted(read_secret(path))
        rows = [(path.stem, "private key", "encrypted" if encrypted else Identity.load(path).fingerprint)]
    elif path.suffix == ".pub":
        site, key = read_public(path)
        rows = [(site, "public key", fingerprint(site, key))]
    elif path.suffix == ".secret":
        sites, text = describe_pair_secret(path)
        rows = [(sites, "pair secret", text)]
    else:
        rows = [(site, "pinned key", fingerprint(site, key)) for site, key in sorted(Roster.load(path).keys.items())]
    return [{"file": path.name, "site": site, "what": what, "fingerprint": text} for site, what, text in rows]


def _bare(text: str) -> str:
    return "".join(text.split()).replace(":", "").lower()
