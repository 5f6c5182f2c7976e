"""Secrets shared by two sites beforehand, carried by hand.

A pair secret goes into every key that the two sites derive. X25519 falls to a large quantum computer, and recorded
traffic with it; 32 random bytes that never travelled over the network do not.
"""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path
from typing import Any

from polyclinic.data.names import check_site_name
from polyclinic.errors import SiteError
from polyclinic.secure.key_files import from_base64, grouped, read_json, refuse_existing, to_base64, write_json

SECRET_BYTES = 32


def pair_path(folder: Path, site: str, peer: str) -> Path:
    """Where the secret of two sites lies, whichever is named first."""
    for name in (site, peer):
        check_site_name(name, str(folder))
    return folder / f"{'--'.join(sorted((site, peer)))}.secret"


def new_pair_secret(folder: Path, site: str, peer: str) -> Path:
    """Write 32 random bytes for two sites; the file is readable by its owner only.

    Raises:
        SiteError: The sites are one, a file is there already, or it can't be written.
        DataError: A name is not plain.
    """
    path = pair_path(folder, site, peer)
    if site == peer:
        raise SiteError(f"a pair secret is between two sites; {site!r} is one.")
    refuse_existing(path)
    secret = to_base64(secrets.token_bytes(SECRET_BYTES))
    write_json(path, {"sites": sorted((site, peer)), "secret": secret}, secret=True)
    return path


def read_pair_secret(path: Path, site: str, peer: str) -> bytes:
    """The 32 bytes that two sites share.

    Raises:
        SiteError: The file can't be read, is open to others, damaged, or of another pair.
    """
    sites, secret = _read(path)
    if sites != sorted((site, peer)):
        raise SiteError(f"{path} is not the secret of {site!r} and {peer!r}. Make one with polyclinic keys pair.")
    return secret


def describe_pair_secret(path: Path) -> tuple[str, str]:
    """Whose secret it is, and a fingerprint: two sites hold the same if it is the same, and it tells nothing else.

    Raises:
        SiteError: As for ``read_pair_secret``.
    """
    sites, secret = _read(path)
    return ", ".join(map(str, sites)), grouped(hashlib.sha256(b"polyclinic pair 1\0" + secret).hexdigest())


def _read(path: Path) -> tuple[list[Any], bytes]:
    found = read_json(path, {"sites", "secret"}, secret=True)
    sites, secret = found["sites"], from_base64(found["secret"], f"{path}: secret")
    if not isinstance(sites, list) or len(secret) != SECRET_BYTES:
        raise SiteError(f"{path} is no pair secret: it must have a list of two sites and {SECRET_BYTES} bytes.")
    return sites, secret
