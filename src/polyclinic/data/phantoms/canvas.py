"""What every phantom is drawn with: seeded streams of numbers, coordinates, soft edges, smooth noise.

Shapes are formulas on coordinates, so that a phantom is drawn directly at the wanted size and the same patient looks
the same at every size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]


def stream(seed: int, site: str, patient: int, purpose: str) -> np.random.Generator:
    """Numbers that depend on these four values alone: the same on every machine, independent between purposes.

    Anatomy, disease, pose and noise each have their own purpose, so that none of them changes another.
    """
    digest = hashlib.sha256(f"{seed}|{site}|{patient}|{purpose}".encode()).digest()
    words = np.frombuffer(digest, dtype="<u4").tolist()
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


@dataclass(frozen=True)
class Streams:
    """The streams of one image. ``anatomy`` and ``disease`` belong to the patient, ``pose`` to the image."""

    anatomy: np.random.Generator
    disease: np.random.Generator
    pose: np.random.Generator

    @classmethod
    def of(cls, seed: int, site: str, patient: int, image: int) -> Streams:
        """The streams of image ``image`` of a patient."""
        return cls(
            stream(seed, site, patient, "anatomy"),
            stream(seed, site, patient, "disease"),
            stream(seed, site, patient, f"pose {image}"),
        )


@lru_cache(maxsize=32)
def axes(size: tuple[int, ...]) -> tuple[Array, ...]:
    """Open coordinates of pixel centres, for height and width of ``size``; -1 to 1 along the shorter side.

    Returns:
        ``y`` of shape (H, 1) and ``x`` of shape (1, W), y growing downwards.
    """
    shorter = min(size[-2:])
    y, x = (((np.arange(n) + 0.5) * 2 - n) / shorter for n in size[-2:])
    return y.astype(np.float32)[:, None], x.astype(np.float32)[None, :]


def posed(size: tuple[int, ...], angle: float, zoom: float, shift: Sequence[float] | Array) -> tuple[Array, Array]:
    """Coordinates (y, x), each (H, W), of a patient turned by ``angle`` (radians), enlarged and shifted."""
    y, x = axes(size)
    c, s = np.float32(np.cos(angle) / zoom), np.float32(np.sin(angle) / zoom)
    return y * c + x * s - np.float32(shift[0]), x * c - y * s - np.float32(shift[1])


def step(distance: Array, width: float) -> Array:
    """Soft edge: 0 below ``-width/2``, 1 above ``width/2``, smooth between."""
    t = distance * np.float32(1 / width)
    t += np.float32(0.5)
    np.clip(t, 0, 1, out=t)
    edge: Array = t * t * (3 - 2 * t)
    return edge


def bump(squared_distance: Array) -> Array:
    """Smooth hill ``exp(-d²/2)``."""
    hill: Array = np.exp(squared_distance * np.float32(-0.5))
    return hill


def ripple(values: Array) -> Array:
    """Periodic hills of height 1 at whole numbers, 0 half-way between."""
    t = values - np.round(values)
    t *= t
    t *= -4
    t += 1
    return t * t


def clouds(rng: np.random.Generator, size: tuple[int, int], knots: int) -> Array:
    """Smooth noise of mean 0 and deviation about 0.6, shape ``size``; more knots, finer grain."""
    grid = rng.standard_normal((knots, knots), dtype=np.float32) * np.float32(1.3)
    noise: Array = _pixel_weights(size[0], knots) @ grid @ _pixel_weights(size[1], knots).T
    return noise


def solid_clouds(rng: np.random.Generator, z: Array, size: tuple[int, int], knots: int) -> Array:
    """Smooth noise of a solid, cut at heights ``z`` (-1 to 1, any shape); shape (len(z), H, W), deviation about 0.5."""
    grid = rng.standard_normal((knots, knots, knots), dtype=np.float32) * np.float32(1.6)
    planes = np.tensordot(_weights((z.ravel() + 1) / 2, knots), grid, axes=1)
    return np.asarray(_pixel_weights(size[0], knots) @ planes @ _pixel_weights(size[1], knots).T)


@lru_cache(maxsize=128)
def _pixel_weights(n: int, knots: int) -> Array:
    return _weights((np.arange(n) + 0.5) / n, knots)


def _weights(position: NDArray[np.floating[Any]], knots: int) -> Array:
    """Cubic B-spline weights, shape (len(position), knots), that spread ``knots`` values over 0..1."""
    at = np.clip(position, 0, 1).astype(np.float64) * (knots - 3)
    t = np.abs(at[:, None] - (np.arange(knots)[None, :] - 1))
    inner, outer = 2 / 3 - t**2 + t**3 / 2, (2 - t) ** 3 / 6
    return np.where(t < 1, inner, np.where(t < 2, outer, 0)).astype(np.float32)


def covered(field: Array) -> NDArray[np.uint8]:
    """Mask (0 or 1) where a lesion field of 0..1 is at least half; never empty unless the field is 0 everywhere."""
    highest = float(field.max())
    if highest <= 0:
        return np.zeros(field.shape, dtype=np.uint8)
    return (field >= min(0.5, highest)).astype(np.uint8)
