"""Which candidates are copies of a training image, one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from polyclinic.synthesis.distances import ByPatient, two_nearest

ENOUGH = 200
"""Training images of a class whose distances to other patients say where a copy begins; with fewer, those of all do."""


def find_copies(
    candidates: Tensor,
    labels: Tensor,
    train: ByPatient,
    train_labels: Tensor,
    quantile: float,
    *,
    holdout: ByPatient | None = None,
    near: bool = False,
) -> Tensor:
    """Candidates that are nearer to a training image than another patient's image would be.

    Two numbers of each candidate are looked at: its distance to the nearest training patient, which finds copies, and
    that over its distance to the second nearest, which finds noisy copies of images that lie far from all others. A
    candidate is a copy if either is below the ``1 - quantile`` quantile of the same number of the training images, each
    compared with the other patients'. An honest candidate, which is to the training images what another patient's image
    is, falls below each about that often, but with n training patients not less often than one in n: a small site pays
    with some honest candidates, in two spaces up to 4 of n.

    A blurred image, near the mean of all, is nearer to every image than two noisy images are to each other. So a
    candidate that lies as near to a held-out patient, whom no generator saw, is no copy by its distance alone.

    Departure: the sheet (2.5) takes the quantile of all pairs of different patients. A candidate has as many pairs as
    there are training images: of real held-out skin lesions that line calls 12% (211 training images) to 25% (1,100)
    copies, this one 3% and 1%.

    Args:
        candidates: ``[m, F]``.
        labels: int64 ``[m]``, class: each has a line of its own where it has images ``ENOUGH``.
        train: At least three patients, so that each has a second nearest.
        train_labels: int64 ``[n]``.
        quantile: Near 1.
        holdout: Patients that the generator was not trained on.
        near: Look at the distance alone: for candidates of classes that the patients do not have.

    Returns:
        bool ``[m]``.
    """
    found = torch.zeros(len(candidates), dtype=torch.bool)
    own = _numbers(two_nearest(candidates, train))
    elsewhere = (
        two_nearest(candidates, holdout)[:, 0].double()
        if holdout is not None
        else own.new_full(own.shape[:1], torch.inf)
    )
    others = _numbers(two_nearest(train.vectors, train, train.who))
    overall = others.quantile(1 - quantile, dim=0)
    lines = {}
    for c in sorted(set(train_labels.tolist())):
        if int((train_labels == c).sum()) >= ENOUGH:
            lines[c] = others[train_labels == c].quantile(1 - quantile, dim=0)
    for c in sorted(set(labels.tolist())):
        here = labels == c
        line = lines.get(c, overall)
        below = own[here] < line
        below[:, 0] &= elsewhere[here] >= line[0]
        found[here] = below[:, 0] if near else below.any(1)
    return found


def _numbers(nearest: Tensor) -> Tensor:
    """Distance to the nearest patient, and that over the distance to the second, float64 ``[m, 2]``."""
    first, second = nearest.double().unbind(1)
    return torch.stack([first, torch.where(second > 0, first / second.clamp(min=1e-30), 1.0)], dim=1)
