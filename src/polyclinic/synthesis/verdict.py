"""A site's verdict as it comes: the server looks at every name and number before results or report hold it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from polyclinic.errors import SiteError

LONGEST = 1 << 20
"""Letters of a report."""
_REASONS = ("no hold-out", "few patients", "copy", "all", "class", "device")
_COUNTS = ("candidates", "train", "holdout", "copies")
_NUMBERS = ("dcr_ratio", "closer", "closer_low", "closer_high", "nndr", "nndr_holdout", "auc", "tpr", "fpr")
_TEXT = 1000


def checked_verdict(site: str, text: str, classes: Sequence[str], devices: Sequence[str]) -> dict[str, Any]:
    """What ``GateResult.as_json`` made.

    Args:
        site: Who says so.
        text: As it came.
        classes: Names that rows may be about.
        devices: Names that rows may be about.

    Raises:
        SiteError: It is something else.
    """
    try:
        if len(text) > LONGEST:
            raise ValueError(f"{len(text)} letters")
        told = json.loads(text)
        rows = [_row(row, classes, devices) for row in told["rows"]]
        if len(rows) > 2 * (1 + len(classes) + len(devices)):
            raise ValueError(f"{len(rows)} rows")
        refused = {why: _count(n) for why, n in told["refused"].items() if why in _REASONS}
        return {"accepted": _count(told["accepted"]), "refused": refused, "rows": rows}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SiteError(
            f"site {site!r} answered with a report that is none of the gate ({type(error).__name__}: {error}). Its "
            "program is of another version."
        ) from None


def _row(row: Mapping[str, Any], classes: Sequence[str], devices: Sequence[str]) -> dict[str, Any]:
    names = {"space": ("pixels", "features"), "class": (*classes, "all"), "device": (*devices, "all")}
    for key, known in names.items():
        if row[key] not in known:
            raise ValueError(f"{key} of a row")
    if row["passed"] not in (True, False, None) or not isinstance(row["why"], str):
        raise ValueError("verdict of a row")
    counts = {key: None if row[key] is None else _count(row[key]) for key in _COUNTS}
    numbers = {key: None if row[key] is None else _number(row[key]) for key in _NUMBERS}
    said = {"passed": row["passed"], "why": row["why"][:_TEXT]}
    return {**{key: row[key] for key in names}, **counts, **numbers, **said}


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 53:
        raise ValueError("a count that is none")
    return value


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError("a number that is none")
    return float(value)
