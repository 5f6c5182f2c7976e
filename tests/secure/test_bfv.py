"""What every provider of encrypted addition promises."""

from __future__ import annotations

import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from polyclinic.errors import ProtocolError, StudyError
from polyclinic.secure.bfv import Bfv, Blob, KeyMode, Keys, ProviderName, open_provider

# Homomorphic Encryption Standard (2018), table 1: most bits of modulus for 128-bit security, uniform ternary secret.
STANDARD_128 = {1024: 27, 2048: 54, 4096: 109, 8192: 218}
BITS = {("seal", "secret"): 40, ("seal", "public"): 36, ("tenseal", "secret"): 40, ("tenseal", "public"): 40}
Values = NDArray[np.uint64]


@pytest.fixture(params=list(BITS), ids="-".join, scope="module")
def bfv(request: pytest.FixtureRequest) -> Bfv:
    name, key = request.param
    pytest.importorskip(name)
    return open_provider(name, key)


@pytest.fixture(scope="module")
def keys(bfv: Bfv) -> Keys:
    return bfv.new_keys()


def encrypt(bfv: Bfv, keys: Keys, values: Values) -> Blob:
    return bfv.encrypt(values, keys.public if bfv.key == "public" else keys.secret)


def add(bfv: Bfv, keys: Keys, vectors: Sequence[Values]) -> Blob:
    total = encrypt(bfv, keys, vectors[0])
    for vector in vectors[1:]:
        bfv.add_into(total, encrypt(bfv, keys, vector))
    return total


def vectors(count: int, length: int, bits: int, seed: int = 0) -> list[Values]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 1 << bits, length, dtype=np.uint64) for _ in range(count)]


def plain_sum(parts: Sequence[Values], bits: int) -> list[int]:
    return [sum(column) % (1 << bits) for column in zip(*(part.tolist() for part in parts), strict=True)]


def test_bits(bfv: Bfv) -> None:
    assert bfv.bits == BITS[bfv.name, bfv.key]


@pytest.mark.parametrize(("count", "length"), [(1, 1), (2, 2047), (3, 2048), (4, 2049), (16, 4097), (10, 9000)])
def test_the_sum_is_the_plain_sum_of_the_integers(bfv: Bfv, keys: Keys, count: int, length: int) -> None:
    parts = vectors(count, length, BITS[bfv.name, bfv.key])
    total = add(bfv, keys, parts)
    found = bfv.decrypt(total, keys.secret)
    assert found.dtype == np.uint64
    assert found.tolist() == plain_sum(parts, BITS[bfv.name, bfv.key])
    assert bfv.terms(total) == count


@pytest.mark.parametrize("count", [3, 15, 16])
def test_extreme_values_wrap_like_integers(bfv: Bfv, keys: Keys, count: int) -> None:
    bits = BITS[bfv.name, bfv.key]
    extremes = np.array([0, 1, 2 ** (bits - 1) - 1, 2 ** (bits - 1), 2**bits - 2, 2**bits - 1], np.uint64)
    found = bfv.decrypt(add(bfv, keys, [extremes] * count), keys.secret)
    assert found.tolist() == [count * value % 2**bits for value in extremes.tolist()]


def test_zeros_at_the_end_are_not_lost(bfv: Bfv, keys: Keys) -> None:
    values = np.zeros(5000, np.uint64)
    assert bfv.decrypt(encrypt(bfv, keys, values), keys.secret).tolist() == [0] * 5000
    values[2] = 7
    assert bfv.decrypt(encrypt(bfv, keys, values), keys.secret).tolist() == [0, 0, 7] + [0] * 4997


@pytest.mark.parametrize("key", get_args(KeyMode))
def test_both_providers_give_the_same_integers(key: KeyMode) -> None:
    pytest.importorskip("seal")
    first, second = open_provider("seal", key), open_provider("tenseal", key)
    bits = min(BITS["seal", key], BITS["tenseal", key])
    parts = vectors(7, 5001, bits - 3)  # with seven terms no sum reaches 2**bits, so both moduli answer alike
    if key == "secret":
        parts = vectors(7, 5001, 40)
    found = []
    for bfv in (first, second):
        own = bfv.new_keys()
        found.append(bfv.decrypt(add(bfv, own, parts), own.secret).tolist())
    assert found[0] == found[1] == plain_sum(parts, 40)


