"""What is particular to TenSEAL: keys carry parameters, and ciphertexts have lengths of their own."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from polyclinic.errors import ProtocolError
from polyclinic.secure.bfv import Blob
from polyclinic.secure.bfv_tenseal import PLAIN_MODULUS, TensealBfv

tenseal = pytest.importorskip("tenseal.sealapi") and pytest.importorskip("tenseal")


def test_the_plain_modulus_is_the_largest_prime_for_batching_that_holds_any_sum() -> None:
    def is_prime(number: int) -> bool:
        return all(pow(base, number - 1, number) == 1 for base in (2, 3, 5, 7, 11, 13))

    assert is_prime(PLAIN_MODULUS)
    assert PLAIN_MODULUS % 8192 == 1
    assert 16 * (2**40 - 1) < PLAIN_MODULUS < 2**45
    assert not any(is_prime(n) for n in range(PLAIN_MODULUS + 8192, 2**45, 8192))


def test_a_key_of_other_parameters_is_refused() -> None:
    context = tenseal.context(
        tenseal.SCHEME_TYPE.BFV, poly_modulus_degree=4096, plain_modulus=1032193, coeff_mod_bit_sizes=[40, 40]
    )
    key = context.serialize(save_secret_key=True, save_galois_keys=False, save_relin_keys=False)
    with pytest.raises(ProtocolError, match="a key was made with other parameters than tenseal"):
        TensealBfv("public").encrypt(np.zeros(3, np.uint64), key)


def test_a_key_over_the_limit_is_not_read() -> None:
    with pytest.raises(ProtocolError, match="a key of 300000 bytes is over the limit"):
        TensealBfv("secret").encrypt(np.zeros(3, np.uint64), bytes(300_000))


def test_a_context_without_its_secret_key_cannot_stand_for_the_secret() -> None:
    bfv = TensealBfv("public")
    keys = bfv.new_keys()
    with pytest.raises(ProtocolError, match="where the secret key is needed"):
        bfv.decrypt(bfv.encrypt(np.zeros(3, np.uint64), keys.public), keys.public)


def test_a_frame_that_claims_more_than_it_has_is_refused() -> None:
    bfv = TensealBfv("secret")
    secret = bfv.new_keys().secret
    blob = bfv.encrypt(np.zeros(3, np.uint64), secret)
    blob[32:36] = np.frombuffer(struct.pack("<I", len(blob)), np.uint8)
    with pytest.raises(ProtocolError, match="a ciphertext claims"):
        bfv.decrypt(blob, secret)


def test_a_ciphertext_of_less_than_a_block_is_refused() -> None:
    bfv = TensealBfv("secret")
    secret = bfv.new_keys().secret
    data = tenseal.bfv_vector(tenseal.context_from(secret), [1, 2, 3]).serialize()
    blob = forged(bfv, secret, data)
    with pytest.raises(ProtocolError, match="does not hold 4096 integers"):
        bfv.decrypt(blob, secret)


def test_a_ciphertext_of_three_polynomials_is_refused(tmp_path: Path) -> None:
    bfv = TensealBfv("secret")
    secret = bfv.new_keys().secret
    context = tenseal.context_from(secret)
    cipher = tenseal.bfv_vector(context, [1] * 4096).ciphertext()[0]
    cipher.resize(context.seal_context().data, 3)
    blob = forged(bfv, secret, stored(cipher, tmp_path))
    with pytest.raises(ProtocolError, match="does not hold 4096 integers"):
        bfv.add_into(bfv.encrypt(np.zeros(3, np.uint64), secret), blob)


def test_a_sum_that_the_library_refuses_is_a_refusal_of_ours(tmp_path: Path) -> None:
    bfv = TensealBfv("secret")
    secret = bfv.new_keys().secret
    seal_context = tenseal.context_from(secret).seal_context().data
    zeros = tenseal.sealapi.Ciphertext(seal_context)
    zeros.resize(seal_context, 2)  # all words zero: the library adds no such thing to itself
    blob = forged(bfv, secret, stored(zeros, tmp_path))
    with pytest.raises(ProtocolError, match="transparent"):
        bfv.add_into(blob, blob.copy())


def forged(bfv: TensealBfv, secret: bytes, data: bytes) -> Blob:
    """A blob of three integers with another ciphertext in its frame."""
    blob = bfv.encrypt(np.zeros(3, np.uint64), secret)
    blob[32 : 36 + len(data)] = np.frombuffer(struct.pack("<I", len(data)) + data, np.uint8)
    return blob


def stored(cipher: object, folder: Path) -> bytes:
    """TenSEAL's form (protobuf) of one ciphertext: field 1 the number of values, 4096; field 2 SEAL's own form."""
    cipher.save(str(folder / "cipher"))  # type: ignore[attr-defined]
    data = (folder / "cipher").read_bytes()
    length, varint = len(data), b""
    while length > 127:
        varint, length = varint + bytes([length & 127 | 128]), length >> 7
    return b"\x0a\x02\x80\x20\x12" + varint + bytes([length]) + data
