"""Local training: each site alone, from the common start weights. What every collaboration has to beat."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Site
from polyclinic.federation.state import ServerState
from polyclinic.methods.base import Leaf, Method, MethodParams, Op, draw_cohort, load_own
from polyclinic.secure.sum import SecureSum


class LocalParams(MethodParams):
    """Settings of local."""

    name: Literal["local"] = "local"


class Local(Method):
    """No model is exchanged; a round is as much training as a round of fedavg."""

    Params = LocalParams
    title = "each site alone"
    reference = "baseline"
    exchanges = False
    mixed_networks = True
    personal = True
    trained_at_home = True
    starts_global = False

    def server(self, channel: Channel, state: ServerState, sums: SecureSum) -> Iterator[None]:
        """Tell the sites to train on."""
        for number in state.rounds(self.study.method.rounds):
            cohort = draw_cohort(self.study, channel.sites, number)
            channel.call("train", dict.fromkeys(cohort, Message()))
            yield

    def ops(self) -> dict[str, Op]:
        """One op: train the site's own model."""
        return {"train": Op(train_own, (Leaf("loss", "scalar", "images"),))}


def train_own(site: Site, message: Message) -> Message:
    """Train the site's own model and keep it."""
    load_own(site)
    result = site.train()
    site.state.save("personal", site.tensors)
    return Message(scalars={"loss": result.loss})
