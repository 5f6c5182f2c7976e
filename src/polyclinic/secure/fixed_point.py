"""Fixed-point numbers: float arrays as integers that can be added modulo a power of two, and back.

What is added are shares of a weighted mean, v = (w / W) x, with w a site's weight and W a public number, at least the
sum of the weights. A mean never leaves the range of its values: |x| <= bound at every site gives |sum of v| <= bound,
however many sites there are, so no bits are lost to headroom.

Each tensor has a public bound and travels in lanes of one width:

=====  ==================  ===========================================  ========================
bits   bound of the size   what is larger                               step of the mean
=====  ==================  ===========================================  ========================
64     2**36               refused before anything is sent              2**-26
32     256 times ``base``  refused before anything is sent              2**-22 times ``base``
16-20  ``base``            cut; what is cut is kept for the next round  2**(1 - bits) times ``base``
=====  ==================  ===========================================  ========================

``base`` is the power of two at or above the largest |value| of the tensor in the model that all sites received, and at
least ``aggregation.reach``. Running statistics of batch normalisation and counters take 64 bits: they outgrow any bound
that suits weights. Rounding is to the nearest step; in narrow lanes it is stochastic, and the site adds what was lost
to its next update (error feedback: Seide et al. 2014; Karimireddy et al. 2019, arXiv 1901.09847).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from polyclinic.errors import MessageError, ProtocolError

if TYPE_CHECKING:
    from torch import Tensor

WIDE, FULL = 64, 32
WIDE_BOUND = 2.0**36
FULL_REACH = 256.0
WEIGHT_STEPS = 2**16
"""Weights are counted in steps of 2**-16."""
MAX_WEIGHT = 2.0**40
_CHUNK = 1 << 16
_RUNNING = ("running_mean", "running_var")
Lanes = dict[int, NDArray[Any]]
"""``{bits: signed integers of all tensors of that width, one after another}``, in the order of the layout."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a layout."""

    name: str
    """``group/name``."""
    shape: tuple[int, ...]
    bits: int
    bound: float

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def narrow(self) -> bool:
        """Whether what exceeds the bound is cut and kept, rather than refused."""
        return self.bits < FULL

    def scale(self, sites: int) -> float:
        """Steps per unit. In narrow lanes room for one step of rounding per site is left."""
        if self.narrow:
            return (2.0 ** (self.bits - 1) - 1 - sites) / self.bound
        return 2.0 ** (self.bits - 2) / self.bound


@dataclass(frozen=True)
class Layout:
    """What travels and how: public, the same at all sites, bound into every signature of an attempt."""

    entries: tuple[Entry, ...]
    groups: tuple[str, ...]
    """Groups of arrays, each with a weight of its own, which take one wide lane each before the tensors."""

    def __post_init__(self) -> None:
        known = {entry.name.partition("/")[0] for entry in self.entries}
        twice = len({e.name for e in self.entries}) != len(self.entries) or len(set(self.groups)) != len(self.groups)
        if twice or not known <= set(self.groups):
            raise MessageError("a layout names a tensor twice or one of no known group.")

    @property
    def widths(self) -> list[int]:
        """Widths in bits that occur, widest first."""
        return sorted({WIDE, *(entry.bits for entry in self.entries)}, reverse=True)

    def count(self, bits: int) -> int:
        """Number of lanes of a width."""
        own = sum(entry.size for entry in self.entries if entry.bits == bits)
        return own + (len(self.groups) if bits == WIDE else 0)

    @property
    def digest(self) -> str:
        """SHA-256 of the layout, hexadecimal."""
        return hashlib.sha256(self.to_text().encode()).hexdigest()

    def to_text(self) -> str:
        """As JSON."""
        rows = [[e.name, list(e.shape), e.bits, e.bound] for e in self.entries]
        return json.dumps({"groups": list(self.groups), "entries": rows}, separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str) -> Layout:
        """Read ``to_text``.

        Raises:
            MessageError: It is no layout.
        """
        try:
            raw = json.loads(text)
            entries = tuple(Entry(str(n), tuple(map(int, s)), int(b), float(c)) for n, s, b, c in raw["entries"])
            groups = tuple(map(str, raw["groups"]))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise MessageError(f"a site's layout cannot be read: {error}") from None
        if any(
            e.bits not in (16, 18, 20, FULL, WIDE) or not 0 < e.bound < math.inf or min(e.shape, default=1) < 0
            for e in entries
        ):
            raise MessageError("a site's layout holds a width, bound or shape that does not exist.")
        layout = cls(entries, groups)
        if layout.to_text() != text:
            raise MessageError("a site's layout is not in our form.")
        return layout


