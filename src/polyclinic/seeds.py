"""One seed for a study; every draw gets its own stream, named by what it is for.

A stream depends on names alone, never on what was drawn before, so a resumed run draws what the killed one would have.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed from the study's seed and names, by SHA-256."""
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """A numpy generator for the stream of these names."""
    import numpy as np

    return np.random.default_rng(derive_seed(seed, *names))
