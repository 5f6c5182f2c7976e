"""Fed-ISIC2019: 23,247 dermatoscopic images of six centres, 8 diagnoses (multi-class), as FLamby divides them.

Source: ISIC 2019 training images, https://challenge.isic-archive.com/data/#2019, and FLamby's table,
https://github.com/owkin/FLamby (flamby/datasets/fed_isic2019/dataset_creation_scripts). Licence: CC BY-NC 4.0.
Citation: du Terrail et al., FLamby, NeurIPS 2022; Tschandl et al. 2018; Codella et al. 2018; Combalia et al. 2019.

Layout::

    train_test_split.csv    (FLamby's file train_test_split, renamed; also .csv.gz)
    HAM10000_metadata.csv   (optional, also .csv.gz: lesion of the images of centres 1, 2, 3 and 5)
    ISIC_2019_Training_Metadata.csv   (optional: lesion_id of more images)
    ISIC_2019_Training_Input/ISIC_0000000.jpg   (any folder; or FLamby's ISIC_2019_Training_Input_preprocessed)

Site: the centre, by the names of ``SITES``. Device: the same (a centre is one camera series). Patient: the lesion where
a table has it, otherwise the image itself, because patients are not published. Split: FLamby's fold by option; its
folds divide some lesions (696 of 7,470 of HAM10000), so that the default leaves the split to the study.
"""

from __future__ import annotations

from pathlib import Path

from polyclinic.data.importers.release import Release, hot, records, write_sites
from polyclinic.data.manifest import Case
from polyclinic.errors import DataError

CLASSES = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC")
"""The diagnoses in the order of FLamby's ``target``."""
SITES = ("bcn", "vidir_molemax", "vidir_modern", "rosendahl", "msk", "vienna_dias")
"""Name of centre 0 to 5."""

_LAYOUT = """train_test_split.csv with columns image, MEL, NV, BCC, AK, BKL, DF, VASC, SCC, target, center, fold;
ISIC_2019_Training_Input/*.jpg; optional HAM10000_metadata.csv and ISIC_2019_Training_Metadata.csv."""


def import_fed_isic2019(folder: Path, out: Path, *, folds: bool = False, partial: bool = False) -> list[Path]:
    """Write one manifest per centre.

    Args:
        folder: Folder or zip with the files above.
        out: Folder for the manifests, at or above ``folder``.
        folds: Take FLamby's ``train`` and ``test``. A lesion on both sides is then refused by the study.
        partial: Accept that some images of the table are missing, and leave out their rows.

    Raises:
        DataError: Files are missing, or target and one-hot columns disagree.
    """
    release = Release(folder, "Fed-ISIC2019", _LAYOUT)
    table = release.table("train_test_split.csv", "train_test_split.csv.gz")
    images = release.images((".jpg", ".jpeg", ".png"))
    lesions = _lesions(release)
    cases = []
    for where, row in records(table, "image", *CLASSES, "target", "center", "fold"):
        name = row["image"]
        if name not in images and partial:
            continue
        if name not in images:
            raise release.error(f"{where}: {name}.jpg is missing (fetch all images, or set partial)")
        label = hot(row, CLASSES, where)
        if row["target"] != str(CLASSES.index(label)):
            raise DataError(f"{where}: target is {row['target']}, but column {label} is 1. Fetch the table again.")
        site = _site(row["center"], where)
        cases.append(
            Case(
                image=images[name],
                patient=lesions.get(name, name),
                site=site,
                device=site,
                label=label,
                split=row["fold"] if folds else "",
                source=release.source,
                where=where,
            )
        )
    return write_sites(cases, out)


def _site(center: str, where: str) -> str:
    if not center.isdecimal() or int(center) >= len(SITES):
        raise DataError(f"{where}: center is {center!r}; it should be 0 to {len(SITES) - 1}. Fetch the table again.")
    return SITES[int(center)]


def _lesions(release: Release) -> dict[str, str]:
    """Lesion by image, from the tables that are there."""
    lesions: dict[str, str] = {}
    for names, column in (
        (("ISIC_2019_Training_Metadata.csv",), "image"),
        (("HAM10000_metadata.csv", "HAM10000_metadata.csv.gz"), "image_id"),
    ):
        if any(release.has(name) for name in names):
            for _, row in records(release.table(*names), column, "lesion_id"):
                if row["lesion_id"]:
                    lesions[row[column]] = row["lesion_id"]
    return lesions