def plan(
    arrays: Mapping[str, Tensor], least: Mapping[str, int], received: Mapping[str, Tensor], *, narrow: int, reach: float
) -> Layout:
    """The layout of an answer, from what is public alone: names, shapes and the received model.

    Args:
        arrays: ``{group/name: array}`` to be summed.
        least: For each group, the narrowest lanes that it may travel in: 16, 32 or 64 bits.
        received: The model that all sites got, by name without group; empty where there is none.
        narrow: Width that the study wants: 16 to 20, or 32.
        reach: Least ``base``.

    Raises:
        ProtocolError: The received model holds values that are not finite.
    """
    entries = []
    for key, array in arrays.items():
        group, _, name = key.partition("/")
        bits = WIDE if name.rpartition(".")[2] in _RUNNING else max(least[group], narrow)
        bound = WIDE_BOUND
        if bits < WIDE:
            own = received.get(name)
            # The two ends rather than abs().max(), which would copy the model.
            largest = max(map(abs, map(float, own.aminmax()))) if own is not None and own.numel() else 0.0
            if not math.isfinite(largest):
                raise ProtocolError(f"{name} of the received model holds values that are not finite: it diverged.")
            bound = 2.0 ** math.ceil(math.log2(max(reach, largest))) * (FULL_REACH if bits == FULL else 1.0)
        entries.append(Entry(key, tuple(array.shape), bits, bound))
    return Layout(tuple(entries), tuple(dict.fromkeys(key.partition("/")[0] for key in arrays)))


def weight_steps(weight: float) -> int:
    """A site's weight in steps of 2**-16.

    Raises:
        ProtocolError: Negative, not a number, or above 2**40.
    """
    if not 0 <= weight <= MAX_WEIGHT:
        # The reason travels to the server, so it must not tell the weight.
        raise ProtocolError("this site's weight cannot be summed securely: it must lie between 0 and 2**40.")
    return round(weight * WEIGHT_STEPS)


def encode(
    layout: Layout,
    arrays: Mapping[str, Tensor],
    steps: Mapping[str, int],
    totals: Mapping[str, int],
    *,
    sites: int,
    rng: np.random.Generator | None = None,
) -> tuple[Lanes, dict[str, NDArray[np.float32]]]:
    """Integers of a site's share of the weighted mean, weights first.

    Args:
        layout: What goes where.
        arrays: ``{group/name: array}``.
        steps: The site's weight per group, ``weight_steps``.
        totals: Per group, the public sum of all sites' steps.
        sites: Number of sites that were asked.
        rng: For the stochastic rounding of narrow lanes; needed where there are any.

    Returns:
        The lanes, and of each tensor in narrow lanes what was cut or rounded off, in the tensor's own unit.

    Raises:
        ProtocolError: A value is not finite, or beyond the bound of its lanes.
    """
    lanes: Lanes = {bits: np.empty(layout.count(bits), dtype=np.dtype(f"i{word(bits)}")) for bits in layout.widths}
    lanes[WIDE][: len(layout.groups)] = [steps[group] for group in layout.groups]
    start = dict.fromkeys(layout.widths, 0) | {WIDE: len(layout.groups)}
    lost = {}
    for entry in layout.entries:
        group = entry.name.partition("/")[0]
        # A refusal of a sum below this site's own weight would tell, if asked often enough, that weight.
        share = min(1.0, steps[group] / totals[group]) if totals[group] > 0 else 0.0
        values = np.ascontiguousarray(arrays[entry.name].detach().cpu().numpy()).reshape(-1)
        into = lanes[entry.bits][start[entry.bits] : start[entry.bits] + entry.size]
        start[entry.bits] += entry.size
        if not entry.narrow:
            _round_to(into, values, entry, share * entry.scale(sites))
        elif rng is None:
            raise ValueError("narrow lanes need a generator for their rounding.")
        else:
            lost[entry.name] = _cut_to(into, values, entry, share * entry.scale(sites), rng)
    return lanes, lost


