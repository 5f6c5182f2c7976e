"""What the page of a comparison shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyclinic.evaluation.names import HEADLINE, lower_is_better, metric_label
from polyclinic.report.chapters import chapters
from polyclinic.report.curves import method_curves, selection_metric
from polyclinic.report.figures import ACCENT, GRID, INK, MUTED, PAPER, Key, Panel, panel, slug
from polyclinic.report.folder import Comparison, Json
from polyclinic.report.pictures import example_cards, side_by_side
from polyclinic.report.run_page import facts, headline_rows, method_settings
from polyclinic.report.synthesis_costs import exchange_effort


def comparison_context(comparison: Comparison) -> dict[str, Any]:
    """Everything ``comparison.html`` needs."""
    metrics = comparison.metrics
    first = next(iter(comparison.runs.values()))[0]
    kind, classes = first.metrics["task"], first.metrics["classes"]
    baselines = list(dict.fromkeys(row["baseline"] for row in metrics["differences"]))
    names = [row["metric"] for row in headline_rows(first.metrics, classes)]
    headline = HEADLINE[kind]
    shown = _curve_metrics(comparison, kind)
    return {
        "title": f"{metrics['study']}: comparison",
        "study": comparison.study,
        "metrics": metrics,
        "first": first.metrics,
        "environment": comparison.environment,
        "facts": facts(comparison.study) | {"Seeds": ", ".join(map(str, metrics["seeds"]))},
        "method_settings": {m: method_settings(runs[0].study["method"]) for m, runs in comparison.runs.items()},
        "baseline": metrics.get("baseline") or (baselines[0] if baselines else None),
        "headline": headline,
        "metric_options": [(name, metric_label(name)) for name in names],
        "method_options": [(method, method) for method in comparison.runs],
        "first_seed_hint": _first_seed(metrics["seeds"]),
        "blocks": [_block(metrics, metric) for metric in names],
        "overview": _differences(metrics, headline),
        "sites": list(first.metrics["sites"]),
        "curves": [method_curves(comparison.runs, name) for name in shown],
        "site_curves": [method_curves(comparison.runs, shown[0], site) for site in first.sites] if shown else [],
        "chapters": {method: chapters(runs[0], f"{slug(method)}-") for method, runs in comparison.runs.items()},
        "examples": _examples(comparison),
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


def forest_panel(differences: list[Json], metric: str, methods: list[str]) -> Panel:
    """Paired difference of each method to the baseline, for the mean over sites and the worst site.

    ``methods`` are the rows, the baseline's one empty, so that they stand beside those of ``dot_panel``.
    """
    rows = [r for r in differences if r["metric"] == metric]
    baseline = rows[0]["baseline"]
    with panel(f"forest-{metric}", f"Difference to {baseline}", shape=_shape(len(methods))) as (made, axes):
        axes.axvline(0, color=INK, linewidth=0.9)
        origin = (0, methods.index(baseline))
        axes.annotate("baseline", origin, (5, 0), textcoords="offset points", va="center", fontsize=9, color=MUTED)
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
    return made


def _block(metrics: Json, metric: str) -> Json:
    differences = [r for r in metrics["differences"] if r["metric"] == metric]
    panels = [dot_panel(metrics["table"], metric)]
    if differences:
        panels.append(forest_panel(differences, metric, list(metrics["table"])))
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
        "differences": _differences(metrics, metric),
        "notes": sorted({r["note"] for r in differences if r.get("note")}),
    }


def _differences(metrics: Json, metric: str) -> dict[str, dict[str, Json]]:
    found: dict[str, dict[str, Json]] = {}
    for row in metrics["differences"]:
        if row["metric"] == metric:
            found.setdefault(row["method"], {})[row["where"]] = row
    return found


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
    axes.set_title(axes.get_title("left"), pad=18)


def _shape(rows: int) -> tuple[float, float]:
    return 5, 1.1 + 0.42 * max(rows, 2)


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


def _first_seed(seeds: list[int]) -> str:
    if len(seeds) == 1:
        return f"Seed {seeds[0]}."
    return f"First seed ({seeds[0]}) of each method; the other seeds are in their run reports, linked below."


def _examples(comparison: Comparison) -> dict[str, list[Json]]:
    first = {method: runs[0] for method, runs in comparison.runs.items()}
    found: dict[str, dict[str, list[Json]]] = {}
    for method, run in first.items():
        for site, arrays in run.examples.items():
            cards = example_cards(arrays, run.metrics["classes"], run.metrics["task"], site)
            found.setdefault(site, {})[method] = cards
    compared = {site: side_by_side(cards, site) for site, cards in found.items()}
    return {site: pictures for site, pictures in compared.items() if pictures}


def _effort(method: str, runs: list[Any]) -> Json:
    records = [record for run in runs for record in run.rounds]
    moved = [part for record in records for part in record.get("bytes", {}).values()]
    before = [exchange_effort(run) for run in runs]
    return {
        "method": method,
        "rounds": len(records) / len(runs),
        "chosen": ", ".join(str(run.metrics.get("chosen_round", "–")) for run in runs),
        "up": sum(part.get("up", 0) for part in [*moved, *before]) / len(runs),
        "down": sum(part.get("down", 0) for part in [*moved, *before]) / len(runs),
        "seconds": sum(record.get("seconds") or 0 for record in [*records, *before]) / len(runs),
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
