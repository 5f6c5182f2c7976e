"""Distances from images to patients, in blocks: a patient is as near as the nearest of his images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_PAIRS = 1 << 22
"""Distances held at once: 16 MB in float32, a few times over."""


@dataclass(frozen=True, eq=False)
class ByPatient:
    """Images as vectors, and whose they are.

    Attributes:
        vectors: float32 ``[n, F]``.
        who: int64 ``[n]``, number of the patient.
        patients: How many; each has an image.
    """

    vectors: Tensor
    who: Tensor
    patients: int

    @classmethod
    def of(cls, vectors: Tensor, names: Sequence[str]) -> ByPatient:
        """Patients are numbered by name, so that the order of images does not matter."""
        number = {name: k for k, name in enumerate(sorted(set(names)))}
        return cls(vectors, torch.tensor([number[name] for name in names], dtype=torch.int64), len(number))

    def joined(self, other: ByPatient) -> ByPatient:
        """Both; the patients of ``other`` are others, and numbered behind these."""
        who = torch.cat([self.who, other.who + self.patients])
        return ByPatient(torch.cat([self.vectors, other.vectors]), who, self.patients + other.patients)


def to_patients(rows: Tensor, people: ByPatient) -> Iterator[tuple[slice, Tensor]]:
    """Euclidean distances of rows to patients, block by block.

    Args:
        rows: ``[m, F]``.
        people: At least one patient.

    Yields:
        Which rows, and ``[b, patients]``.
    """
    # About a common centre, float32 keeps the digits that tell near images apart.
    centre = people.vectors.mean(0)
    columns = people.vectors - centre
    one_each = people.patients == len(columns) and bool((people.who == torch.arange(people.patients)).all())
    step = max(1, _PAIRS // len(columns))
    for start in range(0, len(rows), step):
        part = slice(start, min(start + step, len(rows)))
        distances = torch.cdist(rows[part] - centre, columns)
        if not one_each:
            into = torch.full((len(distances), people.patients), torch.inf)
            distances = into.scatter_reduce_(1, people.who.expand(len(distances), -1), distances, "amin")
        yield part, distances


def two_nearest(rows: Tensor, people: ByPatient, own: Tensor | None = None) -> Tensor:
    """Distance of each row to the two nearest patients.

    Args:
        rows: ``[m, F]``.
        people: Whose images.
        own: int64 ``[m]``: each row's own patient among them, who does not count.

    Returns:
        ``[m, 2]``, ascending; infinite where there are no two.
    """
    found = torch.full((len(rows), 2), torch.inf)
    for part, distances in to_patients(rows, people):
        if own is not None:
            distances.scatter_(1, own[part, None], torch.inf)
        # Two minima: several times as fast as sorting out the two least.
        found[part, 0], at = distances.min(dim=1)
        found[part, 1] = distances.scatter_(1, at[:, None], torch.inf).amin(1)
    return found
