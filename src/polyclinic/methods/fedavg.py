"""Federated averaging: sites train the global model locally, the server averages what training changed.

McMahan, Moore, Ramage, Hampson, Agüera y Arcas: Communication-efficient learning of deep networks from decentralized
data. AISTATS 2017, Algorithm 1. arXiv 1602.05629.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Site
from polyclinic.federation.state import ServerState
from polyclinic.methods.base import TRAINED, Leaf, Method, MethodParams, Op, draw_cohort, keep_local, load_global
from polyclinic.secure.sum import SecureSum
from polyclinic.training import AdjustGradients, StepRule, plain_step

UPDATE = (Leaf("update", "sum", "images", lanes=16), *TRAINED)


class FedAvgParams(MethodParams):
    """Settings of fedavg."""

    name: Literal["fedavg"] = "fedavg"
    server_lr: float = Field(1.0, ge=0)
    """Share of the mean update that the server applies."""


class FedAvg(Method):
    """w ← w + server_lr · Σₖ nₖ (wₖ − w) / Σₖ nₖ."""

    Params = FedAvgParams
    title = "federated averaging"
    reference = "McMahan et al., AISTATS 2017, arXiv 1602.05629"

    def server(self, channel: Channel, state: ServerState, sums: SecureSum) -> Iterator[None]:
        """Send the model, average the updates, repeat."""
        yield from average_rounds(self, channel, state, sums, server_lr=self.study.method.server_lr)

    def ops(self) -> dict[str, Op]:
        """One op: train the received model."""
        return {"train": Op(train_global, UPDATE)}


def average_rounds(
    method: Method, channel: Channel, state: ServerState, sums: SecureSum, *, server_lr: float = 1.0
) -> Iterator[None]:
    """The server's side of every method that averages the updates of an op called ``train``."""
    for number in state.rounds(method.study.method.rounds):
        cohort = draw_cohort(method.study, channel.sites, number)
        message = Message.pack({"model": state.groups["model"]})
        total = sums.sum(channel, "train", dict.fromkeys(cohort, message))
        state.groups["model"] = add_update(state.groups["model"], total.mean("update"), server_lr)
        yield


def add_update(model: dict[str, Tensor], update: dict[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
    """``model + scale * update``, added in float64 where the model is and rounded once to its type.

    Args:
        model: By name.
        update: The same names; a hidden sum's lies on the CPU, wherever the model is.
        scale: Factor of the update.
    """
    return {n: torch.add(t, update[n].to(t.device), alpha=scale).to(t.dtype) for n, t in model.items()}


def train_global(site: Site, message: Message) -> Message:
    """The site's side: load the received model, train it, answer with what changed."""
    return train_from(site, load_global(site, message))


def train_from(
    site: Site,
    received: dict[str, Tensor],
    adjust: AdjustGradients | None = None,
    *,
    steps: int | None = None,
    lr: float | None = None,
    only: Collection[str] | None = None,
    rule: StepRule = plain_step,
) -> Message:
    """Train the loaded network, as ``Site.train`` does, and answer with the weighted update since ``received``."""
    result = site.train(adjust=adjust, steps=steps, lr=lr, only=only, rule=rule)
    keep_local(site, received)
    return Message.pack({"update": site.update(received)}, loss=result.loss, **{"weight/update": site.weight})
