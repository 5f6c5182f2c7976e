"""What merging data vectors costs: ours beside reading the files once, a plain torch script, and mergekit.

``python benchmarks/merge.py`` writes a base, 10 vectors and 10 whole models of 346 MB each (the tensors of a ViT-B/16,
random values) below ``runs/merge-benchmark``, merges them by four rules, three times, and removes them again. A stopped
run goes on where it was. mergekit is only run as a program, from an environment of its own:
``python -m venv V && V/bin/pip install torch==2.13.0 mergekit==0.1.5``, then ``--mergekit V/bin/mergekit-pytorch``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import median

from merge_peers import METHODS, mergekit_config
from tables import RESULTS, ROOT, Json, Results, Table

RULES = ("sum", "ties", "model-stock", "median")
TITLES = {"ours": "ours", "mergekit": "mergekit-pytorch", "plain": "plain torch script"}
QUICK = {"depth": 1}
"""What is smaller in the quick profile: the same tensors, but one block of them."""
READINGS = {"sum": 1.5, "ties": 6.0}
"""How many times the reading of all files a merge may take."""
CAUSES = {
    "sum": "a value from the page cache costs less of a core than its conversion to float64, its addition and its "
    "norm; fresh memory for tensors, and hashing and writing the result come on top",
    "ties": "each tensor of each site is gone through twice for its threshold, and then to elect and to average",
}
"""Why these are missed, where they were when this was written."""
INTRO = """One merge into one file: a base and a vector a site in float32, the tensors of a ViT-B/16, normal values,
half of each vector's energy shared by all sites. *Reading* is reading every file once, base and vectors, into one
buffer of 16 MiB that is used again and again; the page cache is warm, and readings and merges of one process alternate.
Every merge runs in a fresh process, and within a repeat all programs follow each other. Median of the repeats, with the
range. MB are 10^6 bytes."""


@dataclass(frozen=True)
class Case:
    """Files of one size.

    Attributes:
        scratch: They lie in a folder of their own below it.
        width: Of the transformer.
        depth: Its blocks.
        sites: Number of vectors.
    """

    scratch: Path
    width: int = 768
    depth: int = 12
    sites: int = 10

    @property
    def size(self) -> Json:
        """Without the place."""
        return {name: value for name, value in asdict(self).items() if name != "scratch"}

    @property
    def folder(self) -> Path:
        """Where the files lie."""
        return self.scratch / "-".join(f"{name}-{value}" for name, value in self.size.items())

    @property
    def base(self) -> Path:
        """The base's file."""
        return self.folder / "base.safetensors"

    def files(self, kind: str) -> list[Path]:
        """Those of the vectors, or of whole models."""
        return [self.folder / f"{kind}-{j}.safetensors" for j in range(self.sites)]

    @cached_property
    def made(self) -> Json:
        """Writes the files, where they are not all there; says how large they are."""
        note = self.folder / "made.json"
        if not note.is_file():
            print(f"writing the files to {self.folder}", flush=True)
            answer = probe("write", {"folder": str(self.folder), **self.size})
            note.write_text(json.dumps(answer), encoding="utf-8")
        answer = json.loads(note.read_text(encoding="utf-8"))
        return dict(answer)


def main() -> None:
    """Measure what is not measured yet, write the tables, remove the files."""
    options = _options()
    case = Case(options.scratch, **(QUICK if options.quick else {}))
    repeats = 1 if options.quick else options.repeats
    results = Results(f"merge{'-quick' if options.quick else ''}", options.results, fresh=options.fresh)
    program = options.mergekit
    versions = packages(program)
    found: dict[str, list[Json]] = {rule: [] for rule in options.only or RULES}
    for repeat in range(repeats):
        for rule, measured in found.items():
            settings = {"rule": rule, **case.size, "mergekit": versions.get("mergekit")}
            measured.append(results.cell(f"{rule}/{repeat}", settings, partial(measure, case, rule, program)))
    tables = [goals(found), ours(found), side_by_side(found), _packages(versions)]
    results.write("Merging data vectors", INTRO, tables, seeds=[0])
    if not options.keep and case.folder.is_dir():
        shutil.rmtree(case.folder)


