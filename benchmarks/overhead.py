"""What Polyclinic costs beside a plain PyTorch loop: time per round, peak memory, memory per site, start-up.

``python benchmarks/overhead.py`` prints a table and writes it below ``benchmarks/results/``; it asserts nothing. What
was measured before with the same code and settings is taken from there, so a stopped benchmark goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from overhead_probes import SEED, Case
from tables import RESULTS, ROOT, Json, Results, Table

CASES = {
    "resnet18": Case("resnet18", size=64, sites=4, patients=120, rounds=5),
    "small-cnn": Case("small-cnn", size=28, sites=10, patients=120, rounds=31),
}
QUICK_ROUNDS = {"resnet18": 3, "small-cnn": 9}
GOALS = {"resnet18": 1.05, "small-cnn": 1.15}
MEMORY_GOAL, STARTUP_GOAL = 1.2, 4.0
REPEATS = 3
SITES = (2, 5, 10)
PARTS = ("speed", "memory", "sites", "startup")
INTRO = """What a federated study costs beside a plain PyTorch loop (`benchmarks/plain_loop.py`) that does the same
gradient steps on the same decoded images. Every figure comes from a fresh process. Goals are aims, not promises."""
SPEED_NOTE = (
    "Batches of 32, {threads}. Rounds of the two take turns in one process, the first of each is not counted. A round "
    "is all from the server's message to the averaged model, saved to disk, from where a killed run goes on; the plain "
    "loop saves nothing. Loading images and building the network are in neither, there is no validation. A ratio is "
    "the median over neighbouring pairs of rounds, then over repeats (lowest to highest); that of processor time "
    "suffers less from other programs, but does not see waiting for the disk. *Unsaved*: the ratio without saving. "
    "*Per site*: what is added to a site's turn, by the ratio of processor time. *Apart*: distance of the two models "
    "after one round, as a share of what training changed: rounding, so the work is the same."
)


def main() -> None:
    """Measure what is asked for and write the tables."""
    options = _options()
    cases = {name: CASES[name] for name in options.only or CASES}
    for name, case in cases.items():
        rounds = options.rounds + 1 if options.rounds else QUICK_ROUNDS[name] if options.quick else case.rounds
        cases[name] = replace(case, rounds=rounds)
    bench = Bench(Results("overhead", options.results, fresh=options.fresh), options.threads, options.quick)
    makers = {
        "speed": lambda: _speed_table(bench, cases),
        "memory": lambda: _memory_table(bench, cases),
        "sites": lambda: _sites_table(bench),
        "startup": lambda: _startup_table(bench, cases),
    }
    tables = [makers[part]() for part in options.parts or PARTS]
    bench.results.write("Overhead", INTRO, tables, seeds=[SEED])


class Bench:
    """Runs probes in fresh processes and keeps what they say."""

    def __init__(self, results: Results, threads: int, quick: bool) -> None:
        self.results, self.threads = results, threads
        self.repeats = 1 if quick else REPEATS

    def repeated(self, key: str, probe: str, **arguments: Any) -> list[Json]:
        """The probe's answers of each repeat."""
        return [self.once(f"{key}/{k}", probe, **arguments) for k in range(self.repeats)]

    def once(self, key: str, probe: str, **arguments: Any) -> Json:
        """The probe's answer."""
        settings = {"probe": probe, "threads": self.threads, **arguments}
        return self.results.cell(key, settings, lambda: self._measure(probe, arguments))

    def _measure(self, probe: str, arguments: Json) -> Json:
        with tempfile.TemporaryDirectory() as scratch:
            if probe == "startup":
                return _start(arguments["study"], Path(scratch), self.threads)
            if probe == "peak_plain":
                work = str(Path(scratch) / "work.safetensors")
                _child("export", {**arguments, "to": work}, self.threads)
                arguments = {**arguments, "work": work}
            return _child(probe, arguments, self.threads)


def _speed_table(bench: Bench, cases: dict[str, Case]) -> Table:
    rows = []
    for name, case in cases.items():
        found = bench.repeated(f"speed/{name}", "speed", case=asdict(case))
        rounds = [one for repeat in found for one in repeat["rounds"]]
        plain = statistics.median(one["wall"]["plain"] for one in rounds)
        wall = _ratios(found, lambda one: one["wall"]["polyclinic"] / one["wall"]["plain"])
        unsaved = _ratios(found, lambda one: one["training"] / one["wall"]["plain"])
        processor = _ratios(found, lambda one: one["processor"]["polyclinic"] / one["processor"]["plain"])
        rows.append(
            [
                f"{case.model}, {case.size} px, {case.sites} sites",
                f"{len(found)} x {case.rounds - 1} rounds of {found[0]['steps']} steps",
                f"{plain:.3f} s",
                _with_range(wall),
                _with_range(processor),
                f"at most {GOALS[name]:.2f}",
                f"{statistics.median(unsaved):.3f}",
                f"{(statistics.median(processor) - 1) * plain * 1000 / case.sites:.1f} ms",
                f"{max(repeat['difference']['first'] for repeat in found):.0e}",
            ]
        )
    columns = ["Study", "Measured", "Plain round", "Ratio, wall", "Ratio, processor", "Goal", "Unsaved, wall"]
    threads = "one thread" if bench.threads == 1 else f"{bench.threads} threads"
    return Table("Time per round", [*columns, "Per site", "Apart"], rows, SPEED_NOTE.format(threads=threads))


