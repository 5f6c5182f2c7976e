"""What a sum costs that shows nobody a single site's update: ours beside the plain sum and what other systems do.

``python benchmarks/secure_sum.py`` measures a vector of 11 million values at 4 and 10 sites, three times, each option
in a fresh process and all of them in turn, and writes ``benchmarks/results/secure_sum.md``. A stopped run goes on where
it was. Packages that only a peer needs are no dependencies of the project; without them its row says what to install.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

from tables import RESULTS, ROOT, Json, Results, Table

VECTOR = 11_000_000
QUICK_VECTOR = 100_000
SITES = (4, 10)
REPEATS = 3
INTRO = """One weighted sum of float32 updates over sites: normal, standard deviation 0.02, tensors as of a ResNet-18.
Processor seconds of all threads, one thread where it can be chosen; median of the repeats, with the range. Each option
runs in a fresh process, and within a repeat the options follow each other, so that ratios compare neighbours in time.
Goals are aims for this comparison, not promises."""


@dataclass(frozen=True)
class Option:
    """One way to sum."""

    title: str
    needs: tuple[str, ...] = ()
    """Packages, as ``name==version``."""

    def missing(self) -> list[str]:
        """What is not installed."""
        return [need for need in self.needs if installed(need) is None]


SEAL, TENSEAL = "seal-python==4.4.0", "tenseal==0.3.18"
OPTIONS = {
    "plain": Option("plain sum"),
    "masked-32": Option("masked, 32-bit lanes"),
    "masked-16": Option("masked, 16-bit lanes"),
    "ring-he-seal": Option("ring-he, seal", (SEAL,)),
    "ring-he-tenseal": Option("ring-he, tenseal", (TENSEAL,)),
    "flower": Option("Flower SecAgg+", ("flwr==1.42.0",)),
    "nvflare": Option("NVFlare's HE settings", (TENSEAL,)),
    "pppml-hmi": Option("PPPML-HMI reference settings", (TENSEAL,)),
}
OPENING = ("open", "ring-open", "ring-open, bytes")
"""Phases in which a site opens the sum: each site of a peer in CKKS, one site of the ring."""
HANDING_ON = ("ring-pass", "ring-pass, bytes")
"""Phases of the ring on the critical path: each site waits for the one before it."""
Measured = Mapping[str, list[Json]]
"""Per option, what the probe said in each repeat; nothing where its package is missing."""


def main() -> None:
    """Measure what is not measured yet and write the tables."""
    options = _options()
    vector, repeats = (QUICK_VECTOR, 1) if options.quick else (VECTOR, REPEATS)
    results = Results(f"secure_sum{'-quick' if options.quick else ''}", options.results, fresh=options.fresh)
    asked = {name: OPTIONS[name] for name in options.only or OPTIONS}
    found: dict[int, Measured] = {}
    for sites in SITES[:1] if options.quick else SITES:
        measured: dict[str, list[Json]] = {name: [] for name in asked}
        for repeat in range(repeats):
            for name in (name for name, option in asked.items() if not option.missing()):
                settings = {"option": name, "sites": sites, "parameters": vector}
                known = {**settings, **{need: installed(need) for need in asked[name].needs}}
                one = results.cell(f"{sites}/{name}/{repeat}", known, partial(child, settings))
                measured[name].append(one)
        found[sites] = measured
    tables = [table for sites, part in found.items() for table in (costs(sites, part), _phases(sites, part))]
    if not options.quick:
        tables.insert(0, goals(found))  # they are for the long vector
    results.write("Secure sums", INTRO, [*tables, _versions(asked)], seeds=[0])


def at_site(one: Json) -> float:
    """Processor seconds of one site until all that it sends has been sent."""
    return sum(spent[0] for name, spent in one["seconds"]["site"].items() if name not in OPENING)


def at_server(one: Json) -> float:
    """Processor seconds of the server, or of whoever adds and opens in its place."""
    return sum(spent[0] for spent in one["seconds"]["server"].values())


def opening(one: Json) -> float:
    """Processor seconds in which a site opens the sum."""
    return sum(spent[0] for name, spent in one["seconds"]["site"].items() if name in OPENING)


def handing_on(one: Json) -> float:
    """Processor seconds of one site while the others wait for it."""
    return sum(spent[0] for name, spent in one["seconds"]["site"].items() if name in HANDING_ON)


def preparing(one: Json) -> float:
    """Processor seconds of one site while nobody waits for it."""
    return at_site(one) - handing_on(one)


def size(one: Json) -> float:
    """Bytes that a site sends, as a multiple of the float32 vector."""
    return float(one["up"] / one["float32"])


def largest(one: Json) -> float:
    """Megabytes of the largest message of a site."""
    return float(one["largest"] / 1e6)


def held(one: Json) -> float:
    """Most memory that one site's work took, as a multiple of the float32 vector."""
    return max(one["memory"].values(), default=math.nan) * 2**20 / float(one["float32"])


