"""What ``overhead.py`` measures: each probe runs in a fresh process, as ``overhead_probes.py PROBE JSON``."""

from __future__ import annotations

import copy
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from plain_loop import PlainSite, Recipe, plain_round
from torch import Tensor, nn

if TYPE_CHECKING:
    from polyclinic.runner import Observer, Run
    from polyclinic.study import Study

Json = dict[str, Any]
SEED = 0
LR = 0.01
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """A FedAvg study on made-up chest radiographs."""

    model: str
    size: int
    """Height and width, pixels."""
    sites: int
    patients: int
    """Per site; three quarters train, and a patient has one or two images."""
    rounds: int
    method: str = "fedavg"
    batch_size: int = 32

    def names(self) -> list[str]:
        """Names of the sites, sorted."""
        return [f"site{k:02d}" for k in range(self.sites)]

    def raw(self) -> Json:
        """The study file. No validation images, so that the rounds hold training and nothing else."""
        return {
            "name": "overhead",
            "seed": SEED,
            "task": {"classes": ["normal", "pneumonia", "effusion", "nodule"]},
            "data": {
                "phantom": {"sites": [{"name": name, "patients": self.patients} for name in self.names()]},
                "image": {"size": [self.size, self.size]},
                "split": {"fractions": [0.75, 0, 0.25]},
            },
            "model": {"name": self.model},
            "training": {"lr": LR, "batch_size": self.batch_size},
            "evaluation": {"every": 0, "select": "last"},
            "method": {"name": self.method, "rounds": self.rounds},
        }


def speed(case: Case) -> Json:
    """Seconds of each round, Polyclinic's and the plain loop's in turn, so that both see the same machine.

    The first round of each fills caches and is not counted.
    """
    from polyclinic.runner import Silent

    class Alternate(Silent):
        """Lets the plain loop do the same round whenever Polyclinic has finished one."""

        def run_started(self, study: Study, sites: list[str], finished: int) -> None:
            self.started = clocks()

        def round_finished(self, record: Mapping[str, Any]) -> None:
            done = clocks()
            plain.step(record["round"])
            plain_done = clocks()
            wall, processor = (
                {"polyclinic": end - start, "plain": plain_end - end}
                for start, end, plain_end in zip(self.started, done, plain_done, strict=True)
            )
            rounds.append({"wall": wall, "processor": processor, "training": record["seconds"]})
            apart.append(difference(run.state.groups["model"], plain.weights, start))
            self.started = clocks()

    rounds: list[Json] = []
    apart: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        run = prepare(case, Path(scratch), Alternate())
        start = run.state.groups["model"]
        plain = Plain(run.bench.model, work_of(run), case)
        run.train()
    if apart[0] > 1e-4:
        raise SystemExit(f"after one round the weights differ by {apart[0]:.1e} of the change: not the same work.")
    return {
        "steps": sum(map(len, plain.orders(1))),
        "rounds": rounds[1:],
        "difference": {"first": apart[0], "last": apart[-1]},
    }


def peak_polyclinic(case: Case) -> Json:
    """Peak memory of the rounds, and of everything up to the report, with the seconds of each part."""
    from polyclinic.runner import Silent

    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        run = prepare(case, Path(scratch), Silent())
        seconds["load"] = time.perf_counter() - started
        before = memory("VmRSS")
        started = time.perf_counter()
        run.train()
        seconds["train"] = time.perf_counter() - started
        trained = memory("VmHWM")
        started = time.perf_counter()
        run.test()
        seconds["test"] = time.perf_counter() - started
        from polyclinic.report import write_report

        started = time.perf_counter()
        write_report(run.folder.path)
        seconds["report"] = time.perf_counter() - started
    model = sum(t.numel() * t.element_size() for t in run.bench.tensors.values()) / MIB
    return {"peak": trained, "before": before, "study": memory("VmHWM"), "model": model, "seconds": seconds}


def peak_plain(case: Case, work: str) -> Json:
    """Peak memory of the plain loop, in a process that has imported torch and what the network needs."""
    from safetensors.torch import load_file

    model = network(case)
    plain = Plain(model, load_file(work), case)
    before = memory("VmRSS")
    for number in range(1, case.rounds + 1):
        plain.step(number)
    return {"peak": memory("VmHWM"), "before": before}


