"""What the page of a comparison shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyclinic.evaluation.names import lower_is_better, metric_label
from polyclinic.report.curves import method_curves, selection_metric
from polyclinic.report.figures import ACCENT, GRID, INK, MUTED, PAPER, Key, Panel, panel
from polyclinic.report.folder import Comparison, Json
from polyclinic.report.run_page import HEADLINE, facts, headline_rows


def comparison_context(comparison: Comparison) -> dict[str, Any]:
    """Everything ``comparison.html`` needs."""
    metrics = comparison.metrics
    first = next(iter(comparison.runs.values()))[0]
    kind, classes = first.metrics["task"], first.metrics["classes"]
    baselines = list(dict.fromkeys(row["baseline"] for row in metrics["differences"]))
    names = [row["metric"] for row in headline_rows(first.metrics, classes)]
    headline = HEADLINE[kind]
    return {
        "title": f"{metrics['study']}: comparison",
        "study": comparison.study,
        "metrics": metrics,
        "first": first.metrics,
        "environment": comparison.environment,
        "facts": facts(comparison.study) | {"Seeds": ", ".join(map(str, metrics["seeds"]))},
        "method_settings": {m: _settings(runs[0].study["method"]) for m, runs in comparison.runs.items()},
        "baseline": metrics.get("baseline") or (baselines[0] if baselines else None),
        "headline": headline,
        "blocks": [_block(metrics, metric) for metric in names],
        "overview": [r for r in metrics["differences"] if r["metric"] == headline and r["where"] in ("mean", "worst")],
        "sites": list(first.metrics["sites"]),
        "curves": [method_curves(comparison.runs, name) for name in _curve_metrics(comparison, kind)],
        "keys": Key.of(list(comparison.runs)),
        "effort": [_effort(method, runs) for method, runs in comparison.runs.items()],
        "notes": _notes(comparison),
        "confidence": comparison.study["evaluation"]["confidence"],
        "bootstrap": comparison.study["evaluation"]["bootstrap"],
    }


def dot_panel(table: Mapping[str, Json], metric: str) -> Panel:
    """Mean over sites and worst site of each method, with intervals."""
    with panel(f"values-{metric}", f"{metric_label(metric)} by method", shape=_shape(len(table))) as (made, axes):
        for row, entry in enumerate(table.values()):
            _dot(axes, row - 0.13, entry["mean"][metric], filled=True, color=ACCENT)
            _dot(axes, row + 0.13, entry["worst"][metric], filled=False, color=MUTED)
        _method_rows(axes, list(table))
    return made


def forest_panel(differences: list[Json], metric: str) -> Panel:
    """Paired difference of each method to the baseline, for the mean over sites and the worst site."""
    rows = [r for r in differences if r["metric"] == metric]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    baseline = rows[0]["baseline"]
    with panel(f"forest-{metric}", f"Difference to {baseline}", shape=_shape(len(methods))) as (made, axes):
        axes.axvline(0, color=INK, linewidth=0.9)
        for row in rows:
            place = methods.index(row["method"])
            if row["where"] == "mean":
                _dot(axes, place - 0.13, row, filled=True, color=ACCENT)
            elif row["where"] == "worst":
                _dot(axes, place + 0.13, row, filled=False, color=MUTED)
        _method_rows(axes, methods)
        reach = max(abs(bound) for bound in axes.get_xlim())
        axes.set_xlim(-reach, reach)
        better, worse = ("← better", "worse →") if lower_is_better(metric) else ("better →", "← worse")
        left, right = (better, worse) if lower_is_better(metric) else (worse, better)
        for x, text, side in ((0, left, "left"), (1, right, "right")):
            axes.text(x, 1.0, text, transform=axes.transAxes, ha=side, va="bottom", fontsize=9, color=MUTED)
        axes.set_title(axes.get_title("left"), pad=18)
    return made


def _block(metrics: Json, metric: str) -> Json:
    differences = [r for r in metrics["differences"] if r["metric"] == metric]
    panels = [dot_panel(metrics["table"], metric)]
    if differences:
        panels.append(forest_panel(differences, metric))
    methods = list(dict.fromkeys(row["method"] for row in differences))
    return {
        "metric": metric,
        "panels": panels,
        "table": {
            method: {
                "mean": entry["mean"][metric],
                "worst": entry["worst"][metric],
                "sites": [site[metric] for site in entry["sites"].values()],
            }
            for method, entry in metrics["table"].items()
        },
        "differences": {m: {r["where"]: r for r in differences if r["method"] == m} for m in methods},
        "notes": sorted({r["note"] for r in differences if r.get("note")}),
    }


def _dot(axes: Any, row: float, cell: Json, filled: bool, color: str) -> None:
    if cell["value"] is None:
        return
    if cell["low"] is not None:
        axes.plot([cell["low"], cell["high"]], [row, row], color=color, linewidth=1.6)
    face = color if filled else PAPER
    axes.plot([cell["value"]], [row], "o" if filled else "D", markersize=6 if filled else 5, color=color, mfc=face)


def _method_rows(axes: Any, methods: list[str]) -> None:
    axes.set_yticks(range(len(methods)), methods, color=INK)
    axes.set_ylim(len(methods) - 0.45, -0.55)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.margins(x=0.08)
    axes.locator_params(axis="x", nbins=5)


def _shape(rows: int) -> tuple[float, float]:
    return 5, 1.1 + 0.42 * max(rows, 2)


def _settings(method: Json) -> str:
    return ", ".join(f"{name} {value}" for name, value in method.items() if name != "name")


def _curve_metrics(comparison: Comparison, kind: str) -> list[str]:
    wanted = [
        selection_metric(comparison.study),
        *(["dice"] if kind == "segmentation" else ["loss", "auroc"]),
    ]
    known = {
        name
        for runs in comparison.runs.values()
        for record in runs[0].rounds
        for entry in record["sites"].values()
        for name in entry.get("val") or {}
    }
    return [name for name in dict.fromkeys(wanted) if name in known]


def _effort(method: str, runs: list[Any]) -> Json:
    records = [record for run in runs for record in run.rounds]
    moved = [part for record in records for part in record.get("bytes", {}).values()]
    return {
        "method": method,
        "rounds": len(records) / len(runs),
        "chosen": ", ".join(str(run.metrics.get("chosen_round", "–")) for run in runs),
        "up": sum(part.get("up", 0) for part in moved) / len(runs),
        "down": sum(part.get("down", 0) for part in moved) / len(runs),
        "seconds": sum(record.get("seconds") or 0 for record in records) / len(runs),
        "reports": [(run.metrics["seed"], f"runs/{run.folder.name}/report.html") for run in runs],
    }


def _notes(comparison: Comparison) -> list[tuple[str, str]]:
    found: dict[tuple[str, str], list[str]] = {}
    for method, runs in comparison.runs.items():
        for run in runs:
            for site, entry in run.metrics["sites"].items():
                for note in entry.get("notes", []):
                    found.setdefault((site, str(note)), []).append(method)
    everyone = len(comparison.runs)
    return [
        (site, note if len(set(methods)) == everyone else f"{note} ({', '.join(dict.fromkeys(methods))})")
        for (site, note), methods in found.items()
    ]
