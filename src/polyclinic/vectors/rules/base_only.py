"""The base alone: the vectors are ignored.

A control: what restoration, or a head refitted on the base's own features, achieves without any site's vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from polyclinic.vectors.rules.base import Judge, Rule


class BaseOnly(Rule):
    """Nothing is added to the base."""

    name: Literal["base"] = "base"

    def shares(self, images: Sequence[int], judge: Judge | None) -> list[float]:
        """Zero for every contribution."""
        return [0.0] * len(images)
