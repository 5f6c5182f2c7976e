"""From the cells of the data-vectors benchmark to its tables and its first plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from comparisons import value_cell
from tables import Results, Table

from polyclinic.evaluation.summary import SiteResult, differences, table

METRICS = {"balanced_accuracy": "Balanced accuracy", "auroc": "AUROC"}
HEADLINE = (
    "base, bn-recal",
    "random, mean",
    "random, sum",
    "shuffled, mean",
    "shuffled, sum",
    "own site",
    "single",
    "single, bn-recal",
    "best single",
    "best single, bn-recal",
    "ensemble",
    "sum",
    "mean",
    "weighted",
    "norm-keep",
    "model-stock",
    "search",
    "greedy-soup",
    "ties",
    "dare, mean",
    "breadcrumbs, mean",
    "support, mean",
    "fisher",
    "regmean",
    "regmean, proxy (WUDI)",
    "tsv",
    "iso-c",
    "median",
    "trimmed mean",
    "ridge head on base",
    "lda head on base",
    "ridge head on merged",
    "lda head on merged",
    "ridge head on fedavg",
    "ridge head on pooled",
    "fedavg, one round",
    "fedavg, many rounds",
    "fedavg, many rounds, bn-recal",
    "pooled",
    "pooled, bn-recal",
)
"""Models with intervals, in the order of the tables."""
SHORT: tuple[str, ...] = (
    "base, bn-recal",
    "random, mean",
    "single",
    "single, bn-recal",
    "best single, bn-recal",
    "ensemble",
    "sum",
    "mean",
    "model-stock",
    "regmean",
)
SHORT += ("ridge head on base", "ridge head on merged", "fedavg, many rounds", "pooled")
CLAIM = (
    ("random, mean", "single"),
    ("sum", "single"),
    ("mean", "single"),
    ("mean", "single, bn-recal"),
    ("mean", "best single, bn-recal"),
    ("mean", "own site"),
    ("mean", "base: finetune"),
    ("greedy-soup", "best single, bn-recal"),
    ("mean", "ridge head on base"),
    ("mean", "ensemble"),
    ("mean", "fedavg, one round"),
    ("mean", "fedavg, many rounds"),
    ("mean", "pooled"),
)
"""Pairs whose differences say whether the paper's ordering holds: first minus second."""

INTRO = """What each model says about the same test images. One base, trained on natural images, for all; every method
passes equally often over each training image ({rounds} rounds), at the learning rate that was best for pooled training
on validation images. `sum` is the paper's rule. The coordinator restores every merged model by bn-recal on its own
images (half of the validation patients; drawn balanced by label, as sites train) where nothing else is said; `search`
and `greedy-soup` choose on the other half. `single` is the mean over the sites' own models, each judged on the test
images of all sites, as its training left it; `single, bn-recal` after the same restoration as merged models. `best
single` is the one that is best, as its training left it, on the coordinator's validation images. `own site`, with real
sites only: each site's own model on that site's own test patients. `fedavg, one round` averages the same models as
`weighted`, without a cap and with their running statistics, and is not restored. Closed-form heads are solved on sums
over all training images, on the base or on `mean`, both after bn-recal; `polyclinic vectors create` would leave out
classes of fewer than five patients. Labels used beside the sites' own: whatever is restored by bn-recal, finetune or
head-only (closed-form heads too) uses the coordinator's restoration labels, search, greedy-soup and best single its
validation labels, single, own site, ensemble, fedavg and pooled none. A site whose test images are of one class has no
balanced accuracy: it is left out of means and worst sites. Intervals are 95%, over patients and seeds."""


@dataclass(frozen=True)
class Config:
    """One division of one data set, with all its seeds."""

    dataset: str
    division: str
    sites: int
    seeds: Mapping[int, Path]

    @property
    def title(self) -> str:
        """For the rows of tables."""
        return "real sites" if self.division == "real" else f"{self.division.replace('-', ' ')}, N = {self.sites}"


