"""From the finished cells of the natural-image benchmark to its tables."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from cell_runs import Cell
from comparisons import value_cell
from natimg_arms import ABLATIONS, LEARNED, LOCAL, NOISE, POOLED, PRETRAINED, RANDOM, UNIFORM
from natimg_bytes import bytes_table
from natimg_cells import NETWORKS, PRETRAIN, SITES, finished, kind_of
from tables import Results, Table

from polyclinic.evaluation.results import read_results
from polyclinic.evaluation.summary import SiteResult, differences, table

Json = dict[str, Any]
Runs = dict[str, dict[int, Mapping[str, SiteResult]]]
METRICS = {"auroc": "macro AUROC", "balanced_accuracy": "balanced accuracy"}
OWN_BASES = {
    ", one family": "A12: local, one family",
    ", one network": "A12: local, one network",
    ", batch norm, random start": "A18: local, batch norm, random start",
    "random start": RANDOM,
}
"""How the names of ablations end that have a baseline of their own, and which."""
BASES = (PRETRAINED, LOCAL, UNIFORM, *OWN_BASES.values())
"""What differences are taken from: the decisive baseline, a random start, uniform weights, those of ablations."""
JUDGING = ("evaluate", "keep", "test", "central-test")
"""Ops that are no part of a round's training."""

INTRO = f"""NatIMG-FL (reconstruction): of the paper its abstract is public; algorithm, settings and data here are
ours. Real chest X-rays at 64 pixels, grey; hospitals with different small networks (group norm; 64 features enter the
last layer; full-size ones were not trained, for want of a GPU) and 1000 public images of flowers (five classes, grey)
as proxies, the same for every method that uses any. `kermany-N` are three hospitals of children (normal, bacterial,
viral) drawn by patient from one with other shares of the classes, N training images each; `sources-N` children in
Guangzhou, adults at the NIH (no finding or pneumonia) and intensive care in Hannover, which has one class and at most
82 training images: AUROC and balanced accuracy say nothing there and are left out; which site an image comes from is
easily seen, so what helps there may be a shortcut. `findings-150` are three hospitals of the NIH's adults with seven
findings; `small-2000` two of children at 28 pixels from PneumoniaMNIST, whose patients are not recorded. Kermany and
PneumoniaMNIST are the same source and never mixed. Test and validation patients are the same for every seed and N (N /
2 images for validation, 80 at most); seeds draw training patients and start weights. All sites make the same number of
gradient steps on their own images in every round, with batches of 16, balanced but for `findings`; `pooled` makes as
many as all sites together. All but `local`, and what is named after a random start or one family, start from networks
trained for {PRETRAIN} passes on the proxies, and so does what rivals add (companions, central models). What a method
trains on proxies comes on top; its seconds are in the tables of cost. The server makes 40 steps a round. Learned
weights keep at least a tenth of the training images apart, whole patients and two of each class: 14% at 50 images;
`A6: uniform, as many kept apart` does the same. Validation chose the round; test reports. The central model is that of
the last round. Values are means over seeds with 95% intervals over patients and seeds; differences are paired by
both."""


BYTES = "kermany-100"
"""The scenario whose bytes are compared with what was reckoned."""


def write_results(name: str, cells: Sequence[Cell], work: Path, out: Path, data: Path) -> None:
    """Write tables and numbers of all cells that are finished; ``data`` is the folder of the real images."""
    results = Results(name, out)
    groups: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        if finished(cell, work) is not None:
            groups[cell.scenario].append(cell)
    found = {}
    for scenario, own in groups.items():
        stamps = [f"{cell.key} {(work / cell.key / 'cell.json').stat().st_mtime_ns}" for cell in own]
        found[scenario] = results.cell(scenario, {"cells": stamps}, lambda own=own: group(own, work))
    tables = [verdicts_table(found)] if found else []
    tables += [made for scenario, numbers in found.items() for made in group_tables(scenario, numbers)]
    if BYTES in found:
        tables.append(bytes_table(groups[BYTES], found[BYTES]["costs"], data))
    commits = sorted({commit for numbers in found.values() for commit in numbers["commits"]})
    note = f" Trained at commit {', '.join(commits)}, one thread each." if commits else ""
    seeds = sorted({cell.seed for own in groups.values() for cell in own})
    tables = [made for made in tables if made.rows]
    results.write("NatIMG-FL (reconstruction): hospitals with different networks", INTRO + note, tables, seeds=seeds)


def group(cells: Sequence[Cell], work: Path) -> Json:
    """Numbers of one scenario: values, differences, costs, central models."""
    runs: Runs = defaultdict(dict)
    for cell in cells:
        results = read_results(work / cell.key)
        runs[cell.arm][cell.seed] = {site: without_one_class(result) for site, result in results.items()}
    runs = with_pooled(runs, kind_of(cells[0].scenario))
    pairs: list[Json] = []
    for base in BASES:
        others = {arm: own for arm, own in runs.items() if base in runs and set(own) & set(runs[base])}
        pairs += differences(others, base) if len(others) > 1 else []
    by_arm: dict[str, list[Path]] = defaultdict(list)
    for cell in cells:
        by_arm[cell.arm].append(work / cell.key)
    return {
        "values": {arm: table(own) for arm, own in runs.items()},
        "by_seed": {arm: {s: _mean_auroc(run) for s, run in own.items()} for arm, own in runs.items()},
        "pairs": [row for row in pairs if row["metric"] in METRICS],
        "costs": {arm: mean_costs(folders) for arm, folders in by_arm.items()},
        "central": {arm: central(folders) for arm, folders in by_arm.items()},
        "commits": sorted({str(_json(work / cell.key / "environment.json")["commit"]) for cell in cells}),
    }