def test_four_bits_of_noise_budget_are_left_after_sixteen_vectors(bfv: Bfv, keys: Keys) -> None:
    bits = BITS[bfv.name, bfv.key]
    largest = np.full(40_000, 2**bits - 1, np.uint64)
    for parts in (vectors(16, 40_000, bits), [largest] * 16):
        total = add(bfv, keys, parts)
        assert bfv.noise_budget(total, keys.secret) >= 4
        assert bfv.noise_budget(total, keys.secret) < bfv.noise_budget(encrypt(bfv, keys, largest), keys.secret)


def test_parameters_are_within_the_published_table() -> None:
    pytest.importorskip("seal")
    from polyclinic.secure.bfv_seal import SealBfv
    from polyclinic.secure.bfv_tenseal import TensealBfv

    for key in get_args(KeyMode):
        parameters = SealBfv(key).context.key_context_data().parms()
        bits = sum(prime.bit_count() for prime in parameters.coeff_modulus())
        assert bits <= STANDARD_128[parameters.poly_modulus_degree()]
        degree, _, primes = TensealBfv(key).parameters
        assert sum(prime.bit_length() for prime in primes) <= STANDARD_128[degree]


def test_sizes_are_known_beforehand(bfv: Bfv, keys: Keys) -> None:
    for length in (1, 2048, 4097):
        assert len(encrypt(bfv, keys, np.zeros(length, np.uint64))) == bfv.size(length)
    # Two lanes per integer: 1.1e7 parameters.
    assert bfv.size(5_500_000) / 1.1e7 < 8.03


def test_a_blob_survives_the_wire_and_is_not_changed_by_being_added(bfv: Bfv, keys: Keys) -> None:
    parts = vectors(2, 3000, 20)
    sent = encrypt(bfv, keys, parts[1]).tobytes()
    received = np.frombuffer(b"\0" + sent, np.uint8)[1:]  # read-only, and its words are not aligned
    total = encrypt(bfv, keys, parts[0])
    bfv.add_into(total, received)
    assert received.tobytes() == sent
    assert bfv.decrypt(received, keys.secret).tolist() == parts[1].tolist()
    assert bfv.decrypt(total, keys.secret).tolist() == plain_sum(parts, 40)


def test_encrypting_twice_gives_other_bytes(bfv: Bfv, keys: Keys) -> None:
    values = vectors(1, 2048, 30)[0]
    first, second = (encrypt(bfv, keys, values)[32:] for _ in range(2))
    assert np.mean(first == second) < 0.2  # the top bits of words are zero in both


def test_another_key_does_not_decrypt(bfv: Bfv, keys: Keys) -> None:
    values = vectors(1, 2048, 30)[0]
    found = bfv.decrypt(encrypt(bfv, keys, values), bfv.new_keys().secret)
    assert np.mean(found == values) < 0.01


def test_a_public_key_does_not_decrypt(bfv: Bfv, keys: Keys) -> None:
    if bfv.key == "secret":
        assert keys.public == b""
        return
    blob = encrypt(bfv, keys, np.ones(5, np.uint64))
    with pytest.raises(ProtocolError, match="key"):
        bfv.decrypt(blob, keys.public)


def test_keys_do_not_print_their_secret(keys: Keys) -> None:
    assert repr(keys) == f"Keys(public={keys.public!r})"


@pytest.mark.parametrize("damage", [lambda k: k[:-7], lambda k: b"", lambda k: b"\7" * len(k)])
def test_a_damaged_key_is_refused(bfv: Bfv, keys: Keys, damage: object) -> None:
    assert callable(damage)
    blob = encrypt(bfv, keys, np.ones(5, np.uint64))
    with pytest.raises(ProtocolError, match="key cannot be read"):
        bfv.decrypt(blob, damage(keys.secret))
    with pytest.raises(ProtocolError, match="key cannot be read"):
        encrypt(bfv, Keys(damage(keys.secret), damage(keys.public)), np.ones(5, np.uint64))


@pytest.mark.parametrize(
    "values", [np.uint64([]), np.zeros((2, 2), np.uint64), np.zeros(3, np.int64), np.uint64([0, 2**40])]
)
def test_values_that_do_not_fit_are_refused(bfv: Bfv, keys: Keys, values: Values) -> None:
    with pytest.raises(ValueError, match="values must be uint64"):
        encrypt(bfv, keys, values)


def changed(blob: Blob, at: int, data: bytes) -> Blob:
    copy = blob.copy()
    copy[at : at + len(data)] = np.frombuffer(data, np.uint8)
    return copy


