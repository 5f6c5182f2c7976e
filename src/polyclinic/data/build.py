"""A manifest from a folder of images and a table of labels: ``polyclinic data build``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from polyclinic.data.manifest import Case, write_manifest
from polyclinic.data.names import check_reference, check_site_name
from polyclinic.data.readers import NIFTI, PILLOW
from polyclinic.data.sources import Place, read_bytes
from polyclinic.data.tables import Table, load_table
from polyclinic.errors import DataError

FIELDS = ("label", "mask", "patient", "site", "device", "split")
IGNORED = (".csv", ".gz", ".parquet", ".txt", ".md", ".json", ".yaml", ".yml", ".pdf", ".xlsx", ".zip")


@dataclass(frozen=True, slots=True)
class Built:
    """What was found.

    Args:
        cases: Rows of the manifest.
        ignored: Files that are no images, relative to the folder.
        masks: Number of images that other rows name as their mask.
    """

    cases: list[Case]
    ignored: list[str]
    masks: int


def build_manifest(folder: Path, labels: Path | None, out: Path, *, site: str = "") -> Built:
    """Walk a folder, group DICOM files into series, join a table of labels and write the manifest.

    A DICOM series of several files becomes one row, its folder; it must have the folder to itself. Single DICOM
    files, NIfTI, PNG, JPEG, TIFF and BMP files are a row each, an NPZ a row for every row of its image arrays
    (``images``, ``*_images``). Rows of the table are matched by path or, where that is unambiguous, by file name with
    or without its suffix. Patient and device come from the table, else from the DICOM header (PatientID;
    Manufacturer and ManufacturerModelName).

    Args:
        folder: Holds the images; hidden files are left out.
        labels: CSV or Parquet with a column ``image`` (or ``file``) and any of label, mask, patient, site, device,
            split.
        out: The manifest, in ``folder`` or above it.
        site: Owner of all images, where the table has no site column.

    Raises:
        DataError: Images without a row or rows without an image (counts and first name), no patient or site, or a
            series that shares its folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder. Give the folder that holds the images.")
    skip = {path.absolute() for path in (labels, out) if path is not None}
    cases, ignored = _found(folder.absolute(), skip)
    if not cases:
        raise DataError(f"{folder} holds no DICOM, NIfTI, PNG, JPEG, TIFF or NPZ files. Give the folder of the images.")
    masks = 0
    if labels is not None:
        before = len(cases)
        cases = _joined(cases, load_table(labels))
        masks = before - len(cases)
    cases = [case if case.site else replace(case, site=site) for case in cases]
    _check_complete(cases, folder)
    write_manifest(cases, out)
    return Built(cases, ignored, masks)


def find_images(folder: Path) -> list[str]:
    """References of all images below a folder, a DICOM series of several files counting as one.

    Raises:
        DataError: A series shares its folder.
    """
    return [case.image for case in _found(folder.absolute(), set())[0]]


def _found(folder: Path, skip: set[Path]) -> tuple[list[Case], list[str]]:
    """One case an image or series, sorted by path, and the files that are neither."""
    cases: list[Case] = []
    ignored: list[str] = []
    series: dict[str, list[tuple[str, Case]]] = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if not path.is_file() or path in skip or any(part.startswith(".") for part in parts):
            continue
        name = "/".join(parts)
        case = Case(image=name, patient="", site="", source=str(folder), where=name)
        lower = name.lower()
        if lower.endswith(PILLOW + NIFTI):
            cases.append(case)
        elif lower.endswith(".npz"):
            cases += _npz_cases(path, case)
        elif path.name.upper() == "DICOMDIR" or lower.endswith(IGNORED) or not _is_dicom(path):
            ignored.append(name)
        else:
            uid, case = _dicom_case(path, case)
            series.setdefault(uid, []).append((str(PurePosixPath(name).parent), case))
    cases += [_series_case(uid, members, series) for uid, members in series.items()]
    return sorted(cases, key=lambda case: case.image), ignored


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _npz_cases(path: Path, case: Case) -> list[Case]:
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            keys = [key for key in arrays.files if key == "images" or key.endswith("_images")]
            counts = {key: len(arrays[key]) for key in keys}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{case.image} cannot be read as an NPZ of numbers: {error}.") from error
    return [replace(case, image=f"{case.image}/{key}#{row}") for key in keys for row in range(counts[key])]


def _dicom_case(path: Path, case: Case) -> tuple[str, Case]:
    from polyclinic.data.dicom import read_header

    place = Place(path)
    header = read_header(place, read_bytes(place))
    device = " ".join(str(header.get(key, "") or "").strip() for key in ("Manufacturer", "ManufacturerModelName"))
    patient = str(header.get("PatientID", "") or "").strip()
    uid = str(header.get("SeriesInstanceUID", "") or case.image)
    return uid, replace(case, patient=patient, device=device.strip())


