"""Addition of integer vectors under encryption: the BFV scheme (Fan and Vercauteren, eprint 2012/144) of two libraries.

============ ======== ====== ====================== ================== ============ ================
provider     key      N      coefficient modulus    plain modulus t    integers mod bytes / integer
============ ======== ====== ====================== ================== ============ ================
seal         secret   2048   one prime, 54 bits     2**40              2**40        16
seal         public   2048   one prime, 54 bits     2**36              2**36        16
tenseal      either   4096   60 + 49 bits           prime of 45 bits   2**40        16.05
============ ======== ====== ====================== ================== ============ ================

All are at or below the 128-bit row of the Homomorphic Encryption Standard (2018, table 1). At least 4 bits of noise
budget are left after ``MOST_TERMS`` additions, so a decryption never fails by chance. Two values of half the width fit
in one integer; packing them is the caller's business.

Encryption hides the integers from whoever lacks the secret key; it does not show who made or changed a blob. Whatever
this module can see to be wrong (length, parameters, words outside the ring) it refuses; everything else is up to the
signature over the blob.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from polyclinic.errors import ProtocolError, StudyError

Blob = NDArray[np.uint8]
KeyMode = Literal["secret", "public"]
ProviderName = Literal["seal", "tenseal"]

MOST_TERMS = 16
"""A sum holds the vectors of at most so many sites."""
_HEADER = struct.Struct("<8s8sQI4x")
_MAGIC = b"PLYBFV01"
_RESEND = "It was damaged on its way or is a forgery: start a fresh attempt."


@dataclass(frozen=True)
class Keys:
    """One pair of keys, in the form of the provider that made them.

    Attributes:
        secret: Decrypts; encrypts too where the key mode is ``secret``.
        public: Encrypts where the key mode is ``public``; empty otherwise.
    """

    secret: bytes = field(repr=False)
    public: bytes


class Bfv(Protocol):
    """Adds vectors of integers modulo ``2**bits`` under encryption. All parties of one sum use the same provider."""

    name: ProviderName
    key: KeyMode
    bits: int
    """Integers lie in ``0 ... 2**bits - 1`` and are added modulo ``2**bits``."""

    def new_keys(self) -> Keys:
        """A fresh pair from the random generator of the operating system."""

    def size(self, length: int) -> int:
        """Bytes of a blob of so many integers, so that a receiver can refuse any other size before reading it."""

    def terms(self, blob: Blob) -> int:
        """How many encrypted vectors have been added up in a blob.

        Raises:
            ProtocolError: The blob is not one of this provider, or damaged.
        """

    def encrypt(self, values: NDArray[np.uint64], key: bytes) -> Blob:
        """Encrypt integers.

        Args:
            values: Shape ``(length,)``, at least one, each below ``2**bits``.
            key: ``Keys.secret`` or ``Keys.public``, as the key mode says.

        Raises:
            ValueError: No values, or one of ``2**bits`` or more.
            ProtocolError: The key is damaged or one of other parameters.
        """

    def add_into(self, total: Blob, other: Blob) -> None:
        """``total += other`` under encryption, in place and without a key.

        Raises:
            ProtocolError: One of them is damaged, they differ in length, or more than ``MOST_TERMS`` vectors would be
                in the sum. Throw ``total`` away then: part of it may have been added.
        """

    def decrypt(self, blob: Blob, secret: bytes) -> NDArray[np.uint64]:
        """The sum modulo ``2**bits``, shape ``(length,)``.

        Raises:
            ProtocolError: The blob or the key is damaged or one of other parameters.
        """

    def noise_budget(self, blob: Blob, secret: bytes) -> int:
        """Bits of noise that the worst ciphertext of a blob can still take; decryption is right above zero.

        It depends on the secret key: whoever holds that may look at it, and must not tell anybody.
        """


@dataclass(frozen=True)
class Layout:
    """How the ciphertexts of a provider lie in a blob: a header, then one frame of equal size per ciphertext.

    Attributes:
        title: Provider and parameters in words; blobs of other titles are refused.
        block: Integers per ciphertext.
        frame: Bytes per ciphertext.
    """

    title: str
    block: int
    frame: int

    def blocks(self, length: int) -> int:
        """How many ciphertexts hold so many integers."""
        return -(-length // self.block)

    def size(self, length: int) -> int:
        """Bytes of a blob."""
        return _HEADER.size + self.blocks(length) * self.frame

    def new(self, length: int) -> Blob:
        """A blob of one term whose frames are not filled yet."""
        blob = np.empty(self.size(length), np.uint8)
        self.mark(blob, length, 1)
        return blob

    def mark(self, blob: Blob, length: int, terms: int) -> None:
        """Write the header."""
        _HEADER.pack_into(blob.data, 0, _MAGIC, self._fingerprint, length, terms)

    def read(self, blob: Blob) -> tuple[int, int]:
        """Length and terms of a blob whose header and size are right.

        Raises:
            ProtocolError: They are not.
        """
        if blob.dtype != np.uint8 or blob.ndim != 1 or not blob.flags.c_contiguous or len(blob) < _HEADER.size:
            raise ProtocolError(f"an encrypted vector must be at least {_HEADER.size} bytes in one row. {_RESEND}")
        magic, fingerprint, length, terms = _HEADER.unpack_from(blob.data)
        if magic != _MAGIC:
            raise ProtocolError(f"received bytes that are not an encrypted vector. {_RESEND}")
        if fingerprint != self._fingerprint:
            raise ProtocolError(
                f"an encrypted vector was made with other parameters than {self.title}. All sites need the same "
                "provider, key mode and version: set them in the study, and compare what is installed."
            )
        if length < 1 or len(blob) != self.size(length):
            raise ProtocolError(
                f"an encrypted vector of {length} integers must be {self.size(length)} bytes and is {len(blob)}. "
                f"{_RESEND}"
            )
        if not 1 <= terms <= MOST_TERMS:
            raise ProtocolError(f"an encrypted sum holds {terms} vectors; between 1 and {MOST_TERMS} are allowed.")
        return length, terms

    def frames(self, blob: Blob) -> NDArray[np.uint8]:
        """The frames, a view of shape ``(blocks, frame)``."""
        return blob[_HEADER.size :].reshape(-1, self.frame)

    def add(self, total: Blob, other: Blob, frames: Callable[[NDArray[np.uint8], NDArray[np.uint8]], None]) -> None:
        """Check two blobs, let ``frames(into, more)`` add their frames, and count the terms.

        Raises:
            ProtocolError: As ``Bfv.add_into``.
        """
        (length, terms), (other_length, more) = self.read(total), self.read(other)
        if length != other_length:
            raise ProtocolError(f"cannot add an encrypted vector of {other_length} integers to one of {length}.")
        if terms + more > MOST_TERMS:
            raise ProtocolError(
                f"an encrypted sum of {terms} and {more} vectors is over the limit of {MOST_TERMS}: its noise could "
                "outgrow the parameters."
            )
        frames(self.frames(total), self.frames(other))
        self.mark(total, length, terms + more)

    def padded(self, values: NDArray[np.uint64], bits: int) -> NDArray[np.uint64]:
        """Values in whole blocks, shape ``(blocks, block)``, the last one filled up with zeros.

        Raises:
            ValueError: No values, or one of ``2**bits`` or more.
        """
        if values.dtype != np.uint64 or values.ndim != 1 or not len(values) or int(values.max()) >> bits:
            raise ValueError(f"values must be uint64 in one row, at least one, each below 2**{bits}.")
        whole = np.zeros((self.blocks(len(values)), self.block), np.uint64)
        whole.reshape(-1)[: len(values)] = values
        return whole

    @property
    def _fingerprint(self) -> bytes:
        return hashlib.sha256(self.title.encode()).digest()[:8]


def damaged(what: str, error: Exception) -> ProtocolError:
    """The refusal of a key or a ciphertext that the library could not read."""
    return ProtocolError(f"{what} cannot be read ({error}). {_RESEND}")


def open_provider(name: ProviderName | Literal["auto"], key: KeyMode) -> Bfv:
    """A provider that works on this machine; ``auto`` takes ``seal``, or else ``tenseal``.

    Raises:
        StudyError: The library is not installed.
    """
    from polyclinic.secure.bfv_seal import SealBfv
    from polyclinic.secure.bfv_tenseal import TensealBfv

    providers: dict[str, Callable[[KeyMode], Bfv]] = {"seal": SealBfv, "tenseal": TensealBfv}
    reasons = []
    for choice in providers if name == "auto" else (name,):
        try:
            return providers[choice](key)
        except ImportError as error:
            reasons.append(f"{choice}: {error}")
    raise StudyError(
        f"homomorphic encryption with {name!r} is not possible here ({'; '.join(reasons)}). "
        'Install it: pip install "polyclinic[he]"'
    )
