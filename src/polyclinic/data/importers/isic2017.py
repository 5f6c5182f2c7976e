"""ISIC 2017: dermatoscopic images with lesion masks (segmentation) and three diagnoses (multi-class).

Source: https://challenge.isic-archive.com/data/#2017. Licence: CC0 1.0. Citation: Codella et al., arXiv 1710.05006.

Layout, for each of ``Training`` (2,000 images), ``Validation`` (150) and ``Test_v2`` (600) that is there::

    ISIC-2017_Training_Data/ISIC_0000000.jpg
    ISIC-2017_Training_Part1_GroundTruth/ISIC_0000000_segmentation.png   0 skin, 255 lesion
    ISIC-2017_Training_Part3_GroundTruth.csv   (image_id, melanoma, seborrheic_keratosis; optional)

Site: ``isic2017`` for all; the clinics are not named, use a partition. Device: not published. Patient: the image
itself, because neither patients nor lesions are published: photographs of one lesion may lie on both sides of a split.
Split: train, val and test as published.
"""

from __future__ import annotations

from pathlib import Path

from polyclinic.data.importers.release import Release, is_one, records, write_sites
from polyclinic.data.manifest import Case
from polyclinic.errors import DataError

CLASSES = ("nevus", "melanoma", "seborrheic_keratosis")
"""The diagnoses; an image that is neither of the last two is a nevus."""

_PARTS = {"Training": "train", "Validation": "val", "Test_v2": "test"}
_LAYOUT = """ISIC-2017_Training_Data/*.jpg, ISIC-2017_Training_Part1_GroundTruth/*_segmentation.png and (optional)
ISIC-2017_Training_Part3_GroundTruth.csv; likewise Validation and Test_v2."""


def import_isic2017(folder: Path, out: Path) -> list[Path]:
    """Write ``isic2017.csv``, with mask and, where the table is there, label.

    Args:
        folder: Folder or zip with the files above.
        out: Folder for the manifest, at or above ``folder``.

    Raises:
        DataError: Files are missing.
    """
    release = Release(folder, "ISIC 2017", _LAYOUT)
    parts = [part for part in _PARTS if any(f"ISIC-2017_{part}_Data/" in path for path in release.files)]
    if not parts:
        raise release.error(f"{folder} has no ISIC-2017_Training_Data")
    return write_sites((case for part in parts for case in _part(release, part)), out)


def _part(release: Release, part: str) -> list[Case]:
    images = release.images((".jpg", ".jpeg"), f"ISIC-2017_{part}_Data")
    masks = release.images(("_segmentation.png",), f"ISIC-2017_{part}_Part1_GroundTruth")
    labels = _labels(release, f"ISIC-2017_{part}_Part3_GroundTruth.csv")
    cases = []
    for stem, path in images.items():
        if stem not in masks:
            raise release.error(f"{path} has no mask {stem}_segmentation.png")
        if labels and stem not in labels:
            raise release.error(f"{path} is not in ISIC-2017_{part}_Part3_GroundTruth.csv")
        cases.append(
            Case(
                image=path,
                patient=stem,
                site="isic2017",
                label=labels.get(stem, ""),
                mask=masks[stem],
                split=_PARTS[part],
                source=release.source,
                where=path,
            )
        )
    return cases


def _labels(release: Release, name: str) -> dict[str, str]:
    if not release.has(name):
        return {}
    labels = {}
    for where, row in records(release.table(name), "image_id", *CLASSES[1:]):
        positive = [disease for disease in CLASSES[1:] if is_one(row[disease], f"{where}, {disease}")]
        if len(positive) > 1:
            raise DataError(f"{where}: both {' and '.join(positive)} are 1. Fetch the table again.")
        labels[row["image_id"]] = positive[0] if positive else CLASSES[0]
    return labels
