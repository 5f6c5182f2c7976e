"""Averaging a network whose class and device vectors only some sites own: both sides of one sum.

Group ``body``: what training changed of all layers, weighed as any update. Group ``rows``, of weight one: for each
class and device its weight at the site, and its vector's change times that weight. So any secure sum will do, and the
server divides one sum by the other.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyclinic.errors import SiteError
from polyclinic.federation.message import Message, Scalar
from polyclinic.federation.site import Leaf
from polyclinic.secure.sum import Total
from polyclinic.synthesis.vae import ROWS, Lines

LEAVES = (
    Leaf("body", "sum", "images", lanes=16),
    # 64 bits: a device's vector counts as often as the site has images, which outgrows any bound that suits weights.
    Leaf("rows", "sum", "images", lanes=64),
    Leaf("weight/*", "scalar", "counts"),
)


def own_weights(lines: Lines, shape: tuple[int, int]) -> tuple[float, list[Tensor]]:
    """The number of images, and of each class the root of its images, of each device the number of its images.

    Args:
        lines: The site's.
        shape: Classes and devices.
    """
    classes, devices = (
        torch.bincount(column.cpu(), minlength=count).double()
        for column, count in zip((lines.labels, lines.devices), shape, strict=True)
    )
    return float(len(lines)), [classes.sqrt(), devices]


def equal_weights(lines: Lines, shape: tuple[int, int]) -> tuple[float, list[Tensor]]:
    """One for everything, zero at a site without images: which classes it owns, and how many, is private."""
    weight = 1.0 if len(lines) else 0.0
    return weight, [torch.full((count,), weight, dtype=torch.float64) for count in shape]


def weighed(update: Mapping[str, Tensor], weights: tuple[float, list[Tensor]], said: Mapping[str, Scalar]) -> Message:
    """A site's answer.

    Args:
        update: What training changed, by parameter name.
        weights: Of layers; of classes and of devices.
        said: Scalars beside it.
    """
    rows: dict[str, Tensor] = {}
    for name, own in zip(ROWS, weights[1], strict=True):
        rows[name] = own[:, None] * update[name].double()
        rows[f"{name}_weight"] = own
    body = {name: tensor for name, tensor in update.items() if name not in ROWS}
    return Message.pack({"body": body, "rows": rows}, **said, **{"weight/body": weights[0], "weight/rows": 1.0})


def averaged(model: Mapping[str, Tensor], total: Total) -> dict[str, Tensor]:
    """The network after a round: one mean of all layers, and one of each row over the sites that own it.

    Args:
        model: Before.
        total: Sums of ``body`` and ``rows`` over the sites.

    Raises:
        SiteError: No site has an image to train on.
    """
    if total.weights["body"] == 0:
        raise SiteError(
            "the generator has nothing to train on: no site has a class with synthesis.floor training patients on one "
            "device. Lower synthesis.floor, or leave the generator out."
        )
    change, rows = total.mean("body"), total.sums["rows"]
    for name in ROWS:
        weight = rows[f"{name}_weight"][:, None]
        # An image weighs 1 at least; what is less comes from sums that are not exact.
        change[name] = torch.where(weight > 0.5, rows[name] / weight.clamp(min=0.5), 0.0)
    return {name: (tensor.cpu().double() + change[name].cpu()).to(tensor.dtype) for name, tensor in model.items()}
