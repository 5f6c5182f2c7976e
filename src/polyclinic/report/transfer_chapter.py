"""The chapter on what networks learnt from each other, from ``transfer.json`` and ``transfer/`` of a run's folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from polyclinic.report.figures import INK, MUTED, Key, Panel, panel, series_style
from polyclinic.report.folder import Json, Run

_ABOVE, _BELOW = "more than 1", "less than 1"
_STRONGEST = 0.5
"""Strength of the colour under the weight that is furthest from 1; ink stays readable on it."""
_LEAST_SPAN = 1.25
"""How far from 1 a weight must be at least to have that colour: a little noise is to look like little."""
TO_SITE, TO_CENTRAL = "central to site", "site to central"
_TERMS = {
    "natural": "natural classes (cross-entropy)",
    "matching": "matching of maps",
    "soft": "soft outputs",
    "alignment": "alignment of the two kinds of images",
}


def transfer_chapter(run: Run) -> Json:
    """Everything that ``transfer.html`` needs; empty for a run in which networks did not learn from each other."""
    found = run.transfer
    if not found:
        return {}
    central = found["central"]
    looks = _looks(found)
    span = max([math.log(_LEAST_SPAN), *(_from_one(value) for look in looks for row in look["where"] for value in row)])
    shown = [look for look in looks if "channels" in look]
    most = max([2.0, *(share for look in shown for row in look["channels"] for share in row)])
    return {
        "maps": [_weight_map(look, span) for look in looks],
        "scale": Key.of([_ABOVE, _BELOW]),
        "channels": [_channels(look, most) for look in shown],
        "entropy": [_entropy(looks)] if looks else [],
        "directions": Key.of([TO_SITE, TO_CENTRAL]),
        "curves": _curves(found),
        "curve_keys": Key.of(["central", *found["sites"]]),
        "rows": _rows(found),
        "terms": [(name, text) for name, text in _TERMS.items() if any(name in last for _, last in _last(found))],
        "accuracy": central["rounds"][-1].get("natural_accuracy") if central["rounds"] else None,
        "differences": any(
            "difference" in record.get("meta_steps", {})
            for site in found["sites"].values()
            for record in site["rounds"]
        ),
    }


def _last(found: Json) -> list[tuple[str, Json]]:
    """The last record of the central model and of each site."""
    parts = {"central": found["central"], **found["sites"]}
    return [(name, part["rounds"][-1]) for name, part in parts.items() if part["rounds"]]


def _looks(found: Json) -> list[Json]:
    """Tables of the last round that has them, of each site in both directions; none where all weights are alike."""
    central, looks = found["central"], []
    for site, entry in found["sites"].items():
        records = [record for record in entry["rounds"] if "where" in record]
        if records:
            names = central["levels"], entry["levels"]
            looks.append({"site": site, "direction": TO_SITE, "names": names, **records[-1]})
        records = [record["sites"][site] for record in central["rounds"] if site in record.get("sites", {})]
        if records:
            names = entry["levels"], central["levels"]
            looks.append({"site": site, "direction": TO_CENTRAL, "names": names, **records[-1]})
    return looks


def _weight_map(look: Json, span: float) -> Panel:
    """Mean λ of each pair of maps: the source's downwards, the target's across, shallow first.

    Args:
        look: Of a site and a direction.
        span: |log λ| of the strongest colour.
    """
    from matplotlib.patches import Rectangle

    table = np.array(look["where"])
    height = 0.43 * len(table) + 0.75
    id, title = _named("where", look)
    with panel(id, title, shape=(5, max(height, 1.6))) as (made, axes):
        for (row, column), value in np.ndenumerate(table):
            color, strength = series_style(int(value < 1))["color"], _STRONGEST * _from_one(float(value)) / span
            axes.add_patch(
                Rectangle((column - 0.48, row - 0.47), 0.96, 0.94, facecolor=color, alpha=strength, linewidth=0)
            )
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=9.5, color=INK)
        sources, targets = ([_short(name) for name in names] for names in look["names"])
        axes.set_xlim(-0.5, table.shape[1] - 0.5)
        axes.set_ylim(table.shape[0] - 0.5, -0.5)
        axes.set_xticks(range(table.shape[1]), targets, fontsize=8.5, parse_math=False)
        axes.set_yticks(range(table.shape[0]), sources, fontsize=8.5, parse_math=False)
        axes.set_xlabel("learns", fontsize=9)
        axes.set_ylabel("teaches", fontsize=9)
        _bare(axes)
    return made


def _from_one(weight: float) -> float:
    """How far a weight is from 1, by ratios; attention may take all of it from a pair, which counts as a hundredth."""
    return abs(math.log(max(weight, 0.01)))


def _named(kind: str, look: Json) -> tuple[str, str]:
    """Identifier and title of a picture of a site and a direction."""
    site, direction = look["site"], look["direction"]
    return f"{kind}-{site}-{direction}", f"{site}: from central" if direction == TO_SITE else f"{site}: to central"


def _bare(axes: Any) -> None:
    axes.grid(False)
    for side in axes.spines.values():
        side.set_visible(False)


def _channels(look: Json, most: float) -> Panel:
    """A row of bars for each map that teaches: channels in groups, weightiest first, beside a line at 1.

    Args:
        look: Of a site and a direction.
        most: Weight of the highest bar of all pictures.
    """
    rows = look["channels"]
    number = [TO_SITE, TO_CENTRAL].index(look["direction"])
    id, title = _named("what", look)
    with panel(id, title, shape=(5, 0.55 * len(rows) + 0.75)) as (made, axes):
        for place, shares in enumerate(rows):
            # Rows run downwards, bars up from their foot.
            foot, scale, width = place + 0.45, 0.85 / most, 1 / len(shares)
            left = [n * width for n in range(len(shares))]
            tops = [-scale * share for share in shares]
            axes.bar(left, tops, 0.92 * width, foot, align="edge", color=series_style(number)["color"], alpha=0.75)
            axes.plot([0, 1], [foot - scale] * 2, color=MUTED, linewidth=0.8)
            axes.text(1.02, foot - scale, f"{shares[0]:.2f}", va="center", fontsize=9.5, color=INK)
        axes.set_xlim(0, 1.13)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xticks([])
        axes.set_yticks(range(len(rows)), [_short(name) for name in look["names"][0]], fontsize=8.5, parse_math=False)
        axes.set_xlabel("channels, the weightiest first", fontsize=9)
        axes.set_ylabel("teaches", fontsize=9)
        _bare(axes)
    return made


def _short(name: str) -> str:
    """The last part of a module's name, with the one before it where that says nothing by itself."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def _entropy(looks: Sequence[Json]) -> Panel:
    """Bars of the channel weights' entropy, a site and direction each, with the range over pairs of maps."""
    sites = list(dict.fromkeys(look["site"] for look in looks))
    shape = (5, 0.36 * 2 * len(sites) + 0.9)
    with panel("channel-entropy", "Entropy of channel weights", shape=shape) as (made, axes):
        for look in looks:
            values = np.array(look["entropy"])
            number = [TO_SITE, TO_CENTRAL].index(look["direction"])
            place = sites.index(look["site"]) + 0.2 * (2 * number - 1)
            mean = float(values.mean())
            axes.barh(place, mean, height=0.34, color=series_style(number)["color"], alpha=0.75)
            axes.plot([values.min(), values.max()], [place, place], color=INK, linewidth=1)
            axes.text(0.01, place, f"{mean:.0%}", va="center", fontsize=8.5, color=INK)
        axes.axvline(1, color=MUTED, linewidth=0.8)
        axes.set_xlim(0, 1.02)
        axes.set_ylim(len(sites) - 0.5, -0.5)
        axes.set_yticks(range(len(sites)), sites, parse_math=False)
        axes.set_xlabel("share of the largest")
    return made