def _series_case(uid: str, members: list[tuple[str, Case]], series: dict[str, list[tuple[str, Case]]]) -> Case:
    if len(members) == 1:
        return members[0][1]
    folders = sorted({folder for folder, _ in members})
    first = members[0][1]
    if len(folders) > 1:
        raise DataError(
            f"DICOM series {uid} lies in {len(folders)} folders: {', '.join(folders[:3])}. Put each series in one."
        )
    guests = [case for other, cases in series.items() if other != uid for at, case in cases if at == folders[0]]
    if guests or folders[0] == ".":
        other = f"with {guests[0].image} of another series" if guests else "in the top folder"
        raise DataError(
            f"DICOM series {uid} ({len(members)} files, first {first.image}) lies {other}. Give it a folder of its own."
        )
    patients = sorted({case.patient for _, case in members})
    if len(patients) > 1:
        raise DataError(f"DICOM series {uid} in {folders[0]} has {len(patients)} patients: {', '.join(patients[:3])}.")
    return replace(first, image=folders[0], where=folders[0])


def _keys(reference: str) -> list[str]:
    """Names that a table may use for an image: path, file name, both without suffix."""
    path = PurePosixPath(reference)
    stem = path.name.removesuffix(".gz")
    stem = stem.rpartition(".")[0] or stem
    return list(dict.fromkeys([reference, str(path.parent / stem).removeprefix("./"), path.name, stem]))


def _joined(cases: Sequence[Case], table: Table) -> list[Case]:
    named = table.column("file" if "image" not in table.columns and "file" in table.columns else "image", "the image")
    at = {name: table.columns.index(name) for name in FIELDS if name in table.columns}
    by_key: dict[str, list[int]] = {}
    for index, case in enumerate(cases):
        for key in _keys(case.image):
            by_key.setdefault(key, []).append(index)
    rows: dict[int, tuple[int, list[str]]] = {}
    absent = []
    for number, values in table.rows:
        wanted = values[named].removeprefix("./")
        matches = next((by_key[key] for key in _keys(wanted) if key in by_key), [])
        if len(matches) > 1:
            raise DataError(
                f"{table.place(number)}: {wanted!r} could be {cases[matches[0]].image} or {cases[matches[1]].image}. "
                "Write the path relative to the folder."
            )
        if not matches:
            absent.append((number, wanted))
        elif matches[0] in rows:
            raise DataError(f"{table.place(number)}: {wanted!r} is the image of row {rows[matches[0]][0]} already.")
        else:
            rows[matches[0]] = (number, values)
    masks = {mask for _, values in rows.values() if "mask" in at and (mask := values[at["mask"]].removeprefix("./"))}
    unnamed = [case.image for i, case in enumerate(cases) if i not in rows and case.image not in masks]
    if absent or unnamed:
        raise DataError(_mismatch(table, absent, unnamed))
    return [_filled(cases[i], table, rows[i], at) for i in sorted(rows)]


def _mismatch(table: Table, absent: Sequence[tuple[int, str]], unnamed: Sequence[str]) -> str:
    parts = []
    if absent:
        number, name = absent[0]
        parts.append(f"{len(absent)} of its {len(table.rows)} rows name no image (first: row {number}, {name!r})")
    if unnamed:
        parts.append(f"{len(unnamed)} images have no row (first: {unnamed[0]!r})")
    return (
        f"{table.path.name} does not match the folder: {'; '.join(parts)}. Complete the table, or move what does not "
        "belong there away."
    )


def _filled(case: Case, table: Table, row: tuple[int, list[str]], at: dict[str, int]) -> Case:
    found = {name: row[1][column] for name, column in at.items() if row[1][column]}
    if "mask" in found:
        found["mask"] = found["mask"].removeprefix("./")
        check_reference(found["mask"], table.place(row[0]))
    return replace(case, **found, where=table.place(row[0]))


def _check_complete(cases: Sequence[Case], folder: Path) -> None:
    for case in cases:
        if case.site:
            check_site_name(case.site, case.where)
    for name, remedy in (
        ("patient", "Add a 'patient' column to the labels table (for images that are each another patient, repeat the "
         "image name there)."),
        ("site", "Give the site's name, or add a 'site' column to the labels table."),
    ):  # fmt: skip
        empty = [case for case in cases if not getattr(case, name)]
        if empty:
            raise DataError(
                f"{folder.name}: {len(empty)} of {len(cases)} images have no {name} (first: {empty[0].where}). {remedy}"
            )
