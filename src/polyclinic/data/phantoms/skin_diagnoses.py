"""Skin lesions of the eight diagnoses of ISIC 2019, for studies of rare classes and rare devices.

Each diagnosis has the signs by which a dermatoscope tells it: blue-grey ovoid nests (basal cell carcinoma), a red
pseudonetwork under scale (actinic keratosis), white cysts in wax (benign keratosis), a white scar in a brown rim
(dermatofibroma), red lacunae (vascular lesion), keratin and blood (squamous cell carcinoma). How strong a sign is
varies from lesion to lesion, and a lesion may show a little of another diagnosis' signs: classes overlap. Signs are
large enough to be seen at 24 pixels. Coordinates run from -1 to 1, y downwards.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from polyclinic.data.phantoms.canvas import Array, Streams, bump, clouds, step
from polyclinic.data.phantoms.skin_lesion import BLACK, BLUE, BROWN, FAIR, WAX, Ink, close_up, mix, outline

CLASSES = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC")
"""Melanoma, nevus, basal cell carcinoma, actinic keratosis, benign keratosis, dermatofibroma, vascular lesion,
squamous cell carcinoma: the order of ISIC 2019."""

_ROSE = np.array([0.86, 0.50, 0.47], dtype=np.float32)
_RED = np.array([0.70, 0.16, 0.17], dtype=np.float32)
_PURPLE = np.array([0.38, 0.12, 0.26], dtype=np.float32)
_WHITE = np.array([0.97, 0.93, 0.88], dtype=np.float32)
_KERATIN = np.array([0.95, 0.85, 0.60], dtype=np.float32)

Range = tuple[float, float]
_TRACE: Range = (0.0, 0.12)
"""How much of a foreign sign a lesion may show."""


@dataclass(frozen=True)
class _Character:
    """How a diagnosis is drawn: lowest and highest of each; signs are amounts of 0 to 1."""

    radius: Range = (0.36, 0.62)
    ragged: Range = (0.03, 0.12)
    oblong: Range = (0.0, 0.3)
    edge: Range = (0.10, 0.35)
    brown: Range = (0.0, 0.25)
    """Ground: pigment, wax or blood; what is left is skin."""
    wax: Range = (0.0, 0.2)
    rose: Range = (0.0, 0.2)
    motley: Range = (0.0, 0.25)
    """Patches of black, blue and white."""
    nests: Range = _TRACE
    """Blue-grey ovals."""
    lacunae: Range = _TRACE
    """Red and purple lakes."""
    net: Range = _TRACE
    """Pale holes in a red net."""
    scale: Range = _TRACE
    """Yellow-white flakes."""
    keratin: Range = _TRACE
    """Keratin in the middle, blood around it."""
    scar: Range = _TRACE
    """White middle."""
    cysts: Range = _TRACE
    """White pearls."""


_CHARACTERS = {
    "MEL": _Character(ragged=(0.07, 0.20), oblong=(0.1, 0.45), brown=(0.45, 1.0), motley=(0.35, 1.0)),
    "NV": _Character(ragged=(0.02, 0.09), oblong=(0.0, 0.25), brown=(0.4, 1.0), motley=(0.0, 0.4)),
    "BCC": _Character(ragged=(0.04, 0.15), rose=(0.2, 0.7), nests=(0.45, 1.0), scale=(0.0, 0.25), brown=(0.0, 0.35)),
    "AK": _Character(
        radius=(0.42, 0.68), ragged=(0.06, 0.18), edge=(0.3, 0.6), rose=(0.4, 0.9), net=(0.4, 1.0), scale=(0.1, 0.7)
    ),
    "BKL": _Character(
        ragged=(0.03, 0.14), edge=(0.04, 0.14), wax=(0.4, 1.0), brown=(0.15, 0.6), cysts=(0.3, 1.0), scale=(0.0, 0.2)
    ),
    "DF": _Character(
        radius=(0.30, 0.52), ragged=(0.02, 0.08), edge=(0.2, 0.45), brown=(0.25, 0.7), rose=(0.0, 0.35), scar=(0.5, 1.0)
    ),
    "VASC": _Character(radius=(0.28, 0.55), ragged=(0.02, 0.10), edge=(0.06, 0.2), rose=(0.3, 0.8), lacunae=(0.5, 1.0)),
    "SCC": _Character(
        ragged=(0.06, 0.20), edge=(0.08, 0.3), rose=(0.3, 0.8), keratin=(0.45, 1.0), scale=(0.0, 0.5), net=(0.0, 0.2)
    ),
}


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
        radius, where = outline(rng, float(rng.uniform(*character.radius)), (character.ragged, character.oblong), y, x)
        lesion = _Lesion(rng, character, radius, where, y, x)
        cover = step(-where, rng.uniform(*character.edge)) * rng.uniform(0.6, 1.0)
        return cover, lesion.signs(lesion.ground(skin)), where

    return close_up(streams, size, paint)


@dataclass(frozen=True)
class _Lesion:
    """One lesion while it is painted: signs are laid over each other, each drawn whatever its amount."""

    rng: np.random.Generator
    character: _Character
    radius: float
    where: Array
    y: Array
    x: Array

    def ground(self, skin: NDArray[np.float32]) -> Array:
        """Pigment, wax and blood over skin, darker towards the middle; (3, H, W)."""
        rng, tone = self.rng, skin
        amounts = [rng.uniform(*span) for span in (self.character.rose, self.character.wax, self.character.brown)]
        for ink, amount in zip((_ROSE, WAX, BROWN), amounts, strict=True):
            tone = tone + (ink - tone) * np.float32(amount)
        depth = np.clip(-self.where / self.radius, 0, 1)
        dark = np.clip(0.22 * depth + 0.10 * self._noise(14), 0, 1) * amounts[2]
        return mix(np.broadcast_to(tone[:, None, None], (3, *self.where.shape)), BLACK, dark)

    def signs(self, colour: Array) -> Array:
        """Every sign of the character, from the ground upwards; (3, H, W)."""
        rng, has = self.rng, self.character
        motley = rng.uniform(*has.motley)
        for ink, knots, level in ((BLACK, 9, 0.3), (BLUE, 8, 0.6), (FAIR * np.array([1, 0.85, 0.85]), 9, 0.8)):
            colour = mix(colour, ink, 0.9 * motley * step(self._noise(knots) - level, 0.7))
        net = rng.uniform(*has.net)
        colour = mix(colour, _RED, 0.45 * net * step(0.25 - self._noise(13), 0.6))
        colour = mix(colour, _WHITE, 0.5 * net * step(self._noise(13) - 0.35, 0.5))
        colour = self._spots(colour, BLUE * np.float32(0.75), rng.uniform(*has.nests), (2, 6), (0.07, 0.15))
        lacunae = rng.uniform(*has.lacunae)
        colour = self._spots(colour, _RED, lacunae, (3, 7), (0.08, 0.17))
        colour = self._spots(colour, _PURPLE, lacunae, (1, 5), (0.08, 0.15))
        colour = self._spots(colour, _WHITE, 0.8 * rng.uniform(*has.cysts), (2, 9), (0.03, 0.06))
        colour = mix(colour, _WHITE, 0.8 * rng.uniform(*has.scar) * self._middle((0.12, 0.24)))
        keratin = rng.uniform(*has.keratin)
        colour = self._spots(colour, _RED, 0.9 * keratin, (2, 6), (0.05, 0.10))
        colour = mix(colour, _KERATIN, 0.9 * keratin * self._middle((0.14, 0.30)))
        return mix(colour, _KERATIN, 0.8 * rng.uniform(*has.scale) * step(self._noise(11) - 0.4, 0.5))

    def _noise(self, knots: int) -> Array:
        return clouds(self.rng, (self.where.shape[0], self.where.shape[1]), knots)

    def _middle(self, spread: Range) -> Array:
        """A hill somewhere about the middle."""
        rng = self.rng
        y, x = self.y - 0.2 * self.radius * rng.normal(), self.x - 0.2 * self.radius * rng.normal()
        return bump((y * y + x * x) / rng.uniform(*spread) ** 2)

    def _spots(self, colour: Array, ink: NDArray[np.floating], amount: float, count: Range, spread: Range) -> Array:
        """Ovals of one colour, strewn over the lesion."""
        rng = self.rng
        for _ in range(int(rng.integers(int(count[0]), int(count[1]) + 1))):
            angle, away, turn = rng.uniform(0, 6.3), self.radius * rng.uniform(0.05, 0.8), rng.uniform(0, 3.2)
            y, x = self.y - away * np.sin(angle), self.x - away * np.cos(angle)
            c, s = np.float32(np.cos(turn)), np.float32(np.sin(turn))
            long, short = y * c + x * s, x * c - y * s
            width = rng.uniform(*spread)
            colour = mix(colour, ink, amount * bump((long * long * 0.5 + short * short) / width**2))
        return colour
