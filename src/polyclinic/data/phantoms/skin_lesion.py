"""Skin lesion as a dermatoscope sees it: skin, pigment, hairs, and one lesion of three classes.

The classes differ by the rules that dermatologists learn (asymmetry, border, colour) and overlap: a nevus may be
uneven and a melanoma may be calm. Coordinates run from -1 to 1, y downwards.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from polyclinic.data.phantoms.canvas import Array, Streams, bump, clouds, covered, posed, step

CLASSES = ("nevus", "melanoma", "keratosis")
"""Round and even; asymmetric, ragged, many-coloured; sharp-edged, waxy, with white cysts."""

FAIR = np.array([0.93, 0.77, 0.68], dtype=np.float32)
_TAN = np.array([0.72, 0.52, 0.40], dtype=np.float32)
BROWN = np.array([0.44, 0.26, 0.17], dtype=np.float32)
BLACK = np.array([0.13, 0.09, 0.09], dtype=np.float32)
BLUE = np.array([0.42, 0.46, 0.55], dtype=np.float32)
WAX = np.array([0.60, 0.44, 0.28], dtype=np.float32)
_HAIR = np.array([0.16, 0.11, 0.09], dtype=np.float32)


@dataclass(frozen=True)
class _Character:
    """How typical ranges of a class are drawn: lowest and highest of each."""

    ragged: tuple[float, float]
    oblong: tuple[float, float]
    motley: tuple[float, float]
    edge: tuple[float, float]
    wax: tuple[float, float]
    cysts: tuple[int, int]


_CHARACTERS = {
    "nevus": _Character((0.02, 0.09), (0.0, 0.2), (0.0, 0.35), (0.15, 0.40), (0.0, 0.2), (0, 1)),
    "melanoma": _Character((0.08, 0.21), (0.1, 0.45), (0.5, 1.05), (0.08, 0.30), (0.0, 0.2), (0, 1)),
    "keratosis": _Character((0.03, 0.14), (0.0, 0.35), (0.0, 0.35), (0.04, 0.14), (0.4, 1.1), (1, 12)),
}


Ink = tuple[Array, Array, Array]
"""What is painted on skin: how much is covered (H, W), 0..1; colour (3, H, W); distance from the border (H, W)."""


def draw(streams: Streams, findings: Collection[str], size: tuple[int, int]) -> tuple[Array, NDArray[np.uint8]]:
    """Draw one close-up.

    Args:
        streams: Where the patient's numbers come from.
        findings: Exactly one of ``CLASSES``.
        size: Height and width in pixels.

    Returns:
        Colours (3, H, W) before the device, 0 to 1, and the mask (H, W) of the lesion, 0 or 1.
    """
    (name,) = findings
    character = _CHARACTERS[name]

    def paint(skin: NDArray[np.float32], y: Array, x: Array) -> Ink:
        rng = streams.disease
        shape = (character.ragged, character.oblong)
        radius, where = outline(rng, float(rng.uniform(0.40, 0.65)), shape, y, x)
        return *_lesion(rng, character, skin, (radius, where), (y, x)), where

    return close_up(streams, size, paint)


def close_up(
    streams: Streams, size: tuple[int, int], paint: Callable[[NDArray[np.float32], Array, Array], Ink]
) -> tuple[Array, NDArray[np.uint8]]:
    """Skin with a lesion that ``paint`` makes, hairs over both, and the light of the dermatoscope.

    Args:
        streams: Where the patient's numbers come from.
        size: Height and width in pixels.
        paint: Called with the colour of the skin (3,) and coordinates y, x (H, W).

    Returns:
        As ``draw``.
    """
    rng, pose = streams.anatomy, streams.pose
    y, x = posed(size, pose.uniform(-0.3, 0.3), pose.uniform(0.9, 1.1), pose.normal(0, 0.06, 2))
    skin = FAIR + (_TAN - FAIR) * np.float32(rng.beta(1.3, 3.0))
    mottle = 1 + 0.035 * clouds(rng, size, 10) + 0.025 * clouds(rng, size, 40)
    picture = skin[:, None, None] * mottle
    picture[1:] -= 0.02 * clouds(rng, size, 7)
    cover, colour, where = paint(skin, y, x)
    picture += cover * (colour - picture)
    for number in range(max(int(rng.integers(-3, 8)), 0)):
        _hair(picture, pose if number % 2 else rng, y, x)
    corner = y * y + x * x
    picture *= 1 - 0.10 * corner + 0.06 * (pose.uniform(-1, 1) * x + pose.uniform(-1, 1) * y)
    shade = 1 - 0.9 * step(corner - 1.75, 0.2) * (pose.random() < 0.3)
    return np.clip(picture * shade, 0, 1), covered(step(-where, 0.02))


def outline(
    rng: np.random.Generator, radius: float, shape: tuple[tuple[float, float], tuple[float, float]], y: Array, x: Array
) -> tuple[float, Array]:
    """A ragged oval of a mean ``radius``, and the signed distance (H, W) from its border: below 0 inside.

    ``shape`` are the lowest and highest raggedness and oblongness.
    """
    ragged_range, oblong_range = shape
    turn, oblong = rng.uniform(0, np.pi), rng.uniform(*oblong_range)
    c, s = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    u, v = (y * c + x * s) * np.float32(1 + oblong), (x * c - y * s) * np.float32(1 - oblong / 2)
    angle = np.arctan2(v, u)
    border = np.full_like(angle, radius)
    ragged = rng.uniform(*ragged_range)
    for wave in range(2, 10):
        border += np.float32(radius * ragged * rng.normal() / wave**0.5) * np.cos(wave * angle + rng.uniform(0, 6.3))
    return radius, np.sqrt(u * u + v * v) - np.maximum(border, 0.12)


def _lesion(
    rng: np.random.Generator,
    character: _Character,
    skin: NDArray[np.float32],
    outline: tuple[float, Array],
    place: tuple[Array, Array],
) -> tuple[Array, Array]:
    """How much of the skin the lesion covers (H, W), 0..1, and its colour (3, H, W)."""
    radius, where = outline
    y, x = place
    size = (y.shape[0], y.shape[1])
    cover = step(-where, rng.uniform(*character.edge)) * rng.uniform(0.55, 1.0)
    motley, wax = rng.uniform(*character.motley), rng.uniform(*character.wax)
    depth = np.clip(-where / radius, 0, 1)
    tone = skin + (BROWN - skin) * np.float32(rng.uniform(0.5, 1.1))
    tone = tone + (WAX - tone) * np.float32(0.7 * wax)
    dark = np.clip(0.25 * depth + 0.10 * clouds(rng, size, 14), 0, 1)
    colour = mix(tone[:, None, None], BLACK, dark * (1 - 0.8 * wax))
    for ink, knots, level in ((BLACK, 9, 0.35), (BLUE, 8, 0.7), (FAIR * np.array([1, 0.85, 0.85]), 9, 0.8)):
        patch = step(clouds(rng, size, knots) - level, 0.7)
        colour = mix(colour, ink, patch * motley * 0.9)
    net = np.cos(30 * x + 2.5 * clouds(rng, size, 9)) * np.cos(30 * y + 2.5 * clouds(rng, size, 9))
    colour = colour * (1 - 0.10 * net * (1 - wax)) * (1 + 0.09 * wax * clouds(rng, size, 30))
    for _ in range(int(rng.integers(character.cysts[0], character.cysts[1] + 1))):
        angle, away = rng.uniform(0, 6.3), radius * rng.uniform(0, 0.75)
        spot = (y - away * np.sin(angle)) ** 2 + (x - away * np.cos(angle)) ** 2
        colour = mix(colour, FAIR, 0.7 * bump(spot / rng.uniform(0.02, 0.035) ** 2))
    return cover, colour


def mix(colour: Array, other: NDArray[np.floating], share: Array) -> Array:
    """``colour`` (3, H, W) gone over to ``other`` (3,) by ``share`` (H, W) of 0..1."""
    mixed: Array = colour + share * (other.astype(np.float32)[:, None, None] - colour)
    return mixed


def _hair(picture: Array, rng: np.random.Generator, y: Array, x: Array) -> None:
    """Paint one curved hair over the picture."""
    turn, away, bend = rng.uniform(0, np.pi), rng.uniform(-0.9, 0.9), rng.uniform(-0.25, 0.25)
    c, s = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    u, v = y * c + x * s, x * c - y * s
    line = step(0.009 - np.abs(v - away - bend * u * u), 0.03) * step(rng.uniform(0.3, 1.4) - np.abs(u), 0.1)
    picture += 0.75 * line * (_HAIR[:, None, None] - picture)
