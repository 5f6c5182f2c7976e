"""The model card of a merged model: one HTML page, made of its record alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from polyclinic.errors import ContributionError
from polyclinic.evaluation.names import HEADLINE
from polyclinic.files import whole_file
from polyclinic.report.write import render
from polyclinic.vectors.record import ContributionRecord, MergeRecord, Privacy
from polyclinic.yaml_settings import explain

SHORT = 12
"""Hexadecimal digits of a digest that a person reads."""
LEAKS = (
    "Whoever holds the base and a vector holds a fine-tuned model and what it started from: a strong position for "
    "telling who was among its training patients. The sites' own audits measure one such attack and prove nothing.",
    "The merged model, too, was trained on patients. Merging hides single sites a little; it is no guarantee.",
    "The rows of the head show which classes a site had, and roughly how often.",
)
NO_EPSILON = "None. No noise was added to the sum or to the model, so there is no bound on what it tells of a patient."


def write_card(record: Mapping[str, Any], path: Path) -> None:
    """Write the card of a merge.

    Args:
        record: What ``merge.json`` holds; see ``MergeRecord``.
        path: Of the HTML file.

    Raises:
        ContributionError: The record is not what a merge writes, or the file cannot be written.
    """
    html = card(record)
    try:
        with whole_file(path) as file:
            file.write(html.encode())
    except OSError as error:
        raise ContributionError(f"{path} cannot be written: {error.strerror or error}.") from error


def card(record: Mapping[str, Any]) -> str:
    """The page."""
    try:
        merged = MergeRecord.model_validate(record)
    except ValidationError as error:
        raise ContributionError(explain(error, MergeRecord, "this is no record of a merge:")) from None
    used = [c for c in merged.contributions if c.used]
    wrong = [name for name, shares in merged.shares.items() if shares is not None and len(shares) != len(used)]
    if wrong:
        raise ContributionError(f"this is no record of a merge: {wrong[0]} has not one share for each vector.")
    metrics = list(dict.fromkeys(name for stage in merged.metrics for name in stage.metrics))
    sets = {stage.data for stage in merged.metrics}
    return render(
        "model_card.html",
        {
            "title": f"Model card: {merged.name}",
            "merge": merged,
            "used": used,
            "metrics": metrics,
            "one_set": next(iter(sets)) if len(sets) == 1 else "",
            "headline": _headline(merged, metrics),
            "image": _facts(merged.image),
            "network": _facts(merged.model),
            "recipe": _facts(merged.recipe),
            "restoration": _facts(merged.restoration),
            "software": _facts(merged.software),
            "heat": _heat(merged.shares, used),
            "rows": _rows(merged.shares),
            "audited": _audited(used),
            "privacy": _privacy(merged.privacy),
            "privacy_of": {
                c.digest: _privacy(c.privacy) for c in merged.contributions if c.privacy.epsilon is not None
            },
            "leaks": LEAKS,
            "short": lambda digest: digest[:SHORT],
        },
    )


def _headline(merged: MergeRecord, metrics: Sequence[str]) -> dict[str, Any] | None:
    """The task's headline metric, else the first, of the last stage, and of the first for comparison."""
    if not metrics:
        return None
    last, first = merged.metrics[-1], merged.metrics[0]
    wanted = HEADLINE.get(merged.task, "")
    return {
        "metric": wanted if wanted in metrics else metrics[0],
        "last": last,
        "first": first if first is not last else None,
    }


def _facts(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Every setting on a line of its own: ``rule.name`` -> ``ties``."""
    facts: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            facts |= _facts(value, f"{prefix}{key}.")
        elif isinstance(value, Sequence) and any(isinstance(item, Mapping) for item in value):
            for number, item in enumerate(value, start=1):
                facts |= _facts(item if isinstance(item, Mapping) else {"": item}, f"{prefix}{key} {number}.")
        else:
            facts[f"{prefix}{key}"] = _text(value)
    return facts


def _text(value: Any) -> str:
    if value is None or value in ("", [], {}):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " × ".join(map(_text, value)) if all(isinstance(v, int) for v in value) else ", ".join(map(_text, value))
    return str(value)


def _rows(shares: Mapping[str, Sequence[float] | None]) -> list[tuple[str, Sequence[float] | None]]:
    """The table of shares; neighbouring layers with the same shares are one row."""
    rows: list[tuple[str, str, Sequence[float] | None, int]] = []
    for name, values in shares.items():
        if rows and rows[-1][2] == values:
            first, _, _, count = rows[-1]
            rows[-1] = (first, name, values, count + 1)
        else:
            rows.append((name, name, values, 1))
    if len(rows) == 1 and rows[0][3] > 1:
        return [(f"all {rows[0][3]} layers", rows[0][2])]
    return [(first if count == 1 else f"{first} … {last} ({count})", values) for first, last, values, count in rows]


def _heat(shares: Mapping[str, Sequence[float] | None], used: Sequence[ContributionRecord]) -> dict[str, Any] | None:
    """Cells of the heat map, layers across and contributions down; None where a table says as much."""
    linear = {name: values for name, values in shares.items() if values is not None}
    if not linear or len({tuple(values) for values in linear.values()}) == 1:
        return None
    top = max((abs(v) for values in linear.values() for v in values), default=0.0) or 1.0
    columns = list(shares)
    rows = [
        {
            "site": c.site,
            "cells": [
                {"layer": name, "value": values[j], "part": round(abs(values[j]) / top, 3), "minus": values[j] < 0}
                if (values := shares[name]) is not None
                else {"layer": name, "value": None}
                for name in columns
            ],
        }
        for j, c in enumerate(used)
    ]
    return {"rows": rows, "columns": len(columns), "top": top, "any_minus": any(c.get("minus") for c in _cells(rows))}


def _cells(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [cell for row in rows for cell in row["cells"]]


def _audited(used: Sequence[ContributionRecord]) -> dict[str, Any]:
    """The sites' audits in one number, the largest AUC, and in words."""
    measured = [c.membership.auc for c in used if c.membership is not None and c.membership.auc is not None]
    if not measured:
        return {"largest": None, "words": "no site measured it"}
    words = f"largest AUC of {len(measured)} of {len(used)} sites; 0.500 is guessing"
    return {"largest": max(measured), "words": words}


def _privacy(privacy: Privacy) -> str:
    if privacy.epsilon is None:
        return NO_EPSILON
    delta = "delta not stated" if privacy.delta is None else f"delta {privacy.delta:g}"
    unit = f"for a {privacy.unit}" if privacy.unit else "its unit is not stated, so it says little"
    return f"epsilon {privacy.epsilon:g}, {delta}, {unit} ({privacy.mechanism})."
