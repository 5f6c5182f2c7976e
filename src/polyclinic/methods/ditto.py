"""Ditto: beside the global model each site trains a personal one that is held near the global one.

Li, Hu, Beirami, Smith: Ditto: fair and robust federated learning through personalization. ICML 2021, Algorithm 1.
arXiv 2012.04221.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Site
from polyclinic.federation.state import ServerState
from polyclinic.methods.base import Method, MethodParams, Op, load_global, load_own
from polyclinic.methods.fedavg import UPDATE, average_rounds, train_from
from polyclinic.methods.fedprox import proximal
from polyclinic.secure.sum import SecureSum


class DittoParams(MethodParams):
    """Settings of ditto."""

    name: Literal["ditto"] = "ditto"
    strength: float = Field(0.1, ge=0)
    """λ: how strongly the personal model is pulled to the global one; 0 is local training."""
    personal_epochs: int | None = Field(None, ge=1)
    """Passes of the personal model per round; empty: as the training says. It doubles the gradient steps of a round."""


class Ditto(Method):
    """Each round a site trains w (fedavg) and v, with the gradient λ (v − w) added to v's."""

    Params = DittoParams
    title = "personal models near the global one"
    reference = "Li et al., ICML 2021, arXiv 2012.04221"
    personal = True
    starts_global = False

    def server(self, channel: Channel, state: ServerState, sums: SecureSum) -> Iterator[None]:
        """As in fedavg: personal models never leave."""
        yield from average_rounds(self, channel, state, sums)

    def ops(self) -> dict[str, Op]:
        """One op: train both models."""
        return {"train": Op(self.train, UPDATE)}

    def train(self, site: Site, message: Message) -> Message:
        """First the personal model against the received one, then the received one as in fedavg."""
        received = message.group("model")
        load_own(site)
        pull = proximal(site.model, received, self.study.method.strength)
        site.train(purpose="personal", epochs=self.study.method.personal_epochs, adjust=pull)
        site.state.save("personal", site.tensors)
        return train_from(site, load_global(site, message))

    def deploy(self, site: Site, message: Message) -> None:
        """Load the personal model."""
        load_own(site)