def refusals(blob: Blob) -> dict[str, Blob]:
    """Damaged forms of a blob, by the message they must meet. The header: magic 8, parameters 8, length 8, terms 4."""
    return {
        "at least 32 bytes": blob[:31],
        "in one row": blob.reshape(1, -1),
        "bytes in one row": np.repeat(blob, 2)[::2],
        "bytes and is": blob[:-1],
        f"is {len(blob) + 1}": np.append(blob, np.uint8(0)),
        "not an encrypted vector": changed(blob, 0, b"X"),
        "made with other parameters": changed(blob, 8, bytes(8)),
        "of 0 integers": changed(blob[:32], 16, bytes(8)),
        f"of {2**62} integers": changed(blob, 16, struct.pack("<Q", 2**62)),
        "holds 0 vectors": changed(blob, 24, struct.pack("<I", 0)),
        "holds 17 vectors": changed(blob, 24, struct.pack("<I", 17)),
    }


def test_damaged_blobs_are_refused_before_memory_is_spent(bfv: Bfv, keys: Keys) -> None:
    blob = encrypt(bfv, keys, np.arange(3000, dtype=np.uint64))
    total = blob.copy()
    for message, bad in refusals(blob).items():
        tracemalloc.start()
        with pytest.raises(ProtocolError, match=message):
            bfv.terms(bad)
        with pytest.raises(ProtocolError, match=message):
            bfv.decrypt(bad, keys.secret)
        with pytest.raises(ProtocolError, match=message):
            bfv.noise_budget(bad, keys.secret)
        with pytest.raises(ProtocolError, match=message):
            bfv.add_into(total, bad)
        assert tracemalloc.get_traced_memory()[1] < 100_000
        tracemalloc.stop()
    assert np.array_equal(total, blob)


def test_tampered_ciphertexts_are_refused(bfv: Bfv, keys: Keys) -> None:
    blob = encrypt(bfv, keys, np.arange(3000, dtype=np.uint64))
    last = len(blob) - bfv.size(1) + 32  # start of the last ciphertext
    for at in (32 + 16_000, last + 16_000):
        bad = changed(blob, at, b"\xff" * 64)
        with pytest.raises(ProtocolError):
            bfv.decrypt(bad, keys.secret)
        with pytest.raises(ProtocolError):
            bfv.add_into(blob.copy(), bad)
        with pytest.raises(ProtocolError):
            bfv.add_into(bad.copy(), blob)


def test_vectors_of_other_lengths_are_not_added(bfv: Bfv, keys: Keys) -> None:
    short, long = (encrypt(bfv, keys, np.zeros(n, np.uint64)) for n in (100, 101))
    with pytest.raises(ProtocolError, match="of 101 integers to one of 100"):
        bfv.add_into(short, long)


def test_a_seventeenth_vector_is_refused(bfv: Bfv, keys: Keys) -> None:
    total = add(bfv, keys, vectors(16, 10, 36))
    with pytest.raises(ProtocolError, match="of 16 and 1 vectors is over the limit of 16"):
        bfv.add_into(total, encrypt(bfv, keys, np.zeros(10, np.uint64)))


def test_blobs_of_another_provider_or_key_mode_are_refused() -> None:
    pytest.importorskip("seal")
    providers = [open_provider(name, key) for name in get_args(ProviderName) for key in get_args(KeyMode)]
    for bfv in providers:
        blob = encrypt(bfv, bfv.new_keys(), np.zeros(5000, np.uint64))
        for other in providers:
            if other is not bfv:
                with pytest.raises(ProtocolError, match="other parameters"):
                    other.terms(blob)


def test_auto_takes_seal_and_falls_back_to_tenseal(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("seal")
    assert open_provider("auto", "secret").name == "seal"
    monkeypatch.setitem(sys.modules, "seal", None)
    assert open_provider("auto", "secret").name == "tenseal"
    with pytest.raises(StudyError, match=r"'seal' is not possible here .*pip install \"polyclinic\[he\]\""):
        open_provider("seal", "secret")
    monkeypatch.setitem(sys.modules, "tenseal", None)
    with pytest.raises(StudyError, match=r"\(seal: .*; tenseal: .*pip install \"polyclinic\[he\]\""):
        open_provider("auto", "public")


def test_the_libraries_are_imported_when_they_are_needed() -> None:
    code = (
        "import sys, polyclinic.secure.bfv_seal, polyclinic.secure.bfv_tenseal, polyclinic.secure.ckks_as_published\n"
        "assert not {'seal', 'tenseal', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
