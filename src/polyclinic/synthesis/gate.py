"""The memorisation gate: what candidates must pass at the site whose patients the generator was trained on.

Nothing is released before it. The site compares candidates with its training patients and with held-out patients that
no generator saw (its validation images), as pixels and as frozen features, over all, by class and by device. Sheet 2.5;
distance tests alone prove nothing (arXiv 2505.01524), so membership inference is among the measures.

Two kinds of verdict:

- **A copy** is refused by itself: a candidate nearer to a training image than another patient's image ever is, or
  nearly (``copies``), whatever class it was made for.
- **A group fails** as a whole, and all its candidates are refused: ``class``, ``device`` or ``all``.

When does a group fail? The lines are the sheet's, but a site may have five held-out patients, and with so few a
generator that knows nobody crosses any line by chance in many a run. So a group fails where a line is crossed *and* an
honest generator would cross it that far in at most ``(1 - confidence) / 2`` of all cases: one in 200. For ``closer``
and ``dcr_ratio`` that is a lower bound of ``closer`` above a half; for the others the chance itself (``measures``).
The price is stated, not hidden: in a small group only clear memorisation fails. Copies are refused in any group. On
real skin lesions one judged row in 100 fails by chance, one site in 25.

A group with fewer patients on either side than ``settings.holdout`` is not judged by itself, only within all. If even
all have too few, nothing can be said, and everything of this site's classes is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyclinic.errors import DataError
from polyclinic.federation.site import Site
from polyclinic.seeds import derive_seed, generator
from polyclinic.synthesis.cells import OwnImages, device_name, own_images
from polyclinic.synthesis.copies import find_copies
from polyclinic.synthesis.distances import ByPatient
from polyclinic.synthesis.frozen import frozen_features
from polyclinic.synthesis.measures import Measures, failures, measure
from polyclinic.synthesis.pool import Samples
from polyclinic.synthesis.settings import GateSettings, SynthesisSettings
from polyclinic.synthesis.vae import shrunk_images

ALL = "all"
NO_HOLDOUT = "no hold-out"
FEW_PATIENTS = "few patients"
Names = tuple[Sequence[str], Sequence[str]]
"""Of classes and of devices."""


@dataclass(frozen=True, eq=False)
class GateImages:
    """Images as the gate sees them.

    Attributes:
        spaces: By name, ``pixels`` and ``features``: float32 ``[n, F]`` each.
        labels: int64 ``[n]``, class.
        devices: int64 ``[n]``, place in the list of devices.
        patients: Whose; empty for candidates.
    """

    spaces: Mapping[str, Tensor]
    labels: Tensor
    devices: Tensor
    patients: Sequence[str] = ()

    def only(self, chosen: Tensor) -> GateImages:
        """Those at bool ``[n]``."""
        rows = torch.nonzero(chosen).flatten()
        names = [self.patients[i] for i in rows.tolist()] if self.patients else ()
        spaces = {name: vectors[rows] for name, vectors in self.spaces.items()}
        return GateImages(spaces, self.labels[rows], self.devices[rows], names)

    def side(self, space: str) -> ByPatient:
        """Real images in one space, by patient."""
        return ByPatient.of(self.spaces[space], self.patients)


@dataclass(frozen=True, eq=False)
class GateResult:
    """A site's verdict.

    Attributes:
        accepted: bool ``[m]``; true as well for candidates of classes that the site does not own, but for copies: it
            abstains.
        refused: Candidates by reason, each once, under the first that holds: ``no hold-out``, ``few patients``,
            ``copy``, ``all``, ``class``, ``device``.
        rows: One per space and group, plain values for a JSON file.
    """

    accepted: Tensor
    refused: dict[str, int]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self, floor: int = 0, *, counts: bool = True) -> dict[str, Any]:
        """Counts and rows; ``accepted`` counts the candidates of the site's own classes and those it abstains on.

        Args:
            floor: Fewer images of patients are not told.
            counts: Say how many images of patients a row is about, and what tells it.
        """
        rows = [_told(row, floor) if counts else _without_counts(row) for row in self.rows]
        return {"accepted": int(self.accepted.sum()), "refused": dict(self.refused), "rows": rows}


@dataclass(frozen=True)
class _Group:
    """Which images a row is about: a class, a device, or all."""

    kind: str
    number: int
    name: str

    def of(self, images: GateImages) -> Tensor:
        """bool ``[n]``."""
        if self.kind == ALL:
            return torch.ones(len(images.labels), dtype=torch.bool)
        return (images.labels if self.kind == "class" else images.devices) == self.number


def judge(
    candidates: GateImages,
    train: GateImages,
    holdout: GateImages,
    settings: GateSettings,
    seed: int,
    names: Names | None = None,
) -> GateResult:
    """Judge candidates by the patients of one site.

    Args:
        candidates: Of any class; those of classes without training images are accepted unless they are copies.
        train: What the generator may have been trained on.
        holdout: Images of other patients, drawn by chance from the same.
        settings: Lines.
        seed: Of the draws of patients; the same seed gives the same bits.
        names: Of classes and of devices; otherwise their numbers.

    Raises:
        DataError: A patient is on both sides.
    """
    if both := sorted(set(train.patients) & set(holdout.patients)):
        raise DataError(
            f"{len(both)} patients are both in training and held out; what a generator remembers cannot be told then. "
            "Split the data by patient."
        )
    own = torch.isin(candidates.labels, train.labels)
    accepted = torch.ones(len(own), dtype=torch.bool)
    if len(train.labels) == 0:
        return GateResult(accepted, {})
    reasons, rows = _reasons(candidates.only(own), train, holdout, settings, seed, names)
    accepted[own] = torch.from_numpy(reasons == "")
    accepted[~own] = ~_copies_of_others(candidates.only(~own), train, holdout, settings)
    refused = Counter(str(reason) for reason in reasons if reason)
    refused["copy"] += int((~accepted[~own]).sum())
    return GateResult(accepted, {why: count for why, count in refused.items() if count}, rows)


def _copies_of_others(seen: GateImages, train: GateImages, holdout: GateImages, settings: GateSettings) -> Tensor:
    """Candidates made for classes that the site does not own, and yet copies of its patients, bool ``[m]``."""
    found = torch.zeros(len(seen.labels), dtype=torch.bool)
    if len(found) and not _lacking(train, holdout, settings):
        for space, vectors in seen.spaces.items():
            side = train.side(space)
            held = holdout.side(space)
            found |= find_copies(
                vectors, seen.labels, side, train.labels, settings.copy_quantile, holdout=held, near=True
            )
    return found


def _reasons(
    seen: GateImages,
    train: GateImages,
    holdout: GateImages,
    settings: GateSettings,
    seed: int,
    names: Names | None,
) -> tuple[NDArray[np.object_], list[dict[str, Any]]]:
    """Why each candidate is refused, empty where it is not, and the rows."""
    reasons = np.full(len(seen.labels), "", dtype=object)
    if len(seen.labels) == 0:
        return reasons, []
    if why := _lacking(train, holdout, settings):
        reasons[:] = NO_HOLDOUT if len(set(holdout.patients)) < settings.holdout else FEW_PATIENTS
        return reasons, [_row(space, _Group(ALL, 0, ALL), (seen, train, holdout), why=why) for space in seen.spaces]
    copies = {
        space: find_copies(
            vectors,
            seen.labels,
            train.side(space),
            train.labels,
            settings.copy_quantile,
            holdout=holdout.side(space),
        )
        for space, vectors in seen.spaces.items()
    }
    for found in copies.values():
        reasons[found.numpy()] = "copy"
    rows = []
    for group in _groups(seen, names):
        here, passed = group.of(seen), True
        if group.kind != ALL and all(bool(group.of(side).all()) for side in (seen, train, holdout)):
            continue  # the same as all
        sides = (seen.only(here), train.only(group.of(train)), holdout.only(group.of(holdout)))
        for space in seen.spaces:
            rows.append(_judged(space, group, sides, settings, seed) | {"copies": int(copies[space][here].sum())})
            passed = passed and rows[-1]["passed"] is not False
        if not passed:
            reasons[here.numpy() & (reasons == "")] = group.kind
    return reasons, rows


def _groups(candidates: GateImages, names: Names | None) -> Iterator[_Group]:
    """All, then each class and each device that has candidates."""
    yield _Group(ALL, 0, ALL)
    for k, (kind, numbers) in enumerate((("class", candidates.labels), ("device", candidates.devices))):
        for number in sorted(set(numbers.tolist())):
            yield _Group(kind, number, names[k][number] if names else str(number))


def _lacking(train: GateImages, holdout: GateImages, settings: GateSettings) -> str:
    """Why a group cannot be judged; empty where it can."""
    members, others = len(set(train.patients)), len(set(holdout.patients))
    if min(members, others) >= settings.holdout:
        return ""
    return f"too few training or held-out patients; {settings.holdout} of each are needed"


def _judged(
    space: str,
    group: _Group,
    sides: tuple[GateImages, GateImages, GateImages],
    settings: GateSettings,
    seed: int,
) -> dict[str, Any]:
    candidates, train, holdout = sides
    if why := _lacking(train, holdout, settings):
        return _row(space, group, sides, why=f"{why}; judged within all")
    measures = measure(
        candidates.spaces[space],
        train.side(space),
        holdout.side(space),
        generator(seed, "gate", space, group.kind, group.name),
        gap=settings.nndr_gap,
        confidence=settings.confidence,
    )
    crossed = list(failures(measures, settings))
    return _row(space, group, sides, measures, passed=not crossed, why="; ".join(crossed))


def _row(
    space: str,
    group: _Group,
    sides: tuple[GateImages, GateImages, GateImages],
    measures: Measures | None = None,
    *,
    passed: bool | None = None,
    why: str = "",
) -> dict[str, Any]:
    shown = ("dcr_ratio", "closer", "closer_low", "closer_high", "nndr", "nndr_holdout", "auc", "tpr", "fpr")
    numbers = dict(zip(("candidates", "train", "holdout"), (len(side.labels) for side in sides), strict=True))
    return {
        "space": space,
        "class": group.name if group.kind == "class" else ALL,
        "device": group.name if group.kind == "device" else ALL,
        **numbers,
        **{name: getattr(measures, name) if measures else None for name in shown},
        "copies": 0,
        "passed": passed,
        "why": why,
    }


def _told(row: dict[str, Any], floor: int) -> dict[str, Any]:
    small = {name: None for name in ("train", "holdout") if 0 < row[name] < floor}
    return {**row, **small}


def _without_counts(row: dict[str, Any]) -> dict[str, Any]:
    """One false accusation as a share tells how many patients are held out."""
    why = "a line is crossed" if row["passed"] is False else row["why"]
    return {**row, "train": None, "holdout": None, "fpr": None, "why": why}


def vet(site: Site, samples: Samples, devices: tuple[str, ...], settings: SynthesisSettings) -> GateResult:
    """The gate at a site: its training images against its validation images, both at the samples' resolution.

    Args:
        site: Its workbench is loaded with the start weights.
        samples: With images.
        devices: All devices of the study.
        settings: The floor says which images exist for generators, ``gate`` the lines.
    """
    assert samples.images is not None
    size = int(samples.images.shape[-1])
    vae = settings.of_kind("vae")
    # Training with DP-SGD takes cells below the floor as well, so their patients are looked for too.
    own = own_images(site.data, devices, 1 if vae is not None and vae.dp is not None else settings.floor)
    site.load(site.initial)

    def seen(images: Tensor, labels: Tensor, machines: Tensor, patients: Sequence[str] = ()) -> GateImages:
        pixels = images.flatten(1).float() / 255
        found = frozen_features(site.model, images, site.study.data.image)
        return GateImages({"pixels": pixels, "features": found}, labels, machines, patients)

    def real(held: OwnImages) -> GateImages:
        images = shrunk_images(site.data, held.positions, size)
        return seen(images, held.labels, held.devices, held.patients)

    return judge(
        seen(samples.images.cpu(), samples.labels, samples.devices),
        real(own),
        real(_held_out(site, own, devices)),
        settings.gate,
        derive_seed(site.study.seed, "gate", site.name),
        (site.task.classes, devices),
    )


def _held_out(site: Site, own: OwnImages, devices: tuple[str, ...]) -> OwnImages:
    """Validation images of the cells that the generator saw; of others nothing could be nearer to training."""
    place = {name: k for k, name in enumerate(devices)}
    cells = set(zip(own.labels.tolist(), own.devices.tolist(), strict=True))
    data = site.data
    rows = [
        (i, int(data.targets[i]), place.get(device_name(data, i), -1), data.cases[i].patient)
        for i in data.splits["val"].tolist()
    ]
    kept = [row for row in rows if row[1:3] in cells]
    columns = [torch.tensor([row[k] for row in kept], dtype=torch.int64) for k in range(3)]
    return OwnImages(columns[0], columns[1], columns[2], [who for *_, who in kept])
