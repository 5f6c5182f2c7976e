"""A last layer in closed form, from sums over features that sites add up: ridge regression and linear discriminants.

Sums over images of several sites are the sums over all their images, so the solution is the one that pooled images
would give, whatever their split; taking a site out is subtraction. As Fed3R (Fanì et al., ICML 2024, arXiv 2406.01116)
and AFL (He et al., CVPR 2025, arXiv 2405.16240) for ridge, FedCGS (arXiv 2503.06962) and GH-OFL (arXiv 2602.01186) for
discriminants.

Departure: those scale features to unit length. Here they are the network's own penultimate features with a constant 1
behind them, so the solution is the network's last linear layer and the result is a model like any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from polyclinic.errors import ContributionError
from polyclinic.settings import Settings

TEMPERATURE = 10.0
"""What ridge scores, which lie about 0 and 1, are multiplied by to become logits: a score ahead by 0.5 is then a
probability of 0.99. It changes how sure the model sounds, never what it decides."""
_ROUNDING = 1e-6


class RidgeHead(Settings):
    """The last layer by ridge regression on features, from the sums that sites sent."""

    name: Literal["ridge"] = "ridge"
    gamma: float = Field(1e-2, gt=0)
    """How much slopes are pulled towards zero, relative to the mean eigenvalue of the features' scatter."""
    balanced: bool = False
    """Classes weigh the same, however many images they have over all sites."""
    temperature: float = Field(TEMPERATURE, gt=0)
    """What scores are multiplied by to become logits: how sure the model sounds, not what it decides."""

    def solve(self, sums: HeadSums) -> tuple[Tensor, Tensor]:
        """Weight ``[C, D]`` and bias ``[C]``, float64."""
        return solve_ridge(sums, self.gamma, self.balanced, self.temperature)


class LDAHead(Settings):
    """The last layer by linear discriminants of features, from the sums that sites sent."""

    name: Literal["lda"] = "lda"
    shrinkage: float = Field(1e-2, gt=0, le=1)
    """How far the covariance within classes is pulled towards a multiple of the identity."""
    prior: Literal["uniform", "counts"] = "uniform"
    """``uniform`` aims at balanced accuracy; ``counts``: classes are as frequent as over all sites."""

    def solve(self, sums: HeadSums) -> tuple[Tensor, Tensor]:
        """Weight ``[C, D]`` and bias ``[C]``, float64."""
        return solve_lda(sums, self.shrinkage, self.prior)


