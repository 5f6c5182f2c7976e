"""NatIMG-FL (reconstruction) and its rivals on real X-rays: hospitals with different networks, and natural images.

``python benchmarks/natimg_fl.py`` trains every method at three hospitals with 50, 100 and 500 X-rays each and three
seeds, all with the same gradient steps on their own images, then ablations, other hospitals, several findings and
2000 images, and writes ``benchmarks/results/natimg_fl.md``; ``--plan`` says how long it takes. ``--quick`` does a small
part of it in a few minutes, ``--tables`` trains nothing. A stopped benchmark goes on after the last finished round. It
needs the images: ``../shared/data``, or the folder that ``POLYCLINIC_DATA`` names.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from cell_runs import Cell, attempted, command_line, expected_seconds, tell, train_all
from natimg_arms import planned
from natimg_cells import NETWORKS, SITES, STEPS, finished, kind_of, measure, prepare, pretrain
from natimg_tables import write_results
from tables import ROOT


def main() -> None:
    """Measure what is missing, the most important first, then write the tables."""
    options = command_line(__doc__.splitlines()[0] if __doc__ else "", "natimg-fl").parse_args()
    data = Path(os.environ.get("POLYCLINIC_DATA", ROOT / ".." / "shared" / "data")).resolve()
    work = options.runs / ("quick" if options.quick else "full")
    cells = planned(options.seeds or ([0] if options.quick else [0, 1, 2]), options.quick)
    cells = [c for c in cells if c.scenario in (options.scenario or [c.scenario])]
    cells = [c for c in cells if c.arm in (options.arm or [c.arm])]
    missing = [cell for cell in cells if finished(cell, work) is None]
    seconds = expected_seconds(cells, lambda cell: finished(cell, work), guess)
    tell(cells, missing, seconds, options.workers)
    if options.plan:
        return
    if not options.tables and missing:
        prepare(missing, work, data)
        write_starts(missing, work, data, options.workers)
        train_all(missing, seconds, partial(attempt, work=work, data=data), options.workers, options.minutes)
    write_results("natimg_fl-quick" if options.quick else "natimg_fl", cells, work, options.results, data)


STEP_SECONDS = {"small-cnn": 0.008, "small-resnet": 0.017, "shufflenet": 0.027, "mobilenet": 0.035}
"""Of a training step of 16 images at 64 pixels, with one thread."""
FACTORS = {"natimg-fl, learned": 4.6, "natimg-fl": 4.2, "A": 4.2, "feddf": 2.5, "fml": 1.7, "fedkd": 2.0}
FACTORS |= dict.fromkeys(("fedmd", "ds-fl", "fccl", "kt-pfl"), 1.8)


def guess(cell: Cell) -> float:
    """Processor seconds of a cell, before its like was measured."""
    kind, _, size = cell.scenario.partition("-")
    networks = list(SITES[kind].values())
    if cell.arm.startswith("pooled, "):
        networks = [cell.arm.removeprefix("pooled, ")] * len(networks)
    factor = next((f for name, f in FACTORS.items() if cell.arm.startswith(name)), 1.1)
    steps = cell.rounds * STEPS[int(size)] * (0.4 if kind == "small" else 1)
    return 2 + factor * steps * sum(STEP_SECONDS[name] for name in networks)


def write_starts(missing: Sequence[Cell], work: Path, data: Path, workers: int) -> None:
    """Pre-train the networks of all seeds that cells start from, in processes of one thread."""
    used = {name for cell in missing for name in SITES[kind_of(cell.scenario)].values()}
    jobs = [(name, seed) for seed in sorted({cell.seed for cell in missing}) for name in NETWORKS if name in used]
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(partial(pretrain, work=work, data=data), jobs))
    print(f"{len(jobs)} pre-trained networks", flush=True)


def attempt(cell: Cell, work: Path, data: Path, ends: float | None) -> str:
    """Train one cell; how long it took, or why it failed."""
    return attempted(cell.key, lambda: measure(cell, work, data), work / "failed", ends)


if __name__ == "__main__":
    main()
