"""What all tests share: real images, where this machine has them, and a study that runs in a second."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

os.environ["OMP_NUM_THREADS"] = "1"

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


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real images: ``POLYCLINIC_DATA``, or ``shared/data`` beside the repository."""
    named = os.environ.get("POLYCLINIC_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real images: {folder} does not exist (set POLYCLINIC_DATA)")
    return folder


@pytest.fixture
def tiny_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes the tiny study, with sections changed: ``tiny_file(method={"name": "ditto"})``."""

    def write(file: str = "tiny.yaml", **sections: Any) -> Path:
        path = tmp_path / file
        path.write_text(yaml.safe_dump(changed(TINY, sections)), encoding="utf-8")
        return path

    return write


@pytest.fixture
def tiny_study() -> Callable[..., Any]:
    """The tiny study, validated, with sections changed."""
    from polyclinic.study import validate_study

    return lambda **sections: validate_study(changed(TINY, sections))


def changed(raw: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    """``raw`` with each section updated; what is no mapping, or None before, is replaced."""
    result = dict(raw)
    for name, section in sections.items():
        old = raw.get(name)
        result[name] = {**old, **section} if isinstance(section, dict) and isinstance(old, dict) else section
    return result
