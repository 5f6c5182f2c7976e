"""Rows of a CSV or Parquet table as plain strings, with the row number that a spreadsheet shows."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from polyclinic.errors import DataError, did_you_mean
from polyclinic.files import whole_file


@dataclass(frozen=True, slots=True)
class Table:
    """A table in memory.

    ``rows`` holds ``(number, values)``; the header is row 1, so the first record is row 2, as in a spreadsheet.
    Values are stripped strings in the order of ``columns``; a missing value is an empty string.
    """

    path: Path
    columns: list[str]
    rows: list[tuple[int, list[str]]]

    def place(self, number: int) -> str:
        """How errors name a row: ``cases.csv row 17``."""
        return f"{self.path.name} row {number}"

    def column(self, name: str, purpose: str) -> int:
        """Position of a column.

        Raises:
            DataError: There is none of that name; the message has the nearest name and all names.
        """
        if name in self.columns:
            return self.columns.index(name)
        raise DataError(
            f"{self.path.name} has no column '{name}' ({purpose}).{did_you_mean(name, self.columns)} "
            f"Its columns are: {', '.join(self.columns)}."
        )

    def optional(self, name: str, usual: str, purpose: str) -> int | None:
        """Position of a column that may be absent, unless the study file asks for it under another than its usual
        name."""
        if name not in self.columns and name == usual:
            return None
        return self.column(name, purpose)


def load_table(path: Path) -> Table:
    """Read a CSV (UTF-8, comma; also ``.csv.gz``) or a Parquet file.

    Raises:
        DataError: The file is missing, empty, not UTF-8, has a column twice or a row of another length.
    """
    if not path.is_file():
        raise DataError(f"there is no table {path}. Check 'path' of the table and data.root (or POLYCLINIC_DATA).")
    if path.suffix == ".parquet":
        return _load_parquet(path)
    if path.name.endswith((".csv", ".csv.gz")):
        return _load_csv(path)
    raise DataError(f"{path.name} is neither .csv, .csv.gz nor .parquet. Save the table as one of these.")


def _load_csv(path: Path) -> Table:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as stream:
            return _table(path, csv.reader(stream, strict=True))
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is not UTF-8 (byte {error.start}). Save it as CSV UTF-8.") from error
    except (csv.Error, OSError, EOFError) as error:
        raise DataError(
            f"{path.name} cannot be read as CSV: {error}. Save it again as comma-separated UTF-8."
        ) from error


def _table(path: Path, records: Iterator[list[str]]) -> Table:
    columns = [name.strip() for name in next(records, [])]
    if not columns:
        raise DataError(f"{path.name} is empty. Its first row must name the columns.")
    if len(columns) == 1 and (";" in columns[0] or "\t" in columns[0]):
        raise DataError(f"{path.name} is separated by semicolons or tabs. Save it as comma-separated UTF-8.")
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise DataError(f"{path.name} has the column '{twice[0]}' twice. Rename or remove one of them.")
    rows = []
    for number, record in enumerate(records, start=2):
        if record and len(record) != len(columns):
            raise DataError(
                f"{path.name} row {number} has {len(record)} fields, the header has {len(columns)}. "
                "Quote fields that contain a comma."
            )
        if record:
            rows.append((number, [value.strip() for value in record]))
    return Table(path, columns, rows)


def _load_parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path.name} cannot be read as Parquet: {error}. Write the file again.") from error
    columns = [["" if v is None else str(v).strip() for v in column.to_pylist()] for column in table.columns]
    records = [list(row) for row in zip(*columns, strict=True)]
    return Table(path, list(table.column_names), list(enumerate(records, start=2)))


def save_table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a CSV or, by suffix, a Parquet file of strings; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        if path.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            values = {name: [row[i] for row in rows] for i, name in enumerate(columns)}
            schema = pyarrow.schema([(name, pyarrow.string()) for name in columns])
            pyarrow.parquet.write_table(pyarrow.table(values, schema=schema), file)
            return
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
        file.write(text.getvalue().encode())
