"""What a secure sum does to the result of a study: the same study, with the same seeds, under every backend.

``python benchmarks/secure_study.py`` trains ``examples/pppml-ct-segmentation.yaml`` with its own method, three seeds
and each backend, and writes ``benchmarks/results/secure_study.md``; a stopped benchmark goes on where it was.
``--quick`` is one seed with two rounds. Results folders stay below ``runs/secure-study``.

Training is chaotic: one rounding more or less anywhere leads to another model of the same quality. So two questions are
asked. After one round, how far is the model from that of the plain sum, and is it within the stated bound? After all
rounds, do the metrics differ by more than those of the plain sum computed with another number of threads?
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from comparisons import value_cell
from rich.console import Console
from tables import RESULTS, ROOT, Json, Results, Table

from polyclinic.api import run
from polyclinic.evaluation.results import read_results
from polyclinic.evaluation.summary import differences, table
from polyclinic.models.registry import start_model
from polyclinic.models.weights import read_tensors
from polyclinic.progress import TerminalObserver
from polyclinic.secure.fixed_point import error_bound, plan
from polyclinic.study import Study, load_study

NAME = "pppml-ct-segmentation"
PLAIN, CONTROL = "plain", "plain, two threads"
BACKENDS: dict[str, Json] = {
    PLAIN: {"backend": "plain"},
    CONTROL: {"backend": "plain"},
    "masked, 32 bits": {"backend": "masked"},
    "masked, 16 bits": {"backend": "masked", "lanes": 16},
    "ring-he, sites' key": {"backend": "ring-he"},
    "ring-he, server's key": {"backend": "ring-he", "key_holder": "server"},
    "ring-as-published": {"backend": "ring-as-published"},
}
METRICS = ("dice", "lesion_sensitivity", "hd95")
INTRO = f"""`examples/{NAME}.yaml` with its own method, on one thread; the backend alone differs. Test images are judged
once. Means over seeds with 95% intervals over patients and seeds; differences are paired by patient and seed."""


def main() -> None:
    """Run what is not finished, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one seed, two rounds: does it run at all?")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "secure-study", help="where results folders go")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the tables go")
    options = parser.parse_args()
    seeds = [0] if options.quick else [0, 1, 2]
    suffix = "-quick" if options.quick else ""
    overrides = ["method.rounds=2", "evaluation.bootstrap=100"] if options.quick else []
    folder = options.runs.with_name(options.runs.name + suffix)
    for backend in BACKENDS:
        trained(folder / "one-round" / slug(backend), backend, 0, ["method={name: fedavg, rounds: 1}"])
    for seed in seeds:
        for backend in BACKENDS:
            trained(folder / f"{slug(backend)}-seed{seed}", backend, seed, overrides)
    results = Results(f"secure_study{suffix}", options.results)
    settings = {"seeds": seeds, "overrides": overrides}
    near = results.cell("one round", settings, partial(distances, folder / "one-round"))
    trained_at = json.loads((folder / f"{slug(PLAIN)}-seed0" / "environment.json").read_text(encoding="utf-8"))
    found = results.cell("all rounds", {**settings, "trained": trained_at}, partial(measured, folder, seeds))
    found["commit"] = trained_at["commit"]
    results.write("What a secure sum does to a study", INTRO, [distance_table(near), *tables(found)], seeds=seeds)


def slug(backend: str) -> str:
    """As part of a file name."""
    return "".join(c if c.isalnum() else "-" for c in backend).replace("--", "-")


def study_of(backend: str, seed: int, overrides: list[str]) -> Study:
    """The example under one backend, without its compare section."""
    given = [f"aggregation={json.dumps(BACKENDS[backend])}", f"seed={seed}", "compare={methods: [], seeds: []}"]
    return load_study(ROOT / "examples" / f"{NAME}.yaml", overrides=[*given, *overrides])


def trained(folder: Path, backend: str, seed: int, overrides: list[str]) -> None:
    """Run or finish one study."""
    torch.set_num_threads(2 if backend == CONTROL else 1)
    study, begun = study_of(backend, seed, overrides), (folder / "study.yaml").is_file()
    if (folder / "metrics.json").is_file():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TerminalObserver(Console(), 1) as observer:
        run(study, out=None if begun else folder, resume=folder if begun else None, observer=observer)


