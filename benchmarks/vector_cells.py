"""One cell of the data-vectors benchmark: train the sites once, merge in every way, say what each model thinks of the
test images.

All methods see the same base, the same images and the same number of passes over them: a site alone, a vector, a round
of many-round FedAvg and pooled training each pass once over an image in a round. The coordinator holds the validation
patients: half of them restore (unlabelled for bn-recal), half choose.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polyclinic.data.dataset import SiteData
from polyclinic.data.partition import partition_cases
from polyclinic.evaluation.bootstrap import classification_replicates, patient_weights
from polyclinic.evaluation.classification import classification_metrics
from polyclinic.evaluation.inference import probabilities
from polyclinic.models.registry import start_model
from polyclinic.models.weights import load_tensors, read_tensors, save_tensors, shared_tensors, snapshot
from polyclinic.seeds import derive_seed, generator
from polyclinic.study import PartitionSettings, Study
from polyclinic.tasks import make_task
from polyclinic.training import learning_rate, train
from polyclinic.vectors.head import HeadSums, LDAHead, RidgeHead, add_all, solve_head
from polyclinic.vectors.manifest import binned
from polyclinic.vectors.merge import merge
from polyclinic.vectors.recipe import Recipe
from polyclinic.vectors.restoration import Restoration, restore
from polyclinic.vectors.sources import InMemory, InMemoryTensors, Outline
from polyclinic.vectors.statistics import head_sums, site_statistics

State = dict[str, Tensor]

RULES: dict[str, dict[str, Any]] = {
    "sum": {"rule": {"name": "data-vector", "coefficients": "sum"}},
    "mean": {"rule": {"name": "data-vector", "coefficients": "mean"}},
    "weighted": {"rule": {"name": "data-vector", "coefficients": "weighted"}},
    "norm-keep": {"rule": {"name": "data-vector", "coefficients": "norm-keep"}},
    "model-stock": {"rule": {"name": "data-vector", "coefficients": "model-stock"}},
    "search": {"rule": {"name": "data-vector", "coefficients": "search"}},
    "greedy-soup": {"rule": "greedy-soup"},
    "ties": {"rule": "ties"},
    "dare, mean": {"rule": {"name": "data-vector", "coefficients": "mean"}, "filters": ["dare"]},
    "breadcrumbs, mean": {"rule": {"name": "data-vector", "coefficients": "mean"}, "filters": ["breadcrumbs"]},
    "support, mean": {"rule": {"name": "data-vector", "coefficients": "mean"}, "filters": ["support"]},
    "fisher": {"rule": "fisher"},
    "regmean": {"rule": {"name": "regmean", "grams": "real"}},
    "regmean, proxy (WUDI)": {"rule": {"name": "regmean", "grams": "proxy"}},
    "tsv": {"rule": "tsv"},
    "iso-c": {"rule": "iso-c"},
    "median": {"rule": "median"},
    "trimmed mean": {"rule": {"name": "trimmed-mean", "trim": 1}},
    "random, sum": {"rule": {"name": "data-vector", "coefficients": "sum"}, "filters": ["random"]},
    "random, mean": {"rule": {"name": "data-vector", "coefficients": "mean"}, "filters": ["random"]},
    "shuffled, sum": {"rule": {"name": "data-vector", "coefficients": "sum"}, "filters": ["shuffled"]},
    "shuffled, mean": {"rule": {"name": "data-vector", "coefficients": "mean"}, "filters": ["shuffled"]},
}
"""Merges; each is restored by bn-recal where the network has batch norm."""

TOTALS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.0, 10.0)
"""The sweep of lambda: how many times the mean vector is added to the base; N is the paper's sum."""

METRICS = ("balanced_accuracy", "auroc")
POOLED_HEAD = "ridge head on pooled"
ONE_ROUND = "fedavg, one round"
NATURAL = "bn-recal, natural"
"""bn-recal on images at their natural class frequencies, although the sites trained on balanced batches."""
MODES = ("none", "bn-pooled", "bn-recal", NATURAL, "finetune", "head-only")


