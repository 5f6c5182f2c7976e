"""CKKS at the settings of the PPPML-HMI reference code, for comparison only: nothing is protected with it.

Ring degree 8192 with primes of 31, 6 x 26 and 31 bits and scale 2**26, one vector per parameter tensor (arXiv
2302.11571 and its published code, with TenSEAL). A sum needs one prime of these eight; and what CKKS decrypts must not
be shown to others than the key holder (Li and Micciancio, EUROCRYPT 2021). Galois keys, which the reference makes and
never uses, are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyclinic.errors import ProtocolError

N = 8192
PRIME_BITS = (31, 26, 26, 26, 26, 26, 26, 31)
SCALE = 2.0**26
SLOTS = N // 2
_LENGTH_BYTES = 4
_MOST_BYTES = 16 * N * len(PRIME_BITS)  # of one ciphertext: two polynomials of 64-bit words per prime


class Encrypted:
    """Encrypted tensors, which can be added and subtracted without a key.

    TenSEAL itself splits a vector of more than ``SLOTS`` values into ciphertexts, but warns on standard output; so they
    are split here, into the same ciphertexts.
    """

    def __init__(self, sizes: tuple[int, ...], vectors: list[Any]) -> None:
        self.sizes = sizes
        self._vectors = vectors

    def add(self, other: Encrypted) -> None:
        """``self += other``."""
        for mine, theirs in self._pairs(other):
            mine += theirs

    def subtract(self, other: Encrypted) -> None:
        """``self -= other``."""
        for mine, theirs in self._pairs(other):
            mine -= theirs

    def decrypt(self) -> list[NDArray[np.float64]]:
        """The tensors, flat; right to about 1e-4 at these settings.

        Raises:
            ValueError: Read by a holder of the public key only.
        """
        values = np.concatenate([np.float64(vector.decrypt()) for vector in self._vectors])
        return np.split(values, np.cumsum(self.sizes)[:-1])

    def to_bytes(self) -> bytes:
        """The ciphertexts, each behind its length in four bytes."""
        parts = [vector.serialize() for vector in self._vectors]
        return b"".join(len(part).to_bytes(_LENGTH_BYTES, "little") + part for part in parts)

    def _pairs(self, other: Encrypted) -> zip[tuple[Any, Any]]:
        if self.sizes != other.sizes:
            raise ProtocolError(f"encrypted tensors of sizes {other.sizes} do not fit those of sizes {self.sizes}.")
        return zip(self._vectors, other._vectors, strict=True)


class CkksAsPublished:
    """One context for all sites, the secret key included, as in the reference code.

    Args:
        keys: What ``keys()`` of another one gave; a fresh pair without.

    Raises:
        ImportError: ``tenseal`` is not installed.
        ProtocolError: The keys are damaged.
    """

    def __init__(self, keys: bytes | None = None) -> None:
        import tenseal

        self._tenseal: Any = tenseal
        if keys is None:
            self._context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, N, coeff_mod_bit_sizes=list(PRIME_BITS))
            self._context.global_scale = SCALE
            return
        try:
            self._context = tenseal.context_from(keys)
        except (ValueError, RuntimeError) as error:
            raise ProtocolError(f"CKKS keys cannot be read ({error}).") from None

    def keys(self, *, secret: bool) -> bytes:
        """The context with or without its secret key."""
        data: bytes = self._context.serialize(save_secret_key=secret, save_relin_keys=False, save_galois_keys=False)
        return data

    def encrypt(self, tensors: Sequence[NDArray[np.float32]]) -> Encrypted:
        """Encrypt flat tensors of any sizes above zero."""
        chunks = [t[start : start + SLOTS] for t in tensors for start in range(0, len(t), SLOTS)]
        vectors = [self._tenseal.ckks_vector(self._context, chunk.tolist()) for chunk in chunks]
        return Encrypted(tuple(len(t) for t in tensors), vectors)

    def load(self, data: bytes, sizes: Sequence[int]) -> Encrypted:
        """Read what ``Encrypted.to_bytes`` wrote.

        Args:
            data: The ciphertexts.
            sizes: Number of values of each tensor, which all sites know.

        Raises:
            ProtocolError: Damaged, or not of these sizes.
        """
        lengths = [min(SLOTS, size - start) for size in sizes for start in range(0, size, SLOTS)]
        vectors = []
        at = 0
        for length in lengths:
            end = at + _LENGTH_BYTES
            size = int.from_bytes(data[at:end], "little")
            at = end + size
            if size > _MOST_BYTES or at > len(data):
                raise ProtocolError(f"{len(data)} bytes do not hold {len(lengths)} CKKS ciphertexts.")
            vectors.append(self._vector(data[end:at], length))
        if at != len(data):
            raise ProtocolError(f"{len(data) - at} bytes follow the last of {len(lengths)} CKKS ciphertexts.")
        return Encrypted(tuple(sizes), vectors)

    def _vector(self, data: bytes, length: int) -> Any:
        try:
            vector = self._tenseal.ckks_vector_from(self._context, data)
        except (ValueError, RuntimeError) as error:
            raise ProtocolError(f"a CKKS ciphertext cannot be read ({error}).") from None
        if vector.size() != length:
            raise ProtocolError(f"a CKKS ciphertext holds {vector.size()} values instead of {length}.")
        return vector
