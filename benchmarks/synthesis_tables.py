"""From the finished cells of the FedSSG benchmark to its tables."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from comparisons import value_cell
from synthesis_arms import OPENED
from synthesis_cells import SOURCES, Cell, finished, train_counts
from synthesis_scores import ALL, METRICS, costs, judged
from tables import Results, Table

from polyclinic.evaluation.summary import SiteResult, differences, table

Json = dict[str, Any]
LOSS = "logit adjustment"
PLAIN = "fedavg"
BALANCED = "balanced, logit adjustment"
STARTED = "pre-trained: logit adjustment"
BASELINES = (LOSS, PLAIN, BALANCED, "fedssg", OPENED, STARTED)
"""What differences are taken from: the loss alone, nothing, and for ablations what they change."""
ABLATIONS = {"VAE: ": OPENED, "fedssg: ": "fedssg", "pre-trained: ": STARTED}
"""How the names of ablations begin, and what they are ablations of."""
GAINS = ("balanced_accuracy", "rare", "worst", "unseen")

INTRO = """FedSSG (reconstruction): of the paper its aims are public; every formula here is ours. All methods start
from the same weights, see the same images and splits and make the same number of gradient steps; validation images
choose among every tenth round and the last. `skin` are the seven diagnoses of HAM10000 by its four real sources at 32
pixels, `skin-cut` the same with akiec, df and vasc cut to a quarter of their training lesions at each source,
`without X` training on three sources and all images of the fourth as test, `phantom` made-up lesions of eight
diagnoses at 24 pixels with the class x centre table of Fed-ISIC2019 divided by ten and 25 test images in each of the
48 cells. Network: small-cnn, width 16, with batch norm on real images and group norm on the phantom (fedbn: batch
norm). Whatever is called fedssg, Gaussians, amplitude mix or VAE uses the logit-adjusted loss, so that the gain of
samples and styles is the difference from `logit adjustment`; `balanced` draws batches in which the classes of a site
are equally frequent, and what is balanced and has samples or styles is to be measured by `balanced, logit
adjustment`; fedavg, fedprox, fedbn, creff and local use cross-entropy. `fedssg` is the default: feature Gaussians by
class, and styles by device; that these two are the default was chosen on validation images. `pre-trained` starts from
the same network trained on 6,000 natural images. Metrics are over the test images of all devices together: balanced
accuracy, macro F1, mean recall of the rare classes (akiec, df, vasc; on the phantom DF, VASC), the worst device's
balanced accuracy, mean recall of cells (a class on a device) by their number of training images. Values are means
over seeds; intervals are 95%, over patients and seeds, differences paired by both."""


def write_results(name: str, cells: Sequence[Cell], work: Path, out: Path, replicates: int) -> None:
    """Write tables and numbers of all cells that are finished."""
    results = Results(name, out)
    groups: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        if finished(cell, work) is not None:
            groups[f"{cell.scenario}, {cell.rounds} rounds"].append(cell)
    found = {}
    for title, own in groups.items():
        stamps = [f"{cell.key} {(work / cell.key / 'cell.json').stat().st_mtime_ns}" for cell in own]
        found[title] = results.cell(
            title, {"cells": stamps, "replicates": replicates}, lambda own=own: group(own, work, replicates)
        )
    tables = [made for title, numbers in found.items() for made in group_tables(title, numbers)]
    tables = [*elsewhere_tables(found), *tables]
    commits = sorted({c for numbers in found.values() for c in numbers["commits"]})
    note = f" Trained at commit {', '.join(commits)}, one thread each." if commits else ""
    seeds = sorted({cell.seed for own in groups.values() for cell in own})
    results.write("FedSSG (reconstruction): rare diagnoses and rare devices", INTRO + note, tables, seeds=seeds)


def group(cells: Sequence[Cell], work: Path, replicates: int) -> Json:
    """Numbers of one scenario and number of rounds: values, differences, costs, the gate's verdicts."""
    runs: dict[str, dict[int, dict[str, SiteResult]]] = defaultdict(dict)
    for cell in cells:
        runs[cell.arm][cell.seed] = judged(cell, work, replicates)
    overall = {arm: {seed: {ALL: run[ALL]} for seed, run in own.items()} for arm, own in runs.items()}
    devices = {
        arm: {seed: {n: r for n, r in run.items() if n != ALL} for seed, run in own.items()}
        for arm, own in runs.items()
    }
    pairs: list[Json] = []
    for base in BASELINES:
        if base in overall:
            others = {arm: own for arm, own in overall.items() if set(own) & set(overall[base])}
            pairs += [row for row in differences(others, base) if row["where"] == ALL] if len(others) > 1 else []
    first = work / cells[0].key
    return {
        "classes": json.loads((first / "metrics.json").read_text(encoding="utf-8"))["classes"],
        "trained": train_counts(first),
        "values": {arm: table(own)["sites"][ALL] for arm, own in overall.items()},
        "by_seed": {a: {s: run[ALL].metrics for s, run in own.items()} for a, own in overall.items()},
        "devices": {
            arm: {name: cell["balanced_accuracy"] for name, cell in table(own)["sites"].items()}
            for arm, own in devices.items()
        },
        "pairs": pairs,
        "costs": {arm: mean_costs([c for c in cells if c.arm == arm], work) for arm in runs},
        "samples": {arm: samples_of([c for c in cells if c.arm == arm], work) for arm in runs},
        "commits": sorted({_commit(work / cell.key) for cell in cells}),
    }


