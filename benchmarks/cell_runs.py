"""Cells of a benchmark that trains: each in a folder of its own, resumable, many of them in processes of one thread."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tables import RESULTS, ROOT

from polyclinic.data.dataset import SiteData
from polyclinic.errors import PolyclinicError
from polyclinic.results import RunFolder
from polyclinic.runner import Run, Silent
from polyclinic.study import Study

Json = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """What is trained once."""

    scenario: str
    rounds: int
    arm: str
    changes: tuple[tuple[str, str], ...]
    """What the arm sets: places in the notation of ``--set``, and values as JSON."""
    seed: int

    @property
    def key(self) -> str:
        """Names its folder below the work folder."""
        slug = "".join(c if c.isalnum() else "-" for c in self.arm.lower()).strip("-")
        while "--" in slug:
            slug = slug.replace("--", "-")
        return f"{self.scenario}/{self.rounds}/{slug}-seed{self.seed}"


def cells_of(scenario: str, rounds: int, arms: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]) -> list[Cell]:
    """A cell for every seed and arm, seed by seed; an arm is its name and what it sets."""
    made = {name: tuple((key, json.dumps(value)) for key, value in changes.items()) for name, changes in arms.items()}
    return [Cell(scenario, rounds, name, changes, seed) for seed in seeds for name, changes in made.items()]


def command_line(description: str, name: str) -> argparse.ArgumentParser:
    """What every benchmark of cells can be told; its cells lie below ``runs/<name>``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a few methods, one seed, a few rounds")
    parser.add_argument("--tables", action="store_true", help="train nothing, only write tables from what there is")
    parser.add_argument("--plan", action="store_true", help="print the cells and how long they will take")
    parser.add_argument("--scenario", action="append", help="one by its name in the tables; may be repeated")
    parser.add_argument("--arm", action="append", help="one method by its name in the tables; may be repeated")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of 0, 1 and 2")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--minutes", type=float, help="begin no cell after so many minutes")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / name, help="where cells go")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the tables go")
    return parser


def train_cell(study: Study, path: Path, sites: Callable[[], Mapping[str, SiteData]]) -> Json:
    """Train and test a study in a folder; seconds of wall and processor, and whether it was resumed.

    The report that a run usually writes is left out: it takes longer than a round. A stopped cell goes on after its
    last finished round.
    """
    folder = RunFolder(path)
    begun = folder.checkpoint.is_file() and same(folder, study)
    if not begun:
        shutil.rmtree(path, ignore_errors=True)
        folder.create(study)
    data = sites()
    wall, processor = time.perf_counter(), time.process_time()
    run = Run(study, data, folder, Silent())
    run.train()
    run.test()
    seconds = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
    return {"seconds": seconds, "resumed": begun}


def close_cell(path: Path, about: Json) -> Json:
    """Drop what a resumed run would have needed and mark the cell as finished."""
    shutil.rmtree(path / "state", ignore_errors=True)
    RunFolder(path).write("cell.json", json.dumps(about, indent=1))
    return about


def finished_cell(path: Path, recipe: Json) -> Json | None:
    """What ``cell.json`` holds, or None where the cell was not measured, or with other settings."""
    if not (path / "cell.json").is_file():
        return None
    about: Json = json.loads((path / "cell.json").read_text(encoding="utf-8"))
    return about if about["recipe"] == json.loads(json.dumps(recipe)) else None


def same(folder: RunFolder, study: Study) -> bool:
    """Whether a folder holds a begun run of this study."""
    try:
        folder.open(study)
    except PolyclinicError:
        return False
    return True


def expected_seconds(
    cells: Sequence[Cell], finished: Callable[[Cell], Json | None], guess: Callable[[Cell], float]
) -> dict[Cell, float]:
    """Processor seconds of every cell: as its like took before, else a guess."""
    known: dict[tuple[str, int, str], list[float]] = defaultdict(list)
    for cell in cells:
        about = finished(cell)
        if about is not None and not about["resumed"]:
            known[cell.scenario, cell.rounds, cell.arm].append(about["seconds"]["processor"])
    found = {}
    for cell in cells:
        measured = known.get((cell.scenario, cell.rounds, cell.arm))
        found[cell] = statistics.mean(measured) if measured else guess(cell)
    return found


def tell(cells: Sequence[Cell], missing: Sequence[Cell], seconds: Mapping[Cell, float], workers: int) -> None:
    """Print how much there is to do, and how long it will take."""
    rows: dict[str, list[float]] = defaultdict(list)
    for cell in missing:
        rows[f"{cell.scenario}, {cell.rounds} rounds"].append(seconds[cell])
    for title, values in rows.items():
        print(f"{title}: {len(values)} cells, about {sum(values) / workers / 60:.0f} min", flush=True)
    total = sum(sum(values) for values in rows.values()) / workers / 60
    print(f"{len(missing)} of {len(cells)} cells to go, about {total:.0f} min with {workers} processes", flush=True)


def train_all(
    missing: Sequence[Cell],
    seconds: Mapping[Cell, float],
    attempt: Callable[..., str],
    workers: int,
    minutes: float | None,
) -> None:
    """Train cells in processes of one thread, in their order; one that fails is told of and left out of the tables.

    Args:
        missing: What to train.
        seconds: What each is expected to take.
        attempt: ``attempt(cell, ends=time)`` trains a cell and says how it went; can be pickled.
        workers: Processes.
        minutes: Begin no cell after so many.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    started, left = time.monotonic(), sum(seconds[cell] for cell in missing)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        ends = None if minutes is None else time.time() + 60 * minutes
        futures = {pool.submit(attempt, cell, ends=ends): cell for cell in missing}
        for number, future in enumerate(as_completed(futures), start=1):
            cell = futures[future]
            left -= seconds[cell]
            past = (time.monotonic() - started) / 60
            head = f"[{number}/{len(missing)}, {past:.0f} min, about {left / workers / 60:.0f} min to go]"
            print(f"{head} {cell.key}: {future.result()}", flush=True)


def attempted(key: str, measure: Callable[[], Json], failed: Path, ends: float | None) -> str:
    """Train one cell; how long it took, or why it failed, with its traceback below ``failed``."""
    if ends is not None and time.time() > ends:
        return "left for later"
    try:
        return f"{measure()['seconds']['wall']:.0f} s"
    except Exception as error:  # whatever it is, the other cells go on; the traceback is kept
        failed.mkdir(parents=True, exist_ok=True)
        (failed / f"{key.replace('/', '.')}.txt").write_text(traceback.format_exc(), encoding="utf-8")
        return f"FAILED: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
