"""Real images and synthetic samples of each class, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from polyclinic.errors import RunError
from polyclinic.report.figures import slug
from polyclinic.report.folder import Json, Run
from polyclinic.report.pictures import picture_card

REAL, SYNTHETIC = 3, 6
"""Most pictures of a class, so that the page stays small."""
Entry = TypeVar("Entry")


def example_id(site: str, position: int) -> str:
    """Of an example on the page of a run, so that the gallery shows the same picture without holding it twice."""
    return slug(f"example-{site}-{position}")


def gallery(run: Run, examples: Mapping[str, Sequence[Json]]) -> list[Json]:
    """A row a class: ``name``, ``real`` and ``synthetic`` cards; empty where the folder keeps no samples.

    Real images are examples of the test, spread over sites; samples are spread over devices.

    Args:
        run: Read with its details.
        examples: Cards of the examples of each site, with their ``id`` on the page.

    Raises:
        RunError: The example samples are damaged.
    """
    if not run.samples:
        return []
    classes, devices = run.synthesis["classes"], run.synthesis["devices"]
    images, labels, places = _checked(run.samples, len(classes), len(devices))
    real = [[{**card, "caption": site} for card in cards] for site, cards in examples.items()]
    rows = []
    for c, name in enumerate(classes):
        positions = [np.flatnonzero((labels == c) & (places == d)).tolist() for d in range(len(devices))]
        made = [
            {**picture_card(images[i]), "caption": devices[places[i]], "id": ""} for i in in_turn(positions)[:SYNTHETIC]
        ]
        shown = in_turn([[card for card in cards if card["target"] == name] for cards in real])[:REAL]
        if made or shown:
            rows.append({"name": name, "real": shown, "synthetic": made})
    return rows


def in_turn(lists: Sequence[Sequence[Entry]]) -> list[Entry]:
    """The first of each list, then the second of each, and so on."""
    longest = max(map(len, lists), default=0)
    return [several[k] for k in range(longest) for several in lists if k < len(several)]


def _checked(samples: dict[str, np.ndarray], classes: int, devices: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, labels and devices of the kept samples."""
    missing = {"images", "labels", "devices"} - set(samples)
    if missing:
        raise RunError(f"synthesis/examples.npz lacks {', '.join(sorted(missing))}: was the file cut off?")
    images, labels, places = (samples[name] for name in ("images", "labels", "devices"))
    fits = images.ndim == 4 and images.dtype == np.uint8 and labels.shape == places.shape == images.shape[:1]
    if not fits or (len(labels) and (labels.max() >= classes or places.max() >= devices)):
        raise RunError(
            f"synthesis/examples.npz holds images {images.shape}, labels {labels.shape} and devices {places.shape} "
            f"that do not fit {classes} classes and {devices} devices: is it of another run?"
        )
    return images, labels, places
