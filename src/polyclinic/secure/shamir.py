"""Shamir's secret sharing: any ``threshold`` shares tell a secret, fewer tell nothing at all.

Shamir, How to share a secret, Communications of the ACM 22 (1979). The secret is the value at 0 of a random polynomial
of degree ``threshold - 1`` over the integers modulo the prime 2**521 - 1; share ``x`` is its value at ``x``. A SHA-256
digest travels inside the shared value, so that a share altered by accident or on purpose is noticed when the secret is
recovered; it changes nothing for those with too few shares, to whom every value is equally likely.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping

from polyclinic.errors import ProtocolError

PRIME = 2**521 - 1
SHARE_BYTES = 66
DIGEST_BYTES = 32
MOST_BYTES = 33
"""The longest secret: with its digest it must stay below the prime."""


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Share a secret among ``count`` holders.

    Args:
        secret: 1 to 33 bytes.
        threshold: How many shares recover it, 1 to ``count``.
        count: Number of shares.

    Returns:
        Shares of 66 bytes (big-endian); the one at index ``i`` belongs to ``x = i + 1``.
    """
    if not 1 <= len(secret) <= MOST_BYTES:
        raise ValueError(f"a secret of {len(secret)} bytes can't be shared; 1 to {MOST_BYTES} can.")
    if not 1 <= threshold <= count:
        raise ValueError(f"{threshold} of {count} shares is no threshold; it lies between 1 and their number.")
    value = int.from_bytes(secret + hashlib.sha256(secret).digest())
    coefficients = [value, *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return [_at(coefficients, x).to_bytes(SHARE_BYTES) for x in range(1, count + 1)]


def recover(shares: Mapping[int, bytes], length: int) -> bytes:
    """The secret of ``length`` bytes from at least as many shares as the threshold, as ``{x: share}``.

    Raises:
        ProtocolError: A share is damaged or of another secret, or there are too few; which of these can't be told.
    """
    points = {x: _value(x, share) for x, share in shares.items()}
    value = 0
    for x, y in points.items():
        above, below = 1, 1
        for other in points:
            if other != x:
                above = above * other % PRIME
                below = below * (other - x) % PRIME
        value = (value + y * above * pow(below, -1, PRIME)) % PRIME
    if value.bit_length() <= 8 * (length + DIGEST_BYTES):
        both = value.to_bytes(length + DIGEST_BYTES)
        if hmac.compare_digest(hashlib.sha256(both[:length]).digest(), both[length:]):
            return both[:length]
    raise ProtocolError(
        f"the shares {sorted(points)} do not fit together: one is damaged or of another secret, or they are too few. "
        "Begin a new attempt."
    )


def _at(coefficients: list[int], x: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % PRIME
    return value


def _value(x: int, share: bytes) -> int:
    value = int.from_bytes(share)
    if not 1 <= x < PRIME or len(share) != SHARE_BYTES or value >= PRIME:
        raise ProtocolError(
            f"share {x} is damaged: {len(share)} bytes where {SHARE_BYTES} are wanted, or its value or its number is "
            "out of range. Begin a new attempt."
        )
    return value
