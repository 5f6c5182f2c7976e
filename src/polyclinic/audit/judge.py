"""Numbers on what an attack left: how near it is to the truth, and how far from noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from polyclinic.audit.attack import Finding

BINS = 256
FEWEST_BYTES = 5 * BINS
"""Below five a bin, the test's approximation is not to be trusted."""
RECONSTRUCTED = 0.5
"""Relative L2 error below which an update counts as reconstructed: three quarters of its energy are explained."""
UNLIKELY = 1e-6
"""An audit does about a hundred tests; by chance one in 10,000 audits has a p-value below this."""
DEVIATIONS = 6.0
"""A correlation of so many standard deviations of that of noise, 1/sqrt(values), is no chance."""

Verdict = Literal["reconstructed", "something shows", "nothing found", "nothing to attack"]


@dataclass(frozen=True)
class Uniformity:
    """Chi-square test of bytes against all 256 values being equally likely.

    Attributes:
        statistic, p: None where there are too few bytes.
        counts: How often each value occurs.
    """

    statistic: float | None
    p: float | None
    counts: list[int]


def uniformity(residue: NDArray[np.uint8]) -> Uniformity:
    """Test bytes; see ``Uniformity``."""
    from scipy.stats import chisquare

    counts = np.bincount(residue, minlength=BINS)
    if residue.size < FEWEST_BYTES:
        return Uniformity(None, None, counts.tolist())
    found = chisquare(counts)
    return Uniformity(float(found.statistic), float(found.pvalue), counts.tolist())


@dataclass(frozen=True)
class Nearness:
    """An estimate of an update beside the update.

    Attributes:
        values: How many numbers are compared.
        max_abs: Largest error, in the update's own unit.
        relative: L2 norm of the error over that of the update.
        correlation: Pearson's; None where one of the two is constant.
    """

    values: int
    max_abs: float
    relative: float
    correlation: float | None


def nearness(truth: NDArray[np.float64], estimate: NDArray[np.float64]) -> Nearness:
    """Compare an estimate with the truth; see ``Nearness``. Shapes ``(values,)``."""
    error = estimate - truth
    size = float(np.linalg.norm(truth))
    relative = float(np.linalg.norm(error)) / size if size else float(np.any(error))
    moves = bool(np.ptp(truth)) and bool(np.ptp(estimate))
    correlation = float(np.corrcoef(truth, estimate)[0, 1]) if moves else None
    return Nearness(len(truth), float(np.abs(error).max(initial=0.0)), relative, correlation)


def flat(arrays: Mapping[str, NDArray[Any]], names: list[str]) -> NDArray[np.float64]:
    """Some arrays as one vector."""
    return np.concatenate([np.asarray(arrays[name], dtype=np.float64).reshape(-1) for name in names])


def verdict(found: Finding | None, near: Nearness | None, noise: Uniformity | None) -> Verdict:
    """What the numbers say. Of floating point only the nearness counts: its bytes are never uniform."""
    if found is None or near is None or noise is None:
        return "nothing to attack"
    if near.relative <= RECONSTRUCTED:
        return "reconstructed"
    if near.correlation is not None and abs(near.correlation) > DEVIATIONS / near.values**0.5:
        return "something shows"
    chance = noise.p is None or noise.p >= UNLIKELY
    return "something shows" if found.modular and not chance else "nothing found"


def as_json(numbers: Nearness | Uniformity) -> dict[str, Any]:
    """For a file."""
    return asdict(numbers)
