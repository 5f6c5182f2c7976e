"""What a local step of per-fedavg costs, beside a step of fedavg: time side by side in one process, peak memory apart.

``python benchmarks/personalisation_cost.py`` measures the networks of PPPML-HMI (the 2D U-Net and the 3D DenseNet) and
the default network on random numbers and writes ``benchmarks/results/personalisation_cost.md``. A stopped run goes on
where it was. Goals: fo at most 2.1 times, hf at most 4.2 times a step of fedavg; peak memory at most 2 times.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from overhead_probes import memory
from tables import RESULTS, Json, Results, Table

VARIANTS = ("fedavg", "fo", "hf", "exact")
INTRO = """A step is one outer step with a batch of the given size; per-fedavg takes a second batch of the same size for
the inner step. Random images; sgd. Times: the variants take turns in one process, three steps each; ratios to fedavg
of the same turn, median over turns and processes with the range. Memory: peak of a process that only trains, less what
it held before its first step."""


@dataclass(frozen=True)
class Case:
    """A network and what it sees."""

    model: str
    size: tuple[int, ...]
    channels: int
    batch_size: int
    task: str = "multi-class"

    @property
    def title(self) -> str:
        """As in the table."""
        return f"{self.model}, {'x'.join(map(str, self.size))}, batch {self.batch_size}"


CASES = {
    "small-cnn": Case("small-cnn", (64, 64), 1, 32),
    "unet": Case("unet", (64, 64), 3, 8, "segmentation"),
    "densenet3d": Case("densenet3d", (32, 32, 32), 1, 4),
}


def main() -> None:
    """Measure what is not measured yet and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="the default network only, one process")
    parser.add_argument("--threads", type=int, default=2, help="threads of a process")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the tables go")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.probe:
        print(json.dumps(probe(**json.loads(options.probe))), flush=True)
        return
    results = Results(f"personalisation_cost{'-quick' if options.quick else ''}", options.results)
    cases = {"small-cnn": CASES["small-cnn"]} if options.quick else CASES
    repeats, turns = (1, 4) if options.quick else (2, 5)

    def measured(key: str, **arguments: Any) -> Json:
        settings = {**arguments, "threads": options.threads}
        return results.cell(key, settings, lambda: child(settings))

    times, peaks = [], []
    for name, case in cases.items():
        found = [
            measured(f"time/{name}/{n}", kind="time", case=asdict(case), turns=turns, repeat=n) for n in range(repeats)
        ]
        base = median(s for one in found for s in one["fedavg"])
        ratios = [
            ratio([v / b for one in found for v, b in zip(one[variant], one["fedavg"], strict=True)])
            for variant in VARIANTS[1:]
        ]
        times.append([case.title, f"{1000 * base:.0f} ms", *ratios])
        used = {v: measured(f"memory/{name}/{v}", kind="memory", case=asdict(case), variant=v) for v in VARIANTS}
        base = used["fedavg"]["peak"] - used["fedavg"]["before"]
        shares = [f"{(used[v]['peak'] - used[v]['before']) / base:.2f}" for v in VARIANTS[1:]]
        peaks.append([case.title, f"{base:.0f} MiB", *shares])
    columns = ["network", "fedavg", *VARIANTS[1:]]
    tables = [Table("Time of a step, as a multiple of fedavg's", columns, times)]
    tables.append(Table("Peak memory of training, as a multiple of fedavg's", columns, peaks))
    results.write("What a step of per-fedavg costs", INTRO, tables, seeds=[0])


def ratio(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def child(arguments: Json, program: str = __file__) -> Json:
    """Run a probe of a benchmark in a fresh process."""
    command = [sys.executable, program, "--probe", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    found: Json = json.loads(done.stdout.splitlines()[-1])
    return found


def probe(kind: str, case: Json, threads: int, turns: int = 1, variant: str = "", repeat: int = 0) -> Json:
    """Seconds per step of every variant and turn (``time``), or peak memory of one (``memory``)."""
    import torch

    torch.set_num_threads(threads)
    steps = trainers(Case(**case))
    if kind == "memory":
        before = memory("VmRSS")
        steps[variant](3)
        return {"before": before, "peak": memory("VmHWM")}
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for turn in range(turns + 1):
        for name, train in steps.items():
            started = time.perf_counter()
            train(3)
            if turn:  # the first fills caches
                seconds[name].append((time.perf_counter() - started) / 3)
    return dict(seconds)


def trainers(case: Case) -> dict[str, Callable[[int], Any]]:
    """Functions that make so many steps, one per variant, of one network on one site's random images."""
    import torch

    from polyclinic.data.dataset import SiteData
    from polyclinic.data.manifest import Case as Row
    from polyclinic.methods.per_fedavg import meta_gradient
    from polyclinic.models.registry import build_model
    from polyclinic.study import ImageSettings, ModelSettings, TaskSettings, TrainingSettings
    from polyclinic.tasks import make_task
    from polyclinic.training import plain_step, train

    kind: Any = case.task
    task = TaskSettings(kind=kind, classes=["healthy", "ill"])
    channels: Any = case.channels
    image = ImageSettings(size=list(case.size), channels=channels)
    settings = TrainingSettings(batch_size=case.batch_size, lr=0.01)
    count = 4 * case.batch_size
    draw = torch.Generator().manual_seed(0)
    pixels = torch.rand(count, case.channels, *case.size, generator=draw)
    shape = (count, *case.size) if case.task == "segmentation" else (count,)
    targets = torch.randint(0, 2, shape, generator=draw)
    if case.task == "segmentation":
        targets = targets.to(torch.uint8)
    rows = [Row(f"{i}.png", f"p{i}", "site", label=task.classes[i % 2], split="train") for i in range(count)]
    nothing = torch.zeros(0, dtype=torch.int64)
    data = SiteData("site", rows, pixels, targets, {"train": torch.arange(count), "val": nothing, "test": nothing})
    model = build_model(ModelSettings(name=case.model), task, image, 0)
    made = make_task(task, settings)

    def trainer(variant: str) -> Callable[[int], Any]:
        def run(steps: int) -> Any:
            wanted = settings.model_copy(update={"steps": steps})
            rule = plain_step if variant == "fedavg" else meta_gradient(variant, 0.01)
            return train(model, data, made, wanted, lr=0.01, seed=0, rule=rule)

        return run

    return {variant: trainer(variant) for variant in VARIANTS}


if __name__ == "__main__":
    main()