def _curves(found: Json) -> list[Panel]:
    """Round by round: natural accuracy of the central model, and the losses of all on public images."""
    parts: Mapping[str, Json] = {"central": found["central"], **found["sites"]}
    made = []
    records = [record for record in found["central"]["rounds"] if "natural_accuracy" in record]
    if records:
        with panel("natural-accuracy", "Natural images that the central model names") as (drawn, axes):
            axes.plot([r["round"] for r in records], [r["natural_accuracy"] for r in records], **series_style(0))
            axes.set_ylim(0, 1)
            _by_round(axes)
        made.append(drawn)
    for term in ("matching", "soft"):
        lines = {name: [(r["round"], r[term]) for r in part["rounds"] if term in r] for name, part in parts.items()}
        if not any(lines.values()):
            continue
        with panel(f"transfer-{term}", _TERMS[term].capitalize()) as (drawn, axes):
            for number, points in enumerate(lines.values()):
                if points:
                    axes.plot(*zip(*points, strict=True), marker=".", **series_style(number))
            axes.set_ylim(bottom=0)
            _by_round(axes)
        made.append(drawn)
    return made


def _by_round(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("round")


def _rows(found: Json) -> list[Json]:
    """Terms of the last round, and the share of pairs whose weight lies at its lower bound."""
    rows: list[dict[str, Any]] = []
    for name, last in _last(found):
        rows.append({"name": name, "floor": last.get("floor"), **{term: last.get(term) for term in _TERMS}})
    return rows
