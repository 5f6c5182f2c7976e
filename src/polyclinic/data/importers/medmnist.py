"""MedMNIST v2: 18 sets of small 2D and 3D images with labels and an official split, one NPZ each.

Source: https://medmnist.com, https://zenodo.org/records/10519652. Licence: CC BY 4.0, DermaMNIST CC BY-NC 4.0.
Citation: Yang et al., Scientific Data 10:41 (2023), and the source of each set.

Layout: ``<name>.npz`` (28 pixels) or ``<name>_64.npz`` (64, 128, 224) with arrays ``train_images`` [N, H, W],
[N, H, W, 3] or [N, D, H, W], ``train_labels`` [N, 1] or [N, 14], and likewise ``val`` and ``test``.

Site: the name of the set for all images; use a partition. Device: not published. Patient: not published, so that each
image is its own patient: patients with several images may lie on both sides of the split (they do in some sets).
Label: the class's name (``CLASSES``); for ChestMNIST the findings joined by ``|``. Split: as published.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from polyclinic.data.importers.release import write_sites
from polyclinic.data.manifest import Case
from polyclinic.errors import DataError, did_you_mean

_ORGANS = ("bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right", "liver", "lung-left",
           "lung-right", "pancreas", "spleen")  # fmt: skip
CLASSES: dict[str, tuple[str, ...]] = {
    "pathmnist": ("adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle", "normal colon mucosa",
                  "cancer-associated stroma", "colorectal adenocarcinoma epithelium"),
    "chestmnist": ("atelectasis", "cardiomegaly", "effusion", "infiltration", "mass", "nodule", "pneumonia",
                   "pneumothorax", "consolidation", "edema", "emphysema", "fibrosis", "pleural", "hernia"),
    "dermamnist": ("actinic keratoses and intraepithelial carcinoma", "basal cell carcinoma",
                   "benign keratosis-like lesions", "dermatofibroma", "melanoma", "melanocytic nevi",
                   "vascular lesions"),
    "octmnist": ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal"),
    "pneumoniamnist": ("normal", "pneumonia"),
    "retinamnist": ("0", "1", "2", "3", "4"),
    "breastmnist": ("malignant", "normal, benign"),
    "bloodmnist": ("basophil", "eosinophil", "erythroblast",
                   "immature granulocytes(myelocytes, metamyelocytes and promyelocytes)", "lymphocyte", "monocyte",
                   "neutrophil", "platelet"),
    "tissuemnist": ("Collecting Duct, Connecting Tubule", "Distal Convoluted Tubule", "Glomerular endothelial cells",
                    "Interstitial endothelial cells", "Leukocytes", "Podocytes", "Proximal Tubule Segments",
                    "Thick Ascending Limb"),
    "organamnist": _ORGANS,
    "organcmnist": _ORGANS,
    "organsmnist": _ORGANS,
    "organmnist3d": ("liver", "kidney-right", "kidney-left", "femur-right", "femur-left", "bladder", "heart",
                     "lung-right", "lung-left", "spleen", "pancreas"),
    "nodulemnist3d": ("benign", "malignant"),
    "adrenalmnist3d": ("normal", "hyperplasia"),
    "fracturemnist3d": ("buckle rib fracture", "nondisplaced rib fracture", "displaced rib fracture"),
    "vesselmnist3d": ("vessel", "aneurysm"),
    "synapsemnist3d": ("inhibitory synapse", "excitatory synapse"),
}  # fmt: skip
"""Class names of each set, in the order of the numbers in its file."""

_SIZES = ("", "_64", "_128", "_224")


def import_medmnist(folder: Path, out: Path, *, which: str = "", download: bool = False) -> list[Path]:
    """Write ``<set>.csv``.

    Args:
        folder: One NPZ, or a folder with it.
        out: Folder for the manifest, at or above the NPZ.
        which: Which set, where ``folder`` has several: ``pneumoniamnist``, ``pneumoniamnist_64``.
        download: Fetch the set with the package medmnist if ``folder`` does not have it.

    Raises:
        DataError: The file is missing, cannot be fetched, or is not of the layout above.
    """
    path = folder if folder.suffix == ".npz" else _chosen(folder, which, download)
    flag = path.stem.partition("_")[0]
    if flag not in CLASSES:
        raise DataError(f"{path} is no set of MedMNIST.{did_you_mean(flag, CLASSES)} Known: {', '.join(CLASSES)}.")
    return write_sites(_cases(path, flag), out)


def _chosen(folder: Path, name: str, download: bool) -> Path:
    if name:
        flag, _, size = name.partition("_")
        if flag not in CLASSES or (f"_{size}" if size else "") not in _SIZES:
            raise DataError(
                f"MedMNIST has no set {name!r}.{did_you_mean(flag, CLASSES)} Known: {', '.join(CLASSES)}, each also "
                "with _64, and in 2D with _128 and _224."
            )
        path = folder / f"{name}.npz"
        if not path.exists() and download:
            _fetch(folder, flag, int(size or 28))
        if not path.exists():
            raise DataError(f"{folder} has no {name}.npz. Fetch it from https://medmnist.com, or set download.")
        return path
    found = sorted(p for p in folder.glob("*.npz") if p.stem.partition("_")[0] in CLASSES)
    if len(found) != 1:
        seen = ", ".join(p.name for p in found) or "none"
        raise DataError(f"{folder} should have one NPZ of MedMNIST; it has {seen}. Say which, e.g. pneumoniamnist.")
    return found[0]


def _fetch(folder: Path, flag: str, size: int) -> None:
    """Let the package medmnist fetch one set; whatever goes wrong there is told with the remedy."""
    try:
        import medmnist

        kind = getattr(medmnist, medmnist.INFO[flag]["python_class"])
        kind(split="train", root=str(folder), size=size, download=True)
    except Exception as error:
        raise DataError(
            f"the package medmnist could not fetch {flag} ({type(error).__name__}: {error}). Install it with "
            "'pip install polyclinic[medmnist]', or fetch the file from https://medmnist.com."
        ) from error


def _cases(path: Path, flag: str) -> Iterator[Case]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            labels = {split: arrays[f"{split}_labels"] for split in ("train", "val", "test")}
            missing = [f"{split}_images" for split in labels if f"{split}_images" not in arrays.files]
    except (OSError, KeyError, ValueError) as error:
        raise DataError(
            f"{path} is not of the layout of MedMNIST ({error}). It needs train_images, train_labels, val_images, "
            "val_labels, test_images, test_labels."
        ) from error
    if missing:
        raise DataError(f"{path} has no {', '.join(missing)}. Fetch it again from https://medmnist.com.")
    for split, rows in labels.items():
        for number, row in enumerate(rows):
            reference = f"{path.name}/{split}_images#{number}"
            yield Case(
                image=reference,
                patient=f"{flag}-{split}-{number}",
                site=flag,
                label=_label(row, flag, f"{path.name} {split}_labels row {number}"),
                split=split,
                source=str(path.absolute().parent),
                where=f"{path.name} {split} row {number}",
            )


def _label(row: np.ndarray[Any, Any], flag: str, where: str) -> str:
    names = CLASSES[flag]
    values = [int(value) for value in np.atleast_1d(row)]
    if flag == "chestmnist":
        if len(values) != len(names) or not set(values) <= {0, 1}:
            raise DataError(f"{where} is {values}; wanted {len(names)} numbers 0 or 1. Fetch the file again.")
        return "|".join(name for name, value in zip(names, values, strict=True) if value)
    if len(values) != 1 or not 0 <= values[0] < len(names):
        raise DataError(f"{where} is {values}; wanted one number from 0 to {len(names) - 1}. Fetch the file again.")
    return names[values[0]]
