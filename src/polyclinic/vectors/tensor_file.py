"""Tensors in one safetensors file, read and written one at a time.

The form (https://huggingface.co/docs/safetensors): eight bytes with the length of a header, little-endian; the header
in JSON, with dtype, shape and place of every tensor; the values, row by row. Files are read with ``pread`` and never
mapped: memory is that of the tensors that are asked for, and a file that shrinks gives an error, not a signal.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from polyclinic.errors import ContributionError
from polyclinic.files import whole_file
from polyclinic.vectors.folders import opened
from polyclinic.vectors.tensor_header import (
    DTYPE_NAMES,
    DTYPES,
    LONGEST_HEADER,
    TensorSpec,
    header_room,
    make_header,
    other_form,
    parse_header,
)

__all__ = [
    "DTYPES",
    "DTYPE_NAMES",
    "TensorFile",
    "TensorSpec",
    "TensorWriter",
    "altered",
    "header_room",
    "sha256_of",
    "tensor_bytes",
]

_PIECE = 2**24


class TensorFile:
    """A safetensors file whose header is checked and whose tensors are read when asked for.

    As a context manager it keeps the file open; otherwise each read opens it, and makes sure that it is still the
    same one.

    Args:
        path: A regular file.
        max_bytes: A larger file is refused before it is read.
        max_header: A longer header is refused before it is read; 100 MB at the very most.
        sha256: What the whole file must hash to, hexadecimal; None: anything.

    Raises:
        ContributionError: Names the file and the reason.
    """

    def __init__(
        self, path: Path, *, max_bytes: int, max_header: int = LONGEST_HEADER, sha256: str | None = None
    ) -> None:
        self.path = path
        self._held: int | None = None
        with opened(path) as descriptor:
            self._stamp = _stamp(descriptor)
            self.nbytes = os.fstat(descriptor).st_size
            if self.nbytes > max_bytes:
                raise ContributionError(f"{path} has {self.nbytes} bytes; at most {max_bytes} can be right.")
            if sha256 is not None and _digest(descriptor, path) != sha256:
                raise altered(path)
            header = _read_header(descriptor, path, self.nbytes, min(max_header, 100_000_000))
        self._values = 8 + len(header)
        self.metadata, self.specs = parse_header(header, self.nbytes - self._values, str(path))

    def __enter__(self) -> TensorFile:
        self._stack = self._fresh()
        self._held = self._stack.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, if it is kept open. It can still be read."""
        if self._held is not None:
            self._held = None
            self._stack.__exit__(None, None, None)

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own.

        Raises:
            ContributionError: There is no such tensor, or the file has changed since it was checked.
        """
        spec = self.spec(name)
        return self.read_into(name, torch.empty(spec.shape, dtype=spec.dtype))

    def read_into(self, name: str, out: Tensor) -> Tensor:
        """One tensor into a contiguous one of the same shape and type.

        Raises:
            ContributionError: As ``read``. ValueError: ``out`` does not fit.
        """
        spec = self.spec(name)
        if tuple(out.shape) != spec.shape or out.dtype != spec.dtype or not out.is_contiguous():
            raise ValueError(f"{name!r} of shape {spec.shape} does not fit into {tuple(out.shape)}, {out.dtype}")
        buffer = tensor_bytes(out)
        with self._descriptor() as descriptor:
            _fill(descriptor, buffer, self._values + spec.start, self.path)
        return out

    def sha256(self) -> str:
        """SHA-256 of the whole file in hexadecimal."""
        with self._descriptor() as descriptor:
            return _digest(descriptor, self.path)

    def spec(self, name: str) -> TensorSpec:
        """Type, shape and place of a tensor.

        Raises:
            ContributionError: There is no such tensor.
        """
        if name not in self.specs:
            raise ContributionError(f"{self.path} has no tensor {name!r}.")
        return self.specs[name]

    @contextmanager
    def _descriptor(self) -> Iterator[int]:
        if self._held is not None:
            yield self._held
        else:
            with self._fresh() as descriptor:
                yield descriptor

    @contextmanager
    def _fresh(self) -> Iterator[int]:
        with opened(self.path) as descriptor:
            if _stamp(descriptor) != self._stamp:
                raise ContributionError(f"{self.path} has changed since it was checked.")
            yield descriptor


class TensorWriter:
    """Writes a safetensors file tensor by tensor, in an order given beforehand; as a whole or not at all.

    The caller's order is kept. Every tensor must start at a multiple of its element size, so that readers can map the
    file: give tensors of wider types first, or one type only.

    Args:
        path: What it takes the place of.
        specs: Name, type and shape of every tensor, in the order of the writing.
        metadata: Short texts.

    Attributes:
        sha256: Of the finished file, hexadecimal.
        nbytes: Its size.

    Raises:
        ContributionError: The specs are none for a file, a tensor comes out of turn or with another shape or type,
            some never come, or the disk refuses.
    """

    def __init__(
        self,
        path: Path,
        specs: Sequence[tuple[str, torch.dtype, Sequence[int]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self._specs = [(name, dtype, tuple(shape)) for name, dtype, shape in specs]
        self._header = make_header(self._specs, metadata or {}, str(path))
        self._hash = hashlib.sha256()
        self._written = 0
        self.nbytes = 0
        self._whole = whole_file(path)
        self._file: BinaryIO | None = None

    @property
    def sha256(self) -> str:
        """SHA-256 of what is written so far, hexadecimal."""
        return self._hash.hexdigest()

    def __enter__(self) -> TensorWriter:
        try:
            self._file = self._whole.__enter__()
        except OSError as error:
            raise self._refused(error) from None
        self._put(self._header)
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor."""
        if self._written == len(self._specs):
            raise ContributionError(f"{self.path}: tensor {name!r} was not announced; all {self._written} are written.")
        wanted, dtype, shape = self._specs[self._written]
        if name != wanted:
            raise ContributionError(f"{self.path}: tensor {name!r} came, {wanted!r} is next.")
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ContributionError(
                f"{self.path}: tensor {name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}; {dtype} "
                f"and {shape} were announced."
            )
        self._put(tensor_bytes(tensor))
        self._written += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self._written < len(self._specs):
            missing = ContributionError(
                f"{self.path}: {len(self._specs) - self._written} tensors were never written, the first is "
                f"{self._specs[self._written][0]!r}."
            )
            self._whole.__exit__(type(missing), missing, None)
            raise missing
        try:
            self._whole.__exit__(kind, error, trace)
        except OSError as refusal:
            raise self._refused(refusal) from None

    def _put(self, content: bytes | memoryview) -> None:
        assert self._file is not None
        try:
            self._file.write(content)
        except OSError as error:
            raise self._refused(error) from None
        self._hash.update(content)
        self.nbytes += len(content)

    def _refused(self, error: OSError) -> ContributionError:
        return ContributionError(f"{self.path} can't be written: {error.strerror or error}.")


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's values as they lie in a file, row by row; no copy where they lie so in memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, in pieces.

    Raises:
        ContributionError: It is no regular file, or can't be read.
    """
    with opened(path) as descriptor:
        return _digest(descriptor, path)


def altered(path: Path) -> ContributionError:
    """The refusal of a file with another digest."""
    return ContributionError(f"{path} was altered: its SHA-256 is not the one that was signed.")


def _digest(descriptor: int, path: Path) -> str:
    found = hashlib.sha256()
    buffer = bytearray(2**20)
    view, at = memoryview(buffer), 0
    while count := _pread(descriptor, view, at, path):
        found.update(view[:count])
        at += count
    return found.hexdigest()


def _pread(descriptor: int, buffer: memoryview, at: int, path: Path) -> int:
    try:
        return os.preadv(descriptor, [buffer], at)
    except OSError as error:
        raise ContributionError(f"{path} can't be read: {error.strerror}.") from None


def _stamp(descriptor: int) -> tuple[int, ...]:
    """What changes when a file is exchanged or written to; the time of the last change of all can't be set back."""
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _fill(descriptor: int, buffer: memoryview, at: int, path: Path) -> None:
    done = 0
    while done < len(buffer):
        count = _pread(descriptor, buffer[done : done + _PIECE], at + done, path)
        if count == 0:
            raise ContributionError(f"{path} ended while it was read.")
        done += count


def _read_header(descriptor: int, path: Path, size: int, most: int) -> bytes:
    start = os.pread(descriptor, 9, 0)
    length = int.from_bytes(start[:8], "little")
    # A pickle's or an archive's first bytes can also be the length of a header, so the brace decides.
    if len(start) < 9 or start[8:] != b"{":
        raise ContributionError(f"{path} {other_form(start)}; only safetensors files are read.")
    if length > most:
        raise ContributionError(f"{path}: its header is said to have {length} bytes; at most {most} are read.")
    if length > size - 8:
        raise ContributionError(f"{path}: its header is said to have {length} bytes, the file has {size}.")
    header = bytearray(length)
    _fill(descriptor, memoryview(header), 8, path)
    return bytes(header)