def decode(layout: Layout, lanes: Lanes, *, sites: int) -> tuple[dict[str, int], dict[str, NDArray[np.float64]]]:
    """Weight steps per group and weighted means from summed lanes (signed); the inverse of ``encode``."""
    weights = dict(zip(layout.groups, map(int, lanes[WIDE]), strict=False))
    start = dict.fromkeys(layout.widths, 0) | {WIDE: len(layout.groups)}
    means = {}
    for entry in layout.entries:
        part = lanes[entry.bits][start[entry.bits] : start[entry.bits] + entry.size]
        start[entry.bits] += entry.size
        means[entry.name] = (part / entry.scale(sites)).reshape(entry.shape)
    return weights, means


def error_bound(entry: Entry, sites: int, largest: float | None = None) -> float:
    """Largest distance, per value, of a decoded sum of ``sites`` shares from the real one, where nothing was cut.

    Args:
        entry: The tensor.
        sites: Number of sites that were asked.
        largest: Largest |value| at any site; by default the bound of the lanes.

    Returns:
        Rounding to steps, and that of float64 (the share, its product with a value, the decoded sum): 2**-51 of
        ``largest``, which counts in wide lanes alone. A mean over fewer sites than were asked is off by this times all
        sites' weight over theirs.
    """
    steps = sites * (1.0 if entry.narrow else 0.5) / entry.scale(sites)
    return steps + (entry.bound if largest is None else largest) * 2.0**-51


def word(bits: int) -> int:
    """Bytes of the integers that lanes of this width are held in."""
    return 2 if bits <= 16 else bits // 8 if bits >= FULL else 4


def _round_to(into: NDArray[Any], values: NDArray[Any], entry: Entry, factor: float) -> None:
    buffer = np.empty(min(_CHUNK, values.size))
    for begin in range(0, values.size, _CHUNK):
        part = values[begin : begin + _CHUNK]
        if not max(abs(float(part.max())), abs(float(part.min()))) <= entry.bound:
            # The reason travels to the server, so it must not tell the value.
            advice = "" if entry.bits == WIDE else " If training did not diverge, raise aggregation.reach."
            raise ProtocolError(
                f"{entry.name} holds a value that is not finite or beyond {entry.bound:g}, the most that "
                f"{entry.bits}-bit lanes carry; nothing was sent.{advice}"
            )
        scaled = np.multiply(part, factor, out=buffer[: part.size], dtype=np.float64, casting="unsafe")
        into[begin : begin + part.size] = np.rint(scaled, out=scaled)


def _cut_to(
    into: NDArray[Any], values: NDArray[Any], entry: Entry, factor: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    lost = np.zeros(values.size, dtype=np.float32)
    for begin in range(0, values.size, _CHUNK):
        part = values[begin : begin + _CHUNK]
        if not np.isfinite(part).all():
            raise ProtocolError(f"{entry.name} holds values that are not finite; nothing was sent. Training diverged.")
        scaled = np.clip(part, -entry.bound, entry.bound) * np.float64(factor)
        whole = np.floor(scaled + rng.random(part.size, dtype=np.float32))
        into[begin : begin + part.size] = whole
        if factor:
            lost[begin : begin + part.size] = part - whole / factor
    return lost
