"""Hospitals train medical-image models together while every image stays where it was taken.

The functions here are what the command line calls; nothing heavy is imported until one of them is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from polyclinic.api import build, check, compare, demo, methods, partition, phantom, predict, report, run, split
    from polyclinic.errors import PolyclinicError
    from polyclinic.study import Study, load_study

_HOMES = {
    **dict.fromkeys(
        ("build", "check", "compare", "demo", "methods", "partition", "phantom", "predict", "report", "run", "split"),
        "polyclinic.api",
    ),
    "PolyclinicError": "polyclinic.errors",
    "Study": "polyclinic.study",
    "load_study": "polyclinic.study",
}

__all__ = [
    "PolyclinicError",
    "Study",
    "build",
    "check",
    "compare",
    "demo",
    "load_study",
    "methods",
    "partition",
    "phantom",
    "predict",
    "report",
    "run",
    "split",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'polyclinic' has no attribute {name!r}")
