"""Classification: one class an image, or any number of findings an image."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class MultiClass:
    """One class an image: softmax, cross-entropy or focal loss."""

    classes: tuple[str, ...]
    focal: bool = False
    kind: str = "multi-class"

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss; ``logits`` [B, K], ``targets`` int64 [B]."""
        if self.focal:
            return focal_loss(logits.float(), targets)
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
