"""Learning curves and traffic, from the records of the rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from polyclinic.evaluation.names import AUTO_METRIC, metric_label
from polyclinic.report.figures import INK, MUTED, PAPER, Panel, panel, series_style
from polyclinic.report.folder import Json, Run


def selection_metric(study: Json) -> str:
    """The validation metric that chose the round."""
    metric = str(study["evaluation"]["metric"])
    return AUTO_METRIC[study["task"]["kind"]] if metric == "auto" else metric


def recorded_sites(rounds: Sequence[Json]) -> list[str]:
    """Every site that appears in a round, in order of appearance (a pooled run trains one called ``pooled``)."""
    return list(dict.fromkeys(site for record in rounds for site in record["sites"]))


def learning_panels(run: Run, prefix: str = "") -> list[Panel]:
    """Training loss and validation metrics by round, one line per site, the kept round marked.

    Args:
        run: The run.
        prefix: Of the ids, where a page shows several runs.
    """
    metric = selection_metric(run.study)
    wanted = ["loss", "balanced_accuracy", "auroc"] if run.metrics["task"] != "segmentation" else ["dice"]
    shown = list(dict.fromkeys([metric, *wanted]))[:3]
    chosen = run.metrics.get("chosen_round")
    sites = _palette(run)
    panels = []
    with panel(f"{prefix}curve-train-loss", "Training loss") as (made, axes):
        _lines(axes, {site: _points(run.rounds, site, "loss") for site in sites}, chosen)
    panels.append(made)
    for name in shown:
        lines = {site: _points(run.rounds, site, name, validation=True) for site in sites}
        if not any(line[0] for line in lines.values()):
            continue
        note = "Chose the round that is kept." if name == metric and run.study["evaluation"]["select"] == "best" else ""
        with panel(f"{prefix}curve-val-{name}", f"Validation: {metric_label(name)}", note) as (made, axes):
            _lines(axes, lines, chosen)
        panels.append(made)
    return panels


def _palette(run: Run) -> list[str]:
    return list(dict.fromkeys([*run.sites, *recorded_sites(run.rounds)]))


def curve_keys(run: Run) -> list[str]:
    """Labels in the order of the line styles of ``learning_panels``."""
    return _palette(run)


def _points(rounds: Sequence[Json], site: str, name: str, validation: bool = False) -> tuple[list[int], list[float]]:
    found = []
    for record in rounds:
        entry = record["sites"].get(site) or {}
        value = (entry.get("val") or {}).get(name) if validation else entry.get(name)
        if value is not None:
            found.append((int(record["round"]), float(value)))
    return [number for number, _ in found], [value for _, value in found]


def _lines(axes: Any, lines: Mapping[str, tuple[list[int], list[float]]], chosen: int | None) -> None:
    for index, (numbers, values) in enumerate(lines.values()):
        if numbers:
            axes.plot(numbers, values, marker="o", markersize=3 if len(numbers) < 40 else 0, **series_style(index))
    axes.set_xlabel("round")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if chosen:
        axes.axvline(chosen, color=INK, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
        axes.annotate(
            "kept",
            (chosen, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-3, -3),
            textcoords="offset points",
            ha="right" if chosen > 1 else "left",
            va="top",
            fontsize=9,
            color=MUTED,
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1},
            zorder=3,
        )


def method_curves(runs: Mapping[str, Sequence[Run]], metric: str, site: str | None = None) -> Panel:
    """A validation metric by round, mean over seeds, one line per method: at one site, or the mean over sites."""
    id = f"curve-methods-{metric}" + (f"-at-{site}" if site else "")
    where = f"{metric_label(metric)}, {site or 'mean over sites'}"
    with panel(id, f"Validation: {where}") as (made, axes):
        for index, several in enumerate(runs.values()):
            means: dict[int, list[float]] = {}
            for run in several:
                for record in run.rounds:
                    entries = [entry for name, entry in record["sites"].items() if site in (None, name)]
                    values = [(entry.get("val") or {}).get(metric) for entry in entries]
                    known = [value for value in values if value is not None]
                    if known:
                        means.setdefault(int(record["round"]), []).append(sum(known) / len(known))
            numbers = sorted(means)
            axes.plot(
                numbers,
                [sum(means[n]) / len(means[n]) for n in numbers],
                marker="o",
                markersize=3 if len(numbers) < 40 else 0,
                **series_style(index),
            )
        axes.set_xlabel("round")
        axes.xaxis.get_major_locator().set_params(integer=True)
    return made


def traffic_panels(run: Run) -> list[Panel]:
    """Bytes by round, stacked by op, and seconds by round and site."""
    ops = list(dict.fromkeys(op for record in run.rounds for op in record.get("bytes", {})))
    numbers = [int(record["round"]) for record in run.rounds]
    with panel("traffic-bytes", "Sent and received per round, MB") as (sent, axes):
        below = [0.0] * len(numbers)
        for index, op in enumerate(ops):
            heights = [sum((r["bytes"].get(op) or {}).values()) / 1e6 for r in run.rounds]
            axes.bar(numbers, heights, bottom=below, width=0.75, color=series_style(index)["color"])
            below = [a + b for a, b in zip(below, heights, strict=True)]
        axes.set_xlabel("round")
        axes.grid(False, axis="x")
        axes.xaxis.get_major_locator().set_params(integer=True)
    with panel("traffic-seconds", "Seconds per round") as (took, axes):
        lines = {site: _points(run.rounds, site, "seconds") for site in _palette(run)}
        _lines(axes, lines, None)
        axes.set_ylim(bottom=0)
    return [sent, took]


def traffic_table(run: Run) -> list[Json]:
    """Bytes by op over all rounds, and over exchange and final test where the run counted them.

    ``rounds`` is 0 for what was in none; ``before`` says whether it came in an exchange of samples before the first.
    """
    totals: dict[str, Json] = {}
    for record in run.rounds:
        for op, part in record.get("bytes", {}).items():
            row = totals.setdefault(op, {"op": op, "up": 0, "down": 0, "rounds": 0})
            row["up"] += part.get("up", 0)
            row["down"] += part.get("down", 0)
            row["rounds"] += 1
    for op, part in run.metrics.get("bytes", {}).items():
        if isinstance(part, dict) and op not in totals:
            totals[op] = {"op": op, "up": part.get("up", 0), "down": part.get("down", 0), "rounds": 0}
    before = run.synthesis.get("bytes", {})
    return [{**row, "before": row["op"] in before} for row in totals.values()]


def site_effort(run: Run) -> list[Json]:
    """Bytes and seconds by site over all rounds."""
    rows = []
    for site in recorded_sites(run.rounds):
        entries = [record["sites"].get(site) or {} for record in run.rounds]
        row = {"site": site, "rounds": sum(e.get("loss") is not None for e in entries)}
        for name in ("bytes_up", "bytes_down", "seconds"):
            row[name] = sum(e.get(name) or 0 for e in entries)
        rows.append(row)
    return rows
