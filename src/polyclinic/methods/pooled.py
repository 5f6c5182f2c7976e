"""Pooled training: all images in one place. What no consortium may do, and the bound that methods are measured against.

Simulation only. A round sees as many images as all sites of fedavg with full participation see together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from polyclinic.errors import StudyError
from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Site
from polyclinic.federation.state import ServerState
from polyclinic.methods.base import Method, MethodParams, Op, load_global
from polyclinic.methods.fedavg import UPDATE, add_update, train_from
from polyclinic.secure.sum import SecureSum
from polyclinic.study import Study

POOLED_SITE = "pooled"
"""The hidden site with the training images of all sites; the runner makes it for methods that are simulation only."""


class PooledParams(MethodParams):
    """Settings of pooled."""

    name: Literal["pooled"] = "pooled"


class Pooled(Method):
    """Ordinary training on the union of the sites."""

    Params = PooledParams
    title = "all images in one place (upper bound)"
    reference = "baseline"
    exchanges = False
    needs = "model.norm other than batch-local"
    simulation_only = True

    @classmethod
    def check(cls, study: Study) -> None:
        """Running statistics of one place cannot be local to several."""
        if study.model.norm == "batch-local":
            raise StudyError("method pooled has no sites to keep model.norm batch-local statistics. Use norm: batch.")

    def server(self, channel: Channel, state: ServerState, sums: SecureSum) -> Iterator[None]:
        """Let the pooled site train on."""
        for _ in state.rounds(self.study.method.rounds):
            message = Message.pack({"model": state.groups["model"]}, sites=len(channel.sites))
            total = sums.sum(channel, "train", {POOLED_SITE: message})
            state.groups["model"] = add_update(state.groups["model"], total.mean("update"))
            yield

    def ops(self) -> dict[str, Op]:
        """One op: train the received model."""
        return {"train": Op(train_pooled, UPDATE)}


def train_pooled(site: Site, message: Message) -> Message:
    """Train with the gradient steps of all sites together."""
    received = load_global(site, message)
    steps = site.study.training.steps
    return train_from(site, received, steps=steps * int(message.scalars["sites"]) if steps else None)
