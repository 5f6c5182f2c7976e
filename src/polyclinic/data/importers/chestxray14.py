"""ChestX-ray14: 112,120 frontal radiographs of 30,805 patients, 14 findings (multi-label).

Source: https://nihcc.app.box.com/v/ChestXray-NIHCC. Licence: no restriction on use; link the source, cite the paper,
name the NIH Clinical Center as provider. Citation: Wang et al., ChestX-ray8, CVPR 2017, pp. 3462-3471.

Layout::

    Data_Entry_2017_v2020.csv       (or Data_Entry_2017.csv)
    images_001/images/00000001_000.png ... images_012/images/*.png   (any folders)
    train_val_list.txt, test_list.txt                               (official split; both or neither)

Site: ``nih`` for all, one hospital; use a partition. Device: not published. Patient: column ``Patient ID``. Label:
findings joined by ``|``, in the words of the table; ``No Finding`` becomes an empty label. Split: images of
``test_list.txt`` are ``test``, the patients of the others are divided into ``train`` and ``val``; without the lists it
is empty, and the study divides.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from polyclinic.data.importers.release import Release, records, write_sites
from polyclinic.data.manifest import Case
from polyclinic.errors import DataError

CLASSES = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)  # fmt: skip
"""The 14 findings, as the table spells them."""

_LAYOUT = """Data_Entry_2017_v2020.csv, images_001/images/*.png to images_012/images/*.png, and (optional, both)
train_val_list.txt and test_list.txt."""


def import_chestxray14(folder: Path, out: Path, *, val_fraction: float = 0.1, partial: bool = False) -> list[Path]:
    """Write ``nih.csv``.

    Args:
        folder: Folder or zip with the files above.
        out: Folder for the manifest, at or above ``folder``.
        val_fraction: Share of the patients of ``train_val_list.txt`` that become ``val``, by a hash of their id.
        partial: Accept that some images of the table are missing, and leave out their rows.

    Raises:
        DataError: Files are missing, or a finding is unknown.
    """
    release = Release(folder, "ChestX-ray14", _LAYOUT)
    table = release.table("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
    images = release.images((".png",))
    test = _split_lists(release)
    cases = []
    for where, row in records(table, "Image Index", "Finding Labels", "Patient ID"):
        name = row["Image Index"]
        path = images.get(name.removesuffix(".png"))
        if path is None and partial:
            continue
        if path is None:
            raise release.error(f"{where}: {name} is missing (fetch all archives, or set partial)")
        patient = row["Patient ID"]
        split = "" if test is None else _split(name, patient, test, val_fraction)
        label = _label(row["Finding Labels"], where)
        cases.append(
            Case(image=path, patient=patient, site="nih", label=label, split=split, source=release.source, where=where)
        )
    return write_sites(cases, out)


def _label(text: str, where: str) -> str:
    names = [name for name in text.split("|") if name != "No Finding"]
    for name in names:
        if name not in CLASSES:
            raise DataError(f"{where}: unknown finding {name!r}. Known: {', '.join(CLASSES)}, No Finding.")
    return "|".join(names)


def _split_lists(release: Release) -> frozenset[str] | None:
    given = [name for name in ("train_val_list.txt", "test_list.txt") if release.has(name)]
    if not given:
        return None
    if len(given) == 1:
        raise release.error(f"of the two split lists only {given[0]} is there")
    test = frozenset(release.lines("test_list.txt"))
    both = test & frozenset(release.lines("train_val_list.txt"))
    if both:
        raise DataError(f"{len(both)} images are in both split lists (first: {min(both)}). Fetch the lists again.")
    return test


def _split(name: str, patient: str, test: frozenset[str], val_fraction: float) -> str:
    if name in test:
        return "test"
    share = int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "little") / 2**64
    return "val" if share < val_fraction else "train"
