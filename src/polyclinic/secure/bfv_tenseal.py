"""BFV of TenSEAL, for machines without a ``seal-python`` wheel (Linux on ARM, Alpine).

TenSEAL asks for two primes and for a plain modulus that allows batching, a prime that is 1 modulo 2N. Here it has 45
bits, above any sum of ``MOST_TERMS`` integers below 2**40: sums never wrap, and are reduced modulo 2**40 after
decryption. Ciphertexts stay in TenSEAL's own form, as it has no door to their words; an addition costs some 20 times
that of ``seal``.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyclinic.errors import ProtocolError
from polyclinic.secure.bfv import Blob, KeyMode, Keys, Layout, ProviderName, damaged

N = 4096
PRIME_BITS = (60, 49)
PLAIN_MODULUS = 35184371884033  # the largest prime below 2**45 that is 1 modulo 2N
BITS = 40
_LENGTH = struct.Struct("<I")
# Two polynomials of 60-bit words do not compress; header, framing and length take less than 192 bytes.
_FRAME = 16 * N + 192
_MOST_KEY_BYTES = 1 << 18
_TENSEAL_ERRORS = (ValueError, RuntimeError)


class TensealBfv:
    """``Bfv`` by TenSEAL; keys are serialised contexts.

    Raises:
        ImportError: ``tenseal`` is not installed.
    """

    name: ProviderName = "tenseal"
    bits = BITS

    def __init__(self, key: KeyMode) -> None:
        import tenseal
        import tenseal.sealapi

        self.key = key
        self._tenseal: Any = tenseal
        self._sealapi: Any = tenseal.sealapi
        self._layout = Layout(f"tenseal, {key} key, N={N}, primes of {PRIME_BITS} bits, t={PLAIN_MODULUS}", N, _FRAME)
        self.parameters = _parameters(self._new_context())

    def new_keys(self) -> Keys:
        """A secret key; a public key too in that mode."""
        context = self._new_context()
        keep = {"save_galois_keys": False, "save_relin_keys": False}
        secret = context.serialize(save_public_key=True, save_secret_key=True, **keep)
        if self.key == "secret":
            return Keys(secret, b"")
        return Keys(secret, context.serialize(save_public_key=True, save_secret_key=False, **keep))

    def size(self, length: int) -> int:
        """Bytes of a blob."""
        return self._layout.size(length)

    def terms(self, blob: Blob) -> int:
        """How many vectors have been added up."""
        return self._layout.read(blob)[1]

    def encrypt(self, values: NDArray[np.uint64], key: bytes) -> Blob:
        """Encrypt block by block."""
        context = self._context(key, secret=self.key == "secret")
        blob = self._layout.new(len(values))
        for frame, block in zip(self._layout.frames(blob), self._layout.padded(values, BITS), strict=True):
            _fill(frame, self._tenseal.bfv_vector(context, block.tolist()))
        return blob

    def add_into(self, total: Blob, other: Blob) -> None:
        """Read, add and write block by block."""
        context = self._new_context()  # Any key will do: adding needs none.

        def frames(into: NDArray[np.uint8], more: NDArray[np.uint8]) -> None:
            for a, b in zip(into, more, strict=True):
                vector, other = self._vector(context, a), self._vector(context, b)
                try:
                    vector += other
                except _TENSEAL_ERRORS as error:
                    raise damaged("a ciphertext", error) from None
                _fill(a, vector)

        self._layout.add(total, other, frames)

    def decrypt(self, blob: Blob, secret: bytes) -> NDArray[np.uint64]:
        """Decrypt block by block."""
        length, _ = self._layout.read(blob)
        context = self._context(secret, secret=True)
        values = np.empty((self._layout.blocks(length), N), np.int64)
        for row, frame in zip(values, self._layout.frames(blob), strict=True):
            row[:] = self._vector(context, frame).decrypt()
        values += np.where(values < 0, PLAIN_MODULUS, 0)  # TenSEAL answers in -t/2 ... t/2
        return (values.reshape(-1)[:length] & ((1 << BITS) - 1)).astype(np.uint64)

    def noise_budget(self, blob: Blob, secret: bytes) -> int:
        """Of the worst block."""
        self._layout.read(blob)
        context = self._context(secret, secret=True)
        decryptor = self._sealapi.Decryptor(context.seal_context().data, context.secret_key().data)
        vectors = (self._vector(context, frame) for frame in self._layout.frames(blob))
        return min(int(decryptor.invariant_noise_budget(vector.ciphertext()[0])) for vector in vectors)

    def _new_context(self) -> Any:
        kinds = self._tenseal.ENCRYPTION_TYPE
        return self._tenseal.context(
            self._tenseal.SCHEME_TYPE.BFV,
            poly_modulus_degree=N,
            plain_modulus=PLAIN_MODULUS,
            coeff_mod_bit_sizes=list(PRIME_BITS),
            encryption_type=kinds.ASYMMETRIC if self.key == "public" else kinds.SYMMETRIC,
        )

    def _context(self, key: bytes, *, secret: bool) -> Any:
        """The context of a key, whose parameters must be ours: weak ones would decrypt for everybody."""
        if len(key) > _MOST_KEY_BYTES:
            raise ProtocolError(f"a key of {len(key)} bytes is over the limit of {_MOST_KEY_BYTES} bytes.")
        try:
            context = self._tenseal.context_from(key)
            theirs = _parameters(context)
        except _TENSEAL_ERRORS as error:
            raise damaged("a key", error) from None
        if theirs != self.parameters:
            raise ProtocolError(f"a key was made with other parameters than {self._layout.title}.")
        if secret and not context.has_secret_key():
            raise ProtocolError("a public key was given where the secret key is needed.")
        return context

    def _vector(self, context: Any, frame: NDArray[np.uint8]) -> Any:
        data = frame.tobytes()
        (length,) = _LENGTH.unpack_from(data)
        if length > _FRAME - _LENGTH.size:
            raise ProtocolError(f"a ciphertext claims {length} bytes of a frame of {_FRAME}.")
        try:
            vector = self._tenseal.bfv_vector_from(context, data[_LENGTH.size : _LENGTH.size + length])
            whole = vector.size() == N and [c.size() for c in vector.ciphertext()] == [2]
        except _TENSEAL_ERRORS as error:
            raise damaged("a ciphertext", error) from None
        if not whole:
            raise ProtocolError(f"a ciphertext does not hold {N} integers.")
        return vector


def _parameters(context: Any) -> tuple[int, int, tuple[int, ...]]:
    """Ring degree, plain modulus and primes of a context."""
    found = context.seal_context().data.key_context_data().parms()
    primes = tuple(prime.value() for prime in found.coeff_modulus())
    return found.poly_modulus_degree(), found.plain_modulus().value(), primes


def _fill(frame: NDArray[np.uint8], vector: Any) -> None:
    data = vector.serialize()
    end = _LENGTH.size + len(data)
    if end > _FRAME:
        raise RuntimeError(f"TenSEAL wrote {len(data)} bytes for one ciphertext; the frame holds {_FRAME}.")
    frame[:end] = np.frombuffer(_LENGTH.pack(len(data)) + data, np.uint8)
    frame[end:] = 0
