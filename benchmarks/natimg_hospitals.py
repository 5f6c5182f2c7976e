"""Who owns which X-ray in the natural-image benchmark: tables of hospitals drawn from real images, always by patient.

Validation and test patients of a hospital are the same for every seed and archive size, so that results are paired by
patient; the seed draws the training patients. Smaller archives are part of larger ones. The first images of a
hospital are of as many patients as there are.
"""

from __future__ import annotations

import csv
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from polyclinic.seeds import generator

CHILDREN = ("normal", "bacteria", "virus")
INFECTION = ("no infection", "infection")
FINDINGS = ("Atelectasis", "Effusion", "Infiltration", "Nodule", "Pneumonia", "Consolidation", "Edema")
"""Those of the NIH's 14 with 75 images or more."""
PREVALENCE = {"east": (0.4, 0.4, 0.2), "north": (0.2, 0.6, 0.2), "west": (0.24, 0.36, 0.4)}
"""Shares of normal, bacteria and virus at three hospitals drawn from one."""
FEW_FIELDS = ("image", "label", "patient", "site", "split")


@dataclass(frozen=True)
class Picture:
    """A row of a source's table, with the one class that it is drawn by."""

    image: str
    label: str
    patient: str


@dataclass(frozen=True)
class Hospital:
    """What a hospital gets of a source: its name and images of each class in training, validation and test."""

    name: str
    train: Mapping[str, int]
    val: Mapping[str, int]
    test: Mapping[str, int]


def write_tables(scenario: str, seed: int, folder: Path, data: Path) -> None:
    """Write ``<folder>/<scenario>.<seed>.<source>.csv``, once.

    Args:
        scenario: ``kermany-N``, ``sources-N``, ``findings-N`` or ``small-N``; N training images at each hospital, or
            as many as it has.
        seed: Draws training patients.
        folder: Made where it is missing.
        data: Folder of the real images.
    """
    kind, _, size = scenario.partition("-")
    rows = {"kermany": _kermany, "sources": _sources, "findings": _findings, "small": _small}[kind](
        int(size), seed, data
    )
    folder.mkdir(parents=True, exist_ok=True)
    for source, own in rows.items():
        path = folder / f"{scenario}.{seed}.{source}.csv"
        with path.with_suffix(".part").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(FEW_FIELDS)
            writer.writerows(own)
        path.with_suffix(".part").replace(path)


Rows = list[tuple[str, str, str, str, str]]


def divide(pictures: Iterable[Picture], hospitals: Sequence[Hospital], seed: int) -> Rows:
    """Give hospitals their patients, class by class: those of test, then validation, then training.

    Patients of test and validation do not depend on the seed; a class that runs short gives what it has. A patient with
    several classes is drawn by the rarest that it has images of, and its other images are left out.

    Returns:
        Rows of ``FEW_FIELDS``.
    """
    by_class = _by_class(pictures)
    rows: Rows = []
    for label, patients in by_class.items():
        fixed = generator(0, "held out", label).permutation(sorted(patients)).tolist()
        left = iter(fixed)
        for split in ("test", "val"):
            for hospital in hospitals:
                wanted = (hospital.test if split == "test" else hospital.val).get(label, 0)
                rows += _take(left, patients, wanted, (label, hospital.name, split))
        rest = list(left)
        drawn = iter(generator(seed, "training patients", label).permutation(rest).tolist() if rest else [])
        for hospital in hospitals:
            rows += _take(drawn, patients, hospital.train.get(label, 0), (label, hospital.name, "train"))
    return rows


def _by_class(pictures: Iterable[Picture]) -> dict[str, dict[str, list[str]]]:
    """Images of each patient by the class that the patient is drawn by."""
    by_patient: dict[str, list[Picture]] = defaultdict(list)
    for picture in pictures:
        by_patient[picture.patient].append(picture)
    sizes: dict[str, int] = defaultdict(int)
    for own in by_patient.values():
        for label in {picture.label for picture in own}:
            sizes[label] += 1
    found: dict[str, dict[str, list[str]]] = {label: {} for label in sorted(sizes)}
    for patient, own in by_patient.items():
        label = min({picture.label for picture in own}, key=lambda name: (sizes[name], name))
        found[label][patient] = [picture.image for picture in own if picture.label == label]
    return found


def _take(patients: Iterable[str], images: Mapping[str, list[str]], wanted: int, about: tuple[str, str, str]) -> Rows:
    """Whole patients until there are enough images, then a first image of each, a second of each, and so on."""
    label, site, split = about
    mine: list[str] = []
    if wanted:
        held = 0
        for patient in patients:
            mine.append(patient)
            held += len(images[patient])
            if held >= wanted:
                break
    depth = max((len(images[patient]) for patient in mine), default=0)
    turns = [(patient, images[patient][k]) for k in range(depth) for patient in mine if k < len(images[patient])]
    return [(image, label, patient, site, split) for patient, image in turns[:wanted]]


def _shares(names: Sequence[str], shares: Sequence[float], count: int) -> dict[str, int]:
    return {name: round(count * share) for name, share in zip(names, shares, strict=True)}


LARGEST = {"kermany": 500, "sources": 500, "small": 2000}
"""Archives that the smaller ones are part of."""
HELD_OUT = {"kermany": (80, 200), "nih": (60, 120), "small": (150, 350)}
"""Validation images at the most, and test images."""


