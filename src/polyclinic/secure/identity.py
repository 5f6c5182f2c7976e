"""Who is who: a site's signing key, and the roster that pins everybody's.

Keys are Ed25519 (RFC 8032). A public key becomes trusted when its fingerprint has been compared outside the system;
from then on the roster pins it, and only a person can change that file.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from polyclinic.data.names import check_site_name
from polyclinic.errors import DataError, ProtocolError, SiteError, nearest
from polyclinic.secure.key_files import (
    from_base64,
    grouped,
    read_json,
    read_secret,
    refuse_existing,
    to_base64,
    write_json,
    write_secret,
)
from polyclinic.secure.pair_secrets import pair_path, read_pair_secret

PUBLIC_BYTES = 32
SHORTEST_PASSPHRASE = 12
PASSPHRASE = "POLYCLINIC_PASSPHRASE"
"""The environment variable with the passphrase of an encrypted key."""


class Identity:
    """One site's Ed25519 key. Neither ``repr`` nor an error message shows the private half."""

    def __init__(self, site: str, private: Ed25519PrivateKey) -> None:
        check_site_name(site, "an identity")
        self.site = site
        self._private = private
        self.public: bytes = private.public_key().public_bytes_raw()

    def __repr__(self) -> str:
        return f"Identity({self.site!r}, {self.fingerprint})"

    @classmethod
    def new(cls, site: str) -> Identity:
        """A fresh key from the system's random numbers.

        Raises:
            DataError: The site's name is not a plain name.
        """
        return cls(site, Ed25519PrivateKey.generate())

    @property
    def fingerprint(self) -> str:
        """What people compare: see ``fingerprint``."""
        return fingerprint(self.site, self.public)

    def sign(self, message: bytes) -> bytes:
        """A signature of 64 bytes."""
        return self._private.sign(message)

    def save(self, path: Path, passphrase: str | None) -> None:
        """Write the private key as PKCS #8 in PEM, readable by its owner only; encrypted where a passphrase is given.

        Raises:
            SiteError: A file is there already, or the passphrase is shorter than 12 characters.
        """
        refuse_existing(path)
        encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
        if passphrase is not None:
            if len(passphrase) < SHORTEST_PASSPHRASE:
                raise SiteError(
                    f"the passphrase has {len(passphrase)} characters; give at least {SHORTEST_PASSPHRASE}, as a few "
                    "random words."
                )
            encryption = serialization.BestAvailableEncryption(passphrase.encode())
        pem = self._private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
        write_secret(path, pem)

    @classmethod
    def load(cls, path: Path, site: str | None = None, passphrase: str | None = None) -> Identity:
        """Read a private key that ``save`` wrote.

        Args:
            path: The file.
            site: Whose it is; by default the file's name without its ending.
            passphrase: Of an encrypted key.

        Raises:
            SiteError: The file can't be read, others than its owner can read it, the passphrase is wrong, missing or
                of no use, or it is no Ed25519 key.
        """
        pem = read_secret(path)
        if passphrase is None and is_encrypted(pem):
            raise SiteError(f"{path} is encrypted: set {PASSPHRASE} to its passphrase.")
        if passphrase is not None and not is_encrypted(pem):
            raise SiteError(
                f"{path} is not encrypted, yet a passphrase was given. Check the file, or unset {PASSPHRASE}."
            )
        try:
            private = serialization.load_pem_private_key(pem, None if passphrase is None else passphrase.encode())
        except (ValueError, TypeError, UnsupportedAlgorithm):
            reason = (
                "is damaged" if passphrase is None else "can't be opened: the passphrase is wrong, or it is damaged"
            )
            raise SiteError(f"{path} {reason}.") from None
        if not isinstance(private, Ed25519PrivateKey):
            raise SiteError(f"{path} holds another kind of key than Ed25519. Make one with polyclinic keys new.")
        return cls(path.stem if site is None else site, private)

    def save_public(self, path: Path) -> None:
        """Write the public key with the site's name, for the others to trust.

        Raises:
            SiteError: A file is there already.
        """
        refuse_existing(path)
        write_json(path, {"site": self.site, "key": to_base64(self.public)})


