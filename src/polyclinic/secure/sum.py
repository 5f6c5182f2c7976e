"""The weighted sum over sites that every averaging method asks for, and its plain backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from polyclinic.errors import SiteError
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
        """``sum_k w_k x_k / sum_k w_k`` of a group, float64."""
        tensors = list(self.sums[group].values())
        means = torch._foreach_div(tensors, self.weights[group])
        return dict(zip(self.sums[group], means, strict=True))


class SecureSum(Protocol):
    """Runs an op at sites and gives the server the weighted sum of their arrays; a method can't tell which backend ran.

    A site answers with groups of arrays and, for each group, a scalar ``weight/<group>`` (not negative).
    """

    def sum(self, channel: Channel, op: str, messages: Mapping[str, Message]) -> Total:
        """Call ``op`` with these messages and sum each group of the replies.

        Raises:
            SiteError: No site answered.
        """


class PlainSum:
    """The reference backend: the server sees each update.

    Memory: one reply and one float64 accumulator, whatever the number of sites. Sites are added in the order of the
    roster, so the order in which they answer does not matter.
    """

    def sum(self, channel: Channel, op: str, messages: Mapping[str, Message]) -> Total:
        """Add up replies as they come."""
        sums: dict[str, dict[str, Tensor]] = {}
        weights: dict[str, float] = {}
        scalars: dict[str, Mapping[str, Scalar]] = {}
        for site, reply in channel.stream(op, messages):
            scalars[site] = reply.scalars
            for group in reply.groups():
                weight = float(reply.scalars[f"weight/{group}"])
                weights[group] = weights.get(group, 0.0) + weight
                arrays = reply.group(group)
                if group not in sums:
                    sums[group] = {name: torch.zeros_like(a, dtype=torch.float64) for name, a in arrays.items()}
                into = sums[group]
                torch._foreach_add_([into[n] for n in arrays], [a.double() for a in arrays.values()], alpha=weight)
        if not scalars:
            reasons = "; ".join(f"{site}: {reason}" for site, reason in channel.absent.items())
            raise SiteError(f"no site answered {op!r} in round {channel.round} ({reasons or 'none was asked'}).")
        return Total(sums, weights, scalars)
