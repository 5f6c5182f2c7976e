"""Coordinate median: for each entry, the median over the sites.

Yin, Chen, Ramchandran, Bartlett: Byzantine-robust distributed learning: towards optimal statistical rates. ICML 2018.
arXiv 1803.01498. For an even number of sites it is the mean of the two middle values.

It bounds what fewer than half of the sites can do to an entry, and shrinks what only a minority of the sites learnt,
be it an attack or a rare disease. The result has the scale of a mean.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from polyclinic.vectors.rules.base import Layer, Merged, Rule
from polyclinic.vectors.rules.elementwise import each_block
from polyclinic.vectors.rules.sorted_values import sorted_places


class Median(Rule):
    """Entry by entry the median of the vectors."""

    name: Literal["median"] = "median"
    elementwise: ClassVar[bool] = True
    scale: float = 1.0
    """What the median is multiplied by; 1 is on the scale of a mean."""

    def merge(self, layer: Layer, survey: object) -> Merged:
        """The median of each entry, float64."""
        sites = len(layer.vectors)
        middle = sorted({(sites - 1) // 2, sites // 2})

        def work(values: list[Tensor]) -> Tensor:
            found = sorted_places(values, middle)
            return found[0].double().add_(found[-1]).mul_(0.5 * self.scale)

        return Merged(each_block(layer.vectors, work))