def _memory_table(bench: Bench, cases: dict[str, Case]) -> Table:
    rows = []
    for name, case in cases.items():
        short = asdict(replace(case, rounds=3))
        ours = bench.once(f"memory/{name}/polyclinic", "peak_polyclinic", case=short)
        plain = bench.once(f"memory/{name}/plain", "peak_plain", case=short)
        rows.append(
            [
                f"{case.model}, {case.size} px, {case.sites} sites",
                f"{plain['peak']:.0f} MiB",
                f"{ours['peak']:.0f} MiB",
                f"{ours['peak'] / plain['peak']:.2f}",
                f"at most {MEMORY_GOAL:.1f}",
                f"{plain['peak'] - plain['before']:.0f} MiB",
                f"{ours['peak'] - ours['before']:.0f} MiB",
                f"{ours['study']:.0f} MiB",
                ", ".join(f"{part} {seconds:.1f} s" for part, seconds in ours["seconds"].items()),
            ]
        )
    columns = [
        "Study",
        "Plain",
        "Polyclinic",
        "Ratio",
        "Goal",
        "Plain, rounds alone",
        "Polyclinic, rounds alone",
        "With test and report",
        "The whole study",
    ]
    note = (
        "Peak resident memory (VmHWM) of three rounds with saving, each side in a process of its own; the plain one "
        "has imported torch and what the network needs. *Rounds alone*: above what was held before the first round."
    )
    return Table("Peak memory", columns, rows, note)


def _sites_table(bench: Bench) -> Table:
    rows = []
    for method in ("fedavg", "ditto"):
        peaks = {}
        for sites in SITES:
            case = Case("resnet18", size=64, sites=sites, patients=8, rounds=2, method=method, batch_size=8)
            found = bench.once(f"sites/{method}/{sites}", "peak_polyclinic", case=asdict(case))
            peaks[sites] = found["peak"]
        few, many = SITES[0], SITES[-1]
        slope = (peaks[many] - peaks[few]) / (many - few)
        rows.append(
            [
                method,
                *(f"{peak:.0f} MiB" for peak in peaks.values()),
                f"{slope:.2f} MiB",
                f"below one model, {found['model']:.1f} MiB",
            ]
        )
    columns = ["Method", *(f"{sites} sites" for sites in SITES), "Per extra site", "Goal"]
    note = "Peak resident memory of two rounds of ResNet-18 at 64 px; eight patients a site."
    return Table("Memory and the number of sites", columns, rows, note)


def _startup_table(bench: Bench, cases: dict[str, Case]) -> Table:
    studies = {f"run, {name}": replace(case, sites=2, patients=20).raw() for name, case in cases.items()}
    rows = []
    for name, study in {"demo": None, **studies}.items():
        seconds = [found["seconds"] for found in bench.repeated(f"startup/{name}", "startup", study=study)]
        rows.append([f"polyclinic {name}", f"{statistics.median(seconds):.1f} s", f"under {STARTUP_GOAL:.0f} s"])
    note = (
        "From the start of the process to the end of the first gradient step, images drawn and decoded; median over "
        f"{bench.repeats}, files in the page cache. `demo` has four sites with 440 patients, the others two with 40. "
        "Building ResNet-18 imports MONAI."
    )
    return Table("Start-up to first gradient step", ["Command", "Reached", "Goal"], rows, note)


def _start(study: Json | None, scratch: Path, threads: int) -> Json:
    arguments = ["demo"]
    if study is not None:
        path = scratch / "study.yaml"
        path.write_text(yaml.safe_dump(study), encoding="utf-8")
        arguments = ["run", str(path)]
    started = time.monotonic()
    found = _child("startup", {"arguments": [*arguments, "--out", str(scratch / "out")]}, threads)
    return {"seconds": found["at"] - started}


def _child(probe: str, arguments: Json, threads: int) -> Json:
    """What a probe in a fresh process prints as its last line."""
    script = Path(__file__).with_name("overhead_probes.py")
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, str(script), probe, json.dumps({"threads": threads, **arguments})],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"the probe {probe} failed, see above.\n{done.stdout}")
    answer: Json = json.loads(done.stdout.splitlines()[-1])
    return answer


def _ratios(repeats: Sequence[Json], ratio: Callable[[Json], float]) -> list[float]:
    """Of each repeat, the median over its rounds."""
    return [statistics.median(map(ratio, repeat["rounds"])) for repeat in repeats]


def _with_range(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short repeat of everything, under three minutes")
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured before")
    parser.add_argument("--only", nargs="+", choices=CASES, help="only these studies")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="only these tables")
    parser.add_argument("--rounds", type=int, help="rounds that count, instead of the profile's number")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="of torch; more than one gives noise where other programs use the machine [default: 1]",
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
