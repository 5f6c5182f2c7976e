"""Addition of raw words is what SEAL itself does."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from polyclinic.errors import ProtocolError
from polyclinic.secure.bfv import Blob, KeyMode

seal = pytest.importorskip("seal")

HEADER, PREFIX, N = 32, 113, 2048


def cipher_bytes(context: object, blob: Blob, block: int) -> bytes:
    """A block in SEAL's own form: what stands before the words is that of any other ciphertext."""
    generator = seal.KeyGenerator(context)
    other = seal.Encryptor(context, generator.secret_key()).encrypt_symmetric(seal.Plaintext("1")).to_string()
    start = HEADER + block * 16 * N
    return bytes(other[:PREFIX]) + blob[start : start + 16 * N].tobytes()


@pytest.mark.parametrize("key", ["secret", "public"])
def test_words_are_those_of_the_librarys_evaluator(key: KeyMode) -> None:
    from polyclinic.secure.bfv_seal import SealBfv

    bfv = SealBfv(key)
    keys = bfv.new_keys()
    random = np.random.default_rng(1)
    values = random.integers(0, 1 << 36, (3, 40_000), dtype=np.uint64)  # more words than one chunk of the cache
    blobs = [bfv.encrypt(v, keys.public if key == "public" else keys.secret) for v in values]
    total = blobs[0].copy()
    for blob in blobs[1:]:
        bfv.add_into(total, blob)

    evaluator = seal.Evaluator(bfv.context)
    for block in (0, 1, 7, 19):
        ciphers = []
        for blob in blobs:
            cipher = seal.Ciphertext(bfv.context)
            cipher.load_bytes(bfv.context, cipher_bytes(bfv.context, blob, block))
            ciphers.append(cipher)
        for cipher in ciphers[1:]:
            evaluator.add_inplace(ciphers[0], cipher)
        assert ciphers[0].to_string() == cipher_bytes(bfv.context, total, block)


def test_a_word_at_the_modulus_is_refused_and_one_below_it_is_added() -> None:
    from polyclinic.secure.bfv_seal import SealBfv

    bfv = SealBfv("secret")
    secret = bfv.new_keys().secret
    blob, other = (bfv.encrypt(np.zeros(10, np.uint64), secret) for _ in range(2))
    at = HEADER + 8 * 4000
    word = int(other[at : at + 8].view("<u8")[0])

    blob[at : at + 8] = np.frombuffer(struct.pack("<Q", bfv.modulus - 1), np.uint8)
    bfv.add_into(other, blob)
    assert int(other[at : at + 8].view("<u8")[0]) == (word + bfv.modulus - 1) % bfv.modulus

    blob[at : at + 8] = np.frombuffer(struct.pack("<Q", bfv.modulus), np.uint8)
    with pytest.raises(ProtocolError, match="a word above the modulus"):
        bfv.add_into(other, blob)
    with pytest.raises(ProtocolError, match="cannot be read"):
        bfv.decrypt(blob, secret)
