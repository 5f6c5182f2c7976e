"""Which samples a site takes from the pool that everybody is sent.

The site chooses, by counts that it alone knows: the server never learns them, nor which samples a site trains on.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from polyclinic.seeds import generator
from polyclinic.synthesis.cells import Counts
from polyclinic.synthesis.pool import Samples
from polyclinic.synthesis.settings import ShareSettings


def quota(images: int, pool: int, share: ShareSettings) -> int:
    """How many samples a site takes: ``ratio`` per training image, ``small_ratio`` at a small site, at most the pool.

    Args:
        images: The site's training images.
        pool: Samples in the pool.
        share: The ratios, and what is small.
    """
    ratio = share.small_ratio if images < share.small_site else share.ratio
    return min(int(ratio * images), pool)


def choose(samples: Samples, own_patients: Counts, level: float, quota: int, seed: int) -> Tensor:
    """Draw a site's samples: cell by cell without replacement, a cell the likelier the more the site lacks of it.

    The chance of a cell with samples left is proportional to ``max(0, level - own_patients)``; a cell that the site has
    ``level`` patients of is never drawn. Cells of devices that the site does not have come first, those of its own
    devices when the others are used up. (FedSSG, phase 4; a reconstruction.)

    Args:
        samples: The pool; images are not looked at.
        own_patients: int64 ``[classes, devices]``, the site's training patients. They need no floor: they stay here.
        level: Of the plan.
        quota: Most samples.
        seed: Of this site; the same seed draws the same samples.

    Returns:
        int64 ``[taken]``, positions in ``samples``, ascending; fewer than ``quota`` where too few lack.
    """
    lack = np.maximum(0.0, level - own_patients)
    has_device = own_patients.sum(axis=0) > 0
    labels, devices = samples.labels.cpu().numpy(), samples.devices.cpu().numpy()
    weights = lack[labels, devices]
    arrivals = _arrivals(labels * own_patients.shape[1] + devices, weights, generator(seed, "share"))
    order = np.lexsort((arrivals, has_device[devices]))
    taken = [position for position in order.tolist() if weights[position] > 0][: max(0, quota)]
    return torch.tensor(sorted(taken), dtype=torch.int64)


def _arrivals(cells: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Times at which samples arrive when each cell sends one at random at a rate of its weight.

    By the race of exponential clocks, order of arrival is the order of drawing cells in proportion to their weights,
    until a cell has no samples left.
    """
    times = np.full(len(cells), np.inf)
    for cell in np.unique(cells):
        members = rng.permutation(np.flatnonzero(cells == cell))
        waiting = rng.exponential(size=len(members))
        if weights[members[0]] > 0:
            times[members] = waiting.cumsum() / weights[members[0]]
    return times
