"""Chest radiograph: torso, lungs, ribs, spine, heart, diaphragm, clavicles, vessels, and three findings.

Coordinates run from -1 to 1, y downwards; the patient's right is on the left of the picture, as on a radiograph.
Values are shades 0 (black, air) to 1 (white, bone).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from polyclinic.data.phantoms.canvas import Array, Streams, bump, clouds, covered, posed, ripple, step

CLASSES = ("normal", "pneumonia", "effusion", "nodule")
"""No finding, and the three findings."""


@dataclass(frozen=True)
class _Chest:
    """Fields of one patient in one pose, each (H, W)."""

    y: Array
    x: Array
    lungs: tuple[Array, Array]
    """Right and left lung, 0..1, without what heart and diaphragm hide."""
    fields: tuple[Array, Array]
    """Right and left lung including what the diaphragm's slope hides: where fluid may stand."""
    domes: tuple[float, float]
    """Height y of the two domes of the diaphragm."""
    shades: Array
    """The healthy picture."""


def draw(streams: Streams, findings: Collection[str], size: tuple[int, int]) -> tuple[Array, NDArray[np.uint8]]:
    """Draw one radiograph.

    Args:
        streams: Where the patient's numbers come from.
        findings: Any of ``CLASSES``; ``normal`` adds nothing.
        size: Height and width in pixels.

    Returns:
        Shades (1, H, W) before the device, about 0 to 1, and the mask (H, W) of all findings, 0 or 1.
    """
    chest = _healthy(streams, size)
    shades = chest.shades
    lesion = np.zeros(size, dtype=np.float32)
    for finding, painter in (("pneumonia", _pneumonia), ("effusion", _effusion), ("nodule", _nodule)):
        rng = streams.disease.spawn(1)[0]
        if finding in findings:
            field, opacity = painter(rng, chest)
            shades = shades + opacity * (np.float32(0.95) - shades)
            np.maximum(lesion, field, out=lesion)
    return shades[None], covered(lesion)


def _healthy(streams: Streams, size: tuple[int, int]) -> _Chest:
    rng, pose = streams.anatomy, streams.pose
    y, x = posed(size, pose.normal(0, 0.02), pose.uniform(0.95, 1.04), pose.normal(0, 0.02, 2))
    build = rng.uniform(0.94, 1.05)
    breath = pose.normal(0, 0.015) + rng.normal(0, 0.02)
    width, height = 0.37 * build, rng.uniform(0.78, 0.86)
    across = np.abs(x)
    body = _body(y, across, build)
    edge = 0.06
    halves, domes, cages = [], [], []
    for side, dome in ((-1, 0.42), (1, 0.49)):
        u = x * side
        top = dome + breath
        middle = (u - (0.43 + 0.10 * y)) / width
        middle *= middle
        reach = (y - 0.05) / height
        reach *= reach
        cage = step((1 - (middle * middle * 0.3 + middle * 0.7 + reach)) * width * 0.5, edge)
        slope = (u - 0.36) / 0.4
        cages.append(cage)
        halves.append(cage * step(top + 0.26 * slope * slope - y, edge))
        domes.append(top)
    heart = _heart(y, x, rng)
    open_to_air = 1 - 0.85 * heart
    lungs = (halves[0] * open_to_air, halves[1] * open_to_air)
    air = lungs[0] + lungs[1]
    cage = np.minimum(cages[0] + cages[1], 1)

    shades = 0.60 + 0.10 * step(y - domes[0], 0.5) + 0.05 * heart
    shades += 0.02 * clouds(rng, size, 9)
    shades -= air * (0.45 + 0.03 * clouds(rng, size, 7) - 0.10 * step(y - 0.1, 0.9))
    shades += _vessels(rng, size, y, x) * air
    shades += _bones(rng, y, x, across, cage * (0.3 + 0.7 * np.minimum(air, 1)))
    shades -= 0.10 * bump((x / 0.05) ** 2) * step(-0.42 - y, 0.3)
    shades -= 0.16 * bump(((x - 0.42) / 0.13) ** 2 + ((y - domes[1] - 0.16) / 0.06) ** 2) * rng.uniform(0, 1)
    shades = np.maximum(shades, 0.06) * body + 0.03
    return _Chest(y, x, lungs, (cages[0], cages[1]), (domes[0], domes[1]), shades)


def _body(y: Array, across: Array, build: float) -> Array:
    """The torso, 0..1: neck, sloping shoulders, chest wall, upper arms."""
    shoulder = y + 0.98 - 0.42 * across * across
    neck = 0.26 - across + 0.0 * y
    wall = 0.93 * build - across + 0.04 * y * y
    arm = 0.22 - np.abs(y + 0.38 - 0.25 * (across - 0.9))
    outline = np.maximum(wall, np.minimum(arm, 1.25 - across))
    return step(np.maximum(np.minimum(shoulder, outline), np.minimum(neck, y + 1.3)), 0.07)