def _commit(folder: Path) -> str:
    return str(json.loads((folder / "environment.json").read_text(encoding="utf-8"))["commit"])


def mean_costs(cells: Sequence[Cell], work: Path) -> Json | None:
    """Means over seeds of seconds and bytes; None where every cell was resumed."""
    found = [cost for cost in (costs(cell, work) for cell in cells) if cost is not None]
    if not found:
        return None
    kept = ("sites", "exchange", "server", "up", "down")
    return {name: float(np.mean([cost[name] for cost in found])) for name in kept} | {"ops": found[0]["ops"]}


def samples_of(cells: Sequence[Cell], work: Path) -> Json | None:
    """What the exchange released and refused, means over seeds; None where no images are made."""
    told = [work / cell.key / "synthesis.json" for cell in cells]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in told if path.is_file()]
    found = [one for one in found if one["quality"]["candidates"]]
    if not found:
        return None
    refused: dict[str, float] = defaultdict(float)
    for one in found:
        for verdict in one["gate"].values():
            for why, count in verdict["refused"].items():
                refused[why] += count / len(found)
    return {
        "before": found[0]["before"]["images"],
        "wanted": np.mean([one["wanted"] for one in found], axis=0).tolist(),
        "released": np.mean([one["released"] for one in found], axis=0).tolist(),
        "devices": found[0]["devices"],
        "candidates": float(np.mean([one["quality"]["candidates"] for one in found])),
        "dropped": float(np.mean([sum(one["quality"]["dropped"].values()) for one in found])),
        "refused": dict(refused),
    }


def group_tables(title: str, numbers: Json) -> list[Table]:
    """Tables of one scenario and number of rounds."""
    made = []
    main = [arm for arm in numbers["values"] if not arm.startswith(tuple(ABLATIONS))]
    if main and not title.startswith("without-"):
        made += [values_table(title, numbers, main), gains_table(title, numbers, main, LOSS)]
        made += [gains_table(title, numbers, main, base) for base in (PLAIN, BALANCED)]
        made += [devices_table(title, numbers, main), costs_table(title, numbers, main)]
    for start, base in ABLATIONS.items():
        own = [arm for arm in numbers["values"] if arm.startswith(start)]
        if own:
            shown = [n for n in (base, LOSS) if n in numbers["values"] and n not in own] + own
            part = f"{title}, {start.rstrip(': ')} start" if start == "pre-trained: " else f"{title}, {start}ablations"
            made += [values_table(part, numbers, shown), gains_table(part, numbers, own, base)]
    making = {arm: told for arm, told in numbers["samples"].items() if told}
    if making:
        made += [samples_table(title, making), plan_table(title, numbers["classes"], making)]
    return [one for one in made if one.rows]


def values_table(title: str, numbers: Json, arms: Sequence[str]) -> Table:
    """Every metric of every method."""
    rows = []
    for arm in arms:
        own = numbers["values"][arm]
        rows.append([arm, value_cell(own["balanced_accuracy"]), *(_plain(own[m]) for m in list(METRICS)[1:])])
    return Table(f"{title}: test images of all devices", ["method", *METRICS.values()], rows)


def _plain(cell: Mapping[str, Any]) -> str:
    return "-" if cell["value"] is None else f"{cell['value']:.3f}"


def gains_table(title: str, numbers: Json, arms: Sequence[str], base: str) -> Table:
    """Paired differences from a baseline."""
    found = {(r["method"], r["metric"]): r for r in numbers["pairs"] if r["baseline"] == base}
    rows = [
        [arm, *(value_cell(found[arm, m], "+") if found[arm, m]["value"] is not None else "-" for m in GAINS)]
        for arm in arms
        if (arm, GAINS[0]) in found
    ]
    return Table(f"{title}: minus {base}, paired", ["method", *(METRICS[m] for m in GAINS)], rows)


