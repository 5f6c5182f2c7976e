"""A study of made-up hospitals that runs in a second."""

from __future__ import annotations

from typing import Any

TINY: dict[str, Any] = {
    "name": "tiny",
    "task": {"kind": "multi-class", "classes": ["normal", "pneumonia"]},
    "data": {
        "phantom": {
            "kind": "chest-xray",
            "sites": [
                {"name": "north", "patients": 12},
                {"name": "south", "patients": 10, "device": "bright"},
                {"name": "west", "patients": 8, "device": "soft"},
            ],
        },
        "image": {"size": [24, 24]},
        "split": {"fractions": [0.5, 0.25, 0.25]},
    },
    "model": {"name": "small-cnn", "width": 4},
    "training": {"lr": 0.05, "batch_size": 8},
    "method": {"name": "fedavg", "rounds": 3},
    "evaluation": {"bootstrap": 50, "examples": 1},
}
"""Three made-up hospitals of unequal size."""


def changed(raw: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    """``raw`` with each section updated; what is no mapping, or None before, is replaced."""
    result = dict(raw)
    for name, section in sections.items():
        old = raw.get(name)
        result[name] = {**old, **section} if isinstance(section, dict) and isinstance(old, dict) else section
    return result
