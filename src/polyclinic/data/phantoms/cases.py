"""Who is in a made-up hospital: patients, their classes and their images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from polyclinic.data.manifest import SPLITS, Case
from polyclinic.data.phantoms import chest_ct, chest_xray, skin_diagnoses, skin_lesion
from polyclinic.data.phantoms.canvas import stream
from polyclinic.data.phantoms.devices import DEVICES
from polyclinic.errors import StudyError, nearest
from polyclinic.study import PhantomSettings, PhantomSite, TaskSettings

CLASSES: dict[str, tuple[str, ...]] = {
    "chest-xray": chest_xray.CLASSES,
    "chest-ct": chest_ct.CLASSES,
    "chest-ct-volume": chest_ct.CLASSES,
    "skin-lesion": skin_lesion.CLASSES,
    "skin-diagnoses": skin_diagnoses.CLASSES,
}
"""The classes of each kind; for the chest the first one is the absence of the others."""

MASK_CLASSES = ("background", "lesion")
"""The classes of a segmentation."""

_GOLDEN = 0.6180339887498949
_ANOTHER_FINDING = 0.25
_COUNTED = 10_000
"""Numbers of patients that each split and class of exact counts has for itself."""


def phantom_cases(settings: PhantomSettings, task: TaskSettings) -> list[Case]:
    """All images of all made-up hospitals, in order of site, patient, image.

    The class of a patient follows the site's prevalence by a low-discrepancy sequence, so that the counts of every
    run of patients stay within about one of their expectation. For multi-label tasks a patient with a finding has
    each other finding with probability 0.25, and ``normal`` is an empty label. A site with exact ``counts`` has just
    these, with their splits; a patient of a split and class looks the same whatever the other counts are.

    Args:
        settings: The hospitals.
        task: For multi-class at least two of ``CLASSES[kind]``, the others are not drawn; for multi-label the
            findings, some or all; for segmentation ``background, lesion`` (the label is still the class).

    Raises:
        StudyError: Unknown class or device (with the nearest name), shares that do not sum to 1, a site given twice,
            or a task that this kind of phantom has no answer for.
    """
    classes = _drawn_classes(settings.kind, task)
    names = [site.name for site in settings.sites]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise StudyError(f"data.phantom.sites: {', '.join(twice)} is listed twice. Give every site its own name.")
    return [case for site in settings.sites for case in _site_cases(settings.seed, site, classes, task)]


def _drawn_classes(kind: str, task: TaskSettings) -> tuple[str, ...]:
    known = CLASSES[kind]
    if task.kind == "segmentation":
        if tuple(task.classes) != MASK_CLASSES:
            raise StudyError(
                f"task.classes: {', '.join(task.classes)}; a {kind} phantom has masks for {', '.join(MASK_CLASSES)}. "
                f"Set task.classes to [{', '.join(MASK_CLASSES)}]."
            )
        return known
    if task.kind == "multi-label" and kind.startswith("skin-"):
        raise StudyError(
            f"task.kind: a {kind} phantom has exactly one class, so that multi-label does not fit. "
            "Use multi-class, or a chest phantom."
        )
    offered = known if task.kind == "multi-class" else known[1:]
    for name in task.classes:
        if name not in offered:
            raise StudyError(
                f"task.classes: a {kind} phantom has no {task.kind} class {name!r}. {nearest(name, offered)}"
            )
    if task.kind == "multi-class" and len(task.classes) < 2:
        raise StudyError(f"task.classes: needs at least two of {', '.join(offered)}; got {task.classes[0]} alone.")
    return tuple(name for name in known if name in task.classes or (task.kind == "multi-label" and name == known[0]))


def _site_cases(seed: int, site: PhantomSite, classes: tuple[str, ...], task: TaskSettings) -> Iterator[Case]:
    if site.counts:
        yield from _counted_cases(seed, site, classes, task)
        return
    devices = _devices(seed, site, site.patients)
    shares = _shares(site, classes)
    offset = float(stream(seed, site.name, 0, "prevalence").random())
    for patient in range(site.patients):
        rng = stream(seed, site.name, patient, "class")
        images = int(rng.integers(1, 3))
        name = _class_at((offset + patient * _GOLDEN) % 1.0, shares)
        label = name
        if task.kind == "multi-label":
            extra = {other: rng.random() < _ANOTHER_FINDING for other in classes[1:]}
            sick = name != classes[0]
            label = "|".join(c for c in classes[1:] if sick and (c == name or extra[c]))
        for image in range(images):
            yield _case(site.name, patient, image, devices[patient], label, task)


def _counted_cases(seed: int, site: PhantomSite, classes: tuple[str, ...], task: TaskSettings) -> Iterator[Case]:
    """One image of each patient that ``site.counts`` asks for."""
    place = f"data.phantom.sites: counts of site {site.name!r}"
    if task.kind == "multi-label":
        raise StudyError(f"{place} give every patient one class, so that multi-label does not fit. Use prevalence.")
    for name in dict.fromkeys(name for part in site.counts.values() for name in part):
        if name not in classes:
            raise StudyError(f"{place} name the unknown class {name!r}. {nearest(name, classes)}")
    counts: Mapping[str, Mapping[str, int]] = {str(split): numbers for split, numbers in site.counts.items()}
    wanted = [
        (split, name, (row * len(classes) + column) * _COUNTED + number)
        for row, (split, numbers) in enumerate((split, counts.get(split, {})) for split in SPLITS)
        for column, name in enumerate(classes)
        for number in range(numbers.get(name, 0))
    ]
    devices = _devices(seed, site, len(wanted))
    for (split, name, patient), device in zip(wanted, devices, strict=True):
        yield replace(_case(site.name, patient, 0, device, name, task), split=split)


def _case(site: str, patient: int, image: int, device: str, label: str, task: TaskSettings) -> Case:
    reference = f"{site}/p{patient:04d}_{image}"
    return Case(
        image=reference,
        patient=f"{site}-p{patient:04d}",
        site=site,
        device=device,
        label=label,
        mask=f"{reference}#mask" if task.kind == "segmentation" else "",
        source="phantom",
        where=f"data.phantom site {site} patient {patient}",
    )


def _devices(seed: int, site: PhantomSite, patients: int) -> list[str]:
    """Device of every patient: the counts follow the shares, who has which is drawn."""
    shares = {site.device: 1.0} if isinstance(site.device, str) else site.device
    if not shares:
        raise StudyError(f"data.phantom.sites: site {site.name!r} has no device. Name one, or leave 'device' out.")
    for name in shares:
        if name not in DEVICES:
            raise StudyError(
                f"data.phantom.sites: site {site.name!r} has the unknown device {name!r}. {nearest(name, DEVICES)}"
            )
    bounds = np.round(np.cumsum([*shares.values()]) / sum(shares.values()) * patients)
    line = np.searchsorted(bounds, np.arange(patients), side="right")
    names = list(shares)
    return [names[line[place]] for place in stream(seed, site.name, 0, "devices").permutation(patients)]


def _shares(site: PhantomSite, classes: tuple[str, ...]) -> dict[str, float]:
    """Share of every class of ``classes``, summing to 1."""
    given = site.prevalence
    place = f"data.phantom.sites: prevalence of site {site.name!r}"
    for name, share in given.items():
        if name not in classes:
            raise StudyError(f"{place} names the unknown class {name!r}. {nearest(name, classes)}")
        if not 0 <= share <= 1:
            raise StudyError(f"{place} gives {name!r} the share {share}. Shares are from 0 to 1.")
    total, rest = sum(given.values()), [name for name in classes if name not in given]
    if total > 1 + 1e-6 or (not rest and total < 1 - 1e-6):
        wanted = "1" if not rest else "at most 1"
        raise StudyError(f"{place} sums to {total:g}; it must sum to {wanted}. Change the shares.")
    return {name: given.get(name, max(1 - total, 0.0) / max(len(rest), 1)) for name in classes}


def _class_at(position: float, shares: dict[str, float]) -> str:
    """The class whose stretch of 0..1 holds ``position``."""
    below = 0.0
    last = ""
    for name, share in shares.items():
        if share > 0:
            last = name
        below += share
        if position < below:
            return name
    return last
