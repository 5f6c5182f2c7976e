"""Enough shares tell the secret; fewer tell nothing, shown by building the polynomial of any other secret."""

from __future__ import annotations

import hashlib
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyclinic.errors import ProtocolError
from polyclinic.secure import shamir
from polyclinic.secure.shamir import recover, split

P = 2**521 - 1
SECRET = bytes(range(100, 132))


def interpolate(points: dict[int, int], at: int) -> int:
    """The value at ``at`` of the polynomial through these points (Lagrange), modulo P."""
    total = 0
    for x, y in points.items():
        term = y
        for other in points:
            if other != x:
                term = term * (at - other) * pow(x - other, P - 2, P) % P
        total += term
    return total % P


def inner(secret: bytes) -> int:
    """The field element that stands for a secret: the secret, then its SHA-256."""
    return int.from_bytes(secret + hashlib.sha256(secret).digest(), "big")


def numbered(shares: list[bytes]) -> dict[int, bytes]:
    return dict(enumerate(shares, 1))


def test_a_polynomial_worked_out_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """f(x) = s + 7x + 3x²: shares at 1, 2, 3, 4 are s + 10, s + 26, s + 48, s + 76."""
    coefficients = iter([7, 3])
    monkeypatch.setattr(shamir.secrets, "randbelow", lambda below: next(coefficients) if below == P else None)
    s = inner(SECRET)
    assert [int.from_bytes(share, "big") for share in split(SECRET, 3, 4)] == [s + 10, s + 26, s + 48, s + 76]


@pytest.mark.parametrize(("threshold", "count"), [(1, 1), (2, 3), (3, 3), (3, 5), (5, 7), (7, 10)])
def test_every_set_of_enough_shares_recovers(threshold: int, count: int) -> None:
    shares = numbered(split(SECRET, threshold, count))
    assert sorted(shares) == list(range(1, count + 1))
    for size in (threshold, count):
        for chosen in combinations(shares, size):
            assert recover({x: shares[x] for x in chosen}, 32) == SECRET


@pytest.mark.parametrize(("threshold", "count"), [(2, 3), (3, 4), (3, 5), (5, 7)])
def test_every_set_of_too_few_shares_fits_any_other_secret(threshold: int, count: int) -> None:
    """One missing share, chosen for the purpose, turns what they hold into shares of any other secret."""
    shares = numbered(split(SECRET, threshold, count))
    for other in (bytes(32), bytes([255]) * 32, b"another secret of thirty-two byte"[:32]):
        for chosen in combinations(shares, threshold - 1):
            held = {x: shares[x] for x in chosen}
            missing = next(x for x in shares if x not in held)
            points = {0: inner(other), **{x: int.from_bytes(share, "big") for x, share in held.items()}}
            forged = interpolate(points, missing).to_bytes(66, "big")
            assert recover({**held, missing: forged}, 32) == other


def test_too_few_shares_are_refused() -> None:
    shares = numbered(split(SECRET, 3, 5))
    for chosen in [*combinations(shares, 2), *combinations(shares, 1), ()]:
        with pytest.raises(ProtocolError, match="do not fit together"):
            recover({x: shares[x] for x in chosen}, 32)


@given(
    secret=st.binary(min_size=1, max_size=33),
    count=st.integers(1, 16),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_any_secret_any_threshold(secret: bytes, count: int, data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, count))
    shares = numbered(split(secret, threshold, count))
    assert {len(share) for share in shares.values()} == {66}
    chosen = data.draw(st.permutations(list(shares)))[: data.draw(st.integers(threshold, count))]
    assert recover({x: shares[x] for x in chosen}, len(secret)) == secret


@given(victim=st.integers(1, 4), bit=st.integers(0, 520))
@settings(max_examples=60, deadline=None)
def test_a_flipped_bit_is_noticed(victim: int, bit: int) -> None:
    shares = numbered(split(SECRET, 3, 4))
    damaged = int.from_bytes(shares[victim], "big") ^ (1 << bit)
    with pytest.raises(ProtocolError, match="do not fit together|damaged"):
        recover({**shares, victim: damaged.to_bytes(66, "big")}, 32)


def test_a_shift_of_the_secret_by_a_known_amount_is_noticed() -> None:
    """A holder of one share can add any number to the recovered value; only the digest can tell."""
    shares = numbered(split(SECRET, 2, 2))
    # The value at 0 is 2 f(1) - f(2): one more at f(2) is one less there; 2**256 more changes the secret's last byte.
    for shift in (1, 2**256, 2**300):
        moved = (int.from_bytes(shares[2], "big") + shift) % P
        with pytest.raises(ProtocolError, match="do not fit together"):
            recover({1: shares[1], 2: moved.to_bytes(66, "big")}, 32)


def test_shares_of_another_secret_or_number_are_refused() -> None:
    one, two = numbered(split(SECRET, 2, 3)), numbered(split(SECRET, 2, 3))
    assert one != two
    with pytest.raises(ProtocolError, match=r"the shares \[1, 2\] do not fit together"):
        recover({1: one[1], 2: two[2]}, 32)
    with pytest.raises(ProtocolError, match="do not fit together"):
        recover({1: one[2], 2: one[1]}, 32)
    with pytest.raises(ProtocolError, match="do not fit together"):
        recover({1: one[1], 2: one[2]}, 31)


@pytest.mark.parametrize(
    ("x", "share"),
    [(2, b""), (2, bytes(65)), (2, bytes(67)), (2, P.to_bytes(66, "big")), (0, bytes(66)), (-1, bytes(66))],
)
def test_a_share_that_cannot_be_one_is_refused(x: int, share: bytes) -> None:
    with pytest.raises(ProtocolError, match=f"share {x} is damaged"):
        recover({1: bytes(66), x: share}, 32)


@pytest.mark.parametrize(
    ("secret", "threshold", "count"), [(b"", 1, 1), (bytes(34), 2, 3), (SECRET, 0, 3), (SECRET, 4, 3)]
)
def test_impossible_splits_are_refused(secret: bytes, threshold: int, count: int) -> None:
    with pytest.raises(ValueError, match="can't be shared|no threshold"):
        split(secret, threshold, count)
