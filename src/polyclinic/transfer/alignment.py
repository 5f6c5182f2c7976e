"""How far two sets of features are apart, and how a network is drawn to bring them together.

The features are those of a site's own images and of public ones. Their label spaces differ, so full agreement is not
even wanted: all of these are meant as small terms beside a task. Nothing here needs more memory than the square of a
batch. MK-MMD and CORAL see features of length one. Of features as they are, the cheapest way to bring two sets together
is to shrink all of them to one point, and kernels as wide as the distances at hand pull the harder the smaller these
get: small networks then forget every difference between images, and the task with it.

- MK-MMD: Gretton et al., JMLR 2012, the biased estimator; five kernels, as Long et al., ICML 2015 (arXiv 1502.02791)
  use them, but of fixed widths.
- CORAL: Sun and Saenko, ECCV 2016 workshops (arXiv 1607.01719); the distance of the means beside it is ours.
- DANN: Ganin et al., JMLR 2016 (arXiv 1505.07818).
- Supervised contrast: Khosla et al., NeurIPS 2020 (arXiv 2004.11362), with classes tied as in VHL (Tang et al., ICML
  2022, arXiv 2206.02465).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kind = Literal["mmd", "coral", "dann", "supcon", "none"]
BANDWIDTHS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Of the kernels, squared distances; about 2, that of two unrelated features of length one."""
CONTRAST_TEMPERATURE = 0.07
INSIDE = 0.1
"""What the contrast among public images alone weighs (VHL)."""


def mk_mmd(first: Tensor, second: Tensor) -> Tensor:
    """Squared distance of two mean embeddings under a sum of five Gaussian kernels; biased, so never negative.

    ``mean K(x, x') + mean K(y, y') − 2 mean K(x, y)`` with ``K = Σₛ exp(−d² / s)`` over ``BANDWIDTHS``.

    Args:
        first: ``[n, F]``, of length one: the widths are made for such.
        second: ``[m, F]``; n and m need not be equal.

    Returns:
        A scalar in 0..10.
    """
    both = torch.cat([first, second])
    squares = both.square().sum(1)
    distances = (squares[:, None] + squares[None] - 2 * both @ both.T).clamp(min=0)
    kernels = sum((torch.exp(distances / -width) for width in BANDWIDTHS), torch.zeros_like(distances))
    # One quadratic form in +1/n and -1/m: what is left of rounding alone can lie below zero.
    signs = both.new_full((len(both),), 1 / len(first))
    signs[len(first) :] = -1 / len(second)
    return (signs @ kernels @ signs).clamp(min=0)


def coral(first: Tensor, second: Tensor) -> Tensor:
    """Squared Frobenius distance of the covariances over ``4 F²``, plus the squared distance of the means.

    Args:
        first: ``[n, F]``, n ≥ 2.
        second: ``[m, F]``, m ≥ 2.
    """
    gap = (torch.cov(first.T) - torch.cov(second.T)).square().sum() / (4 * first.shape[1] ** 2)
    return gap + (first.mean(0) - second.mean(0)).square().sum()


class _Reversed(torch.autograd.Function):
    """The identity, whose gradient is turned around and scaled."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * grads[0], None


class DomainJudge(nn.Module):
    """Tells own from public features; what it learns, the features unlearn."""

    def __init__(self, features: int, hidden: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, first: Tensor, second: Tensor, strength: float) -> Tensor:
        """Mean binary cross-entropy of the judge, each set counting half.

        The judge's own gradient is that of this loss; features get ``−strength`` times theirs.

        Args:
            first: ``[n, F]``, which the judge is to call 1.
            second: ``[m, F]``, 0.
            strength: How hard features are pushed to deceive it.
        """
        ours, theirs = (self.layers(_reversed(part, strength)).squeeze(1) for part in (first, second))
        return (F.softplus(-ours).mean() + F.softplus(theirs).mean()) / 2


def _reversed(features: Tensor, strength: float) -> Tensor:
    turned: Tensor = _Reversed.apply(features, strength)  # type: ignore[no-untyped-call]
    return turned


def supervised_contrast(first: Tensor, second: Tensor, labels: Tensor, public: Tensor) -> Tensor:
    """Features of an image lie near those of its class, and of the public class that its class is tied to.

    Public class j is tied to class j of the study, an arbitrary choice that VHL makes as well. Public features are
    fixed goals for the site's own; among themselves public features contrast with weight 0.1.

    Args:
        first: Own features ``[n, F]``.
        second: Public features ``[m, F]``.
        labels: Classes of the own images, int64 ``[n]``.
        public: Classes of the public images, int64 ``[m]``.
    """
    ours, theirs = F.normalize(first), F.normalize(second)
    goals, classes = torch.cat([ours, theirs.detach()]), torch.cat([labels, public])
    return _contrast(ours, labels, goals, classes) + INSIDE * _contrast(theirs, public, theirs, public)


def _contrast(anchors: Tensor, classes: Tensor, others: Tensor, theirs: Tensor) -> Tensor:
    """Supervised contrast of anchors, the first of ``others``, with the rest; anchors without a like are left out."""
    likeness = anchors @ others.T / CONTRAST_TEMPERATURE
    itself = torch.eye(*likeness.shape, dtype=torch.bool, device=likeness.device)
    shares = likeness.masked_fill(itself, -torch.inf).log_softmax(1)
    same = (classes[:, None] == theirs[None]) & ~itself
    likes = same.sum(1)
    each = -torch.where(same, shares, 0.0).sum(1) / likes.clamp(min=1)
    return each.sum() / (likes > 0).sum().clamp(min=1)


def make_judge(kind: Kind, features: int) -> nn.Module | None:
    """What an alignment trains of its own: the judge of dann, else None."""
    return DomainJudge(features) if kind == "dann" else None


def aligned(
    kind: Kind, own: tuple[Tensor, Tensor], public: tuple[Tensor, Tensor], strength: float, judge: nn.Module | None
) -> Tensor:
    """What an alignment adds to the loss; computed in 32 bits at least, of features of length one for mmd and coral.

    Args:
        kind: Which; ``none`` adds zero.
        own: Features ``[n, F]`` and targets of a site's images.
        public: Features ``[m, F]`` and classes of public images.
        strength: γ: it multiplies the loss; with dann, the gradient that features get.
        judge: Of ``make_judge``.
    """
    first, second = (part[0] if part[0].dtype == torch.float64 else part[0].float() for part in (own, public))
    if kind == "none":
        return first.new_zeros(())
    if kind == "dann":
        assert judge is not None
        found: Tensor = judge(first, second, strength)
        return found
    if kind == "supcon":
        return strength * supervised_contrast(first, second, own[1], public[1])
    return strength * (mk_mmd if kind == "mmd" else coral)(F.normalize(first), F.normalize(second))
