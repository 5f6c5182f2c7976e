"""The header of a safetensors file: read with checks that the format leaves to its reader, and written.

It says dtype, shape and place of every tensor in JSON. Nothing in it is believed: names are plain, shapes possible,
types floating-point, and the places fill the file without gap or overlap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from polyclinic.errors import ContributionError
from polyclinic.vectors.folders import canonical_json, parse_json

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The types that are read and written: floating-point ones, by their names in a header."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 2**20
"""Bytes; thousands of tensors fit."""
LONGEST_NAME = 256
MOST_AXES = 16
MOST_METADATA = 2**14


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a file: ``start`` counts bytes from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


def header_room(tensors: int) -> int:
    """Bytes that a header with so many tensors may have."""
    return LONGEST_HEADER + 1024 * tensors


def other_form(start: bytes) -> str:
    """What a file is that begins so, where it is none of ours."""
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "is a Python pickle, which could run code"
    if start[:4] == b"PK\x03\x04":
        return "is a zip archive, as torch.save writes it: pickles inside could run code"
    return "is no safetensors file"


def parse_header(header: bytes, room: int, where: str) -> tuple[dict[str, str], dict[str, TensorSpec]]:
    """The metadata, and the tensors in the order of their places.

    Args:
        header: Without its length.
        room: Bytes that follow it.
        where: Names the file in messages.

    Raises:
        ContributionError: The header is malformed, or does not describe these bytes.
    """
    found = parse_json(header, f"{where}: its header")
    if not isinstance(found, dict):
        raise ContributionError(f"{where}: its header is no object.")
    metadata = _metadata(found.pop("__metadata__", {}), where)
    specs = {name: _entry(name, entry, where) for name, entry in found.items()}
    ordered = sorted(specs.items(), key=lambda item: item[1].start)
    end = 0
    for name, spec in ordered:
        if spec.start != end:
            raise ContributionError(f"{where}: tensor {name!r} starts at {spec.start}; {end} is right, without gaps.")
        end += spec.nbytes
    if end != room:
        raise ContributionError(f"{where}: its tensors fill {end} bytes, the file has {room} for them.")
    return metadata, dict(ordered)


def _metadata(found: Any, where: str) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ContributionError(f"{where}: the metadata of its header must be texts.")
    if sum(len(key) + len(value) for key, value in found.items()) > MOST_METADATA:
        raise ContributionError(f"{where}: the metadata of its header have more than {MOST_METADATA} characters.")
    return dict(found)


def _entry(name: str, entry: Any, where: str) -> TensorSpec:
    _check_name(name, where)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ContributionError(f"{where}: tensor {name!r} must have dtype, shape and data_offsets, nothing else.")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ContributionError(f"{where}: tensor {name!r} has dtype {str(code)[:20]!r}; known: {', '.join(DTYPES)}.")
    if not _sizes(shape, 1) or len(shape) > MOST_AXES:
        raise ContributionError(f"{where}: tensor {name!r} has the impossible shape {str(shape)[:80]}.")
    if not _sizes(offsets, 0) or len(offsets) != 2:
        raise ContributionError(f"{where}: tensor {name!r} has the impossible offsets {str(offsets)[:80]}.")
    nbytes = math.prod(shape) * DTYPES[code].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise ContributionError(
            f"{where}: tensor {name!r} of shape {str(shape)[:80]} needs {nbytes} bytes; its offsets are {offsets}."
        )
    return TensorSpec(DTYPES[code], tuple(shape), offsets[0], nbytes)


def _sizes(values: Any, least: int) -> bool:
    """Whether these are whole numbers from ``least`` up to what a file can hold; ``true`` is not one of them."""
    return isinstance(values, list) and all(type(value) is int and least <= value < 2**48 for value in values)


def _check_name(name: str, where: str) -> None:
    plain = name.isprintable() and not any(part in name for part in ("/", "\\", ".."))
    if not plain or not 0 < len(name) <= LONGEST_NAME or name == "__metadata__":
        raise ContributionError(
            f"{where}: {name[:80]!r} is no plain name of a tensor: 1 to {LONGEST_NAME} printable characters, without "
            "'/', '\\' and '..'."
        )


def make_header(
    specs: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str], where: str
) -> bytes:
    """Length and header of a file with these tensors in this order.

    Raises:
        ContributionError: A name or shape is impossible, a type is unknown, or a tensor would not be aligned.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, dtype, shape in specs:
        if dtype not in DTYPE_NAMES:
            raise ContributionError(f"{where}: tensor {name!r} is {dtype}; floating-point types only.")
        if name in entries:
            raise ContributionError(f"{where}: tensor {name!r} is there twice.")
        if start % dtype.itemsize:
            raise ContributionError(
                f"{where}: tensor {name!r} would start at {start}; put tensors of wider types first."
            )
        end = start + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    header = canonical_json(entries)
    header += b" " * (-len(header) % 8)
    parse_header(header, start, where)
    return len(header).to_bytes(8, "little") + header