def _heart(y: Array, x: Array, rng: np.random.Generator) -> Array:
    """Heart, great vessels and spine shadow, 0..1."""
    large = rng.uniform(0.9, 1.15)
    v, u = y - 0.27, x - 0.12
    a, b = u * 0.9 + v * 0.45, v * 0.9 - u * 0.45
    muscle = step(0.5 * (1 - (a / (0.33 * large)) ** 2 - (b / (0.25 * large)) ** 2), 0.22)
    column = step(0.13 + 0.05 * step(y, 1.0) - np.abs(x - 0.02), 0.10)
    arch = step(0.11 - np.sqrt((x - 0.13) ** 2 + (y + 0.30) ** 2), 0.06)
    return np.maximum(np.maximum(muscle, column), arch)


def _vessels(rng: np.random.Generator, size: tuple[int, int], y: Array, x: Array) -> Array:
    """Hila and the vessels that branch out of them."""
    u, v = np.abs(x) - 0.2, y - 0.0
    radius = np.sqrt(u * u + v * v) + np.float32(0.02)
    angle = np.arctan2(v, u + np.float32(0.05))
    wiggle = clouds(rng, size, 12)
    first = ripple(angle * 1.3 + 0.8 * wiggle + np.sign(x) * 0.3)
    second = ripple(angle * 2.6 + 1.4 * wiggle + radius)
    near = np.minimum(radius * 7, 1)
    fade = near * near / (1 + 5 * radius)
    hilum = 0.15 * bump((u / 0.09) ** 2 + (v / 0.17) ** 2) * (1 + 0.5 * wiggle)
    return hilum + (0.14 * first * first + 0.13 * second * second) * fade - 0.03


def _bones(rng: np.random.Generator, y: Array, x: Array, across: Array, cage: Array) -> Array:
    """Ribs (behind and in front), vertebrae, clavicles, shoulder blades."""
    gap = rng.uniform(0.135, 0.16)
    start = rng.uniform(0, 1)
    behind = ripple((y - 0.42 * across + 0.50 * across * across) / gap + start)
    front = ripple((y + 0.62 * across + 0.12 * across * across) / (gap * 1.15) + start)
    rim = behind * (1 - behind) * 4
    bones = (0.075 * behind + 0.03 * rim + 0.04 * front * step(across - 0.3, 0.3)) * cage
    spine = bump((x / 0.085) ** 2)
    bones += spine * (0.06 + 0.05 * ripple(y / (gap * 0.8)))
    tilt = rng.uniform(0.12, 0.24)
    collar = (y + 0.60 + tilt * (across - 0.15) + 0.18 * (across - 0.4) ** 2) / 0.042
    bones += 0.15 * bump(collar * collar) * step(across - 0.07, 0.06) * step(0.82 - across, 0.1)
    blade = step(0.16 - np.abs(across - 0.80 + 0.2 * (y + 0.3)), 0.1) * step(0.34 - np.abs(y + 0.22), 0.2)
    return bones + 0.05 * blade


def _pneumonia(rng: np.random.Generator, chest: _Chest) -> tuple[Array, Array]:
    """Soft patchy opacity of one lobe."""
    half = int(rng.integers(2))
    u = chest.x * (2 * half - 1)
    cy, cx = rng.uniform(-0.35, 0.40), rng.uniform(0.32, 0.58)
    tall, wide = rng.uniform(0.18, 0.34), rng.uniform(0.15, 0.25)
    patchy = clouds(rng, (chest.y.shape[0], chest.x.shape[1]), 11)
    distance = ((u - cx) / wide) ** 2 + ((chest.y - cy) / tall) ** 2
    field = bump(distance * (1 + 0.35 * patchy)) * chest.fields[half]
    strength = rng.uniform(0.20, 0.80)
    field = field * np.minimum(0.3 + chest.lungs[half], 1)
    return field, field * strength * (1 + 0.3 * patchy)


def _effusion(rng: np.random.Generator, chest: _Chest) -> tuple[Array, Array]:
    """Fluid at one base, its surface rising towards the chest wall (meniscus)."""
    half = int(rng.integers(2))
    u = chest.x * (2 * half - 1)
    level = chest.domes[half] + rng.uniform(-0.42, -0.04)
    out = u - 0.3
    surface = level - 0.9 * out * np.abs(out)
    fluid = step(chest.y - surface, 0.14) * chest.fields[half]
    open_lung = np.minimum(chest.lungs[half] * 1.3, 1)
    return fluid * open_lung, fluid * np.minimum(0.3 + open_lung, 1) * rng.uniform(0.45, 0.85)


def _nodule(rng: np.random.Generator, chest: _Chest) -> tuple[Array, Array]:
    """One to three round lesions in the open lung."""
    field = np.zeros_like(chest.y)
    spacing = 2 / min(field.shape)
    for _ in range(int(rng.integers(1, 4))):
        side = 1 if rng.random() < 0.5 else -1
        radius = rng.uniform(0.09, 0.15)
        cy, cx = rng.uniform(-0.50, 0.25), rng.uniform(0.32, 0.60)
        distance = np.sqrt((chest.x * side - cx) ** 2 + (chest.y - cy) ** 2)
        # On a grid so coarse that a nodule may fall between pixel centres, its edge is blurred up to the nearest one.
        edge = max(0.05, 2 * (spacing - radius))
        np.maximum(field, step(radius - distance, edge), out=field)
    return field, field * rng.uniform(0.55, 1.0)