def measure(case: Case, rule: str, program: Path | None) -> Json:
    """One rule by every program, one after the other."""
    size = case.made
    with tempfile.TemporaryDirectory(dir=case.folder) as made:
        out = Path(made) / "ours.safetensors"
        asked = {"folder": str(case.folder), "rule": rule, "sites": case.sites, "out": str(out)}
        seen = watched(probe_command("ours", {**asked, "started": time.perf_counter()}))
        one = json.loads(seen["said"])
        # The peak within its first merge: the process goes on after it.
        found = {"ours": {**one, "wall": one["start"] + one["merge"], "anonymous": seen["anonymous"], "apart": 0.0}}
        found["plain"] = _plain(case, rule, out)
        if program is not None and rule in METHODS:
            found["mergekit"] = _mergekit(case, rule, out, program)
    return {**size, "sites": case.sites, "programs": found}


def _plain(case: Case, rule: str, ours_at: Path) -> Json:
    out = ours_at.with_name("plain.safetensors")
    script = Path(__file__).with_name("merge_peers.py")
    command = [sys.executable, str(script), rule, str(case.base), str(out), *map(str, case.files("vector"))]
    warm([case.base, *case.files("vector")])
    started = time.perf_counter()
    seen = watched(command)
    ready = json.loads(seen.pop("said"))
    seen["cpu"] -= ready["cpu"]
    return {**seen, "start": ready["clock"] - started, **_finished(case, out, ours_at)}


def _mergekit(case: Case, rule: str, ours_at: Path, program: Path) -> Json:
    out = ours_at.with_name("mergekit")
    config = ours_at.with_name("mergekit.yaml")
    config.write_text(mergekit_config(rule, case.base, case.files("model")), encoding="utf-8")
    warm([case.base, *case.files("model")])
    start = watched([str(program), "--help"])
    seen = watched([str(program), str(config), str(out), "--quiet"])
    del seen["said"]
    seen["cpu"] -= start["cpu"]
    written = sorted(out.glob("*.safetensors"))
    if len(written) != 1:
        raise SystemExit(f"mergekit wrote {[path.name for path in written]}; one file was expected.")
    return {**seen, "start": start["wall"], **_finished(case, written[0], ours_at)}


def _finished(case: Case, out: Path, ours_at: Path) -> Json:
    """Brings a peer's file to the disk, as ours does by itself, compares it with ours, and removes it."""
    started = time.perf_counter()
    with out.open("rb") as file:
        os.fsync(file.fileno())
    closing = time.perf_counter() - started
    far = probe("apart", {"base": str(case.base), "one": str(ours_at), "other": str(out)})
    out.unlink()
    return {"closing": closing, **far}


def warm(paths: Sequence[Path]) -> None:
    """Read files, so that they are in the page cache."""
    buffer = bytearray(2**20)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def probe(name: str, asked: Json) -> Json:
    """What a probe of ``merge_probes.py`` says in a fresh process."""
    answer: Json = json.loads(watched(probe_command(name, asked))["said"])
    return answer


def probe_command(name: str, asked: Json) -> list[str]:
    """How it is started."""
    return [sys.executable, str(Path(__file__).with_name("merge_probes.py")), name, json.dumps(asked)]


def watched(command: Sequence[str]) -> Json:
    """Run a program to its end.

    Returns:
        Wall and processor seconds; ``peak``: most resident memory, MiB; ``anonymous``: most of it that was no page of
        a file, seen every 10 ms (NaN where the system does not tell); ``said``: its last line.
    """
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complaints:
        started = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=complaints)
        anonymous, stop = [math.nan], threading.Event()
        watcher = threading.Thread(target=_watch, args=(process.pid, anonymous, stop))
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        stop.set()
        watcher.join()
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        complaints.seek(0)
        if status:
            raise SystemExit(f"{' '.join(command)[:1000]} failed:\n{complaints.read()[-4000:]}")
        last = (said.read().splitlines() or [""])[-1]
    return {
        "wall": wall,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak": usage.ru_maxrss / 1024,
        "anonymous": anonymous[0],
        "said": last,
    }


def _watch(process: int, anonymous: list[float], stop: threading.Event) -> None:
    """Keep the most anonymous memory of a process, MiB, until told to stop."""
    status = Path(f"/proc/{process}/status")
    while not stop.wait(0.01):
        try:
            lines = status.read_text(encoding="utf-8").splitlines()
        except OSError:
            return
        now = next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), math.nan)
        anonymous[0] = now if math.isnan(anonymous[0]) else max(anonymous[0], now)


