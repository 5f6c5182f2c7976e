"""The chapter on synthetic samples, from ``synthesis.json`` and ``synthesis/examples.npz`` of a run's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from polyclinic.report.folder import Json, Run
from polyclinic.report.format import number
from polyclinic.report.gallery import gallery
from polyclinic.report.heat_map import heat_map
from polyclinic.report.synthesis_costs import phase_costs, site_costs

_GENERATORS = {
    "vae": "a small autoencoder that knows classes and devices",
    "features": "Gaussians of features by class and device; no images",
    "amplitude": "own images in the colours of other devices, made at each site",
}
_DROPPED = {
    "unlikely": "its class is unlikely by the features of real images",
    "far": "far from the centre of its class",
    "duplicate": "nearly equal to another sample",
}
_REFUSED = {
    "copy": "a copy: nearer to a training image than different patients hardly ever are",
    "all": "all candidates together failed",
    "class": "its class failed",
    "device": "its device failed",
    "no hold-out": "too few held-out patients to judge by",
    "few patients": "too few training patients to judge by",
}
_SYMBOLS = {"epsilon": "ε", "delta": "δ"}


def synthesis_chapter(run: Run, examples: Mapping[str, Sequence[Json]]) -> Json:
    """Everything that ``synthesis.html`` needs; empty for a run without samples.

    Args:
        run: Read with its details.
        examples: Cards of the examples of each site, with their ``id`` on the page.

    Raises:
        RunError: The example samples are damaged.
    """
    found = run.synthesis
    if not found:
        return {}
    found = {"at_sites": np.zeros_like(found["wanted"]).tolist(), **found}
    thresholds = run.synthesis["settings"]["gate"]
    return {
        "facts": _facts(found),
        "maps": _maps(found),
        "at_home": bool(np.any(found["at_sites"])),
        "floor": found["floor"],
        "stages": _stages(found),
        "classes": found["classes"],
        "class_rows": _class_rows(found),
        "cells": _cells(found),
        "gate": [_gate(site, entry) for site, entry in found.get("gate", {}).items()],
        "thresholds": {name: f"{value:g}" for name, value in thresholds.items()},
        "gallery": gallery(run, examples),
        "sites": site_costs(run),
        "phases": phase_costs(run),
        "notes": [("", str(note)) for note in found.get("notes", [])]
        + [
            (site, f"absent from {phase}: {why}")
            for phase, sites in found.get("absent", {}).items()
            for site, why in sites.items()
        ],
    }


def _facts(found: Json) -> dict[str, str]:
    wanted, released, at_home = (int(np.sum(found[name])) for name in ("wanted", "released", "at_sites"))
    epsilon = found.get("epsilon")
    counted = f"training patients in cells of {found['floor']} or more at a site, without noise"
    if epsilon is not None:
        counted = f"training patients, with noise for ε = {epsilon:g} per patient in the place of a floor"
    facts = {
        "Made by": "; ".join(f"{name}: {_GENERATORS.get(name, name)}" for name in found["generator"]) or "nothing",
        "Counted": counted,
        "Planned": f"{wanted} samples of a budget of {found['budget']}, cells filled up to {found['level']:.4g}"
        if wanted
        else "no samples",
    }
    if wanted > at_home:
        facts["Released"] = f"{released} of {wanted - at_home} samples, {released / (wanted - at_home):.0%}"
    return facts | _fit_facts(found.get("fit") or {})


def _fit_facts(fit: Mapping[str, Any]) -> dict[str, str]:
    """What a generator says of itself: a line for its own numbers and texts, and one for each group of others."""
    nested = {name: value for name, value in fit.items() if isinstance(value, Mapping)}
    own = {name: value for name, value in fit.items() if name not in nested and name != "name"}
    lines = {"Generator": _in_line(own)} | {f"Its {name}": _in_line(value) for name, value in nested.items()}
    return {label: text for label, text in lines.items() if text}


def _in_line(values: Mapping[str, Any]) -> str:
    """Names and values, a series by its ends."""
    parts = []
    for name, value in values.items():
        label = _SYMBOLS.get(name, name.replace("_", " "))
        if isinstance(value, list) and value:
            parts.append(f"{label} {_short(value[0])} → {_short(value[-1])} in {len(value)} rounds")
        elif value is not None and value != []:
            parts.append(f"{label} {_short(value)}")
    return ", ".join(parts)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _maps(found: Json) -> list[Any]:
    before, released = (np.array(table, dtype=np.int64) for table in (found["before"]["patients"], found["released"]))
    names, after = (found["classes"], found["devices"]), before + released
    most = int(after.max(initial=0))
    if not released.any():
        return [heat_map("synthesis-before", "Patients", before, names)]
    return [
        heat_map("synthesis-before", "Before: patients", before, names, most=most),
        heat_map("synthesis-after", "After: patients + samples", after, names, added=released, most=most),
    ]


def _stages(found: Json) -> list[Json]:
    """From candidates to released samples, a row for each reason to lose some; empty where none were made."""
    quality = found.get("quality") or {}
    if not quality.get("candidates"):
        return []
    rows = [{"stage": "Made", "why": "candidates", "count": quality["candidates"], "sign": ""}]
    rows += [
        {"stage": "Quality filter", "why": _DROPPED.get(why, why), "count": count, "sign": "−"}
        for why, count in quality.get("dropped", {}).items()
    ]
    for site, entry in found.get("gate", {}).items():
        refused = {why: count for why, count in entry.get("refused", {}).items() if count}
        rows += [
            {"stage": f"Gate at {site}", "why": _REFUSED.get(why, why), "count": count, "sign": "−"}
            for why, count in (refused or {"nothing was refused": 0}).items()
        ]
    rows.append({"stage": "Released", "why": "samples", "count": int(np.sum(found["released"])), "sign": ""})
    return rows


def _class_rows(found: Json) -> list[Json]:
    tables = {"patients": found["before"]["patients"], "images": found["before"]["images"]}
    tables |= {"wanted": found["wanted"], "at_home": found["at_sites"], "released": found["released"]}
    return [
        {"name": name, **{key: int(np.sum(table[c])) for key, table in tables.items()}}
        for c, name in enumerate(found["classes"])
    ]


def _cells(found: Json) -> list[Json]:
    """A row for each cell that has or wants something."""
    rows = []
    for c, name in enumerate(found["classes"]):
        for d, device in enumerate(found["devices"]):
            row = {key: found["before"][key][c][d] for key in ("patients", "images")}
            row |= {key: found[key][c][d] for key in ("limit", "wanted", "released")}
            if any(row.values()):
                rows.append({"class": name, "device": device, **row})
    return rows


def _gate(site: str, entry: Json) -> Json:
    rows = [{**row, **_verdict(row)} for row in entry.get("rows", [])]
    groups = list(dict.fromkeys(row["group"] for row in rows))
    rows.sort(key=lambda row: groups.index(row["group"]))
    return {
        "site": site,
        "accepted": entry.get("accepted", 0),
        "refused": sum(entry.get("refused", {}).values()),
        "rows": rows,
        "failed": sum(row["passed"] is False for row in rows),
        "judged": sum(row["passed"] is not None for row in rows),
    }


def _verdict(row: Json) -> Json:
    """What a row is about, its verdict in words and colour, and its interval in brackets."""
    about = [row[kind] for kind in ("class", "device") if row[kind] != "all"]
    words, style = {True: ("passed", "kept"), False: ("failed", "found"), None: ("not judged", "expected")}[
        row["passed"]
    ]
    low, high = row.get("closer_low"), row.get("closer_high")
    interval = "" if low is None or high is None else f"[{number(low)}, {number(high)}]"
    return {"group": ", ".join(about) or "all", "verdict": words, "style": style, "interval": interval}
