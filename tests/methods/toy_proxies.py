"""A handful of made-up public images with labels, and networks of unlike shape for sites of one study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from polyclinic.data.proxy_manifest import make_manifest

CLASSES = ("cat", "dog", "tree")
PER_CLASS = 14
SIDE = 8

MIXED: dict[str, dict[str, Any]] = {
    "north": {"name": "toy_proxies:wide"},
    "south": {"name": "toy_proxies:narrow"},
}
"""``models`` of a toy study: three networks of unlike shape, for ``west`` keeps the study's."""


def toy_proxies(folder: Path, classes: tuple[str, ...] = CLASSES, seed: int = 0) -> dict[str, Any]:
    """Write 14 colour PNGs of 8 x 8 pixels a class and their manifest.

    Returns:
        The study's ``proxies``, with absolute paths.
    """
    rng = np.random.default_rng(seed)
    images = Path(folder) / "public"
    for index, name in enumerate(classes):
        (images / name).mkdir(parents=True, exist_ok=True)
        for number in range(PER_CLASS):
            pixels = rng.integers(0, 128, (SIDE, SIDE, 3), dtype=np.uint8)
            pixels[..., index % 3] += 100
            Image.fromarray(pixels).save(images / name / f"{number:02d}.png")
    manifest = Path(folder) / "public.json"
    make_manifest(images, manifest, name="toys")
    return {"manifest": str(manifest.absolute()), "images": str(images.absolute())}


class Tapped(nn.Sequential):
    """Layers whose maps and features can be asked for."""

    def __init__(self, *layers: nn.Module, taps: tuple[str, ...], feature: str) -> None:
        super().__init__(*layers)
        self.taps, self.feature_tap = taps, feature


def wide(in_channels: int, out_channels: int, spatial_dims: int, norm: str, hidden: int = 5) -> nn.Module:
    """Two convolutions without normalisation; features of ``hidden``."""
    return Tapped(
        nn.Conv2d(in_channels, hidden, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(hidden, hidden, 3, padding=1),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(hidden, out_channels),
        taps=("1", "3"),
        feature="3",
    )


def narrow(in_channels: int, out_channels: int, spatial_dims: int, norm: str, hidden: int = 3) -> nn.Module:
    """One convolution without normalisation; features of ``hidden``."""
    return Tapped(
        nn.Conv2d(in_channels, hidden, 3, padding=1),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(hidden, out_channels),
        taps=("1",),
        feature="1",
    )
