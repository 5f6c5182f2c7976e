"""A message: named arrays and named scalars, nothing else, with one binary form (safetensors) and no pickle."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from polyclinic.errors import MessageError

if TYPE_CHECKING:
    from torch import Tensor

Scalar = int | float | str | bool
MAX_BYTES = 4 << 30
_DTYPES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}


@dataclass(frozen=True, slots=True)
class Message:
    """What server and sites send each other.

    Array names have the form ``group/name``, for instance ``model/conv1.weight``; a group is what a method declares
    and what a secure sum adds up. Arrays are shared, not copied: whoever receives a message must not write to them.
    """

    arrays: Mapping[str, Tensor] = field(default_factory=dict)
    scalars: Mapping[str, Scalar] = field(default_factory=dict)

    @classmethod
    def pack(cls, groups: Mapping[str, Mapping[str, Tensor]], **scalars: Scalar) -> Message:
        """A message of groups of arrays, ``{group: {name: array}}``, and scalars."""
        return cls({f"{g}/{n}": a for g, arrays in groups.items() for n, a in arrays.items()}, scalars)

    def group(self, group: str) -> dict[str, Tensor]:
        """The arrays of one group, by their names without the group."""
        prefix = f"{group}/"
        return {name[len(prefix) :]: array for name, array in self.arrays.items() if name.startswith(prefix)}

    def groups(self) -> list[str]:
        """Names of the groups, in order of first appearance."""
        return list(dict.fromkeys(name.partition("/")[0] for name in self.arrays))

    @property
    def nbytes(self) -> int:
        """Length of the binary form in bytes, without making it."""
        return 8 + len(self._header()) + sum(a.numel() * a.element_size() for a in self.arrays.values())

    def to_bytes(self) -> bytes:
        """The binary form: a safetensors file with the scalars as JSON in its metadata."""
        return b"".join(self._parts())

    def digest(self) -> str:
        """SHA-256 of the binary form, hexadecimal, without making it."""
        found = hashlib.sha256()
        for part in self._parts():
            found.update(part)
        return found.hexdigest()

    def _parts(self) -> Iterator[bytes | memoryview]:
        import torch

        header = self._header()
        yield struct.pack("<Q", len(header))
        yield header
        for array in self.arrays.values():
            flat = array.detach().cpu().contiguous().reshape(-1)
            if flat.numel():
                yield flat.view(torch.uint8).numpy().data

    @classmethod
    def from_bytes(cls, data: bytes, max_bytes: int = MAX_BYTES) -> Message:
        """Read the binary form.

        Raises:
            MessageError: Longer than ``max_bytes``, or not a whole message in our form.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        if len(data) > max_bytes:
            raise MessageError(f"a message of {len(data)} bytes is over the limit of {max_bytes} bytes.")
        try:
            arrays = load(data)
            (length,) = struct.unpack("<Q", data[:8])
            header = json.loads(data[8 : 8 + length])
            scalars = json.loads(header["__metadata__"]["scalars"])
        except (SafetensorError, KeyError, ValueError, RecursionError, struct.error) as error:
            raise MessageError(f"a message of {len(data)} bytes is damaged or not in our form: {error}") from None
        if not isinstance(scalars, dict) or not all(isinstance(v, Scalar) for v in scalars.values()):
            raise MessageError("a message holds scalars that are not numbers or texts.")
        order = [name for name in header if name != "__metadata__"]
        return cls({name: arrays[name] for name in order}, scalars)

    def _header(self) -> bytes:
        entries: dict[str, object] = {"__metadata__": {"scalars": json.dumps(dict(self.scalars))}}
        start = 0
        for name, array in self.arrays.items():
            if name == "__metadata__" or str(array.dtype) not in _DTYPES:
                raise MessageError(f"array {name!r} of type {array.dtype} has no place in a message.")
            end = start + array.numel() * array.element_size()
            dtype = _DTYPES[str(array.dtype)]
            entries[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, end]}
            start = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        return text + b" " * (-len(text) % 8)
