"""Classification: one class an image, or any number of findings an image."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FOCAL_GAMMA = 2.0


def focal_loss(logits: Tensor, targets: Tensor, gamma: float = FOCAL_GAMMA) -> Tensor:
    """Return the softmax focal loss ``mean of (1 - p)^gamma * -log p``, p the probability of the true class.

    With gamma 0 it is cross-entropy.

    Args:
        logits: ``[B, K]`` or ``[B, K, *spatial]``.
        targets: int64 ``[B]`` or ``[B, *spatial]``.
        gamma: How strongly easy images are discounted.

    References:
        Lin et al., ICCV 2017 (arXiv 1708.02002), eq. 4; MONAI's FocalLoss also divides by the number of classes.
    """
    cross_entropy = F.cross_entropy(logits, targets, reduction="none")
    return ((1 - (-cross_entropy).exp()).pow(gamma) * cross_entropy).mean()


def logit_adjustment(counts: Tensor, tau: float) -> Tensor:
    """What is added to the logits in training: ``tau * log pi``, pi the class frequencies with 0.5 added to each count.

    Args:
        counts: Images per class, ``[K]``; need not be whole.
        tau: 1 is balanced softmax.

    References:
        Menon et al., ICLR 2021 (arXiv 2007.07314), eq. 10; Ren et al., NeurIPS 2020 (arXiv 2007.10740). The half image
        per class keeps classes that a site does not hold finite (ours).
    """
    smoothed = counts.double() + 0.5
    return (tau * (smoothed / smoothed.sum()).log()).float()


def fedlc_margins(counts: Tensor, tau: float) -> Tensor:
    """What is added to the logits in training: ``-tau * n_c^(-1/4)``, and minus infinity for classes without images.

    Args:
        counts: Images per class, ``[K]``; need not be whole.
        tau: How much rare classes are favoured.

    References:
        Zhang et al., ICML 2022 (arXiv 2209.00189), eq. 9.
    """
    margins = -tau * counts.double().clamp(min=1e-12).pow(-0.25)
    return margins.masked_fill(counts <= 0, -torch.inf).float()


@dataclass(frozen=True, slots=True, eq=False)
class MultiClass:
    """One class an image: softmax; cross-entropy, focal loss, or cross-entropy with a shift of the logits by class.

    Attributes:
        prior: What the shift is made from the class counts of a training set: nothing, logit adjustment or FedLC.
        tau: Strength of the shift.
        shift: The shift ``[K]``, in training among images whose counts are known.
    """

    classes: tuple[str, ...]
    focal: bool = False
    prior: Literal["", "logit-adjusted", "fedlc"] = ""
    tau: float = 1.0
    shift: Tensor | None = None
    kind: str = "multi-class"

    def among(self, counts: Tensor) -> MultiClass:
        """The task as training among images with these class counts sees it."""
        if not self.prior:
            return self
        make = logit_adjustment if self.prior == "logit-adjusted" else fedlc_margins
        return replace(self, shift=make(counts, self.tau))

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss; ``logits`` [B, K], ``targets`` int64 [B]."""
        if self.focal:
            return focal_loss(logits.float(), targets)
        if self.shift is not None:
            return F.cross_entropy(logits.float() + self.shift.to(logits.device), targets)
        return F.cross_entropy(logits.float(), targets)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return probabilities [B, K] that sum to 1."""
        return logits.float().softmax(1)

    def predict(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return probabilities [B, K]."""
        return self.probabilities(model(images))


@dataclass(frozen=True, slots=True)
class MultiLabel:
    """Any number of findings an image: one sigmoid a class, binary cross-entropy or its focal form."""

    classes: tuple[str, ...]
    focal: bool = False
    kind: str = "multi-label"

    def among(self, counts: Tensor) -> MultiLabel:
        """The same: no loss of this task looks at class counts."""
        return self

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean over images and classes; ``targets`` 0/1 [B, K]."""
        logits, targets = logits.float(), targets.float()
        if not self.focal:
            return F.binary_cross_entropy_with_logits(logits, targets)
        cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return ((1 - (-cross_entropy).exp()).pow(FOCAL_GAMMA) * cross_entropy).mean()

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return probabilities [B, K], each class for itself."""
        return logits.float().sigmoid()

    def predict(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return probabilities [B, K]."""
        return self.probabilities(model(images))
