"""Example images as data URIs, with the outlines of masks as SVG paths."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np

from polyclinic.errors import RunError
from polyclinic.report.figures import slug
from polyclinic.report.folder import Json

LONGEST = 192
"""Pixels of the longer side of a picture on the page; larger images are shrunk, which keeps the report small."""


def example_cards(examples: dict[str, np.ndarray], classes: Sequence[str], kind: str, site: str) -> list[Json]:
    """One card per example image.

    Args:
        examples: ``images`` uint8 ``[n, C, H, W]`` with ``targets``, ``predictions`` and ``probabilities``.
        classes: Names in order of the index.
        kind: Kind of the task.
        site: For error messages.

    Returns:
        ``picture`` (data URI), ``width``, ``height`` and, for masks, ``outlines`` of ``{kind, path, label}`` and
        ``dice``, else ``target``, ``predicted`` and ``right``.
    """
    missing = {"images", "targets", "predictions"} - set(examples)
    if missing:
        raise RunError(f"examples of site {site!r} lack {', '.join(sorted(missing))}: was the file cut off?")
    cards = []
    for i, image in enumerate(examples["images"]):
        card = {**picture_card(image), "target": ""}
        target, predicted = examples["targets"][i], examples["predictions"][i]
        if kind == "segmentation":
            for k, name in enumerate(classes[1:], start=1):
                for what, mask in (("target", target), ("predicted", predicted)):
                    card["outlines"].append({"kind": what, "path": outline(mask == k), "label": name})
            card["dice"] = _dice(target, predicted)
        else:
            card |= _labels(target, predicted, examples["probabilities"][i], classes)
        cards.append(card)
    return cards


def picture_card(image: np.ndarray) -> Json:
    """``picture`` (data URI), ``width``, ``height`` and no ``outlines`` of an image, uint8 ``[C, H, W]``."""
    height, width = image.shape[-2:]
    return {"picture": _data_uri(image), "width": width, "height": height, "outlines": []}


def side_by_side(cards: Mapping[str, Sequence[Json]], site: str) -> list[Json]:
    """Each picture of a site once, with what every method made of it.

    Args:
        cards: ``example_cards`` by method; the same pictures where the methods were tested alike.
        site: For the id.

    Returns:
        ``id`` and ``answers`` (card by method) of each distinct picture.
    """
    found: dict[tuple[int, str], dict[str, Json]] = {}
    for method, several in cards.items():
        for number, card in enumerate(several):
            found.setdefault((number, card["picture"]), {})[method] = card
    return [{"id": slug(f"picture-{site}-{n}"), "answers": a} for n, a in enumerate(found.values(), start=1)]


def outline(mask: np.ndarray) -> str:
    """SVG path along the pixel edges of a mask ``[H, W]``; runs of edges are one segment."""
    padded = np.pad(np.asarray(mask, dtype=bool), 1)
    parts = []
    for y, row in enumerate(padded[1:] != padded[:-1]):
        parts += [f"M{a - 1} {y}H{b - 1}" for a, b in _runs(row)]
    for x, column in enumerate((padded[:, 1:] != padded[:, :-1]).T):
        parts += [f"M{x} {a - 1}V{b - 1}" for a, b in _runs(column)]
    return "".join(parts)


def _runs(edge: np.ndarray) -> list[tuple[int, int]]:
    steps = np.flatnonzero(np.diff(np.r_[False, edge, False].astype(np.int8)))
    return [(int(a), int(b)) for a, b in zip(steps[::2], steps[1::2], strict=True)]


def _dice(target: np.ndarray, predicted: np.ndarray) -> float:
    both = int(((target > 0) & (predicted > 0)).sum())
    total = int((target > 0).sum() + (predicted > 0).sum())
    return 2 * both / total if total else 1.0


def _labels(target: np.ndarray, predicted: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]) -> Json:
    if np.ndim(target) == 0:
        chosen = int(predicted)
        return {
            "target": classes[int(target)],
            "predicted": f"{classes[chosen]} ({float(probabilities[chosen]):.2f})",
            "right": chosen == int(target),
        }
    truth = [name for name, on in zip(classes, target, strict=True) if on]
    found = [f"{n} ({float(p):.2f})" for n, on, p in zip(classes, predicted, probabilities, strict=True) if on]
    return {
        "target": ", ".join(truth) or "none",
        "predicted": ", ".join(found) or f"none (highest {float(np.max(probabilities)):.2f})",
        "right": bool((np.asarray(target) == np.asarray(predicted)).all()),
    }


def _data_uri(image: np.ndarray) -> str:
    from PIL import Image

    picture = Image.fromarray(image[0]) if image.shape[0] == 1 else Image.fromarray(np.moveaxis(image[:3], 0, -1))
    picture.thumbnail((LONGEST, LONGEST))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