Found = Mapping[str, Sequence[Json]]
"""Per rule, one cell a repeat."""


def reading(one: Json) -> float:
    """Seconds to read all files once, beside our merge."""
    return float(median(one["programs"]["ours"]["reads"]))


def merging(one: Json, name: str = "ours") -> float:
    """Seconds of a program from the end of its start until its file is on the disk."""
    part = one["programs"][name]
    return float(part["wall"] - part["start"] + part["closing"])


def megabytes(one: Json, name: str = "ours", what: str = "peak") -> float:
    """Most memory of a program's process, 10^6 bytes."""
    return float(one["programs"][name][what] * 2**20 / 1e6)


def allowed(one: Json) -> float:
    """3 tensors a site and 300 MB, 10^6 bytes; a tensor is the largest of the network."""
    return float(3 * one["sites"] * one["largest_tensor"] / 1e6 + 300)


def goals(found: Found) -> Table:
    """What was wanted and what was reached."""
    rows = []
    for rule, cells in found.items():
        if rule in READINGS:
            ratios = [merging(one) / reading(one) for one in cells]
            met = round(median(ratios), 2) <= READINGS[rule]
            what = f"{rule}: merging beside reading the files once"
            verdict = ["yes", ""] if met else ["no", CAUSES[rule]]
            rows.append([what, f"at most {READINGS[rule]:g} x", f"{_with_range(ratios)} x", *verdict])
    for rule, cells in found.items():
        peaks = [megabytes(one) for one in cells]
        most = allowed(cells[0])
        what = f"{rule}: most memory of the process"
        verdict = ["yes" if max(peaks) <= most else "no", ""]
        rows.append([what, f"at most {most:.0f} MB", f"{_with_range(peaks, 0)} MB", *verdict])
    note = (
        "Merging is until the merged file is hashed, written and on the disk; the goals are for files of 346 MB. The "
        "memory that is allowed is that of three times the largest tensor for each site and 300 MB, Python, torch and "
        "the package among it."
    )
    return Table("Goals", ["Goal", "Wanted", "Reached", "Met", "Cause, where missed"], rows, note)


def ours(found: Found) -> Table:
    """Our merge and its parts."""
    rows = []
    for rule, cells in found.items():
        parts = [one["programs"]["ours"] for one in cells]
        reads = [reading(one) for one in cells]
        whole = [merging(one) for one in cells]
        hashed = [total + part["hashing"] for total, part in zip(whole, parts, strict=True)]
        nothing = [part["into_nothing"] for part in parts]
        columns = {name: median(part[name] for part in parts) for name in ("writing", "closing", "hashing")}
        rows.append(
            [
                rule,
                f"{_with_range(reads)} s",
                f"{_with_range(whole)} s",
                *(f"{columns[name]:.2f} s" for name in ("writing", "closing")),
                *(f"{median(_beside(values, reads)):.2f} x" for values in (whole, nothing)),
                f"{median(part['cold_read'] for part in parts):.2f} s",
                f"{median(part['cold_merge'] / part['cold_read'] for part in parts):.2f} x",
                f"{columns['hashing']:.2f} s",
                f"{median(_beside(hashed, reads)):.2f} x",
                *(f"{median(megabytes(one, what=what) for one in cells):.0f} MB" for what in ("held", "peak")),
                f"{allowed(cells[0]):.0f} MB",
            ]
        )
    one = next(iter(found.values()))[0]
    title = f"Ours: {one['sites']} vectors of {one['file'] / 1e6:.0f} MB, {one['values']:,} values each"
    columns_ = ["Rule", "Reading once", "Merge", "of it writing", "of it closing", "Merge beside reading"]
    columns_ += ["Without a file, beside reading", "Reading once, cold", "Without a file beside it, cold"]
    columns_ += ["Hashing first", "Hashing and merge, beside reading"]
    columns_ += ["Memory before", "Memory, peak", "Allowed"]
    note = (
        f"The largest tensor has {one['largest_tensor'] / 1e6:.1f} MB. *Writing*: seconds in which the merge waits for "
        "the output to be hashed (SHA-256) and handed to the system; the next layer is blended meanwhile. *Closing*: "
        "until it is on the disk (fsync). *Without a file*: the same merge whose tensors go nowhere. *Cold*: the files "
        "had to come from the disk. *Hashing first*: every vector's file, as `polyclinic vectors merge` does before it "
        "merges; one thread. *Before*: of the "
        "process when all is imported and the files are open."
    )
    return Table(title, columns_, rows, note)