def write_results(name: str, folder: Path, out: Path, seeds: Sequence[int], norm: str) -> None:
    """Read all cells below ``folder`` and write tables, numbers and the plot."""
    results = Results(name, out)
    tables: list[Table] = []
    for dataset in sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name != "cache"):
        found = configs(folder, dataset, seeds)
        tables += dataset_tables(results, dataset, found)
    rounds = sorted({f["rounds"] for cell in results.cells.values() for f in cell["measured"]["facts"]})
    trained = sorted({f["commit"] for cell in results.cells.values() for f in cell["measured"]["facts"]})
    title = "Data vectors: real images, every rule, every control"
    note = f" Network: small-cnn with {norm} norm." + ("" if norm == "batch" else " Nothing to recalibrate: none.")
    note += f" Trained and merged at commit {', '.join(trained)} with one thread; later controls at the one below."
    results.write(title, INTRO.format(rounds=" or ".join(map(str, rounds))) + note, tables, seeds=seeds)
    plot(folder, out / f"{name}.png", seeds)


def configs(folder: Path, dataset: str, seeds: Sequence[int]) -> list[Config]:
    """The divisions that were measured with all seeds, real sites first."""
    grouped: dict[tuple[str, int], dict[int, Path]] = {}
    for path in sorted((folder / dataset).glob("*.npz")):
        division, count, seed = path.stem.rsplit(".", 2)
        grouped.setdefault((division, int(count)), {})[int(seed)] = path
    whole = {key: cells for key, cells in grouped.items() if set(seeds) <= cells.keys()}
    ranks = ["real", "iid", "dirichlet-1.0", "dirichlet-0.3", "dirichlet-0.1"]
    order = sorted(whole, key=lambda key: (ranks.index(key[0]), key[1]))
    return [Config(dataset, division, count, whole[division, count]) for division, count in order]


def dataset_tables(results: Results, dataset: str, found: Sequence[Config]) -> list[Table]:
    """All tables of one data set."""
    cells = {
        config.title: results.cell(
            f"{dataset}/{config.title}",
            {"seeds": sorted(config.seeds), "files": [_stamp(p) for p in config.seeds.values()]},
            lambda c=config: summary(c),  # type: ignore[misc]
        )
        for config in found
    }
    if not cells:
        return []
    made = [short_table(dataset, cells, metric) for metric in METRICS]
    made += [claim_table(dataset, cells), rules_table(dataset, cells)]
    if "real sites" in cells:
        made.append(sites_table(dataset, cells))
    made += [sweep_table(dataset, cells), restoration_table(dataset, cells), cost_table(dataset, cells)]
    return made


def summary(config: Config) -> dict[str, Any]:
    """Numbers of one division: values with intervals, differences, the sweep, restorations, costs."""
    runs, facts = _runs(config)
    with_intervals = {name: runs[name] for name in runs if next(iter(_results(runs[name]))).replicates}
    values: dict[str, Any] = {}
    for name, of_seeds in with_intervals.items():
        found = table(of_seeds)
        values[name] = {
            metric: {"mean": found["mean"][metric], "worst": found["worst"][metric]}
            | {site: cells[metric] for site, cells in found["sites"].items()}
            for metric in METRICS
        }
    pairs = []
    for one, other in CLAIM:
        if one in with_intervals and other in with_intervals:
            rows = differences({one: with_intervals[one], other: with_intervals[other]}, other)
            pairs += [r for r in rows if r["where"] in ("mean", "worst") and r["metric"] in METRICS]
    points = {
        name: {metric: float(np.mean([_mean(run, metric) for run in of_seeds.values()])) for metric in METRICS}
        for name, of_seeds in runs.items()
    }
    return {"values": values, "pairs": pairs, "points": points, "facts": facts}


def _runs(config: Config) -> tuple[dict[str, dict[int, dict[str, SiteResult]]], list[dict[str, Any]]]:
    runs: dict[str, dict[int, dict[str, SiteResult]]] = {}
    facts = []
    for seed, path in config.seeds.items():
        with np.load(path) as arrays:
            facts.append(json.loads(str(arrays["__facts__"])))
            scores = json.loads(str(arrays["__scores__"]))
            for name, places in scores.items():
                runs.setdefault(name, {})[seed] = {
                    place: SiteResult(
                        _defined(metrics),
                        replicates={
                            m: arrays[f"{name}\t{place}\t{m}"].astype(np.float64)
                            for m in METRICS
                            if f"{name}\t{place}\t{m}" in arrays.files
                        },
                    )
                    for place, metrics in places.items()
                }
    if config.division == "real":
        runs["own site"] = {
            seed: {place: runs[f"single/{place}"][seed][place] for place in run} for seed, run in runs["single"].items()
        }
    whole = {name: of_seeds for name, of_seeds in runs.items() if len(of_seeds) == len(config.seeds)}
    return whole, facts


