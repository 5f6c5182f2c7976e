"""Files of keys: written whole, secret ones for their owner alone, JSON without surprises, fingerprints."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from polyclinic.errors import SiteError
from polyclinic.files import whole_file


def refuse_existing(path: Path) -> None:
    """Keys are never written over.

    Raises:
        SiteError: A file is there already.
    """
    if path.exists():
        raise SiteError(f"{path} is there already. Keys are not written over: choose another folder, or move it away.")


def write_secret(path: Path, content: bytes) -> None:
    """Write a file that only its owner can read, at any moment, and make its folder if need be.

    Raises:
        SiteError: It can't be written.
    """
    _write(path, content, 0o600)


def read_secret(path: Path) -> bytes:
    """The content of a file that only its owner can read.

    Raises:
        SiteError: It can't be read, or others can read it too.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            # Windows has no such bits; there the folder's own rights decide.
            if os.name == "posix" and mode & 0o077:
                raise SiteError(f"{path} can be read by others (mode {mode:o}). Run chmod 600 {path}.")
            return file.read()
    except FileNotFoundError:
        raise SiteError(f"there is no file {path}. polyclinic keys new makes a site's key.") from None
    except OSError as error:
        raise SiteError(f"{path} can't be read: {error.strerror}.") from None


def write_json(path: Path, content: Mapping[str, Any], *, secret: bool = False) -> None:
    """Write a JSON object, readable by its owner only where it is ``secret``, and make its folder if need be.

    Raises:
        SiteError: It can't be written.
    """
    _write(path, json.dumps(content, indent=2).encode() + b"\n", 0o600 if secret else 0o666)


def read_json(path: Path, wanted: set[str], *, secret: bool = False) -> dict[str, Any]:
    """A JSON object with exactly the ``wanted`` fields, and no name twice anywhere in it.

    Raises:
        SiteError: The file can't be read or holds anything else; or it is ``secret`` and others can read it.
    """
    try:
        found = json.loads(read_secret(path) if secret else path.read_bytes(), object_pairs_hook=_once)
    except OSError as error:
        raise SiteError(f"{path} can't be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise SiteError(f"{path} is no key file: {error}.") from None
    if not isinstance(found, dict) or found.keys() != wanted:
        raise SiteError(f"{path} is no key file of this kind: it must have the fields {', '.join(sorted(wanted))}.")
    return found


def to_base64(content: bytes) -> str:
    """Bytes as text."""
    return base64.b64encode(content).decode()


def from_base64(text: Any, where: str) -> bytes:
    """Text as bytes.

    Raises:
        SiteError: It is no text in base64.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError):
        raise SiteError(f"{where} is not in base64.") from None


def grouped(digest: str) -> str:
    """The first 160 bits of a hexadecimal digest in ten groups of four digits, to be read out."""
    return " ".join(digest[at : at + 4] for at in range(0, 40, 4))


def _write(path: Path, content: bytes, mode: int) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with whole_file(path, mode) as file:
            file.write(content)
    except OSError as error:
        raise SiteError(f"{path} can't be written: {error.strerror}.") from None


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is there twice")
        found[name] = value
    return found