def export(case: Case, to: str) -> Json:
    """Write what the plain loop works on, for a process that knows nothing of Polyclinic."""
    from safetensors.torch import save_file

    from polyclinic.runner import Silent

    with tempfile.TemporaryDirectory() as scratch:
        save_file(work_of(prepare(case, Path(scratch), Silent())), to)
    return {}


def startup(arguments: list[str]) -> Json:
    """Time of the first gradient step of ``polyclinic ARGUMENTS``, on the clock that its parent read before."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def first(*_: Any) -> None:
        print(json.dumps({"at": time.monotonic()}), flush=True)
        os._exit(0)

    register_optimizer_step_post_hook(first)
    from polyclinic.cli import main

    sys.argv = ["polyclinic", *arguments]
    main()
    raise SystemExit("polyclinic ended without a gradient step")


class Plain:
    """The plain loop on one case.

    Args:
        model: With the start weights; is copied.
        work: From ``work_of``.
        case: Gives rates and sizes.
    """

    def __init__(self, model: nn.Module, work: Mapping[str, Tensor], case: Case) -> None:
        self.model = copy.deepcopy(model)
        self.weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self._work = work
        self._names = case.names()
        counts = [int(work[f"{name}/lengths"].sum()) for name in self._names]
        self._sites = [
            PlainSite(work[f"{name}/images"], work[f"{name}/targets"], count / sum(counts))
            for name, count in zip(self._names, counts, strict=True)
        ]
        self._recipe = Recipe(lr=LR, mean=0.5, std=0.25)

    def orders(self, number: int) -> list[list[Tensor]]:
        """Batches of each site in round ``number``."""
        work = self._work
        return [list(work[f"{n}/order/{number}"].split(work[f"{n}/lengths"].tolist())) for n in self._names]

    def step(self, number: int) -> None:
        """Do round ``number``."""
        self.weights = plain_round(self.model, self.weights, self._sites, self.orders(number), self._recipe)


def prepare(case: Case, scratch: Path, observer: Observer) -> Run:
    """A run that is ready for its first round, images decoded."""
    from polyclinic.results import RunFolder
    from polyclinic.runner import Run, load_sites
    from polyclinic.study import validate_study

    study = validate_study(case.raw())
    folder = RunFolder(scratch / "run")
    folder.create(study)
    return Run(study, load_sites(study, folder.path), folder, observer)


def work_of(run: Run) -> dict[str, Tensor]:
    """Images, targets and batches of every round, as Polyclinic draws them."""
    from polyclinic.seeds import derive_seed, generator

    settings, work = run.study.training, {}
    for name, data in run.data.items():
        work[f"{name}/images"], work[f"{name}/targets"] = data.images, data.targets
        for number in range(1, run.study.method.rounds + 1):
            draws = generator(derive_seed(run.study.seed, name, number, "train"), "order")
            batches = list(data.train_batches(draws, settings.batch_size))
            work[f"{name}/order/{number}"] = torch.cat(batches)
            work[f"{name}/lengths"] = torch.tensor([len(batch) for batch in batches])
    return work


def network(case: Case) -> nn.Module:
    """The case's network without Polyclinic's study machinery."""
    from polyclinic.models.monai_networks import resnet18
    from polyclinic.models.small_cnn import small_cnn

    build = {"resnet18": resnet18, "small-cnn": small_cnn}[case.model]
    return build(in_channels=1, out_channels=4, spatial_dims=2, norm="batch")


def difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """Distance of the two models as a share of how far training has moved."""
    apart = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in ours)
    moved = sum(float((ours[name] - start[name]).double().square().sum()) for name in ours)
    return math.sqrt(apart / moved)


def clocks() -> tuple[float, float]:
    """Wall clock and processor time of this process, seconds."""
    return time.perf_counter(), time.process_time()


def memory(field: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process in MiB; unlike ``ru_maxrss`` not inherited from a parent."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def main() -> None:
    """Run one probe and print its JSON as the last line."""
    name, arguments = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(arguments.pop("threads"))
    if "case" in arguments:
        arguments["case"] = Case(**arguments["case"])
    probes = {probe.__name__: probe for probe in (speed, peak_polyclinic, peak_plain, export, startup)}
    print(json.dumps(probes[name](**arguments)), flush=True)


if __name__ == "__main__":
    main()