@dataclass(frozen=True)
class Goal:
    """One aim of the comparison: a number of ours that is small, or a peer's that is large beside ours."""

    text: str
    wanted: float
    unit: str
    what: Callable[[Json], float]
    option: str
    beside: str = ""
    """The option of ours that a peer is a multiple of."""
    sites: tuple[int, ...] = SITES
    cause: str = ""
    """Why it was missed, where it was when this was written."""

    def values(self, found: Measured) -> list[float]:
        """One per repeat; none where an option was not measured."""
        own = [self.what(one) for one in found.get(self.option, [])]
        if not self.beside:
            return own
        return [a / self.what(b) for a, b in zip(own, found.get(self.beside, []), strict=False)]

    def met(self, reached: float) -> bool:
        """Whether this, as it is shown, is on the right side."""
        return round(reached, 2) >= self.wanted if self.beside else round(reached, 2) <= self.wanted


SIGNED = "beside masking, the received model and the masked vector are hashed for signatures, and bytes are written"
MASKS = f"one mask of ours takes a quarter of one of SecAgg+ on this machine; and {SIGNED}"
ALL_READ = "all masked vectors are read from bytes, hashed to check their signatures, and the mean is made in float64"
TOKEN = "the token is read from bytes, hashed to check a signature, added to, hashed to be signed, and written"
PACKED = (
    "the more sites, the more masks in ours; and CKKS takes two thirds of the time here that it took where the goal "
    "was set"
)
FRAME = "weights, padding to whole blocks and the blob's header"
GOALS = [
    Goal("masked: processor time of a site", 0.2, "s", at_site, "masked-32", cause=SIGNED),
    Goal("masked: processor time of the server", 0.2, "s", at_server, "masked-32", sites=(10,), cause=ALL_READ),
    Goal("masked, 32-bit lanes: bytes sent, beside float32", 1, "x", size, "masked-32"),
    Goal("masked, 16-bit lanes: bytes sent, beside float32", 0.5, "x", size, "masked-16"),
    Goal("masked: memory of a site, beside the float32 vector", 4, "x", held, "masked-32"),
    Goal("SecAgg+ beside masked: processor time of a site", 8, "x", at_site, "flower", "masked-32", cause=MASKS),
    Goal("SecAgg+ beside masked: bytes sent", 2, "x", size, "flower", "masked-32"),
    Goal("NVFlare beside masked: processor time of a site", 40, "x", at_site, "nvflare", "masked-32", cause=SIGNED),
    Goal("NVFlare beside masked: bytes sent", 14, "x", size, "nvflare", "masked-32"),
    Goal("ring-he: preparation of a site", 1.2, "s", preparing, "ring-he-seal"),
    Goal("ring-he: a site's time on the critical path", 0.15, "s", handing_on, "ring-he-seal", cause=TOKEN),
    Goal("ring-he: the largest message", 88, "MB", largest, "ring-he-seal", cause=FRAME),
    Goal(
        "PPPML-HMI beside ring-he: processor time of a site",
        30,
        "x",
        at_site,
        "pppml-hmi",
        "ring-he-seal",
        cause=PACKED,
    ),
]


def goals(found: Mapping[int, Measured]) -> Table:
    """Each goal at each number of sites: what was wanted and what was reached."""
    rows = []
    for goal in GOALS:
        for sites in (sites for sites in found if sites in goal.sites):
            wanted = f"at {'least' if goal.beside else 'most'} {goal.wanted:g} {goal.unit}"
            values = goal.values(found[sites])
            met = bool(values) and goal.met(median(values))
            verdict = ["yes", ""] if met else ["no", goal.cause]
            reached = [f"{_with_range(values)} {goal.unit}", *verdict] if values else ["not measured", "", ""]
            rows.append([goal.text, str(sites), wanted, *reached])
    note = (
        "A site's time is until all that it sends has been sent; that NVFlare's sites then open the sum is not in it. "
        "A peer's figure is a multiple of ours in the same repeat."
    )
    return Table("Goals", ["Goal", "Sites", "Wanted", "Reached", "Met", "Cause, where missed"], rows, note)