def distances(folder: Path) -> Json:
    """Per backend: the largest distance of a weight from the plain sum's model after one round, and over its bound."""
    plain, _ = read_tensors(folder / slug(PLAIN) / "models" / "global.safetensors")
    found: Json = {}
    for backend, settings in BACKENDS.items():
        model, _ = read_tensors(folder / slug(backend) / "models" / "global.safetensors")
        apart = {name: float((model[name].double() - plain[name].double()).abs().max()) for name in plain}
        found[backend] = {"largest": max(apart.values()), "share": None}
        if settings["backend"] in ("masked", "ring-he"):
            bounds = stated_bounds(backend, list(plain))
            # The server's model is float32: its own rounding comes on top.
            ulp = {name: float(plain[name].abs().max()) * 2**-23 for name in plain}
            found[backend]["share"] = max(apart[name] / (bounds[name] + ulp[name]) for name in plain)
    return found


def stated_bounds(backend: str, names: list[str]) -> dict[str, float]:
    """The documented error bound of each tensor's mean update in the first round."""
    study = study_of(backend, 0, [])
    start = {name: tensor for name, tensor in start_model(study).state_dict().items() if name in names}
    arrays = {f"update/{name}": tensor for name, tensor in start.items()}
    settings = study.aggregation
    layout = plan(arrays, {"update": 16}, start, narrow=settings.width, reach=settings.reach)
    sites = len(study.data.phantom.sites) if study.data.phantom else 0
    return {entry.name.partition("/")[2]: error_bound(entry, sites) for entry in layout.entries}


def measured(folder: Path, seeds: list[int]) -> Json:
    """Values, differences from the plain sum, seconds and bytes of every backend."""
    paths = {backend: {s: folder / f"{slug(backend)}-seed{s}" for s in seeds} for backend in BACKENDS}
    runs = {backend: {s: read_results(path) for s, path in own.items()} for backend, own in paths.items()}
    costs: Json = {}
    for backend, own in paths.items():
        found = [json.loads((path / "metrics.json").read_text(encoding="utf-8")) for path in own.values()]
        traffic = [sum(op["up"] + op["down"] for op in metrics["bytes"].values()) for metrics in found]
        seconds = [metrics["seconds"]["rounds"] for metrics in found]
        costs[backend] = {"seconds": sum(seconds) / len(seeds), "bytes": sum(traffic) / len(seeds)}
    return {
        "table": {backend: table(own) for backend, own in runs.items()},
        "differences": differences(runs, PLAIN),
        "costs": costs,
    }


def distance_table(near: Mapping[str, Any]) -> Table:
    """Distances after one round."""
    rows = [
        [backend, f"{cell['largest']:.2g}", "" if cell["share"] is None else f"{cell['share']:.2f}"]
        for backend, cell in near.items()
        if backend != PLAIN
    ]
    note = "One round of fedavg. A share of one is the bound that polyclinic.secure.fixed_point states."
    return Table(
        "Weights after one round", ["backend", "largest distance from plain", "share of the bound"], rows, note
    )


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Values and differences after all rounds, and costs."""
    rows = found["table"]
    sites = list(rows[PLAIN]["sites"])
    values = [
        [backend, *(value_cell(row["mean"][m]) for m in METRICS), *(value_cell(row["sites"][s]["dice"]) for s in sites)]
        for backend, row in rows.items()
    ]
    cells = {(row["method"], row["where"], row["metric"]): row for row in found["differences"]}
    apart = [
        [b, *(value_cell(cells[b, where, m], "+") for where, m in [("mean", m) for m in METRICS] + [("worst", "dice")])]
        for b in rows
        if b != PLAIN
    ]
    base = found["costs"][PLAIN]
    costs = [
        [b, f"{cost['seconds'] / base['seconds']:.2f}", f"{cost['bytes'] / base['bytes']:.2f}"]
        for b, cost in found["costs"].items()
    ]
    note = (
        "The network is small, so what keys and shares cost weighs more here than in secure_sum.md. Seconds are by the "
        "clock and suffer from other work on the machine."
    )
    return [
        Table(
            "Values",
            ["backend", *METRICS, *(f"dice, {site}" for site in sites)],
            values,
            f"Trained at commit `{found['commit']}`.",
        ),
        Table("Minus plain", ["backend", *METRICS, "worst site, dice"], apart),
        Table("Costs, plain = 1", ["backend", "seconds of all rounds", "bytes, evaluation included"], costs, note),
    ]


if __name__ == "__main__":
    main()
