"""Key agreement, key derivation and the streams of bytes that hide integers.

Two sites agree on a secret (X25519, RFC 7748), derive a key from it for one attempt of one round (HKDF-SHA256, RFC
5869) and stretch the key to a stream as long as the model (AES-256 in counter mode, NIST SP 800-38A; or ChaCha20, RFC
8439). One adds the stream and the other subtracts it, modulo a power of two: their sum is exact, each summand looks
uniform.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from cryptography.hazmat.primitives import ciphers, hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from polyclinic.errors import ProtocolError

Cipher = Literal["aes-256-ctr", "chacha20"]

KEY_BYTES = 32
CHUNK_BYTES = 2**18
"""Bytes masked at a time: they stay in the cache of one core while every stream passes over them."""
CPU_INFO = Path("/proc/cpuinfo")

_ZEROS = memoryview(bytes(CHUNK_BYTES))
_UNSIGNED = frozenset((2, 4, 8))


@cache
def has_aes() -> bool:
    """Whether this processor has AES instructions; without them AES is slow and its time may depend on the key.

    Linux says so itself; elsewhere every 64-bit Intel, AMD or Arm machine of this decade has them.
    """
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").lower().splitlines()
    except OSError:
        return platform.machine().lower() in {"x86_64", "amd64", "arm64", "aarch64"}
    features = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "features")))
    return "aes" in next(features, ())


def derive_key(secret: bytes, info: bytes, *, psk: bytes = b"") -> bytes:
    """A 32-byte key for one purpose: HKDF-SHA256 (RFC 5869).

    Args:
        secret: Input keying material, such as what ``agree`` returns.
        info: What the key is for; other bytes give an independent key.
        psk: A secret shared beforehand, taken as the salt: whoever lacks it can't derive the key, even if X25519 falls.
    """
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=psk or None, info=info).derive(secret)


def agree(private: X25519PrivateKey, public: bytes) -> bytes:
    """The 32-byte secret of X25519 (RFC 7748) between an own key and a peer's public key of 32 bytes.

    Raises:
        ProtocolError: The public key has another length or is of small order, which would make the secret all zero.
    """
    if len(public) != KEY_BYTES:
        raise ProtocolError(f"a public key has {len(public)} bytes; X25519 keys have {KEY_BYTES}. Ask the peer again.")
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise ProtocolError(
            "a public key is of small order: the shared secret would be zero, which no honest peer's is. Leave it out."
        ) from None


class Keystream:
    """The bytes that a key stretches to, read from the start, onwards only.

    A key is good for one stream: the same bytes used to hide two vectors give their difference away. At most 2**38
    bytes of a stream may be read, where ChaCha20's counter ends.
    """

    def __init__(self, key: bytes, cipher: Cipher) -> None:
        """Start the stream of a 32-byte key."""
        if len(key) != KEY_BYTES:
            raise ValueError(f"a stream needs a key of {KEY_BYTES} bytes, not {len(key)}.")
        start = bytes(16)
        if cipher == "aes-256-ctr":
            self._encryptor = ciphers.Cipher(algorithms.AES256(key), modes.CTR(start)).encryptor()
        elif cipher == "chacha20":
            self._encryptor = ciphers.Cipher(algorithms.ChaCha20(key, start), mode=None).encryptor()
        else:
            raise ValueError(f"unknown cipher {cipher!r}: use aes-256-ctr or chacha20.")

    def take(self, out: NDArray[Any]) -> None:
        """Fill an array with the next ``out.nbytes`` bytes, read as little-endian integers.

        Args:
            out: Contiguous, of uint16, uint32 or uint64, any shape; overwritten.
        """
        view = _flat(out).view(np.uint8).data
        for start in range(0, len(view), CHUNK_BYTES):
            part = view[start : start + CHUNK_BYTES]
            self._encryptor.update_into(_ZEROS[: len(part)], part)
        if out.dtype != out.dtype.newbyteorder("<"):
            out.byteswap(inplace=True)


def add_streams(into: NDArray[Any], streams: Sequence[tuple[Keystream, int]]) -> None:
    """``into += sum of sign * stream`` modulo 2**16, 2**32 or 2**64, in place.

    Calls on consecutive arrays go on with the streams, so that a list of segments is masked by one stream each.

    Args:
        into: Contiguous, of uint16, uint32 or uint64, any shape.
        streams: Each stream with +1 or -1.

    Cost: about 0.015 s of one core per stream and 1e7 values of 32 bits; half a megabyte of memory.
    """
    flat = _flat(into)
    if wrong := [sign for _, sign in streams if sign not in (1, -1)]:
        raise ValueError(f"a stream is added (+1) or subtracted (-1), not {wrong[0]} times.")
    length = CHUNK_BYTES // flat.itemsize
    buffer = np.empty(min(length, flat.size), dtype=flat.dtype)
    for start in range(0, flat.size, length):
        part = flat[start : start + length]
        mask = buffer[: part.size]
        for stream, sign in streams:
            stream.take(mask)
            (np.add if sign == 1 else np.subtract)(part, mask, out=part)


def _flat(array: NDArray[Any]) -> NDArray[Any]:
    """The same memory in one dimension; a copy would be filled in vain."""
    if array.dtype.kind != "u" or array.dtype.itemsize not in _UNSIGNED:
        raise TypeError(f"streams mask uint16, uint32 and uint64, not {array.dtype}.")
    if not array.flags.c_contiguous:
        raise ValueError("streams mask contiguous arrays only; this one is a view with gaps.")
    return array.reshape(-1)