@dataclass(frozen=True)
class HeadSums:
    """Sums over images of ``x~ = (feature, 1)``, float64.

    Rows are classes in the order of the outputs. Where an image can have several findings (multi-label), rows count
    the images that have each, and one more row at the end counts all images.

    Attributes:
        count: Images of each row, ``[K]``.
        first: Sum of ``x~``, ``[K, D+1]``.
        second: Sum of ``x~ x~^T``, ``[K, D+1, D+1]``.
        multi_label: Whether the last row is all images: K is then one more than the classes.
    """

    count: Tensor
    first: Tensor
    second: Tensor
    multi_label: bool = False

    @classmethod
    def of(cls, features: Tensor, targets: Tensor, classes: int) -> HeadSums:
        """Sums over a batch.

        Args:
            features: ``[B, D]``.
            targets: int64 ``[B]`` (multi-class) or 0/1 ``[B, classes]`` (multi-label).
            classes: Number of outputs.
        """
        x = torch.cat([features.double(), torch.ones(len(features), 1, dtype=torch.float64)], dim=1)
        multi_label = targets.ndim == 2
        if multi_label:
            member = torch.cat([targets.double(), torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
        else:
            member = torch.nn.functional.one_hot(targets.long(), classes).double()
        rows = [x[chosen] for chosen in member.T > 0.5]
        second = torch.stack([row.T @ row for row in rows])
        return cls(member.sum(0), member.T @ x, second, multi_label)

    @classmethod
    def from_tensors(cls, count: Tensor, first: Tensor, second: Tensor, classes: int) -> HeadSums:
        """Sums as a contribution holds them; a row more than classes means multi-label.

        Raises:
            ContributionError: They are no such sums: wrong shapes, not symmetric, or at odds with each other.
        """
        rows, width = first.shape if first.ndim == 2 else (-1, -1)
        if rows not in (classes, classes + 1) or count.shape != (rows,) or second.shape != (rows, width, width):
            raise ContributionError(
                f"head sums have shapes {tuple(count.shape)}, {tuple(first.shape)} and {tuple(second.shape)}; for "
                f"{classes} classes they are [K], [K, D+1] and [K, D+1, D+1] with K {classes}, multi-label one more."
            )
        sums = cls(count.double(), first.double(), second.double(), rows == classes + 1)
        sums._check()
        return sums

    def _check(self) -> None:
        size = self.second.diagonal(dim1=1, dim2=2).abs().amax(1).clamp(min=1) * _ROUNDING
        faults = {
            "hold values that are not finite": not all(
                bool(t.isfinite().all()) for t in (self.count, self.first, self.second)
            ),
            "have negative counts": bool((self.count < 0).any()),
            "are not symmetric": bool(((self.second - self.second.mT).abs().amax((1, 2)) > size).any()),
            "have negative sums of squares": bool((self.second.diagonal(dim1=1, dim2=2) < 0).any()),
            "do not count the same images": bool(((self.second[:, -1, -1] - self.count).abs() > size).any())
            or bool(((self.second[:, -1] - self.first).abs().amax(1) > size).any()),
        }
        for fault, found in faults.items():
            if found:
                raise ContributionError(f"head sums {fault}. Have the site make them anew; do not use these.")

    def __add__(self, other: HeadSums) -> HeadSums:
        """The sums over the images of both."""
        self._same_kind(other)
        return HeadSums(
            self.count + other.count, self.first + other.first, self.second + other.second, self.multi_label
        )

    def __sub__(self, other: HeadSums) -> HeadSums:
        """The sums without the images of ``other``, which must be among these."""
        self._same_kind(other)
        return HeadSums(
            self.count - other.count, self.first - other.first, self.second - other.second, self.multi_label
        )

    def _same_kind(self, other: HeadSums) -> None:
        if self.first.shape != other.first.shape or self.multi_label != other.multi_label:
            raise ContributionError(
                f"head sums of shapes {tuple(self.first.shape)} and {tuple(other.first.shape)} cannot be added: they "
                "were taken on different networks, or for different classes."
            )

    @property
    def classes(self) -> int:
        """Number of outputs."""
        return len(self.count) - self.multi_label

    def tensors(self) -> dict[str, Tensor]:
        """As a contribution holds them."""
        return {"count": self.count, "first": self.first, "second": self.second}


def solve_head(sums: HeadSums, settings: RidgeHead | LDAHead, kind: str) -> dict[str, Tensor]:
    """The last layer's ``weight`` ``[C, D]`` and ``bias`` ``[C]``, float64.

    Args:
        sums: Over all sites.
        settings: Which head.
        kind: Of the task: ``multi-class``, or ``multi-label``, where the last row of the sums is all images.
    """
    weight, bias = settings.solve(replace(sums, multi_label=kind == "multi-label"))
    return {"weight": weight, "bias": bias}


def solve_ridge(
    sums: HeadSums, gamma: float = 1e-2, balanced: bool = False, temperature: float = TEMPERATURE
) -> tuple[Tensor, Tensor]:
    """Least squares of 0/1 targets on features, slopes pulled towards zero, the intercept not.

    It minimises ``sum w_i |y_i - W x_i - b|^2 + gamma e |W|^2`` with ``e`` the mean eigenvalue of the features'
    weighted scatter about their mean. Multi-class logits are ``temperature * score``, multi-label ones
    ``temperature * (score - 0.5)``, so that a score of a half is a probability of a half. A class without images
    scores 0 throughout.

    Args:
        sums: Over all sites.
        gamma: Above 0, relative to the mean eigenvalue.
        balanced: Multi-class: an image of class c weighs ``n / (C n_c)``, with the counts of all sites and C the
            classes that have images. Multi-label: for each class, images with and without it weigh the same in all.
        temperature: Of the logits.

    Returns:
        Weight ``[C, D]`` and bias ``[C]``, float64.

    Raises:
        ContributionError: No images, or features that do not vary.
    """
    if sums.multi_label:
        solved = [_ridge(*_for_finding(sums, c, balanced), gamma) for c in range(sums.classes)]
        weight, bias = torch.cat([w for w, _ in solved]), torch.cat([b for _, b in solved])
        return temperature * weight, temperature * (bias - 0.5)
    weights = _balance(sums.count) if balanced else torch.ones_like(sums.count)
    second = torch.einsum("c,cij->ij", weights, sums.second)
    weight, bias = _ridge(second, weights[:, None] * sums.first, gamma)
    return temperature * weight, temperature * bias


def _balance(count: Tensor) -> Tensor:
    present = count > 0
    return torch.where(present, count.sum() / (present.sum() * count.clamp(min=1)), torch.zeros_like(count))


def _for_finding(sums: HeadSums, c: int, balanced: bool) -> tuple[Tensor, Tensor]:
    """Second moments ``[D+1, D+1]`` of all images and sums ``[1, D+1]`` of those with finding ``c``, weighted."""
    with_it = sums.count[c]
    pair = torch.stack([with_it, sums.count[-1] - with_it])
    have, lack = _balance(pair) if balanced else torch.ones(2, dtype=torch.float64)
    second = have * sums.second[c] + lack * (sums.second[-1] - sums.second[c])
    return second, have * sums.first[c : c + 1]


def _ridge(second: Tensor, targets: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Solve for slopes about the means, then place the intercept.

    Args:
        second: Weighted sum of ``x~ x~^T``, ``[D+1, D+1]``.
        targets: Weighted sums of ``y x~``, ``[C, D+1]``.
        gamma: Relative to the mean eigenvalue.
    """
    weight = second[-1, -1]
    if not weight > 0:
        raise ContributionError("the head sums hold no images. Add contributions with head sums.")
    mean, share = second[-1, :-1] / weight, targets[:, -1] / weight
    scatter = second[:-1, :-1] - weight * torch.outer(mean, mean)
    right = targets[:, :-1] - torch.outer(targets[:, -1], mean)
    slopes = _solve(scatter, right, gamma * _mean_eigenvalue(scatter))
    return slopes, share - slopes @ mean


def _mean_eigenvalue(scatter: Tensor) -> float:
    value = float(scatter.trace()) / len(scatter)
    if not (math.isfinite(value) and value > 0):
        raise ContributionError("the features of all images are the same: no head can be fitted to them.")
    return value


def _solve(matrix: Tensor, right: Tensor, added: float) -> Tensor:
    """``right @ (matrix + added I)^-1`` for a symmetric matrix with no negative eigenvalues."""
    shifted = (matrix + matrix.T) / 2 + added * torch.eye(len(matrix), dtype=matrix.dtype)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    if failed:
        raise ContributionError(
            "the head sums have no solution to working precision. Raise gamma (ridge) or shrinkage (lda)."
        )
    return torch.cholesky_solve(right.T, factor).T


def solve_lda(sums: HeadSums, shrinkage: float = 1e-2, prior: str = "uniform") -> tuple[Tensor, Tensor]:
    """Linear discriminants: ``w_c = S^-1 mu_c``, ``b_c = -mu_c^T S^-1 mu_c / 2 + log pi_c``.

    S is the covariance within classes, over all images, pulled towards ``trace(S) / D`` times the identity. With
    several findings an image each class has its own two groups, with and without it, and its logit is the difference
    of their discriminants.

    Args:
        sums: Over all sites.
        shrinkage: Share of the identity in S, above 0 and at most 1.
        prior: ``uniform``, which aims at balanced accuracy, or ``counts``: classes are as frequent as in the sums.

    Returns:
        Weight ``[C, D]`` and bias ``[C]``, float64.

    Raises:
        ContributionError: A class without images (or, with several findings, one that all images have).
    """
    if not sums.multi_label:
        return _discriminants(sums.count, sums.first, sums.second.sum(0), shrinkage, prior)
    solved = []
    for c in range(sums.classes):
        count = torch.stack([sums.count[c], sums.count[-1] - sums.count[c]])
        first = torch.stack([sums.first[c], sums.first[-1] - sums.first[c]])
        solved.append(_discriminants(count, first, sums.second[-1], shrinkage, prior))
    return torch.stack([w[0] - w[1] for w, _ in solved]), torch.stack([b[0] - b[1] for _, b in solved])


def _discriminants(count: Tensor, first: Tensor, second: Tensor, shrinkage: float, prior: str) -> tuple[Tensor, Tensor]:
    if absent := [k for k, n in enumerate(count.tolist()) if n <= 0]:
        raise ContributionError(
            f"no contribution has images of output {absent[0]} ({len(absent)} such): discriminants need images of "
            "every class. Use the ridge head, or wait for a site that has them."
        )
    images = count.sum()
    means = first[:, :-1] / count[:, None]
    within = (second[:-1, :-1] - (count[:, None] * means).T @ means) / images
    slopes = _solve((1 - shrinkage) * within, means, shrinkage * _mean_eigenvalue(within))
    bias = -0.5 * (slopes * means).sum(1)
    return slopes, bias + (count / images).log() if prior == "counts" else bias


def add_all(parts: Sequence[HeadSums]) -> HeadSums:
    """The sums over all images of several sites, added in the order given."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
