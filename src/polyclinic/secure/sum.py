"""The weighted sum over sites that every averaging method asks for, and its plain backend."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from polyclinic.errors import SiteError
from polyclinic.federation.answers import nobody
from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message, Scalar


@dataclass(frozen=True)
class Total:
    """Weighted sums over the sites that answered.

    Attributes:
        sums: ``{group: {name: sum_k w_k x_k}}`` in float64.
        weights: ``{group: sum_k w_k}``.
        scalars: What each site said beside its arrays.
    """

    sums: dict[str, dict[str, Tensor]]
    weights: dict[str, float]
    scalars: dict[str, Mapping[str, Scalar]]

    def mean(self, group: str) -> dict[str, Tensor]:
        """``sum_k w_k x_k / sum_k w_k`` of a group, float64.

        Raises:
            SiteError: The weights add up to zero.
        """
        if self.weights[group] == 0:
            raise SiteError(
                f"the sites' weights of {group!r} add up to zero: there is no mean. Check aggregation.weight."
            )
        tensors = list(self.sums[group].values())
        means = torch._foreach_div(tensors, self.weights[group])
        return dict(zip(self.sums[group], means, strict=True))


class SecureSum(Protocol):
    """Runs an op at sites and gives the server the weighted sum of their arrays; a method can't tell which backend ran.

    A site answers with groups of arrays and, for each group, a scalar ``weight/<group>`` (not negative).
    """

    incidents: list[str]
    """What was refused and repeated since this list was last emptied."""

    def sum(self, channel: Channel, op: str, messages: Mapping[str, Message]) -> Total:
        """Call ``op`` with these messages and sum each group of the replies.

        Raises:
            SiteError: No site answered, or one with a weight below zero or with other arrays than the rest.
        """


class PlainSum:
    """The reference backend: the server sees each update.

    Memory: one reply and one float64 accumulator, whatever the number of sites. Sites are added in the order of the
    roster, so the order in which they answer does not matter.
    """

    def __init__(self) -> None:
        self.incidents: list[str] = []

    def sum(self, channel: Channel, op: str, messages: Mapping[str, Message]) -> Total:
        """Add up replies as they come."""
        sums: dict[str, dict[str, Tensor]] = {}
        weights: dict[str, float] = {}
        scalars: dict[str, Mapping[str, Scalar]] = {}
        for site, reply in channel.stream(op, messages):
            scalars[site] = reply.scalars
            for group in reply.groups():
                weight = _weight(site, group, reply)
                weights[group] = weights.get(group, 0.0) + weight
                arrays = reply.group(group)
                if group not in sums:
                    sums[group] = {name: torch.zeros_like(a, dtype=torch.float64) for name, a in arrays.items()}
                into = sums[group]
                _check_alike(site, group, into, arrays)
                # One tensor is widened to float64 at a time; a list of widened copies would cost more than the sum.
                torch._foreach_add_([into[n] for n in arrays], list(arrays.values()), alpha=weight)
                del arrays
            del reply  # before the next site trains
        if not scalars:
            raise nobody(channel, op)
        return Total(sums, weights, scalars)


def _weight(site: str, group: str, reply: Message) -> float:
    weight = float(reply.scalars.get(f"weight/{group}", math.nan))
    if not (math.isfinite(weight) and weight >= 0):
        raise SiteError(f"site {site!r} gave {group!r} the weight {weight}; it must be a number of at least zero.")
    return weight


def _check_alike(site: str, group: str, wanted: Mapping[str, Tensor], arrays: Mapping[str, Tensor]) -> None:
    shapes, own = ({n: tuple(a.shape) for n, a in part.items()} for part in (wanted, arrays))
    if shapes != own:
        name = next(n for n in {**shapes, **own} if shapes.get(n) != own.get(n))
        raise SiteError(
            f"site {site!r} answered {group}/{name} with shape {own.get(name)}, sites before it with "
            f"{shapes.get(name)}. Networks must be alike to be averaged."
        )
