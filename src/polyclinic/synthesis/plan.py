"""How many samples of which class and device: water filling (FedSSG, phase 3; a reconstruction).

Under-populated cells are filled up to a common level. A cap forbids inventing a hundred patients out of three, and what
fewer than ``floor`` patients in the whole study have gets nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from polyclinic.synthesis.cells import Counts


@dataclass(frozen=True, eq=False)
class Plan:
    """Samples wanted in each cell.

    Attributes:
        wanted: int64 ``[classes, devices]``.
        limit: int64 ``[classes, devices]``, the most that the cap and the floor allow.
        level: Up to which number cells are filled. Its fraction says how much of the next whole step the budget paid.
    """

    wanted: Counts
    limit: Counts
    level: float


def water_filling(patients: Counts, budget: int, *, cap: float, floor: int, borrow: float) -> Plan:
    """Spread a budget of samples over cells so that the emptiest are filled first.

    With n[c, d] patients in a cell, n[c] of a class and n[d] on a device::

        support[c, d] = n[c, d] + borrow (n[c] - n[c, d])          where n[d] > 0
        limit[c, d]   = floor(cap support[c, d])                   where n[c] >= floor and n[d] >= floor, else 0
        wanted(T)     = min(max(0, T - n), limit)

    for the largest whole T whose ``wanted`` adds up to the budget or less. What is left would not lift all cells by
    one more. It goes to those with fewest patients, of these to the rarest class, then to the rarest device; cells that
    are equal in all three get it together or not at all. So nothing depends on the order of classes and devices, and
    up to one such group's samples stay unspent.

    Args:
        patients: int64 ``[classes, devices]``, not negative.
        budget: Most samples in all, not negative.
        cap: Most samples of a cell, as a multiple of the patients behind it.
        floor: Fewest patients of a class, and of a device, that get samples.
        borrow: How much a patient of the same class on another device counts, 0 to 1.

    Raises:
        ValueError: A negative count or budget.
    """
    if budget < 0 or (patients < 0).any():
        raise ValueError(f"patients and budget are counts; seen are {patients.min(initial=0)} and {budget}.")
    limit = _limits(patients, cap, floor, borrow)
    top = int((patients + limit)[limit > 0].max(initial=0))
    low = _level(patients, limit, budget, top)
    wanted = _filled(patients, limit, low)
    rising = _filled(patients, limit, low + 1) > wanted
    if not rising.any():
        return Plan(wanted, limit, float(low))
    extra = _emptiest(patients, rising, budget - int(wanted.sum()))
    return Plan(wanted + extra, limit, low + float(extra.sum() / rising.sum()))


def split_by_owner(wanted: Counts, patients: Counts) -> tuple[Counts, Counts]:
    """``wanted`` in cells that some site owns, and in those that nobody does: another generator serves these."""
    owned = np.where(patients > 0, wanted, 0)
    return owned, wanted - owned


def _limits(patients: Counts, cap: float, floor: int, borrow: float) -> Counts:
    of_class, of_device = patients.sum(axis=1, keepdims=True), patients.sum(axis=0, keepdims=True)
    support = np.where(of_device > 0, patients + borrow * (of_class - patients), 0)
    # The small number keeps 0.29 * 100, which floating point makes 28.999..., at 29.
    limit = np.floor(cap * support + 1e-9).astype(np.int64)
    return np.where((of_class >= floor) & (of_device >= floor), limit, 0)


def _filled(patients: Counts, limit: Counts, level: int) -> Counts:
    return np.minimum(np.maximum(0, level - patients), limit)


def _level(patients: Counts, limit: Counts, budget: int, top: int) -> int:
    """The largest level from 0 to ``top``, where every cell is at its limit, that the budget pays."""
    low, high = 0, top
    while low < high:
        middle = (low + high + 1) // 2
        if int(_filled(patients, limit, middle).sum()) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def _emptiest(patients: Counts, rising: np.ndarray, left: int) -> Counts:
    """One sample for each of the emptiest rising cells, by whole groups of equal ones, as far as ``left`` goes."""
    of_class, of_device = patients.sum(axis=1), patients.sum(axis=0)
    groups: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for c, d in np.argwhere(rising).tolist():
        groups.setdefault((int(patients[c, d]), int(of_class[c]), int(of_device[d])), []).append((c, d))
    extra = np.zeros_like(patients)
    for _, cells in sorted(groups.items()):
        # Stopping here, not trying the next group, is what lets a larger budget only ever add samples.
        if len(cells) > left:
            break
        left -= len(cells)
        for cell in cells:
            extra[cell] = 1
    return extra
