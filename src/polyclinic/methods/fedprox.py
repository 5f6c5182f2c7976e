"""FedProx: local training is held near the global model by a proximal term.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith: Federated optimization in heterogeneous networks. MLSys 2020, Algorithm 2.
arXiv 1812.06127.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Site
from polyclinic.federation.state import ServerState
from polyclinic.methods.base import Method, MethodParams, Op, load_global
from polyclinic.methods.fedavg import UPDATE, average_rounds, train_from
from polyclinic.secure.sum import SecureSum
from polyclinic.training import AdjustGradients, trained_parameters


class FedProxParams(MethodParams):
    """Settings of fedprox."""

    name: Literal["fedprox"] = "fedprox"
    mu: float = Field(0.01, ge=0)
    """Strength of the proximal term; 0 is fedavg."""


class FedProx(Method):
    """Each site minimises Fₖ(w) + μ/2 ‖w − w_global‖²."""

    Params = FedProxParams
    title = "averaging with a proximal term"
    reference = "Li et al., MLSys 2020, arXiv 1812.06127"

    def server(self, channel: Channel, state: ServerState, sums: SecureSum) -> Iterator[None]:
        """As in fedavg."""
        yield from average_rounds(self, channel, state, sums)

    def ops(self) -> dict[str, Op]:
        """One op: train the received model near itself."""
        return {"train": Op(self.train, UPDATE)}

    def train(self, site: Site, message: Message) -> Message:
        """Train with the proximal gradient μ (w − w_global) added."""
        received = load_global(site, message)
        return train_from(site, received, proximal(site.model, received, self.study.method.mu))


def proximal(model: nn.Module, anchor: Mapping[str, Tensor], strength: float) -> AdjustGradients:
    """Adds ``strength * (w - anchor)`` to the gradients of the parameters that ``anchor`` names."""
    named = [(i, anchor[name]) for i, name in enumerate(trained_parameters(model)) if name in anchor]
    positions, points = [i for i, _ in named], [point for _, point in named]

    @torch.no_grad()
    def adjust(parameters: list[Tensor], gradients: list[Tensor]) -> None:
        distance = torch._foreach_sub([parameters[i] for i in positions], points)
        torch._foreach_add_([gradients[i] for i in positions], distance, alpha=strength)

    return adjust
