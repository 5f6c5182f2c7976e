"""What the weights of matchings looked like while a network trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from polyclinic.transfer.dual_weights import Matching
from polyclinic.transfer.pupil import Learnt

GROUPS = 10
"""Most numbers that tell how even the channels of a map count."""


class Looks:
    """Means of ``Matching.summary`` over some steps of a training: the first in which a source teaches, and every q-th.

    Args:
        matching: By source.
        every: q.
    """

    def __init__(self, matching: Mapping[str, Matching], every: int) -> None:
        self._matching, self._every = matching, every
        self._sums: dict[str, dict[str, Tensor]] = {}
        self._counts: dict[str, int] = {}

    def see(self, step: int, learnt: Learnt) -> None:
        """Look at the step's batch, where it is one of those steps; no pass of a network.

        Args:
            step: Number, from 1.
            learnt: The loss of the batch, of which every source is one of ``matching``.
        """
        for name, source in learnt.sources.items():
            if name in self._counts and step % self._every:
                continue
            found = self._matching[name].summary(source, learnt.said.maps)
            sums = self._sums.get(name)
            self._sums[name] = found if sums is None else {key: sums[key] + found[key] for key in found}
            self._counts[name] = self._counts.get(name, 0) + 1

    def tables(self) -> dict[str, dict[str, Any]]:
        """By source, for a file: the means of ``where``, ``entropy`` and ``floor``; ``channels``, ``[M][<= 10]``.

        ``channels`` has, of each source map, the weight of a channel beside an even one (w c, so 1 at first), averaged
        over images and target maps, channels in falling order and in ten groups of like size: means of the groups.
        """
        return {name: self._table(name) for name in self._sums}

    def _table(self, name: str) -> dict[str, Any]:
        means = {key: total.double().cpu() / self._counts[name] for key, total in self._sums[name].items()}
        channels = [grouped(part) for part in torch.split(means.pop("channels"), self._matching[name].source)]
        tables = {key: torch.round(mean, decimals=4).tolist() for key, mean in means.items()}
        return {**tables, "channels": [torch.round(part, decimals=4).tolist() for part in channels]}


def grouped(weights: Tensor) -> Tensor:
    """Weights ``[c]`` that sum to one, times c, in falling order: means of at most ten groups of like size."""
    ordered = weights.sort(descending=True).values * len(weights)
    return torch.stack([part.mean() for part in ordered.tensor_split(min(GROUPS, len(ordered)))])