def _defined(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """NaN for what is undefined.

    Where all test images are of one class, which AUROC tells, balanced accuracy would be the share of that class that
    is found: 1 for a model that always says it, as noise does.
    """
    one_class = metrics["auroc"] is None
    return {m: float("nan") if v is None or one_class else v for m, v in metrics.items()}


def _results(of_seeds: Mapping[int, Mapping[str, SiteResult]]) -> list[SiteResult]:
    return [result for run in of_seeds.values() for result in run.values()]


def _mean(run: Mapping[str, SiteResult], metric: str) -> float:
    return float(np.nanmean([result.metrics[metric] for result in run.values()]))


def short_table(dataset: str, cells: Mapping[str, Any], metric: str) -> Table:
    """The main models over all divisions."""
    rows = [[title, *(_point(cell, name, metric) for name in SHORT)] for title, cell in cells.items()]
    note = (
        "Means over seeds; with real sites also over sites. Intervals of all models are in the JSON beside this file."
    )
    return Table(f"{dataset}: {METRICS[metric].lower()}", ["division", *SHORT], rows, note)


def _point(cell: Mapping[str, Any], name: str, metric: str) -> str:
    return f"{cell['points'][name][metric]:.3f}" if name in cell["points"] else "-"


def claim_table(dataset: str, cells: Mapping[str, Any]) -> Table:
    """The paper's ordering, as paired differences."""
    rows = []
    for title, cell in cells.items():
        found = {
            (r["method"], r["baseline"]): r
            for r in cell["pairs"]
            if r["metric"] == "balanced_accuracy" and r["where"] == "mean"
        }
        rows.append([title, *(value_cell(found[pair], "+") if pair in found else "-" for pair in CLAIM)])
    columns = ["division", *(f"{one} minus {other}" for one, other in CLAIM)]
    note = "The paper's claim is: random far below single, single below data vectors, data vectors at most pooled. "
    note += "`random` has the base's untrained last layer, so that it is at chance says little; `base: finetune` says "
    note += "what the coordinator's labels do alone, `single, bn-recal` what its restoration does for one site."
    return Table(f"{dataset}: the claim, differences of balanced accuracy", columns, rows, note)


def rules_table(dataset: str, cells: Mapping[str, Any]) -> Table:
    """Every model on the real sites and in one drawn division, with intervals, and on average over all divisions."""
    shown = [title for title in ("real sites", "dirichlet 0.3, N = 5", "dirichlet 0.3, N = 3") if title in cells][:2]
    rows = []
    for name in HEADLINE:
        values = [cell["values"].get(name) for cell in (cells[title] for title in shown)]
        if all(value is None for value in values):
            continue
        points = [cell["points"][name]["balanced_accuracy"] for cell in cells.values() if name in cell["points"]]
        places = ["-" if value is None else value_cell(value[metric]["mean"]) for value in values for metric in METRICS]
        rows.append(
            [name, f"{np.mean(points):.3f}" + ("" if len(points) == len(cells) else f" ({len(points)})"), *places]
        )
    columns = ["model", f"balanced accuracy, mean over divisions ({len(cells)})"]
    columns += [f"{title}: {label.lower()}" for title in shown for label in METRICS.values()]
    return Table(f"{dataset}: every rule", columns, rows, "In brackets: defined in so many divisions only.")


def sites_table(dataset: str, cells: Mapping[str, Any]) -> Table:
    """Per real site and worst site."""
    values = cells["real sites"]["values"]
    sites = [place for place in next(iter(values.values()))["balanced_accuracy"] if place not in ("mean", "worst")]
    rows = []
    for name in HEADLINE:
        if name in values:
            found = values[name]["balanced_accuracy"]
            worst = f"{value_cell(found['worst'])} {found['worst']['site'] or ''}"
            rows.append([name, worst, *(value_cell(found[site]) for site in sites)])
    return Table(f"{dataset}: real sites, balanced accuracy", ["model", "worst site", *sites], rows)


def sweep_table(dataset: str, cells: Mapping[str, Any]) -> Table:
    """How far along the mean vector to go."""
    totals = sorted({float(n.split()[1]) for cell in cells.values() for n in cell["points"] if n.startswith("total ")})
    rows = []
    for title, cell in cells.items():
        rows.append([title, *(_point(cell, f"total {t:g}", "balanced_accuracy") for t in totals)])
    columns = ["division", *(f"{t:g} times the mean" for t in totals)]
    note = "base + t times the mean vector, then bn-recal: t = 1 is the mean, t = N the paper's sum."
    return Table(f"{dataset}: lambda, balanced accuracy", columns, rows, note)


def restoration_table(dataset: str, cells: Mapping[str, Any]) -> Table:
    """Restoration modes for vectors and for controls, averaged over the divisions."""
    modes = ("none", "bn-pooled", "bn-recal", "bn-recal, natural", "finetune", "head-only")
    rows = []
    for start in ("sum", "mean", "best single", "random, mean", "base"):
        row = [start]
        for mode in modes:
            points = [
                cell["points"][f"{start}: {mode}"]["balanced_accuracy"]
                for cell in cells.values()
                if f"{start}: {mode}" in cell["points"]
            ]
            row.append(f"{np.mean(points):.3f}" if points else "-")
        rows.append(row)
    note = (
        "Mean over seeds, the real sites and Dirichlet 0.3 with N = 2, 3, 5, 10. `natural`: images at their own class "
    )
    note += "frequencies, although sites trained on balanced batches. `none` leaves the base's running statistics in "
    note += "place, for best single too; its own come back with bn-pooled. `-`: not defined."
    return Table(f"{dataset}: restoration, balanced accuracy", ["start", *modes], rows, note)


def cost_table(dataset: str, cells: Mapping[str, Any]) -> Table:
    """Seconds and bytes."""
    rows = []
    for title, cell in cells.items():
        facts = cell["facts"]
        one = [sum(v for k, v in f.items() if k.startswith("seconds/local/")) for f in facts]
        sites = len(facts[0]["sizes"])
        size = facts[0]["bytes of a vector"]
        merges = {n: np.mean([f[f"seconds/merge/{n}"] for f in facts]) for n in ("sum", "ties", "regmean")}
        rows.append(
            [
                title,
                f"{np.mean(one):.0f}",
                f"{np.mean([f['seconds/fedavg'] for f in facts]):.0f}",
                *(f"{seconds:.2f}" for seconds in merges.values()),
                f"{2 * size * sites / 1e6:.2f}",
                f"{2 * size * sites * facts[0]['rounds'] / 1e6:.2f}",
            ]
        )
    columns = ["division", "local training of all sites, s", "fedavg, s", "merge: sum, s", "ties, s", "regmean, s"]
    columns += ["MB moved: vectors", "MB moved: fedavg"]
    return Table(
        f"{dataset}: cost", columns, rows, "Seconds of one thread, mean over seeds; bytes both ways, all sites."
    )


def plot(folder: Path, path: Path, seeds: Sequence[int]) -> None:
    """Where plain summation breaks: balanced accuracy over the number of sites, by division."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    datasets = sorted(p.name for p in folder.iterdir() if p.is_dir() and list(p.glob("*.npz")))
    lines = {"sum": "C3", "mean": "C0", "model-stock": "C2", "ridge head on merged": "C4", "single": "C7"}
    lines |= {"random, mean": "C8", "pooled": "black"}
    divisions = ("iid", "dirichlet-1.0", "dirichlet-0.3", "dirichlet-0.1")
    figure, axes = pyplot.subplots(
        len(datasets), len(divisions), figsize=(12, 3 * len(datasets)), sharex=True, sharey="row", squeeze=False
    )
    for row, dataset in zip(axes, datasets, strict=True):
        found = configs(folder, dataset, seeds)
        for axis, division in zip(row, divisions, strict=True):
            chosen = [config for config in found if config.division == division]
            for name, color in lines.items():
                values = [[_mean(run, "balanced_accuracy") for run in _runs(c)[0][name].values()] for c in chosen]
                if values:
                    counts = [c.sites for c in chosen]
                    means = np.mean(values, axis=1)
                    axis.plot(counts, means, color=color, marker="o", markersize=3, label=name)
                    axis.fill_between(counts, np.min(values, axis=1), np.max(values, axis=1), color=color, alpha=0.15)
            axis.set_title(f"{dataset}, {division.replace('-', ' ')}", fontsize=10)
            axis.set_xticks([2, 3, 5, 10])
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("sites")
    for row in axes:
        row[0].set_ylabel("balanced accuracy")
    if axes[0][-1].lines:
        axes[0][-1].legend(fontsize=8, loc="best")
    figure.suptitle("Where plain summation breaks: lines are means over seeds, bands their range", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _stamp(path: Path) -> str:
    return f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}"
