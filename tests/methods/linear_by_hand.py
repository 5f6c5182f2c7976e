"""The toys' linear network, its training and its public images, written out a second time."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from polyclinic.data.dataset import SiteData
from polyclinic.data.proxies import load_proxies
from polyclinic.runner import Run
from polyclinic.study import Study

LR = 0.1
Weights = list[Tensor]
"""``[2, 16]`` and ``[2]``."""


def start(run: Run) -> Weights:
    return [run.bench.initial[name].clone() for name in ("1.weight", "1.bias")]


def own_images(data: SiteData) -> tuple[Tensor, Tensor]:
    """Pixels as the network gets them, and classes, of the training images."""
    return ((data.images[data.splits["train"]] - 0.5) / 0.25).flatten(1), data.labels("train")


def public(study: Study) -> Tensor:
    """Pixels of all public images, in the manifest's order; losses are means, so that the order does not matter."""
    return ((load_proxies(study).images.float() / 255 - 0.5) / 0.25).flatten(1)


def scores(weights: Weights, inputs: Tensor) -> Tensor:
    return inputs @ weights[0].T + weights[1]


def descended(weights: Weights, loss: Callable[[Weights], Tensor], lr: float = LR) -> Weights:
    """One step of gradient descent."""
    leaves = [tensor.clone().requires_grad_() for tensor in weights]
    slopes = torch.autograd.grad(loss(leaves), leaves)
    return [tensor - lr * slope for tensor, slope in zip(weights, slopes, strict=True)]


def trained_alone(weights: Weights, data: SiteData) -> Weights:
    """One step on all of a site's images."""
    inputs, classes = own_images(data)
    return descended(weights, lambda w: F.cross_entropy(scores(w, inputs), classes))


def close(found: dict[str, Tensor], wanted: Weights) -> None:
    torch.testing.assert_close([found["1.weight"], found["1.bias"]], wanted, rtol=1e-5, atol=1e-6)


def naive_kl(goal: Tensor, own: Tensor) -> Tensor:
    """Mean over rows of ``sum p log (p / q)`` of probabilities."""
    total = own.new_zeros(())
    for p, q in zip(goal, own, strict=True):
        total = total + sum((a * (a / b).log() for a, b in zip(p, q, strict=True)), own.new_zeros(()))
    return total / len(own)