def side_by_side(found: Found) -> Table:
    """All programs on the same numbers."""
    rows = []
    for rule, cells in found.items():
        for name, title in TITLES.items():
            if name not in cells[0]["programs"]:
                why = "not installed: see the top of merge.py" if rule in METHODS else "has no such method"
                rows.append([rule, title, why, *[""] * 8])
                continue
            parts = [one["programs"][name] for one in cells]
            times = [merging(one, name) for one in cells]
            rows.append(
                [
                    rule,
                    title,
                    f"{median(part['start'] for part in parts):.2f} s",
                    f"{_with_range(times)} s",
                    f"{median(part['closing'] for part in parts):.2f} s",
                    f"{median(_beside(times, [reading(one) for one in cells])):.2f} x",
                    f"{_with_range(_beside(times, [merging(one) for one in cells]))} x",
                    f"{median(part['cpu'] for part in parts):.1f} s",
                    *(
                        f"{median(megabytes(one, name, what) for one in cells):.0f} MB"
                        for what in ("peak", "anonymous")
                    ),
                    f"{max(part['apart'] for part in parts):.0e}",
                ]
            )
    columns = ["Rule", "Program", "Start", "Merge", "of it closing", "Beside reading", "Beside ours", "Processor"]
    columns += ["Memory, peak", "of it own", "Apart"]
    note = (
        "*Start*: until the program's imports are done (mergekit: all of `--help`); *Merge*: all the rest, until the "
        "file is on the disk: ours sees to that itself, for the others fsync is called after them. Ours hashes its "
        "output, the others do not; none hashes its input here. *Processor*: of all threads, from the end of the start "
        "to the end of the process. *Peak*: of the whole process; *own*: most of it that is no page of a file, as "
        "mapped files can be dropped from memory. *Apart*: Euclidean distance from our merged model beside what was "
        "added to the base. mergekit merges whole models (base + vector, rounded), so values at TIES' threshold can "
        "fall on the other side; a fifth of each tensor is kept everywhere. `torch.median` would give the lower of the "
        "two middle values, so the script sorts."
    )
    return Table("Side by side", columns, rows, note)


def packages(program: Path | None) -> Json:
    """Versions of what is compared; mergekit's are those of its own environment."""
    code = "import json; from importlib.metadata import version; print(json.dumps([version(n) for n in {names}]))"
    found: Json = {}
    for title, python, names in (
        ("", sys.executable, ["torch", "safetensors"]),
        ("mergekit: ", None if program is None else str(program.with_name("python")), ["mergekit", "torch"]),
    ):
        if python is not None:
            said = watched([python, "-c", code.format(names=names)])["said"]
            keys = [name if name == "mergekit" else f"{title}{name}" for name in names]
            found |= dict(zip(keys, json.loads(said), strict=True))
    return found


def _packages(versions: Json) -> Table:
    return Table("Packages", ["Package", "Version"], [[name, version] for name, version in versions.items()])


def _beside(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Ratios within each repeat."""
    return [one / other for one, other in zip(values, others, strict=True)]


def _with_range(values: Sequence[float], digits: int = 2) -> str:
    middle = f"{median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a tenth of the size, one repeat: under three minutes")
    size.add_argument("--full", action="store_true", help="what the results folder holds [default]; 8 GB of disk")
    parser.add_argument("--repeats", type=int, default=3, help="of the full profile [default: 3]")
    parser.add_argument("--only", nargs="+", choices=RULES, help="only these rules")
    program = shutil.which("mergekit-pytorch")
    parser.add_argument(
        "--mergekit",
        type=Path,
        default=None if program is None else Path(program),
        help="mergekit's program, in an environment of its own [default: the one on PATH]",
    )
    parser.add_argument("--keep", action="store_true", help="leave the written files where they are")
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured before")
    scratch = ROOT / "runs" / "merge-benchmark"
    parser.add_argument("--scratch", type=Path, default=scratch, help="folder for the files")
    parser.add_argument("--results", "--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    if options.mergekit is not None and not options.mergekit.is_file():
        parser.error(f"--mergekit: {options.mergekit} is no file")
    return options


if __name__ == "__main__":
    main()
