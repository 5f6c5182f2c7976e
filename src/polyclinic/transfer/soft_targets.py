"""Soft targets: what one network says of an image, softened, as the goal of another.

Hinton, Vinyals, Dean: Distilling the knowledge in a neural network. 2015. arXiv 1503.02531. The form for findings that
do not exclude each other, a Bernoulli divergence for each, is ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def soft(logits: Tensor, temperature: float, multi_label: bool) -> Tensor:
    """Probabilities at a temperature.

    Args:
        logits: ``[..., K]``, any floating type; computed in float32 at least.
        temperature: Above 0; 1 changes nothing, more is softer.
        multi_label: A sigmoid for each class, instead of the softmax over them.

    Returns:
        ``[..., K]`` in float32, or float64 for such logits.
    """
    scaled = _wide(logits) / temperature
    return scaled.sigmoid() if multi_label else scaled.softmax(-1)


def distillation(logits: Tensor, targets_probabilities: Tensor, temperature: float, multi_label: bool) -> Tensor:
    """``T² KL(targets || soft(logits))``: zero where both agree, never negative but for rounding.

    The factor keeps gradients of the same size whatever the temperature (Hinton et al., section 2).

    Args:
        logits: Of the network that learns, ``[..., K]``; gradients flow into these alone.
        targets_probabilities: ``[..., K]``, made by ``soft`` at the same temperature, or a mean of such.
        temperature: Above 0.
        multi_label: The Bernoulli divergence, averaged over classes as the binary cross-entropy is; else that of the
            distributions over classes.

    Returns:
        A scalar: the mean over all but the class axis.
    """
    scaled, targets = _wide(logits) / temperature, targets_probabilities.detach()
    targets = targets.to(scaled.dtype)
    if multi_label:
        cross = F.binary_cross_entropy_with_logits(scaled, targets, reduction="none")
        gap: Tensor = cross - torch.special.entr(targets) - torch.special.entr(1 - targets)
    else:
        gap = -(targets * scaled.log_softmax(-1) + torch.special.entr(targets)).sum(-1)
    return gap.mean() * temperature**2


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
