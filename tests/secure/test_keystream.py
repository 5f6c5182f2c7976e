"""Known answers of the standards, and streams that cancel."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives import ciphers
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from polyclinic.errors import ProtocolError
from polyclinic.secure import keystream
from polyclinic.secure.keystream import Cipher, Keystream, add_streams, agree, derive_key, has_aes

CIPHERS: tuple[Cipher, ...] = ("aes-256-ctr", "chacha20")
KEY = bytes(range(32))


def hexed(text: str) -> bytes:
    return bytes.fromhex(text)


def bytes_of(cipher: Cipher, count: int, key: bytes = KEY) -> bytes:
    """The start of a stream, by the library's own one-shot call and without the code under test."""
    name = algorithms.AES256(key) if cipher == "aes-256-ctr" else algorithms.ChaCha20(key, bytes(16))
    mode = modes.CTR(bytes(16)) if cipher == "aes-256-ctr" else None
    return ciphers.Cipher(name, mode).encryptor().update(bytes(count))


def test_aes_256_counter_mode_sp_800_38a_f_5_5() -> None:
    key = hexed("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = hexed("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    plain = hexed(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    secret = hexed(
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
    )
    assert ciphers.Cipher(algorithms.AES256(key), modes.CTR(counter)).encryptor().update(plain) == secret


def test_chacha20_rfc_8439_2_4_2() -> None:
    nonce = hexed("01000000" + "000000000000004a00000000")
    plain = (
        b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, "
        b"sunscreen would be it."
    )
    secret = hexed(
        "6e2e359a2568f98041ba0728dd0d6981e97e7aec1d4360c20a27afccfd9fae0b"
        "f91b65c5524733ab8f593dabcd62b3571639d624e65152ab8f530c359f0861d8"
        "07ca0dbf500d6a6156a38e088a22b65e52bc514d16ccf806818ce91ab7793736"
        "5af90bbf74a35be6b40b8eedf2785e42874d"
    )
    assert ciphers.Cipher(algorithms.ChaCha20(KEY, nonce), mode=None).encryptor().update(plain) == secret


def test_the_start_of_a_stream_is_the_known_answer_for_a_zero_counter() -> None:
    """AES-256 of a zero block under a zero key (the GCM specification, test case 13); RFC 8439 A.1, test vector 1."""
    out = np.zeros(4, dtype=np.uint32)
    Keystream(bytes(32), "aes-256-ctr").take(out)
    assert out.astype("<u4").tobytes() == hexed("dc95c078a2408989ad48a21492842087")
    Keystream(bytes(32), "chacha20").take(out)
    assert out.astype("<u4").tobytes() == hexed("76b8e0ada0f13d90405d6ae55386bd28")


def test_x25519_rfc_7748_5_2() -> None:
    cases = [
        (
            "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
            "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
            "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552",
        ),
        (
            "4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d",
            "e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493",
            "95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957",
        ),
    ]
    for scalar, point, shared in cases:
        assert agree(X25519PrivateKey.from_private_bytes(hexed(scalar)), hexed(point)) == hexed(shared)
    k = u = hexed("09" + 31 * "00")
    once = hexed("422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079")
    for number in range(1000):
        k, u = agree(X25519PrivateKey.from_private_bytes(k), u), k
        assert number or k == once
    assert k == hexed("684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51")


def test_x25519_rfc_7748_6_1() -> None:
    alice = X25519PrivateKey.from_private_bytes(
        hexed("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    )
    bob = X25519PrivateKey.from_private_bytes(hexed("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"))
    public_a = hexed("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    public_b = hexed("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")
    shared = hexed("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    assert alice.public_key().public_bytes_raw() == public_a
    assert bob.public_key().public_bytes_raw() == public_b
    assert agree(alice, public_b) == agree(bob, public_a) == shared


# The points of small order in canonical form: 0, 1, p - 1 and two of order 8.
SMALL_ORDER = [
    "00" * 32,
    "01" + "00" * 31,
    "ec" + "ff" * 30 + "7f",
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
]


@pytest.mark.parametrize("point", SMALL_ORDER)
def test_a_public_key_that_makes_the_secret_zero_is_refused(point: str) -> None:
    with pytest.raises(ProtocolError, match="small order"):
        agree(X25519PrivateKey.generate(), hexed(point))


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_public_key_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(ProtocolError, match=f"has {length} bytes; X25519 keys have 32"):
        agree(X25519PrivateKey.generate(), bytes(length))


def test_hkdf_rfc_5869_a_1_to_a_3() -> None:
    """The appendix asks for 42 and 82 bytes; HKDF's output is cut to length, so the first 32 are a key's."""
    short = b"\x0b" * 22
    assert derive_key(short, hexed("f0f1f2f3f4f5f6f7f8f9"), psk=bytes(range(13))) == hexed(
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"
    )
    assert derive_key(bytes(range(80)), bytes(range(0xB0, 0x100)), psk=bytes(range(0x60, 0xB0))) == hexed(
        "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c"
    )
    assert derive_key(short, b"") == hexed("8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d")


def test_keys_differ_with_secret_purpose_and_shared_secret() -> None:
    keys = {
        derive_key(b"s", b"i"),
        derive_key(b"t", b"i"),
        derive_key(b"s", b"j"),
        derive_key(b"s", b"i", psk=b"p"),
    }
    assert len(keys) == 4
    assert {len(key) for key in keys} == {32}


@pytest.mark.parametrize("cipher", CIPHERS)
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64])
@given(lengths=st.lists(st.integers(0, 700), max_size=8))
@settings(max_examples=20, deadline=None)
def test_consecutive_takes_are_one_take(cipher: Cipher, dtype: type[np.unsignedinteger], lengths: list[int]) -> None:
    stream = Keystream(KEY, cipher)
    pieces = [np.zeros(length, dtype=dtype) for length in lengths]
    for piece in pieces:
        stream.take(piece)
    whole = np.concatenate([np.zeros(0, dtype=dtype), *pieces])
    assert whole.astype(whole.dtype.newbyteorder("<")).tobytes() == bytes_of(cipher, whole.nbytes)


@pytest.mark.parametrize("cipher", CIPHERS)
def test_a_take_longer_than_a_chunk(cipher: Cipher) -> None:
    out = np.zeros((3, 87_383), dtype=np.uint64)
    Keystream(KEY, cipher).take(out)
    assert out.nbytes > keystream.CHUNK_BYTES
    assert out.nbytes % keystream.CHUNK_BYTES
    assert out.astype("<u8").tobytes() == bytes_of(cipher, out.nbytes)


def test_streams_are_little_endian_in_arrays_of_either_order() -> None:
    little, big = np.zeros(5, dtype="<u4"), np.zeros(5, dtype=">u4")
    for out in (little, big):
        Keystream(KEY, "chacha20").take(out)
    assert little.tolist() == big.tolist()
    assert little.tobytes() == bytes_of("chacha20", 20)


@pytest.mark.parametrize("cipher", CIPHERS)
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64])
@pytest.mark.parametrize("size", [0, 1, 7, 32_768, 32_769, 300_001])
def test_adding_in_chunks_is_adding_whole_streams(cipher: Cipher, dtype: type[np.unsignedinteger], size: int) -> None:
    rng = np.random.default_rng(size)
    into = rng.integers(0, np.iinfo(dtype).max, size, dtype=dtype, endpoint=True)
    keys, signs = [rng.bytes(32) for _ in range(4)], [1, -1, -1, 1]
    wanted = into.copy()
    for key, sign in zip(keys, signs, strict=True):
        mask = np.frombuffer(bytes_of(cipher, into.nbytes, key), dtype=into.dtype.newbyteorder("<")).astype(dtype)
        wanted = wanted + mask if sign > 0 else wanted - mask
    add_streams(into, [(Keystream(key, cipher), sign) for key, sign in zip(keys, signs, strict=True)])
    assert np.array_equal(into, wanted)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64])
