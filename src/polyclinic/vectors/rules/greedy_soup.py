"""Greedy soup: a mean of the vectors that help, picked one after another on validation images.

Wortsman et al.: Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing
inference time. ICML 2022, recipe 1. arXiv 2203.05482.

The sites' models are tried from the best to the worst, and each stays in the mean where the mean is then no worse.
Equal models are tried in the order of their digests (ours).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from polyclinic.errors import ContributionError
from polyclinic.vectors.rules.base import Judge, Rule


class GreedySoup(Rule):
    """The mean of the vectors that do not make it worse."""

    name: Literal["greedy-soup"] = "greedy-soup"
    scale: float = 1.0
    """What the mean is multiplied by, also while candidates are compared."""

    @property
    def judged(self) -> bool:
        """Always: the soup is chosen on validation images."""
        return True

    def shares(self, images: Sequence[int], judge: Judge | None) -> list[float]:
        """``scale / k`` for the k vectors that were picked, zero for the others.

        Raises:
            ContributionError: There is no judge.
        """
        if judge is None:
            raise ContributionError(
                "greedy-soup picks contributions on validation images and there are none. Give the coordinator's "
                "validation images, or take a rule without them, such as data-vector with coefficients mean."
            )
        sites = len(images)
        alone = [judge(self._mean(sites, [j])) for j in range(sites)]
        order = sorted(range(sites), key=lambda j: (-alone[j], j))
        picked, best = order[:1], alone[order[0]]
        for j in order[1:]:
            score = judge(self._mean(sites, [*picked, j]))
            if score >= best:
                picked, best = [*picked, j], score
        return self._mean(sites, picked)

    def _mean(self, sites: int, picked: Collection[int]) -> list[float]:
        """Shares of the mean of these vectors."""
        return [self.scale / len(picked) if j in picked else 0.0 for j in range(sites)]