def nested(pictures: Iterable[Picture], hospitals: Sequence[Hospital], seed: int, size: int, largest: int) -> Rows:
    """Divide for the largest archive, then keep the first images of each hospital and class.

    Of training images the share that ``size`` is of ``largest``; for validation half as many images as for training, or
    what there is; of test all.
    """
    kept: Counter[tuple[str, str, str]] = Counter()
    by_name = {hospital.name: hospital for hospital in hospitals}
    result: Rows = []
    for row in divide(pictures, hospitals, seed):
        _, label, _, site, split = row
        own = by_name[site]
        most = {"train": own.train, "val": own.val, "test": own.test}[split][label]
        if split != "test":
            held = sum(own.val.values())
            most = round(most * (size / largest if split == "train" else min(1.0, size // 2 / max(1, held))))
        kept[site, label, split] += 1
        if kept[site, label, split] <= most:
            result.append(row)
    return result


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _kermany(size: int, seed: int, data: Path) -> dict[str, Rows]:
    """Three hospitals of children, with other shares of normal, bacterial and viral."""
    table = _read(data / "kermany_cxr224" / "dev.csv")
    pictures = [Picture(row["file"], row["label_name"], row["patient"]) for row in table]
    hospitals = [
        Hospital(name, *(_shares(CHILDREN, shares, count) for count in (LARGEST["kermany"], *HELD_OUT["kermany"])))
        for name, shares in PREVALENCE.items()
    ]
    return {"kermany": nested(pictures, hospitals, seed, size, LARGEST["kermany"])}


def _sources(size: int, seed: int, data: Path) -> dict[str, Rows]:
    """Three real hospitals: children, adults (no finding or pneumonia), intensive care with COVID-19 alone."""
    found: dict[str, Rows] = {}
    clear, ill = INFECTION
    table = _read(data / "kermany_cxr224" / "dev.csv")
    pictures = [Picture(row["file"], INFECTION[row["label"] == "1"], row["patient"]) for row in table]
    parts = [_shares(INFECTION, (0.4, 0.6), count) for count in (LARGEST["sources"], *HELD_OUT["kermany"])]
    found["kermany"] = nested(pictures, [Hospital("guangzhou", *parts)], seed, size, LARGEST["sources"])
    table = _read(data / "nih_cxr14_subset224" / "dev.csv")
    pictures = [
        Picture(row["file"], clear if row["label_name"] == "no_finding" else ill, row["patient"])
        for row in table
        if row["label_name"] == "no_finding" or row["Pneumonia"] == "1"
    ]
    parts = [_shares(INFECTION, (0.5, 0.5), count) for count in (LARGEST["sources"], *HELD_OUT["nih"])]
    found["nih"] = nested(pictures, [Hospital("nih", *parts)], seed, size, LARGEST["sources"])
    table = _read(data / "hannover_covid_cxr" / "dev.csv")
    pictures = [Picture(row["file"], ill, row["patient"]) for row in table]
    own = Hospital("hannover", *({ill: count} for count in (min(size, 100), min(size // 2, 20), 40)))
    found["hannover"] = divide(pictures, [own], seed)
    return found


def _findings(size: int, seed: int, data: Path) -> dict[str, Rows]:
    """Three hospitals of the NIH's adults, several findings an image; a third of the patients each."""
    table = _read(data / "nih_cxr14_subset224" / "dev.csv")
    images: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for row in table:
        label = "|".join(name for name in FINDINGS if row[name] == "1")
        images[row["patient"]].append((row["file"], label))
    patients = generator(0, "held out", "findings").permutation(sorted(images)).tolist()
    rows: Rows = []
    sites = [f"adults-{letter}" for letter in "abc"]
    for place, site in enumerate(sites):
        own = patients[place::3]
        # Two fifths are tested on, and a third of the rest is no more than a seed leaves out.
        cut, val = len(own) * 2 // 5, len(own) * 2 // 5 + len(own) // 8
        drawn = generator(seed, "training patients", site).permutation(own[val:]).tolist()
        for split, members in (("test", own[:cut]), ("val", own[cut:val]), ("train", drawn)):
            taken = [(image, label, p, site, split) for p in members for image, label in images[p]]
            rows += taken[:size] if split == "train" else taken
    return {"nih": rows}


def _small(size: int, seed: int, data: Path) -> dict[str, Rows]:
    """Two hospitals of children at 28 pixels; whose image is whose is not recorded, equal images count as a child's."""
    pictures, seen = [], set()
    with np.load(data / "pneumoniamnist28" / "dev.npz") as arrays:
        for part in ("train", "val"):
            labels = arrays[f"{part}_labels"].reshape(-1)
            for row, image in enumerate(arrays[f"{part}_images"]):
                digest = hashlib.sha256(image.tobytes()).hexdigest()[:16]
                if digest not in seen:
                    seen.add(digest)
                    pictures.append(Picture(f"{part}_images#{row}", INFECTION[int(labels[row])], digest))
    hospitals = [
        Hospital(
            name, *(_shares(INFECTION, (clear, 1 - clear), count) for count in (LARGEST["small"], *HELD_OUT["small"]))
        )
        for name, clear in (("east", 0.3), ("north", 0.15))
    ]
    return {"pneumoniamnist28": nested(pictures, hospitals, seed, size, LARGEST["small"])}
