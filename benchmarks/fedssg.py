"""FedSSG (reconstruction) on real and made-up skin lesions: which generator helps, whom, and what the loss alone does.

``python benchmarks/fedssg.py`` trains every method on HAM10000 by its four real sources, on the same with three rare
diagnoses cut to a quarter, on a phantom with the class x centre table of Fed-ISIC2019, and without one source at a
time, early and converged, with three seeds, all with the same number of gradient steps, and writes
``benchmarks/results/fedssg.md``. ``--quick`` does a small part of it in a few minutes, ``--tables`` trains nothing. A
stopped benchmark goes on after the last finished round. It needs the images: ``../shared/data``, or the folder that
``POLYCLINIC_DATA`` names; the generator that is trained on public images takes those of ``--public``.
"""

from __future__ import annotations

import os
import zipfile
from functools import partial
from pathlib import Path

from cell_runs import Cell, attempted, command_line, expected_seconds, tell, train_all
from synthesis_arms import planned
from synthesis_cells import finished, kind_of, measure, prepare
from synthesis_tables import write_results
from tables import ROOT


def main() -> None:
    """Measure what is missing, the most important first, then write the tables."""
    parser = command_line(__doc__.splitlines()[0] if __doc__ else "", "fedssg")
    parser.add_argument("--public", type=Path, help="folder or zip of public images [default: flowers of the data]")
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
    seconds = expected(cells, work)
    tell(cells, missing, seconds, options.workers)
    if options.plan:
        return
    if not options.tables and missing:
        unpack(options.public or data / "tf_flowers96" / "dev.zip", work / "public")
        prepare(sorted({cell.scenario for cell in missing}), work, data)
        train_all(missing, seconds, partial(attempt, work=work, data=data), options.workers, options.minutes)
    name = "fedssg-quick" if options.quick else "fedssg"
    write_results(name, cells, work, options.results, replicates=50 if options.quick else 300)


ROUND_SECONDS = {"skin": 0.95, "phantom": 0.42}
"""Of a pass of federated averaging over the training images, with one thread."""
FACTORS = {"amplitude mix": 1.25, "fedssg": 1.3, "VAE": 1.5, "fediic": 2.2, "creff": 1.4, "harmonise": 1.2}
VAE_SECONDS = {"skin": 60.0, "phantom": 18.0}
"""Of its training at the sites."""


def expected(cells: list[Cell], work: Path) -> dict[Cell, float]:
    """Processor seconds of every cell: as its like took before, else a guess."""
    return expected_seconds(cells, lambda cell: finished(cell, work), _guess)


def _guess(cell: Cell) -> float:
    kind = kind_of(cell.scenario)
    factor = next((f for name, f in FACTORS.items() if cell.arm.startswith(name)), 1.0)
    own = VAE_SECONDS[kind] if "VAE" in cell.arm else 0.0
    return 1 + cell.rounds * ROUND_SECONDS[kind] * factor + (own / 4 if "server" in cell.arm else own)


def attempt(cell: Cell, work: Path, data: Path, ends: float | None) -> str:
    """Train one cell; how long it took, or why it failed."""
    return attempted(cell.key, lambda: measure(cell, work, data), work / "failed", ends)


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