@dataclass(frozen=True)
class Roster:
    """The pinned public keys, 32 bytes each.

    Raises:
        SiteError: A key of another length, or one key under two names: that site would count twice.
        DataError: A name that is not plain.
    """

    keys: Mapping[str, bytes]

    def __post_init__(self) -> None:
        owners: dict[bytes, str] = {}
        for site, key in self.keys.items():
            check_site_name(site, "a roster")
            _public_key(key, f"the roster's key of {site!r}")
            if owners.setdefault(key, site) != site:
                raise SiteError(f"the roster has one key for {owners[key]!r} and {site!r}: each site needs its own.")
        object.__setattr__(self, "keys", MappingProxyType(dict(self.keys)))

    def verify(self, site: str, message: bytes, signature: bytes) -> None:
        """Accept a message if this site signed it.

        Raises:
            ProtocolError: It did not, or it is not on the roster.
        """
        try:
            Ed25519PublicKey.from_public_bytes(self._key(site)).verify(signature, message)
        except InvalidSignature:
            raise ProtocolError(
                f"the signature of site {site!r} is wrong: the message was altered, or signed with another key than "
                f"the pinned {fingerprint(site, self.keys[site])}. Compare its fingerprint with the site by telephone."
            ) from None

    def digest(self, sites: Sequence[str]) -> str:
        """SHA-256 in hexadecimal over the names and keys of these sites, whatever their order.

        Raises:
            ProtocolError: A site is not on the roster.
        """
        found = hashlib.sha256(b"polyclinic roster 1\0")
        for site in sorted(set(sites)):
            found.update(len(site).to_bytes(1) + site.encode() + self._key(site))
        return found.hexdigest()

    def trust(self, site: str, public: bytes) -> Roster:
        """The roster with this key pinned as well.

        Raises:
            ProtocolError: Another key is pinned for this site.
        """
        if self.keys.get(site, public) != public:
            raise ProtocolError(
                f"site {site!r} is pinned to the key {fingerprint(site, self.keys[site])}; this one is "
                f"{fingerprint(site, public)}. If the site has a new key, take its old one out of the file by hand."
            )
        return Roster({**self.keys, site: public})

    @classmethod
    def load(cls, path: Path) -> Roster:
        """Read a roster: JSON, ``{"sites": {name: key in base64}}``.

        Raises:
            SiteError, DataError: Names the file and what is wrong in it.
        """
        sites = read_json(path, {"sites"})["sites"]
        if not isinstance(sites, dict):
            raise SiteError(f'{path}: "sites" must map names to keys.')
        try:
            return cls({site: from_base64(text, f"key of {site!r}") for site, text in sites.items()})
        except (SiteError, DataError) as error:
            raise type(error)(f"{path}: {error}") from None

    def save(self, path: Path) -> None:
        """Write the roster as a whole, sorted by name."""
        write_json(path, {"sites": {site: to_base64(self.keys[site]) for site in sorted(self.keys)}})

    def _key(self, site: str) -> bytes:
        if site not in self.keys:
            raise ProtocolError(
                f"site {site!r} is not on the roster. {nearest(site, self.keys)} Add it with polyclinic keys trust."
            )
        return self.keys[site]


@dataclass(frozen=True)
class Credentials:
    """What a site brings to a secure sum.

    Attributes:
        identity: Its signing key.
        roster: Whom it trusts.
        pair_secrets: ``{peer: 32 bytes}`` shared with single peers beforehand; may be empty.
    """

    identity: Identity
    roster: Roster
    pair_secrets: Mapping[str, bytes] = field(default_factory=dict, repr=False)


