"""COVID-19-CT-Seg: 20 chest CT volumes with masks of left lung, right lung and infection (segmentation).

Source: https://zenodo.org/records/3757476. Licence: as stated on the record; check before use.
Citation: Ma et al., Medical Physics 48(3), 2021 (arXiv 2004.12537).

Layout (each archive unpacked into a folder of its name)::

    COVID-19-CT-Seg_20cases/coronacases_001.nii.gz ... radiopaedia_10_85902_1.nii.gz ...
    Infection_Mask/<same name>              0 background, 1 infection
    Lung_Mask/<same name>                   0 background, 1 left lung, 2 right lung
    Lung_and_Infection_Mask/<same name>     0 background, 1 left lung, 2 right lung, 3 infection

Site: the two sources, ``coronacases`` and ``radiopaedia``, 10 volumes each. Device: not published. Patient: each volume
is its own patient (the record does not say otherwise). Intensities: the Radiopaedia volumes are windowed to 8 bits, not
Hounsfield units; a study over both sites needs no fixed window. Split: none.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from polyclinic.data.importers.release import Release, write_sites
from polyclinic.data.manifest import Case
from polyclinic.errors import StudyError

MASKS = {
    "infection": ("Infection_Mask", ("background", "infection")),
    "lung": ("Lung_Mask", ("background", "left-lung", "right-lung")),
    "both": ("Lung_and_Infection_Mask", ("background", "left-lung", "right-lung", "infection")),
}
"""Folder and classes of each choice of masks."""

_LAYOUT = """COVID-19-CT-Seg_20cases/*.nii.gz with names that begin with coronacases_ or radiopaedia_, and
Infection_Mask/, Lung_Mask/ or Lung_and_Infection_Mask/ with the same names."""


def import_covid_ct_seg(folder: Path, out: Path, *, masks: str = "infection") -> list[Path]:
    """Write ``coronacases.csv`` and ``radiopaedia.csv``.

    Args:
        folder: Folder with the unpacked archives.
        out: Folder for the manifests, at or above ``folder``.
        masks: ``infection``, ``lung`` or ``both``; ``MASKS`` has the classes in the order of the mask's values.

    Raises:
        DataError: Files are missing.
        StudyError: Unknown ``masks``.
    """
    if masks not in MASKS:
        raise StudyError(f"masks: {masks!r} is unknown. Known: {', '.join(MASKS)}.")
    release = Release(folder, "COVID-19-CT-Seg", _LAYOUT)
    volumes = release.images((".nii.gz", ".nii"), "COVID-19-CT-Seg_20cases")
    found = release.images((".nii.gz", ".nii"), MASKS[masks][0])
    cases = []
    for stem, path in volumes.items():
        site = stem.partition("_")[0]
        if site not in ("coronacases", "radiopaedia"):
            raise release.error(f"{path} is of neither source")
        if stem not in found:
            raise release.error(f"{path} has no mask {MASKS[masks][0]}/{PurePosixPath(path).name}")
        cases.append(Case(image=path, patient=stem, site=site, mask=found[stem], source=release.source, where=path))
    return write_sites(cases, out)
