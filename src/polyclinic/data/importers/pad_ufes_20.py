"""PAD-UFES-20: 2,298 smartphone photographs of skin lesions of 1,373 patients, 6 diagnoses (multi-class).

Source: https://data.mendeley.com/datasets/zr7vgbcyr2/1 (doi 10.17632/zr7vgbcyr2.1). Licence: CC BY 4.0.
Citation: Pacheco et al., Data in Brief 32:106221 (2020).

Layout::

    metadata.csv                               (patient_id, lesion_id, img_id, diagnostic, ...)
    imgs_part_1/*.png, imgs_part_2/*.png, imgs_part_3/*.png   (any folders, e.g. images/imgs_part_1/imgs_part_1)

Site: ``ufes`` for all, one programme; use a partition. Device: not published (various smartphones). Patient: column
``patient_id``. Label: ACK, BCC, MEL, NEV, SCC, SEK. Split: none.
"""

from __future__ import annotations

from pathlib import Path

from polyclinic.data.importers.release import Release, records, write_sites
from polyclinic.data.manifest import Case
from polyclinic.errors import DataError

CLASSES = ("ACK", "BCC", "MEL", "NEV", "SCC", "SEK")
"""Actinic keratosis, basal cell carcinoma, melanoma, nevus, squamous cell carcinoma, seborrheic keratosis."""

_LAYOUT = "metadata.csv and imgs_part_1/*.png, imgs_part_2/*.png, imgs_part_3/*.png."


def import_pad_ufes_20(folder: Path, out: Path, *, partial: bool = False) -> list[Path]:
    """Write ``ufes.csv``.

    Args:
        folder: Folder or zip with the files above.
        out: Folder for the manifest, at or above ``folder``.
        partial: Accept that some images of the table are missing, and leave out their rows.

    Raises:
        DataError: Files are missing, or a diagnosis is unknown.
    """
    release = Release(folder, "PAD-UFES-20", _LAYOUT)
    table = release.table("metadata.csv")
    images = release.images((".png",))
    cases = []
    for where, row in records(table, "patient_id", "lesion_id", "img_id", "diagnostic"):
        path = images.get(row["img_id"].removesuffix(".png"))
        if path is None and partial:
            continue
        if path is None:
            raise release.error(f"{where}: {row['img_id']} is missing (fetch all parts, or set partial)")
        label = row["diagnostic"]
        if label not in CLASSES:
            raise DataError(f"{where}: unknown diagnosis {label!r}. Known: {', '.join(CLASSES)}.")
        patient = row["patient_id"]
        cases.append(Case(image=path, patient=patient, site="ufes", label=label, source=release.source, where=where))
    return write_sites(cases, out)