def costs(sites: int, found: Measured) -> Table:
    """All options side by side."""
    rows = []
    for name, repeats in found.items():
        option = OPTIONS[name]
        if not repeats:
            rows.append([option.title, f"not installed (pip install {' '.join(option.needs)})", *[""] * 9])
            continue
        times = [[one_of(one) for one in repeats] for one_of in (_wall, opening, at_server)]
        beside = Goal("", 0, "x", at_site, name, "masked-32").values(found)
        rows.append(
            [
                option.title,
                f"{_with_range([at_site(one) for one in repeats], 3)} s",
                *(f"{median(values):.3f} s" for values in times),
                f"{4 * size(repeats[0]):.3f}",
                f"{size(repeats[0]):.2f} x",
                f"{_with_range(beside)} x" if beside else "-",
                f"{median(map(held, repeats)):.1f} x",
                f"{median(one['peak'] * 2**20 / one['float32'] for one in repeats):.1f} x",
                f"{max(one['error'] for one in repeats):.0e}",
            ]
        )
    note = (
        "*Site*: processor time of one site until all is sent, and the same by the clock; *opening* at a site that "
        "opens the sum, one in the ring and all in CKKS. *Server*: receiving, adding and opening for all sites, "
        "whoever does it. The options in CKKS are measured with one site and one addition and count them as often as "
        "a round has them. *Beside masked*: a site's processor time as a multiple of that with 32-bit masks in the "
        "same repeat. *Memory*: most that one site's work took at once, its update included, and most that one "
        "process took that played the server and one site after another, beside the float32 vector. *Error*: largest "
        "distance from the mean in float64."
    )
    columns = ["Option", "Site", "Site, wall", "Site, opening", "Server", "Bytes a value", "Beside float32"]
    columns += ["Beside masked", "Memory, site", "Memory, process", "Error"]
    values = next((one["float32"] // 4 for repeats in found.values() for one in repeats), 0)
    return Table(f"One sum over {sites} sites of {values:,} values", columns, rows, note)


def _phases(sites: int, found: Measured) -> Table:
    def spent(repeats: list[Json], party: str, phase: str) -> list[str]:
        return [f"{median(one['seconds'][party][phase][i] for one in repeats):.3f} s" for i in (0, 1)]

    rows = [
        [OPTIONS[name].title, party, phase, *spent(repeats, party, phase)]
        for name, repeats in found.items()
        if repeats
        for party in ("site", "server")
        for phase, seconds in repeats[0]["seconds"][party].items()
        if max(seconds) > 0.0005
    ]
    pace = [one["yardstick"] for repeats in found.values() for one in repeats]
    note = (
        ""
        if not pace
        else f"Those above half a millisecond. A fixed piece of work took {min(pace):.3f} to {max(pace):.3f} s."
    )
    return Table(f"Phases, {sites} sites", ["Option", "Party", "Phase", "Processor", "Wall"], rows, note)


def _versions(asked: Mapping[str, Option]) -> Table:
    needs = dict.fromkeys(["numpy", "cryptography", *(need for option in asked.values() for need in option.needs)])
    return Table("Packages", ["Package", "Version"], [[n.partition("==")[0], installed(n) or "-"] for n in needs])


def installed(need: str) -> str | None:
    """Version of an installed package, given as ``name`` or ``name==version``."""
    try:
        return version(need.partition("==")[0])
    except PackageNotFoundError:
        return None


def child(settings: Json) -> Json:
    """What the probe says in a fresh process."""
    script = Path(__file__).with_name("secure_sum_probes.py")
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), json.dumps(settings)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    answer: Json = json.loads(done.stdout.splitlines()[-1])
    return answer


def _wall(one: Json) -> float:
    return sum(spent[1] for name, spent in one["seconds"]["site"].items() if name not in OPENING)


def _with_range(values: list[float], digits: int = 2) -> str:
    middle = f"{median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a short vector, 4 sites, one repeat: under a minute")
    size.add_argument("--full", action="store_true", help="what the results folder holds [default]")
    parser.add_argument("--only", nargs="+", choices=OPTIONS, help="only these options")
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured before")
    parser.add_argument("--results", "--out", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