def fingerprint(site: str, public: bytes) -> str:
    """160 bits of SHA-256 over a name and its public key, as ten groups of four hexadecimal digits."""
    return grouped(hashlib.sha256(b"polyclinic key 1\0" + len(site).to_bytes(1) + site.encode() + public).hexdigest())


def ephemeral_credentials(sites: Sequence[str]) -> dict[str, Credentials]:
    """Fresh keys, all on one roster, for sites that live in one process; they end with it."""
    identities = {site: Identity.new(site) for site in sites}
    roster = Roster({site: identity.public for site, identity in identities.items()})
    return {site: Credentials(identity, roster) for site, identity in identities.items()}


def load_credentials(site: str, keys_folder: Path, roster_path: Path, passphrase: str | None) -> Credentials:
    """A site's key and pair secrets from its folder, and the roster.

    Args:
        site: Its name.
        keys_folder: With ``<site>.key`` and, for some peers, a secret that ``new_pair_secret`` wrote.
        roster_path: The pinned public keys.
        passphrase: Of an encrypted key; ``ask_passphrase`` finds it.

    Raises:
        SiteError: A file is missing, damaged or open to others, or the roster has another key for this site.
        DataError: A name is not plain.
    """
    check_site_name(site, str(keys_folder))
    roster = Roster.load(roster_path)
    identity = Identity.load(key_path(keys_folder, site), site, passphrase)
    if roster.keys.get(site) != identity.public:
        pinned = fingerprint(site, roster.keys[site]) if site in roster.keys else "none"
        raise SiteError(
            f"{roster_path}: the key of site {site!r} is {identity.fingerprint}; the roster has {pinned}. The others "
            f"would refuse its messages. Take an old key out of the file by hand, then add {site}.pub with polyclinic "
            "keys trust."
        )
    paths = {peer: pair_path(keys_folder, site, peer) for peer in roster.keys if peer != site}
    pairs = {peer: read_pair_secret(path, site, peer) for peer, path in paths.items() if path.exists()}
    return Credentials(identity, roster, pairs)


def ask_passphrase(path: Path) -> str | None:
    """The passphrase of a key file: None if it is not encrypted, else from the environment, else typed in.

    Raises:
        SiteError: The file can't be read, or nobody is there to type.
    """
    if not is_encrypted(read_secret(path)):
        return None
    return os.environ.get(PASSPHRASE) or type_passphrase(f"Passphrase of {path}: ")


def type_passphrase(prompt: str) -> str:
    """A passphrase typed at the terminal, unseen.

    Raises:
        SiteError: There is no terminal.
    """
    if not sys.stdin.isatty():
        raise SiteError(f"a passphrase is needed and there is no terminal to type it: set {PASSPHRASE}.")
    return getpass.getpass(prompt)


def key_path(folder: Path, site: str) -> Path:
    """Where a site's private key lies."""
    check_site_name(site, str(folder))
    return folder / f"{site}.key"


def public_path(folder: Path, site: str) -> Path:
    """Where a site's public key lies."""
    check_site_name(site, str(folder))
    return folder / f"{site}.pub"


def read_public(path: Path) -> tuple[str, bytes]:
    """Name and public key of a file that ``Identity.save_public`` wrote.

    Raises:
        SiteError, DataError: Names the file and what is wrong in it.
    """
    found = read_json(path, {"site", "key"})
    check_site_name(found["site"], str(path))
    key = from_base64(found["key"], f"{path}: key")
    _public_key(key, f"{path}: the key")
    return found["site"], key


def _public_key(key: bytes, where: str) -> Ed25519PublicKey:
    if len(key) != PUBLIC_BYTES:
        raise SiteError(f"{where} has {len(key)} bytes; Ed25519 keys have {PUBLIC_BYTES}.")
    return Ed25519PublicKey.from_public_bytes(key)


def is_encrypted(pem: bytes) -> bool:
    """Whether the content of a private key file needs a passphrase."""
    return b"BEGIN ENCRYPTED PRIVATE KEY" in pem