@dataclass(frozen=True)
class Cell:
    """One data set, division into sites, and seed."""

    study: Study
    everything: SiteData
    base: State
    division: str
    sites: int
    seed: int
    rounds: int

    @cached_property
    def model(self) -> nn.Module:
        """The one network that all states are loaded into."""
        return start_model(self.study)

    @cached_property
    def names(self) -> list[str]:
        """Its floating-point tensors."""
        return list(self.base)

    @cached_property
    def hospitals(self) -> dict[str, SiteData]:
        """Training images by site; validation and test images belong to nobody here."""
        train_indices = self.everything.splits["train"]
        cases = [self.everything.cases[i] for i in train_indices.tolist()]
        if self.division != "real":
            kind, _, alpha = self.division.partition("-")
            settings = {
                "kind": kind,
                "sites": self.sites,
                "seed": self.seed,
                **({"alpha": float(alpha)} if alpha else {}),
            }
            cases = partition_cases(cases, PartitionSettings(**settings))  # type: ignore[arg-type]
        owners = np.array([case.site for case in cases])
        nobody = torch.zeros(0, dtype=torch.int64)
        return {
            site: self.part(
                site, {"train": train_indices[torch.from_numpy(owners == site)], "val": nobody, "test": nobody}
            )
            for site in sorted(set(owners.tolist()))
        }

    @cached_property
    def coordinator(self) -> SiteData:
        """Validation patients: half of them to restore on (``train``), half to choose on (``val``)."""
        indices = self.everything.splits["val"]
        patients = [f"{self.everything.cases[i].site}/{self.everything.cases[i].patient}" for i in indices.tolist()]
        drawn = generator(0, "restoration").permutation(sorted(set(patients)))
        restoring = set(drawn[: len(drawn) // 2].tolist())
        mine = torch.tensor([patient in restoring for patient in patients])
        return self.part(
            "coordinator", {"train": indices[mine], "val": indices[~mine], "test": self.everything.splits["test"]}
        )

    def part(self, name: str, splits: dict[str, Tensor]) -> SiteData:
        """Some of the images, as a site; nothing is copied."""
        all_ = self.everything
        return SiteData(name, all_.cases, all_._blocks, all_.targets, splits, mean=all_.mean, std=all_.std)

    def load(self, state: Mapping[str, Tensor]) -> nn.Module:
        """The network with these values."""
        load_tensors(self.model, state)
        return self.model

    def state(self) -> State:
        """A copy of the network's values."""
        return snapshot(shared_tensors(self.model, self.names))

    def judged(self, state: Mapping[str, Tensor], split: str) -> np.ndarray:
        """Probabilities of a state for the coordinator's images, float32 ``[n, classes]``."""
        data, task = self.coordinator, make_task(self.study.task, self.study.training)
        parts = [p for _, p in probabilities(self.load(state), data, task, data.splits[split], 256)]
        return torch.cat(parts).numpy()

    def score(self, state: Mapping[str, Tensor]) -> float:
        """Balanced accuracy on the coordinator's validation images."""
        labels = self.coordinator.labels("val").numpy()
        found = self.judged(state, "val").astype(np.float64)
        value = classification_metrics(labels, found / found.sum(1, keepdims=True), False)["balanced_accuracy"]
        return float(value)


def train_alone(cell: Cell, data: SiteData, rounds: int) -> State:
    """So many rounds of local training from the base, as method ``local`` does it."""
    cell.load(cell.base)
    for number in range(1, rounds + 1):
        train_round(cell, data, number, rounds)
    return cell.state()


def train_round(cell: Cell, data: SiteData, number: int, rounds: int) -> None:
    """One pass over a site's images."""
    settings = cell.study.training
    seed = derive_seed(cell.seed, data.site, number, "train")
    task = make_task(cell.study.task, settings)
    train(cell.model, data, task, settings, lr=learning_rate(settings, number, rounds), seed=seed)


def fedavg(cell: Cell, rounds: int) -> State:
    """Many rounds: everything but counters is averaged, running statistics too, weighted by images."""
    state = cell.base
    for number in range(1, rounds + 1):
        states = {}
        for site, data in cell.hospitals.items():
            cell.load(state)
            train_round(cell, data, number, rounds)
            states[site] = cell.state()
        state = averaged(cell, states)
    return state


def averaged(cell: Cell, states: Mapping[str, State]) -> State:
    """A step of FedAvg: the mean of the sites' models, running statistics too, weighted by images."""
    sizes = {site: len(cell.hospitals[site].splits["train"]) for site in states}
    mean: State = {}
    for name, start in cell.base.items():
        total = torch.zeros_like(start, dtype=torch.float64)
        for site, state in states.items():
            total += state[name].double() * (sizes[site] / sum(sizes.values()))
        mean[name] = total.to(start.dtype)
    return mean


def train_pooled(cell: Cell, rounds: int) -> State:
    """All training images in one place."""
    nobody = torch.zeros(0, dtype=torch.int64)
    splits = {"train": cell.everything.splits["train"], "val": nobody, "test": nobody}
    return train_alone(cell, cell.part("pooled", splits), rounds)


def sources_of(cell: Cell, states: Mapping[str, State]) -> list[InMemory]:
    """What each site would contribute, with everything that any rule asks for."""
    task = make_task(cell.study.task, cell.study.training)
    found = []
    for site, state in states.items():
        data = cell.hospitals[site]
        cell.load(state)
        extra = site_statistics(cell.model, data, task, frozenset({"fisher", "gram"}), derive_seed(cell.seed, site))
        moving = {n: t for n, t in state.items() if n.endswith(("running_mean", "running_var"))}
        vector = {n: state[n] - cell.base[n] for n in state if n not in moving}
        held = torch.bincount(data.labels("train"), minlength=len(cell.study.task.classes)) > 0
        tensors = {"vector": vector, "statistics": moving, **extra}
        digest = f"{derive_seed(cell.seed, site, 'digest'):016x}"
        found.append(InMemory(digest, site, binned(len(data.splits["train"])), tuple(held.tolist()), tensors))
    return found


class Measured:
    """Names of models, and what each says about validation and test images."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.test: dict[str, np.ndarray] = {}
        self.facts: dict[str, Any] = {}

    def add(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Judge a model on the test images."""
        self.test[name] = self.cell.judged(state, "test")

    def timed(self, name: str, work: Callable[[], Any]) -> Any:
        """Do it and note the seconds."""
        started = time.perf_counter()
        result = work()
        self.facts[f"seconds/{name}"] = time.perf_counter() - started
        return result


def trained(cell: Cell, path: Path) -> tuple[dict[str, State], dict[str, float]]:
    """All trained models of a cell, and seconds: each site's, many-round FedAvg's as ``*fedavg``.

    They are kept in a file, so that other merges can be measured without training again.
    """
    if path.is_file():
        tensors, about = read_tensors(path)
        states: dict[str, State] = {}
        for key, tensor in tensors.items():
            site, _, name = key.partition("/")
            states.setdefault(site, {})[name] = tensor
        order = [*sorted(cell.hospitals), "*fedavg"]
        return {site: {n: states[site][n] for n in cell.names} for site in order}, json.loads(about["seconds"])
    seconds: dict[str, float] = {}
    states = {}
    for site, data in cell.hospitals.items():
        started = time.perf_counter()
        states[site] = train_alone(cell, data, cell.rounds)
        seconds[f"local/{site}"] = time.perf_counter() - started
    started = time.perf_counter()
    states["*fedavg"] = fedavg(cell, cell.rounds)
    seconds["fedavg"] = time.perf_counter() - started
    flat = {f"{site}/{name}": tensor for site, state in states.items() for name, tensor in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, flat, {"seconds": json.dumps(seconds)})
    return states, seconds


def measure(cell: Cell, reference: State, kept: Path) -> Measured:
    """Everything that one cell compares; ``reference`` is the pooled model, which depends on the seed alone."""
    found = Measured(cell)
    states, seconds = trained(cell, kept)
    many = states.pop("*fedavg")
    found.facts |= {f"seconds/{name}": value for name, value in seconds.items()}
    sources = found.timed("statistics", lambda: sources_of(cell, states))
    _singles(cell, found, states)
    merged = _merges(cell, found, sources)
    restored = {"base": _restored(cell, cell.base, "bn-recal"), "merged": _restored(cell, merged["mean"], "bn-recal")}
    _heads(cell, found, {**restored, "pooled": reference, "fedavg": many})
    found.add(ONE_ROUND, averaged(cell, states))
    for name, state in (("fedavg, many rounds", many), ("pooled", reference)):
        found.add(name, state)
        found.add(f"{name}, bn-recal", _restored(cell, state, "bn-recal"))
    if cell.division in ("real", "dirichlet-0.3"):
        _restorations(cell, found, sources)
    sizes = {site: len(data.splits["train"]) for site, data in cell.hospitals.items()}
    found.facts |= {"rounds": cell.rounds, "sizes": sizes}
    found.facts |= {"bytes of a vector": sum(4 * t.numel() for t in sources[0].tensors["vector"].values())}
    return found


def _singles(cell: Cell, found: Measured, states: Mapping[str, State]) -> None:
    scores = {site: cell.score(state) for site, state in states.items()}
    best = max(sorted(scores), key=lambda site: scores[site])
    ensemble = None
    for site, state in states.items():
        found.add(f"single/{site}", state)
        found.add(f"single, bn-recal/{site}", _restored(cell, state, "bn-recal"))
        ensemble = found.test[f"single/{site}"] if ensemble is None else ensemble + found.test[f"single/{site}"]
    assert ensemble is not None
    found.test["ensemble"] = ensemble / len(states)
    for kind in ("single", "single, bn-recal"):
        found.test[f"best {kind}"] = found.test[f"{kind}/{best}"]
    found.add("base, bn-recal", _restored(cell, cell.base, "bn-recal"))
    found.facts["best single"] = best


def _merges(cell: Cell, found: Measured, sources: Sequence[InMemory]) -> dict[str, State]:
    recipes = dict(RULES)
    if len(sources) < 3:
        del recipes["trimmed mean"]
    states = {}
    for name, recipe in recipes.items():
        states[name] = found.timed(f"merge/{name}", lambda r=recipe: merged_state(cell, sources, r))
        found.add(name, _restored(cell, states[name], "bn-recal"))
    for total in TOTALS:
        recipe = {"rule": {"name": "data-vector", "coefficients": "mean", "scale": total}}
        found.add(f"total {total:g}", _restored(cell, merged_state(cell, sources, recipe), "bn-recal"))
    return states


def merged_state(cell: Cell, sources: Sequence[InMemory], recipe: Mapping[str, Any]) -> State:
    """The merged model before restoration."""
    state: State = {}
    outline = Outline.of(cell.model, cell.study.task.classes)
    merge(
        outline,
        InMemoryTensors(cell.base),
        sources,
        Recipe.model_validate(dict(recipe)),
        state.__setitem__,
        judge=lambda candidate: cell.score(_restored(cell, candidate, "bn-recal")),
    )
    return state


def _heads(cell: Cell, found: Measured, backbones: Mapping[str, State]) -> None:
    """Closed-form heads on the features of models as they are, from sums over the sites."""
    task = make_task(cell.study.task, cell.study.training)
    for name, state in backbones.items():
        cell.load(state)
        classes = len(cell.study.task.classes)
        parts = [head_sums(cell.model, data, task, fewest=1) for data in cell.hospitals.values()]
        sums = add_all([HeadSums.from_tensors(**part, classes=classes) for part in parts])
        for kind, settings in (("ridge", RidgeHead(balanced=True)), ("lda", LDAHead())):
            solved = solve_head(sums, settings, cell.study.task.kind)
            head = Outline.of(cell.model, cell.study.task.classes).head
            own_head = {f"{head}.{leaf}": tensor.float() for leaf, tensor in solved.items()}
            found.add(f"{kind} head on {name}", {**state, **own_head})


def _restorations(cell: Cell, found: Measured, sources: Sequence[InMemory]) -> None:
    """Each restoration mode for the sum, the mean, and the controls base, best single and random vector."""
    started = {
        "sum": (RULES["sum"], sources),
        "mean": (RULES["mean"], sources),
        "random, mean": (RULES["random, mean"], sources),
        "best single": (RULES["mean"], [s for s in sources if s.site == found.facts["best single"]]),
    }
    for name, (recipe, given) in started.items():
        for mode in MODES:
            if mode == "bn-pooled":
                state = merged_state(cell, given, {**recipe, "restoration": {"mode": mode}})
            else:
                state = _restored(cell, merged_state(cell, given, recipe), mode)
            found.add(f"{name}: {mode}", state)
    for mode in ("none", "bn-recal", NATURAL, "finetune", "head-only"):
        found.add(f"base: {mode}", _restored(cell, cell.base, mode))


def _restored(cell: Cell, state: Mapping[str, Tensor], mode: str) -> State:
    cell.load(state)
    recalibrated = mode.startswith("bn-recal")
    if mode not in ("none", "bn-pooled") and not (recalibrated and cell.study.model.norm == "group"):
        given = {"mode": "bn-recal", "balanced": mode != NATURAL} if recalibrated else {"mode": mode}
        task = make_task(cell.study.task, cell.study.training)
        seed = derive_seed(cell.seed, "restoration")
        settings = Restoration.model_validate(given)
        restore(cell.model, cell.coordinator, task, settings, cell.study.training, batch_size=256, seed=seed)
    return cell.state()


INTERVALS = 300
"""Resamples of the test patients."""


def scored(found: Measured, wanted: Sequence[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metrics of every model by place, and replicates of the models with intervals.

    A place is a real site where the sites are real, else all test images.
    """
    cell = found.cell
    test = cell.everything.splits["test"]
    cases = [cell.everything.cases[i] for i in test.tolist()]
    owners = np.array([case.site if cell.division == "real" else "all" for case in cases])
    labels = cell.everything.labels("test").numpy()
    patients = np.array([f"{case.site}/{case.patient}" for case in cases])
    singles = sorted(name for name in found.test if name.startswith(("single/", "single, bn-recal/")))
    scores: dict[str, Any] = {}
    replicates: dict[str, np.ndarray] = {}
    for place in sorted(set(owners.tolist())):
        here = owners == place
        weights = patient_weights(patients[here].tolist(), INTERVALS, key=place)
        parts: dict[str, tuple[dict[str, float], dict[str, np.ndarray]]] = {}
        for name, said in found.test.items():
            rows = said[here].astype(np.float64)
            rows /= rows.sum(1, keepdims=True)
            metrics = classification_metrics(labels[here], rows, False)
            drawn = {}
            if name in wanted or name in singles:
                drawn = classification_replicates(labels[here], rows, False, weights)
            parts[name] = ({m: metrics[m] for m in METRICS}, {m: drawn[m] for m in METRICS if drawn})
        for kind in ("single", "single, bn-recal"):
            members = [parts[name] for name in parts if name.startswith(f"{kind}/")]
            mean = {m: float(np.mean([metrics[m] for metrics, _ in members])) for m in METRICS}
            spread = {m: np.mean([r[m] for _, r in members], axis=0) for m in METRICS if members[0][1]}
            parts[kind] = (mean, spread)
        for name, (metrics, drawn) in parts.items():
            scores.setdefault(name, {})[place] = {m: None if np.isnan(v) else v for m, v in metrics.items()}
            replicates |= {f"{name}\t{place}\t{m}": values.astype(np.float32) for m, values in drawn.items()}
    return scores, replicates


def save(found: Measured, wanted: Sequence[str], path: Path) -> None:
    """Write scores, replicates, probabilities and facts; whole or not at all."""
    scores, replicates = scored(found, wanted)
    _write(found, scores, replicates, path)


def complete(cell: Cell, wanted: Sequence[str], kept: Path, path: Path) -> bool:
    """Give a cell that older code measured the models and intervals that it lacks; nothing is trained.

    Args:
        cell: As it was measured.
        wanted: Models with intervals.
        kept: Its trained models.
        path: What ``save`` wrote; what is there stays as it is.

    Returns:
        Whether anything was lacking.
    """
    with np.load(path) as arrays:
        before = {name: arrays[name] for name in arrays.files}
    known = json.loads(str(before["__scores__"]))
    having = {name.partition("\t")[0] for name in before}
    if {ONE_ROUND, POOLED_HEAD} <= known.keys() and all(name in having for name in wanted if name in known):
        return False
    found = Measured(cell)
    found.facts = json.loads(str(before["__facts__"]))
    prefix = "probabilities\t"
    found.test = {n.removeprefix(prefix): said for n, said in before.items() if n.startswith(prefix)}
    states, _ = trained(cell, kept)
    if ONE_ROUND not in known:
        found.add(ONE_ROUND, averaged(cell, {site: states[site] for site in cell.hospitals}))
    if POOLED_HEAD not in known:
        pooled_state, _ = read_tensors(path.with_name(f"pooled.{cell.seed}.safetensors"))
        _heads(cell, found, {"pooled": pooled_state, "fedavg": states["*fedavg"]})
    scores, replicates = scored(found, wanted)
    _write(found, scores | known, {name: before.get(name, values) for name, values in replicates.items()}, path)
    return True


def _write(found: Measured, scores: Mapping[str, Any], replicates: Mapping[str, np.ndarray], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    said = {f"probabilities\t{name}": value.astype(np.float16) for name, value in found.test.items()}
    texts = {"__facts__": np.array(json.dumps(found.facts)), "__scores__": np.array(json.dumps(scores))}
    with temporary.open("wb") as file:
        np.savez_compressed(file, **texts, **replicates, **said)  # type: ignore[arg-type]
    temporary.replace(path)
