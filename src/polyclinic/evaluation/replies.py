"""How a site's verdict on its test images travels: declared leaves, and a result as a message and back."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import torch

from polyclinic.evaluation.summary import SiteResult
from polyclinic.federation.message import Message
from polyclinic.federation.site import Leaf

REPORT = (
    Leaf("test/*", "scalar", "images"),
    Leaf("notes", "scalar", "labels"),
    Leaf("images", "scalar", "counts"),
    Leaf("patients", "scalar", "counts"),
    Leaf("replicates", "array", "images"),
)
"""Metrics, notes, counts, and the replicates that intervals are made of."""


def packed(result: SiteResult, notes: Sequence[str] = (), **decided: float | str) -> Message:
    """A result as a message; ``notes`` come before its own."""
    replicates = {name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in result.replicates.items()}
    return Message.pack(
        {"replicates": replicates},
        notes=json.dumps([*notes, *result.notes]),
        images=result.images,
        patients=result.patients,
        **decided,
        **{f"test/{name}": value for name, value in result.metrics.items()},
    )


def unpacked(reply: Message) -> SiteResult:
    """The result in a message."""
    return SiteResult(
        metrics={k.removeprefix("test/"): float(v) for k, v in reply.scalars.items() if k.startswith("test/")},
        notes=json.loads(str(reply.scalars["notes"])),
        replicates={name: array.numpy() for name, array in reply.group("replicates").items()},
        images=int(reply.scalars["images"]),
        patients=int(reply.scalars["patients"]),
        threshold=float(reply.scalars["threshold"]) if "threshold" in reply.scalars else None,
        distance_unit=str(reply.scalars.get("distance_unit", "")),
    )
