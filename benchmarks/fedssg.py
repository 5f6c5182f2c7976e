"""FedSSG (reconstruction) on real and made-up skin lesions: which generator helps, whom, and what the loss alone does.

``python benchmarks/fedssg.py`` trains every method on HAM10000 by its four real sources, on the same with three rare
diagnoses cut to a quarter, on a phantom with the class x centre table of Fed-ISIC2019, and without one source at a
time, early and converged, with three seeds, all with the same number of gradient steps, and writes
``benchmarks/results/fedssg.md``. ``--quick`` does a small part of it in a few minutes, ``--tables`` trains nothing. A
stopped benchmark goes on after the last finished round. It needs the images: ``../shared/data``, or the folder that
``POLYCLINIC_DATA`` names; the generator that is trained on public images takes those of ``--public``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
import traceback
import zipfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from synthesis_arms import planned
from synthesis_cells import Cell, finished, kind_of, measure, prepare
from synthesis_tables import write_results
from tables import RESULTS, ROOT


def main() -> None:
    """Measure what is missing, the most important first, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="six methods, one seed, a few rounds")
    parser.add_argument("--tables", action="store_true", help="train nothing, only write tables from what there is")
    parser.add_argument("--plan", action="store_true", help="print the cells and how long they will take")
    parser.add_argument("--scenario", action="append", help="skin, skin-cut, phantom, without; may be repeated")
    parser.add_argument("--arm", action="append", help="one method by its name in the tables; may be repeated")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of 0, 1 and 2")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--minutes", type=float, help="begin no cell after so many minutes")
    parser.add_argument("--public", type=Path, help="folder or zip of public images [default: flowers of the data]")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "fedssg", help="where cells go")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the tables go")
    options = parser.parse_args()
    data = Path(os.environ.get("POLYCLINIC_DATA", ROOT / ".." / "shared" / "data")).resolve()
    work = options.runs / ("quick" if options.quick else "full")
    seeds = options.seeds or ([0] if options.quick else [0, 1, 2])
    cells = planned(work / "public", seeds, options.quick)
    if options.scenario:
        cells = [c for c in cells if {c.scenario, c.scenario[: len("without")]} & set(options.scenario)]
    if options.arm:
        cells = [c for c in cells if c.arm in options.arm]
    missing = [cell for cell in cells if finished(cell, work) is None]
    tell(cells, missing, work, options.workers)
    if options.plan:
        return
    if not options.tables and missing:
        unpack(options.public or data / "tf_flowers96" / "dev.zip", work / "public")
        prepare(sorted({cell.scenario for cell in missing}), work, data)
        train_all(missing, work, data, options.workers, options.minutes)
    name = "fedssg-quick" if options.quick else "fedssg"
    write_results(name, cells, work, options.results, replicates=50 if options.quick else 300)


def tell(cells: list[Cell], missing: list[Cell], work: Path, workers: int) -> None:
    """Print how much there is to do, and how long it will take judged by what was measured."""
    seconds = expected(cells, work)
    rows: dict[str, list[float]] = defaultdict(list)
    for cell in missing:
        rows[f"{cell.scenario}, {cell.rounds} rounds"].append(seconds[cell])
    for title, values in rows.items():
        print(f"{title}: {len(values)} cells, about {sum(values) / workers / 60:.0f} min", flush=True)
    total = sum(sum(values) for values in rows.values()) / workers / 60
    print(f"{len(missing)} of {len(cells)} cells to go, about {total:.0f} min with {workers} processes", flush=True)


ROUND_SECONDS = {"skin": 0.95, "phantom": 0.42}
"""Of a pass of federated averaging over the training images, with one thread."""
FACTORS = {"amplitude mix": 1.25, "fedssg": 1.3, "VAE": 1.5, "fediic": 2.2, "creff": 1.4, "harmonise": 1.2}
VAE_SECONDS = {"skin": 60.0, "phantom": 18.0}
"""Of its training at the sites."""


def expected(cells: list[Cell], work: Path) -> dict[Cell, float]:
    """Processor seconds of every cell: as its like took before, else a guess."""
    known: dict[tuple[str, int, str], list[float]] = defaultdict(list)
    for cell in cells:
        about = finished(cell, work)
        if about is not None and not about["resumed"]:
            known[cell.scenario, cell.rounds, cell.arm].append(about["seconds"]["processor"])
    found = {}
    for cell in cells:
        measured = known.get((cell.scenario, cell.rounds, cell.arm))
        found[cell] = statistics.mean(measured) if measured else _guess(cell)
    return found


def _guess(cell: Cell) -> float:
    kind = kind_of(cell.scenario)
    factor = next((f for name, f in FACTORS.items() if cell.arm.startswith(name)), 1.0)
    own = VAE_SECONDS[kind] if "VAE" in cell.arm else 0.0
    return 1 + cell.rounds * ROUND_SECONDS[kind] * factor + (own / 4 if "server" in cell.arm else own)


def train_all(missing: list[Cell], work: Path, data: Path, workers: int, minutes: float | None) -> None:
    """Train cells in processes of one thread; one that fails is told of and left out of the tables."""
    os.environ["OMP_NUM_THREADS"] = "1"
    started, seconds = time.monotonic(), expected(missing, work)
    left = sum(seconds.values())
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        ends = None if minutes is None else time.time() + 60 * minutes
        futures = {pool.submit(attempt, cell, work, data, ends): cell for cell in missing}
        for number, future in enumerate(as_completed(futures), start=1):
            cell = futures[future]
            left -= seconds[cell]
            past = (time.monotonic() - started) / 60
            head = f"[{number}/{len(missing)}, {past:.0f} min, about {left / workers / 60:.0f} min to go]"
            print(f"{head} {cell.key}: {future.result()}", flush=True)


def attempt(cell: Cell, work: Path, data: Path, ends: float | None) -> str:
    """Train one cell; how long it took, or why it failed."""
    if ends is not None and time.time() > ends:
        return "left for later"
    try:
        return f"{measure(cell, work, data)['seconds']['wall']:.0f} s"
    except Exception as error:  # whatever it is, the other cells go on; the traceback is kept
        (work / "failed").mkdir(parents=True, exist_ok=True)
        path = work / "failed" / f"{cell.key.replace('/', '.')}.txt"
        path.write_text(traceback.format_exc(), encoding="utf-8")
        return f"FAILED: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def unpack(source: Path, folder: Path) -> None:
    """Public images as files in a folder; a zip is unpacked once, a folder is linked to."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        folder.symlink_to(source.resolve(), target_is_directory=True)
        return
    temporary = folder.with_name(f"{folder.name}.part")
    with zipfile.ZipFile(source) as packed:
        packed.extractall(temporary)
    temporary.rename(folder)


if __name__ == "__main__":
    main()
