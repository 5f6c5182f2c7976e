"""Phantoms as files: what ``polyclinic data phantom --out`` writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from polyclinic.data.manifest import Case, write_manifest
from polyclinic.data.phantoms.cases import phantom_cases
from polyclinic.data.phantoms.chest_ct import EXTENT_MM, FIELD_MM
from polyclinic.data.phantoms.pictures import phantom_picture
from polyclinic.errors import DataError
from polyclinic.study import PhantomSettings, TaskSettings


def write_phantoms(settings: PhantomSettings, task: TaskSettings, folder: Path, size: Sequence[int]) -> Path:
    """Write all images and masks of a phantom, and one table per site.

    X-rays and skin become PNG, CT becomes NIfTI in Hounsfield units. Masks are written whatever the task is.

    Args:
        settings: The made-up hospitals.
        task: Decides labels, as in ``phantom_cases``.
        folder: Receives ``<site>/manifest.csv``, ``<site>/images/`` and ``<site>/masks/``; made where it is missing.
        size: Height, width or depth, height, width.

    Returns:
        ``folder``.

    Raises:
        DataError: A site's folder is there already and not empty.
        StudyError: As ``phantom_cases`` and ``phantom_picture``.
    """
    cases = phantom_cases(settings, task)
    suffix = ".nii.gz" if settings.kind.startswith("chest-ct") else ".png"
    for site in settings.sites:
        place = folder / site.name
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise DataError(f"{place} is there already. Remove it, or give another --out.")
        (place / "images").mkdir(parents=True)
        (place / "masks").mkdir()
        written = []
        for case in (case for case in cases if case.site == site.name):
            name = case.image.split("/")[1] + suffix
            pixels, mask = phantom_picture(settings, case, size)
            save = _save_nifti if suffix == ".nii.gz" else _save_png
            save(place / "images" / name, pixels)
            save(place / "masks" / name, mask[None])
            written.append(_on_disk(case, place, name))
        write_manifest(written, place / "manifest.csv")
    return folder


def _on_disk(case: Case, place: Path, name: str) -> Case:
    return replace(case, image=f"images/{name}", mask=f"masks/{name}", source=str(place.resolve()))


def _save_png(path: Path, pixels: np.ndarray[Any, Any]) -> None:
    """Write (C, H, W) of 0..255, or a mask of 0 and 1."""
    from PIL import Image

    Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(path)


def _save_nifti(path: Path, pixels: np.ndarray[Any, Any]) -> None:
    """Write (1, H, W) or (1, D, H, W) with NIfTI's axis order (x, y[, z]), its axes to the left, back and head."""
    import nibabel

    volume = pixels[0].T
    millimetres = [FIELD_MM / min(volume.shape[:2])] * 2
    depth = EXTENT_MM / volume.shape[2] if volume.ndim == 3 else 1.0
    affine = np.diag([-millimetres[0], -millimetres[1], depth, 1.0])
    data = volume.astype(np.int16) if volume.dtype != np.uint8 else volume
    nibabel.save(nibabel.Nifti1Image(data, affine), path)
