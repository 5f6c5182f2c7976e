"""The toys' networks of linear layers, their training and their public images, written out a second time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from toys import IMAGES

from polyclinic.data.dataset import SiteData
from polyclinic.data.proxies import load_proxies
from polyclinic.runner import Run
from polyclinic.study import Study

LR = 0.1
NAMES = ("1.weight", "1.bias", "2.weight", "2.bias")
"""Tensors of ``toys:two_layers``: body and head; ``toys:linear`` has the first two."""
Weights = list[Tensor]
"""In this order: ``[2, 16]`` and ``[2]``, or ``[3, 16]``, ``[3]``, ``[2, 3]`` and ``[2]``."""


def start(run: Run) -> Weights:
    return [run.bench.initial[name].clone() for name in NAMES if name in run.bench.initial]


def own_images(data: SiteData) -> tuple[Tensor, Tensor]:
    """Pixels as the network gets them, and classes, of the training images."""
    return ((data.images[data.splits["train"]] - 0.5) / 0.25).flatten(1), data.labels("train")


def public(study: Study) -> Tensor:
    """Pixels of all public images, in the manifest's order; losses are means, so that the order does not matter."""
    return ((load_proxies(study).images.float() / 255 - 0.5) / 0.25).flatten(1)


def scores(weights: Weights, inputs: Tensor) -> Tensor:
    """Of one layer or of several, with nothing between them."""
    for weight, bias in zip(weights[::2], weights[1::2], strict=True):
        inputs = inputs @ weight.T + bias
    return inputs


def leaves(weights: Weights) -> Weights:
    """Copies at which gradients are taken."""
    return [tensor.clone().requires_grad_() for tensor in weights]


def stepped(at: Weights, loss: Tensor, lr: float = LR) -> Weights:
    """One step of gradient descent from leaves."""
    slopes = torch.autograd.grad(loss, at)
    return [(tensor - lr * slope).detach() for tensor, slope in zip(at, slopes, strict=True)]


def descended(weights: Weights, loss: Callable[[Weights], Tensor], lr: float = LR) -> Weights:
    """One step of gradient descent."""
    at = leaves(weights)
    return stepped(at, loss(at), lr)


def fitted(weights: Weights, inputs: Tensor, classes: Tensor, lr: float = LR) -> Weights:
    """One step down the cross-entropy of all these."""
    return descended(weights, lambda w: F.cross_entropy(scores(w, inputs), classes), lr)


def trained_alone(weights: Weights, data: SiteData) -> Weights:
    """One step on all of a site's images."""
    return fitted(weights, *own_images(data))


def averaged(own: Mapping[str, Weights]) -> Weights:
    """The mean over the toy sites, by training images."""
    total = sum(IMAGES[site] for site in own)
    parts = [[IMAGES[site] / total * tensor for tensor in weights] for site, weights in own.items()]
    return [torch.stack(tensors).sum(0) for tensors in zip(*parts, strict=True)]


def close(found: Mapping[str, Tensor], wanted: Weights, rtol: float = 1e-5) -> None:
    """As many of the tensors as there are wanted ones."""
    torch.testing.assert_close([found[name] for name in NAMES[: len(wanted)]], wanted, rtol=rtol, atol=1e-6)


def naive_kl(goal: Tensor, own: Tensor) -> Tensor:
    """Mean over rows of ``sum p log (p / q)`` of probabilities."""
    total = own.new_zeros(())
    for p, q in zip(goal, own, strict=True):
        total = total + sum((a * (a / b).log() for a, b in zip(p, q, strict=True)), own.new_zeros(()))
    return total / len(own)
