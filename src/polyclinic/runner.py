"""A study from file to results folder."""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from polyclinic.data.dataset import SiteData
from polyclinic.data.manifest import class_notes, collect
from polyclinic.data.proxies import load_proxies
from polyclinic.data.scanners import check_scanners
from polyclinic.data.split import check_splits, write_splits
from polyclinic.errors import DataError, StudyError
from polyclinic.evaluation.central import CENTRAL, report_central
from polyclinic.evaluation.ops import choose, evaluation_ops, report_test, validate
from polyclinic.evaluation.results import write_replicates
from polyclinic.evaluation.summary import SiteResult, summarise
from polyclinic.federation.local import LocalChannel
from polyclinic.federation.message import Message
from polyclinic.federation.networks import SITE, check_models
from polyclinic.federation.site import Leaf, Op, Site, Workbench
from polyclinic.federation.state import ServerState
from polyclinic.methods import make_method
from polyclinic.methods.pooled import POOLED_SITE
from polyclinic.models.pretraining import pretrain_ahead
from polyclinic.models.registry import describe
from polyclinic.models.weights import save_tensors, shared_tensors, snapshot
from polyclinic.results import Json, RunFolder, plain_json
from polyclinic.secure.backends import Aggregation
from polyclinic.study import Study
from polyclinic.synthesis.exchange import Exchange
from polyclinic.synthesis.exchange_run import ExchangeRun
from polyclinic.tasks import make_task
from polyclinic.training import learning_rate

if TYPE_CHECKING:
    from polyclinic.secure.identity import Credentials

RESERVED_SITES = frozenset({CENTRAL, POOLED_SITE, "exchange", "global", "mean", "server", "worst"})


class Observer(Protocol):
    """Told what a run is doing, for a progress display."""

    def loading(self, site: str, done: int, total: int) -> None:
        """So many of a site's images are decoded."""

    def working(self, what: str, done: int, total: int) -> None:
        """So many parts of a long piece of work that is no training are done."""

    def run_started(self, study: Study, sites: list[str], finished: int) -> None:
        """Training begins, or goes on after ``finished`` rounds."""

    def called(self, op: str, site: str, number: int, loss: float | None) -> None:
        """A site has answered."""

    def round_finished(self, record: Mapping[str, Any]) -> None:
        """A round is finished and safe on disk."""

    def run_finished(self, folder: Path, metrics: Mapping[str, Any]) -> None:
        """Results are written."""


class Silent:
    """An observer that says nothing."""

    def loading(self, site: str, done: int, total: int) -> None:
        """Ignore."""

    def working(self, what: str, done: int, total: int) -> None:
        """Ignore."""

    def run_started(self, study: Study, sites: list[str], finished: int) -> None:
        """Ignore."""

    def called(self, op: str, site: str, number: int, loss: float | None) -> None:
        """Ignore."""

    def round_finished(self, record: Mapping[str, Any]) -> None:
        """Ignore."""

    def run_finished(self, folder: Path, metrics: Mapping[str, Any]) -> None:
        """Ignore."""


def load_sites(study: Study, folder: Path, observer: Observer | None = None) -> dict[str, SiteData]:
    """Read tables, divide them into sites and splits, decode every image once.

    Args:
        study: Says where the images are.
        folder: Where memory-mapped images go unless the study names another place.
        observer: Told of progress.

    Raises:
        DataError: Whatever is wrong with the data, found before any training. StudyError: There is no such device, or
            settings of images and scanners contradict each other.
    """
    _check_device(study)
    observer = observer or Silent()
    cases = collect(study.data, study.task, Path(study.data.root))
    check_scanners(study.data, study.task, cases)
    reserved = sorted(RESERVED_SITES & set(cases))
    if reserved:
        raise DataError(f"a site cannot be called {reserved[0]!r}: the name is used in results. Rename it.")
    unheld = class_notes(cases, study.task).get("", [])
    if unheld:
        raise DataError(f"{unheld[0]}. Remove it from task.classes, or check the labels.")
    named = study.data.image.cache_folder
    cache = Path(study.data.root) / named if named else folder / "cache"
    sites = {}
    for name, own in cases.items():
        sites[name] = SiteData.load(
            name,
            own,
            study.task,
            study.data.image,
            cache,
            phantom=study.data.phantom,
            scanner=study.data.scanners.get(name),
            on_progress=lambda done, total, name=name: observer.loading(name, done, total),  # type: ignore[misc]
        )
    if study.evaluation.select == "best" and not any(len(data.splits["val"]) for data in sites.values()):
        raise DataError(
            "no site has validation images, so evaluation.select: best has nothing to choose by. Give validation a "
            "share in data.split.fractions, or set evaluation.select: last."
        )
    return sites


