"""The ledger of samples: ``samples.csv``, one line for every sample that left the exchange.

Refused candidates are not in it: their numbers and reasons are in ``synthesis.json``, their images nowhere.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from polyclinic.errors import RunError
from polyclinic.files import whole_file
from polyclinic.synthesis.pool import Samples


@dataclass(frozen=True)
class Entry:
    """One released sample.

    Attributes:
        id: As ``Samples.ids`` gives it.
        label: Name of the class.
        device: Name of the device.
        generator: What made it, for instance ``vae``.
        seed: What it was made from.
        sha256: Of its pixels, as ``Samples.pixel_digests`` gives it.
        gated_by: Sites that looked at it before it was released.
    """

    id: str
    label: str
    device: str
    generator: str
    seed: int
    sha256: str
    gated_by: tuple[str, ...]


_COLUMNS = ["id", "class", "device", "generator", "seed", "sha256", "gated_by"]


def entries(
    samples: Samples,
    classes: Sequence[str],
    devices: Sequence[str],
    generators: Sequence[str],
    gated_by: Sequence[Sequence[str]],
) -> list[Entry]:
    """Lines of the ledger for released samples, in their order.

    Args:
        samples: With images.
        classes: Names by label.
        devices: Names by place.
        generators: What made each sample, ``[m]``.
        gated_by: Which sites looked at each sample, ``[m]``.
    """
    return [
        Entry(name, classes[label], devices[device], maker, seed, digest, tuple(sorted(sites)))
        for name, label, device, maker, seed, digest, sites in zip(
            samples.ids(),
            samples.labels.tolist(),
            samples.devices.tolist(),
            generators,
            samples.seeds.tolist(),
            samples.pixel_digests(),
            gated_by,
            strict=True,
        )
    ]


def write_ledger(path: Path, lines: Sequence[Entry]) -> None:
    """Write the ledger as a whole or not at all.

    Raises:
        RunError: The file cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    # Names of sites hold letters, digits, '_', '.' and '-' alone, so '|' can join them.
    writer.writerows([*astuple(line)[:-1], "|".join(line.gated_by)] for line in lines)
    try:
        with whole_file(path) as file:
            file.write(text.getvalue().encode())
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from error


def read_ledger(path: Path) -> list[Entry]:
    """Read what ``write_ledger`` wrote.

    Raises:
        RunError: Names the file, the line and what is wrong with it.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RunError(f"{path}: cannot be read as a ledger of samples: {error}") from error
    if not rows or rows[0] != _COLUMNS:
        raise RunError(f"{path}: columns are {rows[0] if rows else []}, wanted {_COLUMNS}: is it a ledger of samples?")
    found = []
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(_COLUMNS) or not row[4].isdecimal():
            raise RunError(f"{path} line {number}: {row} is no line of a ledger of samples: the file is damaged.")
        name, label, device, maker, seed, digest, sites = row
        found.append(Entry(name, label, device, maker, int(seed), digest, tuple(filter(None, sites.split("|")))))
    return found


def verify(path: Path, samples: Samples, classes: Sequence[str], devices: Sequence[str]) -> None:
    """Check that a ledger lists just these samples, in their order, pixel by pixel.

    What made a sample and who looked at it cannot be seen in it; these two columns are taken as they are.

    Args:
        path: The ledger.
        samples: With images.
        classes: Names by label.
        devices: Names by place.

    Raises:
        RunError: Names the first line that differs, and how.
    """
    listed = read_ledger(path)
    if len(listed) != len(samples):
        raise RunError(f"{path}: lists {len(listed)} samples, {len(samples)} were released.")
    makers, sites = [line.generator for line in listed], [line.gated_by for line in listed]
    for number, (line, true) in enumerate(
        zip(listed, entries(samples, classes, devices, makers, sites), strict=True), start=2
    ):
        for name in (field.name for field in fields(Entry)):
            if getattr(line, name) != getattr(true, name):
                seen, wanted = getattr(line, name), getattr(true, name)
                raise RunError(
                    f"{path} line {number}: {name} is {seen!r}, the released sample has {wanted!r}. "
                    "The ledger or the samples were changed afterwards."
                )
