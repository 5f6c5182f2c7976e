"""Federated averaging as one would write it by hand for a single experiment: torch and nothing else.

It holds the images as they were decoded, normalises a batch when it is needed, keeps one network, and averages as it
goes. What it leaves out is what Polyclinic is for: no checkpoint, no record, no guard over what leaves a site.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class PlainSite:
    """One site's training images, uint8 ``(N, C, H, W)`` or float in 0..1, and class indices ``(N,)``."""

    images: Tensor
    targets: Tensor
    share: float
    """Of the average; shares sum to one."""


@dataclass
class Recipe:
    """What all sites share."""

    lr: float
    mean: float
    std: float


def plain_round(
    model: nn.Module,
    weights: dict[str, Tensor],
    sites: Sequence[PlainSite],
    orders: Sequence[Sequence[Tensor]],
    recipe: Recipe,
) -> dict[str, Tensor]:
    """Train each site from ``weights`` on its batches and return the average of what came out.

    Args:
        model: The one network.
        weights: A ``state_dict``.
        sites: In the order of ``orders``.
        orders: Positions of each batch of each site.
        recipe: Learning rate and normalisation.
    """
    average = {name: torch.zeros_like(t) if t.is_floating_point() else t for name, t in weights.items()}
    for site, batches in zip(sites, orders, strict=True):
        model.load_state_dict(weights)
        train_site(model, site, batches, recipe)
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if tensor.is_floating_point():
                    average[name].add_(tensor, alpha=site.share)
    return average


def train_site(model: nn.Module, site: PlainSite, batches: Sequence[Tensor], recipe: Recipe) -> float:
    """One epoch of SGD; returns the mean loss."""
    model.train()
    # fused is the fastest there is, and what Polyclinic uses: a slower optimiser would flatter the comparison.
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.lr, fused=True)
    unit = 255.0 if site.images.dtype == torch.uint8 else 1.0
    total, seen = 0.0, 0
    for indices in batches:
        # Rounded as in Polyclinic: ResNet-18 with batch normalisation makes much of the last bit within a few steps.
        inputs = site.images[indices].float().mul_(1 / (unit * recipe.std)).sub_(recipe.mean / recipe.std)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), site.targets[indices])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total, seen = total + loss.item() * len(indices), seen + len(indices)
    return total / seen
