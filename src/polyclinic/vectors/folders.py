"""Files from elsewhere, opened with care: plain, bounded, one JSON form; and folders that are there as a whole or not.

What arrives from another hospital is read through these functions only. A link is never followed, a size is known
before a byte is read, and JSON has no key twice and no number that is none.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import BaseModel, Field, ValidationError

from polyclinic.errors import ContributionError
from polyclinic.files import whole_file

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256 in hexadecimal."""
Moment = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
"""A time in UTC, to the second."""
_SHOWN = 80

Model = TypeVar("Model", bound=BaseModel)


def now() -> str:
    """This moment in UTC, as ``2026-01-31T12:00:00Z``."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def is_digest(name: str) -> bool:
    """Whether this is a SHA-256 in hexadecimal."""
    return re.fullmatch(r"[0-9a-f]{64}", name) is not None


def canonical_json(value: Any) -> bytes:
    """The one form that is hashed and signed: ASCII, sorted keys, no spaces.

    Raises:
        ValueError: A number is infinite or none.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def parse_json(content: bytes, where: str) -> Any:
    """JSON in UTF-8, without a key twice in one object and without NaN or Infinity.

    Raises:
        ContributionError: It is anything else; ``where`` names the file.
    """
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ContributionError(f"{where} is no JSON of ours: {str(error)[:_SHOWN]}.") from None


def validated(model: type[Model], content: bytes, where: str) -> Model:
    """Strict JSON as settings of one class.

    Raises:
        ContributionError: Names the file, the field and what is wrong with it.
    """
    parse_json(content, where)
    try:
        return model.model_validate_json(content, strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in fault["loc"])[:_SHOWN] or "(top level)"
        if fault["type"] == "extra_forbidden":
            raise ContributionError(f"{where}: there is no field {place}.") from None
        message = fault["msg"].removeprefix("Value error, ").rstrip(".")
        seen = "" if fault["type"] in ("value_error", "missing") else f" Seen: {repr(fault['input'])[:_SHOWN]}."
        raise ContributionError(f"{where}: {place}: {message}.{seen}") from None


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of a regular file, for reading; closed at the end.

    Raises:
        ContributionError: There is none, it is a link, a folder, a pipe or a device, or it can't be read.
    """
    # A pipe would wait for a writer: it is opened without waiting, and refused by its kind.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise ContributionError(f"there is no file {path}.") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ContributionError(f"{path} is a link. Put the file itself there.") from None
        raise ContributionError(f"{path} can't be read: {error.strerror}.") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ContributionError(f"{path} is no regular file.")
        yield descriptor
    finally:
        os.close(descriptor)


def read_small(path: Path, most: int) -> bytes:
    """The whole content of a file of at most so many bytes.

    Raises:
        ContributionError: It is larger, or ``opened`` refuses it.
    """
    with opened(path) as descriptor, os.fdopen(os.dup(descriptor), "rb") as file:
        size = os.fstat(descriptor).st_size
        if size > most:
            raise ContributionError(f"{path} has {size} bytes; at most {most} are read.")
        content = file.read(most + 1)
    if len(content) > most:
        raise ContributionError(f"{path} grew while it was read.")
    return content


def plain_names(folder: Path, allowed: Collection[str]) -> frozenset[str]:
    """The names in a folder that may hold these files and nothing else.

    Raises:
        ContributionError: The folder is missing or a link, or holds another name, a link or a folder.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise ContributionError(
            f"{folder} is {'a link' if folder.is_symlink() else 'no folder'}. Give the folder itself."
        )
    found = set()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name not in allowed:
                raise ContributionError(
                    f"{folder} holds {entry.name[:_SHOWN]!r}; only {', '.join(sorted(allowed))} may lie there."
                )
            if not entry.is_file(follow_symlinks=False):
                kind = "a link" if entry.is_symlink() else "no regular file"
                raise ContributionError(f"{folder / entry.name} is {kind}. Put the file itself there.")
            found.add(entry.name)
    return frozenset(found)


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file as a whole.

    Raises:
        ContributionError: It can't be written.
    """
    try:
        with whole_file(path) as file:
            file.write(content)
    except OSError as error:
        raise ContributionError(f"{path} can't be written: {error.strerror or error}.") from None


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the name ``out`` when the block ends.

    An error leaves nothing; a crash leaves ``out`` whole or not there (and a hidden folder beside it, which may be
    deleted).

    Raises:
        ContributionError: ``out`` exists, or can't be made.
    """
    if os.path.lexists(out):
        raise ContributionError(f"{out} is there already. Nothing is written over: choose another folder.")
    staged = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        yield staged
        sync_folder(staged)
        staged.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        # The caller may read other files in the block: their errors are not ours to tell.
        place = error.filename
        if place is not None and str(staged) not in str(place) and Path(place) not in (out, *out.parents):
            raise
        raise ContributionError(f"{out} can't be written: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:40]!r} is there twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")