@given(seed=st.integers(0, 2**32 - 1), cuts=st.lists(st.integers(0, 400), max_size=5))
@settings(max_examples=20, deadline=None)
def test_adding_and_subtracting_a_stream_is_nothing(
    dtype: type[np.unsignedinteger], seed: int, cuts: list[int]
) -> None:
    """One site masks segments, the other the whole vector: they need not be cut alike."""
    top = np.iinfo(dtype).max
    before = np.random.default_rng(seed).choice(np.array([0, 1, top - 1, top], dtype=dtype), sum(cuts))
    after = before.copy()
    plus, minus = Keystream(KEY, "aes-256-ctr"), Keystream(KEY, "aes-256-ctr")
    for part in np.split(after, np.cumsum(cuts)[:-1]) if cuts else []:
        add_streams(part, [(plus, 1)])
    assert after.size < 16 or not np.array_equal(after, before)
    add_streams(after, [(minus, -1)])
    assert np.array_equal(after, before)


def test_ten_streams_over_eleven_million_values_take_a_fifth_of_a_second() -> None:
    """The goal is 0.2 s of a core with AES instructions; other processes' use of the caches may triple it."""
    into = np.zeros(11_000_000, dtype=np.uint32)
    streams = [(Keystream(bytes([i]) * 32, "aes-256-ctr" if has_aes() else "chacha20"), 1) for i in range(10)]
    start = time.process_time()
    add_streams(into, streams)
    assert time.process_time() - start < 0.6


def test_wrong_uses_are_refused() -> None:
    stream = Keystream(KEY, "chacha20")
    with pytest.raises(ValueError, match="key of 32 bytes, not 16"):
        Keystream(bytes(16), "aes-256-ctr")
    with pytest.raises(ValueError, match="unknown cipher 'rot13'"):
        Keystream(KEY, "rot13")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not int32"):
        add_streams(np.zeros(3, dtype=np.int32), [(stream, 1)])
    with pytest.raises(TypeError, match="not uint8"):
        stream.take(np.zeros(3, dtype=np.uint8))
    with pytest.raises(ValueError, match="contiguous"):
        add_streams(np.zeros((4, 4), dtype=np.uint32)[:, ::2], [(stream, 1)])
    with pytest.raises(ValueError, match="not 2 times"):
        add_streams(np.zeros(3, dtype=np.uint32), [(stream, 2)])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("processor: 0\nflags\t\t: fpu vme aes avx\n", True),
        ("processor: 0\nflags\t\t: fpu vme avx vaes\n", False),
        ("processor: 0\nFeatures\t: fp asimd aes pmull\n", True),
        ("processor: 0\n", False),
    ],
)
def test_aes_instructions_by_what_linux_says(
    text: str, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(keystream, "CPU_INFO", tmp_path / "cpuinfo")
    assert has_aes.__wrapped__() is found


@pytest.mark.parametrize(("machine", "found"), [("AMD64", True), ("arm64", True), ("riscv64", False)])
def test_aes_instructions_elsewhere(machine: str, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keystream, "CPU_INFO", tmp_path / "missing")
    monkeypatch.setattr(keystream.platform, "machine", lambda: machine)
    assert has_aes.__wrapped__() is found
