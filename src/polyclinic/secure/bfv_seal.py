"""BFV of Microsoft SEAL through ``seal-python``: ring degree 2048 and one prime, half the bytes of any other setting.

A fresh ciphertext is two polynomials of 2048 coefficients modulo the prime q, in coefficient form. What SEAL's
``Evaluator.add`` does is to add their words modulo q, so here numpy adds whole vectors at once, without a library
object per block, and a blob is just the words.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyclinic.errors import ProtocolError
from polyclinic.secure.bfv import Blob, KeyMode, Keys, Layout, ProviderName, damaged

N = 2048
PRIME_BITS = 54
PLAIN_BITS: dict[KeyMode, int] = {"secret": 40, "public": 36}
_PLAIN_HEADER = 88  # bytes before the coefficients of a stored plaintext
_CHUNK = 1 << 15  # words: two chunks fit in a level-2 cache
_SEAL_ERRORS = (ValueError, RuntimeError)


class SealBfv:
    """``Bfv`` by SEAL.

    Raises:
        ImportError: ``seal-python`` is not installed.
    """

    name: ProviderName = "seal"

    def __init__(self, key: KeyMode) -> None:
        import seal

        self.key = key
        self.bits = PLAIN_BITS[key]
        self._seal: Any = seal
        parameters = seal.EncryptionParameters(seal.scheme_type.bfv)
        parameters.set_poly_modulus_degree(N)
        parameters.set_coeff_modulus(seal.CoeffModulus.Create(N, [PRIME_BITS]))
        parameters.set_plain_modulus(1 << self.bits)
        self.context: Any = seal.SEALContext(parameters)
        self.modulus: int = parameters.coeff_modulus()[0].value()
        self._layout = Layout(f"seal, {key} key, N={N}, q={self.modulus}, t=2**{self.bits}", block=N, frame=16 * N)
        full = seal.Plaintext(f"1x^{N - 1}").to_bytes()
        self._plain_prefix: bytes = full[:_PLAIN_HEADER]
        generator = seal.KeyGenerator(self.context)
        blank = seal.Encryptor(self.context, generator.secret_key()).encrypt_symmetric(seal.Plaintext("0")).to_string()
        self._cipher_prefix: bytes = blank[: -16 * N]

    def new_keys(self) -> Keys:
        """A secret key; a public key too in that mode."""
        generator = self._seal.KeyGenerator(self.context)
        public = generator.create_public_key().to_string() if self.key == "public" else b""
        return Keys(generator.secret_key().to_string(), public)

    def size(self, length: int) -> int:
        """Bytes of a blob."""
        return self._layout.size(length)

    def terms(self, blob: Blob) -> int:
        """How many vectors have been added up."""
        return self._layout.read(blob)[1]

    def encrypt(self, values: NDArray[np.uint64], key: bytes) -> Blob:
        """Encrypt block by block."""
        plain, cipher = self._seal.Plaintext(N), self._seal.Ciphertext(self.context)
        encryptor = self._seal.Encryptor(self.context, self._load_key(key))
        encrypt = encryptor.encrypt if self.key == "public" else encryptor.encrypt_symmetric
        blob = self._layout.new(len(values))
        start = len(self._cipher_prefix)
        for frame, block in zip(self._layout.frames(blob), self._layout.padded(values, self.bits), strict=True):
            plain.load_bytes(self.context, self._plain_prefix + block.astype("<u8", copy=False).tobytes())
            encrypt(plain, cipher)
            frame[:] = np.frombuffer(cipher.to_string(), np.uint8, offset=start)
        return blob

    def add_into(self, total: Blob, other: Blob) -> None:
        """Add words modulo q, in chunks that stay in the cache."""
        self._layout.add(total, other, self._add_words)

    def decrypt(self, blob: Blob, secret: bytes) -> NDArray[np.uint64]:
        """Decrypt block by block."""
        length, _ = self._layout.read(blob)
        decryptor = self._seal.Decryptor(self.context, self._load_secret(secret))
        plain = self._seal.Plaintext(N)
        values = np.zeros((self._layout.blocks(length), N), np.uint64)
        for row, frame in zip(values, self._layout.frames(blob), strict=True):
            decryptor.decrypt(self._cipher(frame), plain)
            found = np.frombuffer(plain.to_bytes(), "<u8")[_PLAIN_HEADER // 8 :]
            row[: len(found)] = found  # SEAL leaves out zeros at the end
        return values.reshape(-1)[:length]

    def noise_budget(self, blob: Blob, secret: bytes) -> int:
        """Of the worst block."""
        self._layout.read(blob)
        decryptor = self._seal.Decryptor(self.context, self._load_secret(secret))
        return min(int(decryptor.invariant_noise_budget(self._cipher(frame))) for frame in self._layout.frames(blob))

    def _add_words(self, into: NDArray[np.uint8], more: NDArray[np.uint8]) -> None:
        words, others = into.reshape(-1).view("<u8"), more.reshape(-1).view("<u8")
        q = np.uint64(self.modulus)
        less = np.empty(_CHUNK, np.uint64)
        for start in range(0, len(words), _CHUNK):
            a, b = words[start : start + _CHUNK], others[start : start + _CHUNK]
            if max(a.max(), b.max()) >= q:
                raise ProtocolError(f"an encrypted vector holds a word above the modulus of {self._layout.title}.")
            np.add(a, b, out=a)
            # Below q the subtraction wraps to a huge number, so the smaller of both is the sum modulo q.
            np.minimum(a, np.subtract(a, q, out=less[: len(a)]), out=a)

    def _cipher(self, frame: NDArray[np.uint8]) -> Any:
        cipher = self._seal.Ciphertext(self.context)
        try:
            cipher.load_bytes(self.context, self._cipher_prefix + frame.tobytes())
        except _SEAL_ERRORS as error:
            raise damaged("a ciphertext", error) from None
        return cipher

    def _load_key(self, key: bytes) -> Any:
        if self.key == "secret":
            return self._load_secret(key)
        try:
            return self.context.from_public_str(key)
        except _SEAL_ERRORS as error:
            raise damaged("a public key", error) from None

    def _load_secret(self, key: bytes) -> Any:
        try:
            return self.context.from_secret_str(key)
        except _SEAL_ERRORS as error:
            raise damaged("a secret key", error) from None
