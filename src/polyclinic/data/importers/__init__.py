"""Manifests for public data sets, in the layout in which they are published. Images stay where they are.

Each module documents one set: source, licence, citation, expected files, and what site, device and patient are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from polyclinic.errors import DataError, StudyError, nearest

IMPORTERS: dict[str, str] = {
    "chestxray14": "polyclinic.data.importers.chestxray14:import_chestxray14",
    "covid-ct-seg": "polyclinic.data.importers.covid_ct_seg:import_covid_ct_seg",
    "fed-isic2019": "polyclinic.data.importers.fed_isic2019:import_fed_isic2019",
    "isic2017": "polyclinic.data.importers.isic2017:import_isic2017",
    "medmnist": "polyclinic.data.importers.medmnist:import_medmnist",
    "pad-ufes-20": "polyclinic.data.importers.pad_ufes_20:import_pad_ufes_20",
    "rad-chestct": "polyclinic.data.importers.rad_chestct:import_rad_chestct",
}
"""``module:function`` of each importer."""


def find_importer(name: str) -> Callable[..., list[Path]]:
    """The importer's function.

    Raises:
        StudyError: There is none of that name.
    """
    if name not in IMPORTERS:
        raise StudyError(f"there is no importer {name!r}. {nearest(name, IMPORTERS)}")
    module, _, function = IMPORTERS[name].partition(":")
    importer: Callable[..., list[Path]] = getattr(import_module(module), function)
    return importer


def importer_options(name: str) -> list[str]:
    """Names of the options that an importer takes, beside the folder and the place for the manifests."""
    return list(inspect.signature(find_importer(name)).parameters)[2:]


def run_importer(name: str, folder: Path, out: Path, **options: Any) -> list[Path]:
    """Write the manifests of one public data set.

    Args:
        name: A key of ``IMPORTERS``.
        folder: The data set as published: a folder, or a zip where the importer says so.
        out: Folder for the manifests; it must be ``folder`` or lie above it, because paths in a manifest are
            relative to it.
        options: As the importer documents.

    Returns:
        The manifests.

    Raises:
        StudyError: No such importer or option.
        DataError: Files are missing or do not fit together; the message tells the expected layout.
    """
    importer, known = find_importer(name), importer_options(name)
    for option in options:
        if option not in known:
            raise StudyError(f"importer {name!r} has no option {option!r}. It has: {', '.join(known) or 'none'}.")
    if not folder.exists():
        raise DataError(f"{folder} does not exist. Give the folder that holds the files of {name}.")
    return importer(folder, out, **options)
