"""Means over the steps of a training, gathered without waiting for the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Tally:
    """Sums of named scalars."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Count the terms of a step; not every step need have all."""
        for name, term in terms.items():
            value = term.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """By name, to six digits."""
        values = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        return {name: float(f"{value:.6g}") for name, value in values.items()}

    @property
    def finite(self) -> bool:
        """Whether all sums are numbers."""
        return all(bool(torch.isfinite(total)) for total in self._sums.values())