def without_one_class(result: SiteResult) -> SiteResult:
    """The same, with balanced accuracy undefined where the site has one class: there a constant answer scores 1."""
    if not np.isnan(result.metrics["auroc"]):
        return result
    return replace(result, metrics={**result.metrics, "balanced_accuracy": float("nan")})


def _json(path: Path) -> Json:
    found: Json = json.loads(path.read_text(encoding="utf-8"))
    return found


def with_pooled(runs: Runs, kind: str) -> Runs:
    """The runs with pooled training as one method: at each site the pooled network of the site's own kind."""
    rest = {arm: own for arm, own in runs.items() if not arm.startswith(f"{POOLED}, ")}
    parts = {site: runs.get(f"{POOLED}, {network}", {}) for site, network in SITES[kind].items()}
    seeds = set.intersection(*(set(own) for own in parts.values()))
    pooled = {seed: {site: own[seed][site] for site, own in parts.items()} for seed in sorted(seeds)}
    return {**rest, POOLED: pooled} if pooled else rest


def _mean_auroc(run: Mapping[str, SiteResult]) -> float:
    return float(np.nanmean([result.metrics["auroc"] for result in run.values()]))


def mean_costs(folders: Sequence[Path]) -> Json:
    """Seconds and bytes of a round, means over seeds.

    Of the second half of the rounds, when every exchange is under way: medians over rounds of the seconds of each site,
    of those of the server (what is left of the round), and of the bytes of all sites; judging is left out of bytes.
    """
    found: dict[str, list[float]] = defaultdict(list)
    sites: dict[str, list[float]] = defaultdict(list)
    for folder in folders:
        lines = (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
        late = [json.loads(line) for line in lines[len(lines) // 2 :]]
        spent = {site: [r["sites"][site]["seconds"] for r in late if site in r["sites"]] for site in late[0]["sites"]}
        for site, seconds in spent.items():
            sites[site].append(float(np.median(seconds)))
        own = [r["seconds"] - sum(entry["seconds"] for entry in r["sites"].values()) for r in late]
        found["server"].append(max(0.0, float(np.median(own))))
        for way in ("up", "down"):
            moved = [sum(n[way] for op, n in r["bytes"].items() if op not in JUDGING) for r in late]
            found[way].append(float(np.median(moved)))
    means = {name: float(np.mean(values)) for name, values in found.items()}
    return {"sites": {site: float(np.mean(values)) for site, values in sites.items()}, **means}


def central(folders: Sequence[Path]) -> Json | None:
    """Metrics of the server's own model at the sites, means over seeds; None where there is none."""
    told = [_json(folder / "metrics.json").get("central") for folder in folders]
    if not all(told):
        return None
    sites = list(told[0])
    return {metric: {site: _mean([_value(one[site], metric) for one in told]) for site in sites} for metric in METRICS}


def _value(entry: Mapping[str, Any], metric: str) -> float | None:
    """A metric of a site, as a number or as a cell with an interval."""
    held = entry.get("test", entry).get(metric)
    return held["value"] if isinstance(held, Mapping) else held


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def group_tables(scenario: str, numbers: Json) -> list[Table]:
    """Tables of one scenario."""
    ablations = [arm for arm in numbers["values"] if arm.startswith(ABLATIONS)]
    main = [arm for arm in numbers["values"] if arm not in ablations]
    made = [values_table(scenario, numbers, main), gains_table(scenario, numbers, main, PRETRAINED)]
    made += [costs_table(scenario, numbers, main), central_table(scenario, numbers)]
    if ablations:
        shown = [arm for arm in (PRETRAINED, UNIFORM, LEARNED) if arm in numbers["values"]] + ablations
        made += [values_table(f"{scenario}, ablations", numbers, shown)]
        made += [gains_table(f"{scenario}, ablations", numbers, shown, base) for base in (UNIFORM, PRETRAINED)]
    for ending, base in OWN_BASES.items():
        alike = [LOCAL] * (base == RANDOM) + [arm for arm in ablations if arm.endswith(ending)]
        made.append(gains_table(f"{scenario}, ablations", numbers, alike, base))
    return made


def values_table(title: str, numbers: Json, arms: Sequence[str]) -> Table:
    """Both metrics of every method: mean over sites, worst site, every site."""
    sites = list(next(iter(numbers["values"].values()))["sites"])
    rows = []
    for arm in arms:
        own = numbers["values"][arm]
        row = [arm]
        for metric in METRICS:
            row += [value_cell(own["mean"][metric]), _worst(own["worst"][metric])]
        rows.append([*row, *(_short(own["sites"][site]["auroc"]) for site in sites)])
    names = [f"{label}, {where}" for label in METRICS.values() for where in ("mean", "worst site")]
    return Table(f"{scenario_title(title)}: test images", ["method", *names, *(f"AUROC {s}" for s in sites)], rows)


def scenario_title(title: str) -> str:
    """The scenario with the networks of its sites."""
    own = SITES.get(kind_of(title))
    return f"{title} ({', '.join(f'{site}: {network}' for site, network in own.items())})" if own else title


def _short(cell: Mapping[str, Any]) -> str:
    return "-" if cell["value"] is None else f"{cell['value']:.3f}"


def _worst(cell: Mapping[str, Any]) -> str:
    return f"{_short(cell)} {cell['site']}" if cell["site"] else "-"


def gains_table(title: str, numbers: Json, arms: Sequence[str], base: str) -> Table:
    """Paired differences from a baseline."""
    places = [(metric, where) for metric in METRICS for where in ("mean", "worst")]
    rows = []
    for arm in arms:
        found = [pair(numbers, arm, base, metric, where) for metric, where in places]
        if all(found):
            rows.append([arm, *(value_cell(cell, "+") if cell else "-" for cell in found), said(found[0])])
    columns = [f"{METRICS[metric]}, {'mean' if where == 'mean' else 'worst site'}" for metric, where in places]
    return Table(f"{title}: minus {base}, paired", ["method", *columns, "AUROC"], rows)


def pair(numbers: Json, arm: str, base: str, metric: str = "auroc", where: str = "mean") -> Json | None:
    """The row of a paired difference, or None where it was not measured."""
    wanted = (arm, base, metric, where)
    keys = ("method", "baseline", "metric", "where")
    return next((row for row in numbers["pairs"] if tuple(row[key] for key in keys) == wanted), None)


def said(cell: Mapping[str, Any] | None) -> str:
    """A paired difference in words."""
    if cell is None or cell["value"] is None or cell["low"] is None:
        return "not measured"
    if cell["low"] > 0:
        return "better"
    return "worse" if cell["high"] < 0 else "not told apart"


CRITERIA = (
    (
        "(a) learned weights against pre-training alone",
        LEARNED,
        PRETRAINED,
        "not better at 500 or fewer: no case for it",
    ),
    (
        "(a) uniform weights against pre-training alone",
        UNIFORM,
        PRETRAINED,
        "not better at 500 or fewer: no case for it",
    ),
    (
        "(b) learned against uniform weights",
        LEARNED,
        UNIFORM,
        "not better: meta-learning is dropped, uniform is default",
    ),
    ("(c) noise against natural proxies, random start", NOISE, RANDOM, "not worse: no case for natural images"),
)
"""The fact sheet's kill criteria: what is compared, and what would kill it."""


def verdicts_table(found: Mapping[str, Json]) -> Table:
    """The three kill criteria at every archive size, in words."""
    rows = []
    for title, ours, theirs, death in CRITERIA:
        for scenario, numbers in found.items():
            cell = pair(numbers, ours, theirs)
            if cell is not None:
                rows.append([title, scenario, value_cell(cell, "+"), said(cell), death])
    columns = ["question", "scenario", "macro AUROC, mean over sites", "it is", "what kills"]
    return Table("The three kill criteria", columns, rows)


def costs_table(title: str, numbers: Json, arms: Sequence[str]) -> Table:
    """Seconds and bytes of a round beside local training."""
    base = numbers["costs"].get(PRETRAINED)
    if base is None:
        return Table("", [], [])
    rows = []
    for arm in [name for name in numbers["costs"] if name in arms or name.startswith(POOLED)]:
        own = numbers["costs"][arm]
        ratios = [f"{own['sites'][s] / base['sites'][s]:.2f} x" if s in own["sites"] else "-" for s in base["sites"]]
        moved = [f"{own[way] / 2**10 / len(base['sites']):.1f}" for way in ("up", "down")]
        rows.append([arm, f"{sum(own['sites'].values()):.2f}", *ratios, f"{own['server']:.2f}", *moved])
    columns = ["method", "sites, s", *(f"{site} beside local" for site in base["sites"]), "server, s"]
    note = "Of a round of the second half, one thread, validation included in seconds and not in bytes; KiB of a site."
    return Table(f"{title}: cost of a round", [*columns, "up, KiB", "down, KiB"], rows, note)


def central_table(title: str, numbers: Json) -> Table:
    """The server's own model, which sees no X-ray, at the sites."""
    rows = []
    for arm, own in numbers["central"].items():
        if own:
            means = [_mean(list(own[metric].values())) for metric in METRICS]
            rows.append([arm, *("-" if v is None else f"{v:.3f}" for v in [*means, *own["auroc"].values()])])
    sites = next((list(own["auroc"]) for own in numbers["central"].values() if own), [])
    columns = ["method", *(f"{label}, mean" for label in METRICS.values()), *(f"AUROC {site}" for site in sites)]
    return Table(f"{title}: the central model at the sites", columns, rows, f"Its network: {NETWORKS['small-resnet']}.")