def run_one(study: Study, sites: Mapping[str, SiteData], folder: RunFolder, observer: Observer | None = None) -> Json:
    """Train and test one method with one seed; go on where the folder's last finished round was.

    Args:
        study: With one method; ``compare`` is not looked at.
        sites: From ``load_sites``.
        folder: Made or opened for this study.
        observer: Told of progress.

    Returns:
        What ``metrics.json`` holds.
    """
    from polyclinic.report import write_report

    observer = observer or Silent()
    if folder.finished:
        check_splits({name: data.cases for name, data in sites.items()}, folder.path / "splits.csv")
        metrics: Json = json.loads((folder.path / "metrics.json").read_text(encoding="utf-8"))
    else:
        run = Run(study, sites, folder, observer)
        folder.guard(run.train)
        metrics = folder.guard(run.test)
    if not (folder.path / "report.html").is_file():
        write_report(folder.path)
    # What a resumed run would have needed: personal models and control variates of every site.
    shutil.rmtree(folder.path / "state", ignore_errors=True)
    observer.run_finished(folder.path, metrics)
    return metrics


class Run:
    """One method and one seed on its way through the rounds."""

    def __init__(self, study: Study, sites: Mapping[str, SiteData], folder: RunFolder, observer: Observer) -> None:
        _check_device(study)
        self.method = make_method(study)
        study = self.method.study
        self.study, self.data, self.folder, self.observer = study, sites, folder, observer
        for data in sites.values():
            self.method.check_data(data)
        self.aggregation = Aggregation(study, self.method, sorted(sites))
        check_models(study, sites)
        networks = self.method.networks
        pretrain_ahead(study, [study.model, *(study.model_of(name) for name in sorted(sites))], observer.working)
        self.bench = networks.of(study.model, SITE)
        self.method.check_networks({name: networks.of_site(name).model for name in sorted(sites)})
        self.losses: dict[str, float] = {}
        exchanged = folder.path / "state" / "exchange"
        self.exchange: ExchangeRun | None = None
        if study.synthesis is not None:
            exchange = Exchange(study, self.bench)
            sums = Aggregation(study, exchange, sorted(sites))
            # What sites sum of samples comes from one network, whatever each trains.
            channel = self._local_channel(sums.ops, sums.credentials, exchanged, bench=self.bench)
            self.exchange = ExchangeRun(exchange, channel, sums, folder, observer)
        self.channel = self._local_channel(
            {**self.aggregation.ops, **evaluation_ops(self.method)},
            self.aggregation.credentials,
            folder.path,
            exchanged if self.exchange else None,
            on_call=self._told,
        )
        cases = {name: data.cases for name, data in sites.items()}
        if folder.checkpoint.is_file():
            check_splits(cases, folder.path / "splits.csv")
            self.state = ServerState.load(folder.checkpoint, self.bench.device)
        else:
            names = self.method.shared(self.bench.model)
            self.state = ServerState({"model": snapshot(shared_tensors(self.bench.model, names))})
            folder.guard(lambda: write_splits(cases, folder.path / "splits.csv"))
        folder.guard(lambda: folder.checkpoint.parent.mkdir(exist_ok=True))
        self.records = folder.rounds(upto=self.state.finished)

    def train(self) -> None:
        """Drive the method round by round; after each, judge, record and save. An exchange of samples comes first."""
        if self.exchange is not None:
            self.exchange.finish()
            self.losses.clear()  # those of its generator
        study, state, channel = self.study, self.state, self.channel
        self.observer.run_started(study, list(channel.sites), state.finished)
        channel.begin_round(state.finished + 1)
        started = time.perf_counter()
        for _ in self.method.server(channel, state, self.aggregation.sums):
            number = state.finished + 1
            found: dict[str, dict[str, float]] = {}
            every = study.evaluation.every
            if number == study.method.rounds or (every and number % every == 0 and self.method.ready(number)):
                found = validate(self.method, channel, state)
                choose(self.method, channel, state, found)
            state.finished = number
            record = self._record(number, found, time.perf_counter() - started)
            # The record first: a kill between the two leaves one line too many, which resuming cuts off.
            self.folder.add_round(record)
            self.folder.guard(lambda: state.save(self.folder.checkpoint))
            self.records.append(record)
            self.observer.round_finished(record)
            started = time.perf_counter()
            self.losses.clear()
            self.aggregation.sums.incidents.clear()
            channel.begin_round(number + 1)

    def test(self) -> Json:
        """Judge the kept model on the test images, once, and write the results."""
        self.channel.begin_round(self.state.finished + 1)
        results = report_test(self.method, self.channel, self.state)
        path = self.folder.path
        if not self.method.personal:
            self.folder.guard(lambda: (path / "models").mkdir(exist_ok=True))
            save_tensors(path / "models" / "global.safetensors", self.state.groups["chosen"])
        central = self.folder.guard(lambda: report_central(self.method, self.channel, self.state, path / "models"))
        self.folder.guard(lambda: write_replicates(path / "replicates.safetensors", results))
        if found := self.method.records(self.state):
            self.folder.write("transfer.json", json.dumps(plain_json(found), indent=1))
        self.folder.write("privacy.json", json.dumps(self._what_leaves(), indent=2))
        metrics = {**self._metrics(results), **central}
        self.folder.write("metrics.json", json.dumps(plain_json(metrics), indent=1))
        return metrics

    def _what_leaves(self) -> Json:
        """Per op, everything that may leave a site, as declared and enforced."""
        ops = {**self.aggregation.ops, **evaluation_ops(self.method)}
        if self.exchange is not None:
            ops = {**self.exchange.ops, **ops}
        return {
            "simulation": "every training image leaves its site" if self.method.simulation_only else "",
            "aggregation": self.aggregation.backend,
            "hidden": self.aggregation.hidden,
            "leaves": {op: [_leaf(leaf) for leaf in entry.leaves] for op, entry in ops.items()},
        }

    def _told(self, op: str, site: str, reply: Message) -> None:
        loss = reply.scalars.get("loss")
        if loss is not None:
            self.losses[site] = float(loss)
        self.observer.called(op, site, self.channel.round, None if loss is None else float(loss))

    def _local_channel(
        self,
        ops: Mapping[str, Op],
        credentials: Mapping[str, Credentials],
        folder: Path,
        exchanged: Path | None = None,
        bench: Workbench | None = None,
        on_call: Callable[[str, str, Message], None] | None = None,
    ) -> LocalChannel:
        """Sites with these ops, whose states lie below ``folder``; on ``bench``, or each on its own network's."""
        study = self.study
        task = make_task(study.task, study.training)

        def make(name: str, data: SiteData) -> Site:
            return Site(
                name,
                study,
                data,
                task,
                workbench=bench or self.method.networks.of_site(name),
                networks=self.method.networks,
                ops=ops,
                folder=folder,
                credentials=credentials.get(name),
                exchanged=exchanged,
            )

        hidden = {}
        if self.method.simulation_only:
            hidden[POOLED_SITE] = make(
                POOLED_SITE, SiteData.concat([self.data[n] for n in sorted(self.data)], POOLED_SITE)
            )

        return LocalChannel(
            {name: make(name, data) for name, data in self.data.items()},
            hidden=hidden,
            tolerant=study.federation.on_absent == "continue",
            on_call=on_call,
        )

    def _record(self, number: int, found: Mapping[str, Any], seconds: float) -> Json:
        channel = self.channel
        sites: Json = {}
        for site in sorted({*channel.sites, *self.losses}):
            sites[site] = {"loss": self.losses.get(site), **channel.traffic.of_site(site)}
            if site in found:
                sites[site]["val"] = found[site]
        return {
            "round": number,
            "seconds": seconds,
            "lr": learning_rate(self.study.training, number, self.study.method.rounds),
            "sites": sites,
            "absent": dict(channel.absent),
            "incidents": list(self.aggregation.sums.incidents),
            "bytes": channel.traffic.by_op(),
        }

    def _used_proxies(self) -> Json:
        used = self.study.proxies is not None and (self.study.proxies.pretrain or "proxies" in self.method.ops())
        return describe_proxies(self.study) if used else {}

    def _metrics(self, results: Mapping[str, SiteResult]) -> Json:
        study, records = self.study, self.records
        table = summarise(results, study.evaluation.confidence)
        known = class_notes({name: data.cases for name, data in self.data.items()}, study.task)
        ops: dict[str, dict[str, int]] = {}
        before = [self.exchange.bytes] if self.exchange else []
        for part in [*before, *(r["bytes"] for r in records), self.channel.traffic.by_op()]:
            for op, n in part.items():
                total = ops.setdefault(op, {"up": 0, "down": 0})
                total["up"], total["down"] = total["up"] + n["up"], total["down"] + n["down"]
        return {
            "study": study.name,
            "method": study.method.title,
            "seed": study.seed,
            "task": study.task.kind,
            "classes": study.task.classes,
            "model": {"name": study.model.name, **describe(self.bench.model)},
            **describe_networks(study, {name: self.method.networks.of_site(name).model for name in self.data}),
            **self._used_proxies(),
            "chosen_round": self.state.scalars["chosen_round"],
            "rounds": study.method.rounds,
            "sites": {
                name: {
                    **describe_site(self.data[name]),
                    "test": table["sites"][name],
                    **results[name].decided,
                    "notes": [*known.get(name, []), *results[name].notes],
                }
                for name in results
            },
            "mean": table["mean"],
            "worst": table["worst"],
            "notes": [*(f"{s} could not be tested: {why}" for s, why in self.channel.absent.items()), *table["notes"]],
            "bytes": ops,
            "seconds": {
                "rounds": sum(r["seconds"] for r in records),
                **({"exchange": self.exchange.seconds} if self.exchange else {}),
            },
            "process_peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }


def describe_networks(study: Study, networks: Mapping[str, nn.Module]) -> Json:
    """``models``: name and size of every site's network, where they are not all the same; else nothing."""
    if not study.mixed:
        return {}
    found = {site: {"name": study.model_of(site).name, **describe(networks[site])} for site in sorted(networks)}
    return {"models": found}


def describe_proxies(study: Study) -> Json:
    """``proxies``: what the public images of the study are, where it has any; else nothing."""
    if study.proxies is None:
        return {}
    found = load_proxies(study)
    named = {"name": found.name, "images": len(found), "classes": found.classes, "sha256": found.digest}
    return {"proxies": {**named, "pretrain": study.proxies.pretrain}}


def describe_site(data: SiteData) -> Json:
    """Devices, and patients, images and labels of each split."""
    splits = {name: [data.cases[i] for i in indices.tolist()] for name, indices in data.splits.items()}
    return {
        "device": sorted({case.device for case in data.cases if case.device}),
        "patients": {name: len({case.patient for case in cases}) for name, cases in splits.items()},
        "images": {name: len(cases) for name, cases in splits.items()},
        "labels": {
            name: dict(sorted(Counter(label for case in cases for label in case.labels).items()))
            for name, cases in splits.items()
        },
    }


def _check_device(study: Study) -> None:
    if study.device == "cuda":
        if not torch.cuda.is_available():
            raise StudyError("device: cuda was asked for, but PyTorch finds no CUDA device. Use --device cpu.")
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True


def _leaf(leaf: Leaf) -> Json:
    """As ``privacy.json`` has it; lanes mean something for sums alone."""
    return {name: value for name, value in asdict(leaf).items() if name != "lanes" or leaf.kind == "sum"}
