"""A published data set on disk: which files it has, its tables, and the manifests made from it."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from polyclinic.data.manifest import Case, write_manifest
from polyclinic.data.tables import Table, load_table
from polyclinic.errors import DataError


class Release:
    """The files of one data set, in a folder or in one zip.

    Args:
        place: Folder or zip.
        name: Name of the data set, for errors.
        layout: The files that are expected, for errors.

    Raises:
        DataError: ``place`` is neither a folder nor a readable zip.
    """

    def __init__(self, place: Path, name: str, layout: str) -> None:
        self._place, self._name, self._layout = place, name, " ".join(layout.split())
        self.source = str(place.absolute())
        if place.is_dir():
            self.files = frozenset(_below(place))
        elif place.suffix.lower() == ".zip" and zipfile.is_zipfile(place):
            with zipfile.ZipFile(place) as packed:
                self.files = frozenset(name for name in packed.namelist() if not name.endswith("/"))
        else:
            raise self.error(f"{place} is neither a folder nor a zip")

    def error(self, fault: str) -> DataError:
        """An error that tells the fault and the expected layout."""
        return DataError(f"{fault}. {self._name} is expected as: {self._layout}")

    def find(self, *names: str) -> str:
        """Path of the one file that is called one of ``names``, in whatever folder; earlier names win.

        Raises:
            DataError: There is none, or several of one name.
        """
        for name in names:
            found = sorted(path for path in self.files if path == name or path.endswith(f"/{name}"))
            if len(found) > 1:
                raise self.error(f"{self._place} has {name} {len(found)} times: {', '.join(found[:3])}")
            if found:
                return found[0]
        raise self.error(f"{self._place} has no {' or '.join(names)}")

    def has(self, name: str) -> bool:
        """Whether a file of this name is there, in whatever folder."""
        return any(path == name or path.endswith(f"/{name}") for path in self.files)

    def images(self, suffixes: tuple[str, ...], folder: str = "") -> dict[str, str]:
        """Path of every image by its name without suffix.

        Args:
            suffixes: Wanted endings, lower case.
            folder: Only those with a folder of this name on their path.

        Raises:
            DataError: There is none, or two have the same name.
        """
        found: dict[str, str] = {}
        for path in sorted(self.files):
            parts = PurePosixPath(path).parts
            ending = next((suffix for suffix in suffixes if path.lower().endswith(suffix)), None)
            if ending is None or (folder and folder not in parts[:-1]) or parts[-1].startswith("."):
                continue
            stem = parts[-1][: -len(ending)]
            if stem in found:
                raise self.error(f"two images are called {stem}: {found[stem]} and {path}")
            found[stem] = path
        if not found:
            where = f"{self._place}/{folder}" if folder else str(self._place)
            raise self.error(f"{where} has no {' or '.join(suffixes)} files")
        return found

    def table(self, *names: str) -> Table:
        """Read the CSV that is called one of ``names``.

        Raises:
            DataError: It is missing or damaged.
        """
        path = self.find(*names)
        if self._place.is_dir():
            return load_table(self._place / path)
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(self._place) as packed:
            copy = Path(folder) / PurePosixPath(path).name
            copy.write_bytes(packed.read(path))
            return load_table(copy)

    def lines(self, name: str) -> list[str]:
        """Non-empty lines of a text file.

        Raises:
            DataError: It is missing.
        """
        path = self.find(name)
        if self._place.is_dir():
            data = (self._place / path).read_bytes()
        else:
            with zipfile.ZipFile(self._place) as packed:
                data = packed.read(path)
        return [line.strip() for line in data.decode("utf-8").splitlines() if line.strip()]


def records(table: Table, *columns: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Every row as its place (for errors) and its values by column.

    Raises:
        DataError: One of ``columns`` is missing.
    """
    for name in columns:
        table.column(name, "needed by the importer")
    for number, values in table.rows:
        yield table.place(number), dict(zip(table.columns, values, strict=True))


def hot(row: dict[str, str], columns: Iterable[str], where: str) -> str:
    """Name of the one column that is 1.

    Raises:
        DataError: None or several are.
    """
    names = [name for name in columns if is_one(row[name], f"{where}, {name}")]
    if len(names) != 1:
        raise DataError(f"{where}: exactly one class should be 1, but {', '.join(names) or 'none'} is. Fetch it again.")
    return names[0]


def is_one(value: str, where: str) -> bool:
    """Whether a 0-or-1 field is 1, however it is written (1, 1.0).

    Raises:
        DataError: It is neither.
    """
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if number not in (0.0, 1.0):
        raise DataError(f"{where} is {value!r}; it should be 0 or 1. Fetch the table again.")
    return number == 1.0


def write_sites(cases: Iterable[Case], out: Path) -> list[Path]:
    """Write one manifest per site, ``<out>/<site>.csv``, in the order of their names.

    Raises:
        DataError: An image does not lie below ``out``.
    """
    sites: dict[str, list[Case]] = {}
    for case in cases:
        sites.setdefault(case.site, []).append(case)
    paths = []
    for site in sorted(sites):
        path = out / f"{site}.csv"
        write_manifest(sites[site], path)
        paths.append(path)
    return paths


def _below(folder: Path) -> Iterator[str]:
    for place, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        for name in names:
            yield (Path(place) / name).relative_to(folder).as_posix()