def devices_table(title: str, numbers: Json, arms: Sequence[str]) -> Table:
    """Balanced accuracy of each device."""
    names = list(next(iter(numbers["devices"].values())))
    rows = [[arm, *(value_cell(numbers["devices"][arm][name]) for name in names)] for arm in arms]
    return Table(f"{title}: balanced accuracy by device", ["method", *names], rows)


def costs_table(title: str, numbers: Json, arms: Sequence[str]) -> Table:
    """Seconds of the sites and bytes beside those of the loss alone, and what a second buys."""
    base = numbers["costs"].get(LOSS)
    if base is None:
        return Table("", [], [])
    gains = {
        row["method"]: row["value"]
        for row in numbers["pairs"]
        if row["baseline"] == LOSS and row["metric"] == "balanced_accuracy"
    }
    rows = []
    for arm in arms:
        own = numbers["costs"][arm]
        if own is None:
            continue
        more, gain = own["sites"] - base["sites"], gains.get(arm)
        worth = "-" if gain is None or more < 0.03 * base["sites"] else f"{100 * gain / more:+.2f}"
        ratios = [own[part] / base[part] for part in ("sites", "up", "down")]
        seconds = [f"{own[part]:.1f}" for part in ("sites", "exchange", "server")]
        rows.append([arm, *seconds, *(f"{ratio:.2f} x" for ratio in ratios), worth])
    columns = ["method", "sites, s", "of it exchange, s", "server, s", f"sites beside {LOSS}", "bytes up", "bytes down"]
    columns += ["points per extra site second"]
    note = "Processor seconds of all sites together, validation included, one thread. The last column is the gain in "
    note += f"balanced accuracy over {LOSS}, in points, per second that sites spend more; - where that is under 3%."
    return Table(f"{title}: cost", columns, rows, note)


def samples_table(title: str, making: Mapping[str, Json]) -> Table:
    """How many samples were made, dropped, refused and released."""
    rows = []
    for arm, told in making.items():
        refused = ", ".join(f"{why} {count:.0f}" for why, count in sorted(told["refused"].items()) if count) or "none"
        numbers = [told["candidates"], told["dropped"]]
        released = f"{np.sum(told['released']):.0f} of {np.sum(told['wanted']):.0f}"
        rows.append([arm, *(f"{n:.0f}" for n in numbers), refused, released])
    columns = ["method", "candidates", "dropped by the server", "refused by sites", "released of wanted"]
    return Table(f"{title}: the memorisation gate", columns, rows, "Refusals are summed over sites; means over seeds.")


def plan_table(title: str, classes: Sequence[str], making: Mapping[str, Json]) -> Table:
    """Class by device: training images that count, samples that were wanted and released."""
    arm, told = next(iter(making.items()))
    before, wanted, released = (np.asarray(told[key]) for key in ("before", "wanted", "released"))
    rows = [
        [name, *(f"{before[c, d]:.0f} + {released[c, d]:.0f} of {wanted[c, d]:.0f}" for d in range(before.shape[1]))]
        for c, name in enumerate(classes)
    ]
    note = f"Images + samples released of those wanted, {arm}. Cells below the floor of patients count as empty."
    return Table(f"{title}: the plan", ["class", *told["devices"]], rows, note)


def elsewhere_tables(found: Mapping[str, Json]) -> list[Table]:
    """Balanced accuracy on the source that nobody trained on, and its mean over sources."""
    own = {title: n for title, n in found.items() if title.startswith("without-")}
    if not own:
        return []
    places = [s for s in SOURCES if any(title.startswith(f"without-{s},") for title in own)]
    by_place = {s: next(n for title, n in own.items() if title.startswith(f"without-{s},")) for s in places}
    arms = list(next(iter(own.values()))["values"])
    values, gains = [], []
    for arm in arms:
        cells = [by_place[s]["values"].get(arm, {}).get("balanced_accuracy") for s in places]
        if any(cell is None for cell in cells):
            continue
        mean = f"{np.mean([cell['value'] for cell in cells]):.3f}"
        values.append([arm, mean, *(value_cell(cell) for cell in cells)])
        pairs = [_pair(by_place[s], arm) for s in places]
        if all(pair is not None for pair in pairs):
            mean = f"{np.mean([pair['value'] for pair in pairs]):+.3f}"
            gains.append([arm, mean, *(value_cell(pair, "+") for pair in pairs)])
    columns = ["method", "mean", *(f"without {s}" for s in places)]
    title = "A source that nobody trained on: balanced accuracy"
    return [Table(title, columns, values), Table(f"{title} minus {LOSS}, paired", columns, gains)]


def _pair(numbers: Json, arm: str) -> Any:
    rows = numbers["pairs"]
    wanted = (arm, LOSS, "balanced_accuracy")
    return next((r for r in rows if (r["method"], r["baseline"], r["metric"]) == wanted), None)
