"""FedRep: as FedPer, but head and body are trained one after the other.

Collins, Hassani, Mokhtari, Shakkottai: Exploiting shared representations for personalized federated learning. ICML
2021, Algorithm 1. arXiv 2102.07078.

In a round a site first trains its head on the received body, then the body below the head it has just trained::

    h ← argmin over h of f(body, h)        head_epochs passes, body frozen
    body ← body − η ∇f(body, h)            as long as the study trains, head frozen

Gradients per local step of the body: 1, as in fedavg. The passes of the head come on top: each is a forward pass
through the network and a gradient of the last layer alone, about a third of a pass of fedavg. The paper trains the head
for 10 epochs in most experiments; for the same budget as fedavg lower the training's epochs.

Ours: the body is trained as long as the study says (the algorithm has one step, the paper's experiments whole epochs);
sites are weighted as the study says; running statistics stand still while the head is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field
from torch import nn

from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Site
from polyclinic.federation.state import ServerState
from polyclinic.methods.base import Method, MethodParams, Op, load_global
from polyclinic.methods.fedavg import UPDATE, average_rounds, train_from
from polyclinic.methods.fedper import body_names
from polyclinic.models.normalisation import statistics_kept
from polyclinic.secure.sum import SecureSum
from polyclinic.training import trained_parameters


class FedRepParams(MethodParams):
    """Settings of fedrep."""

    name: Literal["fedrep"] = "fedrep"
    head: list[str] = Field([])
    """Layers that stay at the site, by their names in the network; empty: the last one, or what the network names."""
    head_epochs: int = Field(1, ge=1)
    """τ: passes of the head per round, before the body's; ignored where ``head_steps`` is given."""
    head_steps: int | None = Field(None, ge=1)
    """τ in gradient steps."""


class FedRep(Method):
    """Head and body are never trained together."""

    Params = FedRepParams
    title = "averaging all but the last layer, which is trained first"
    reference = "Collins et al., ICML 2021, arXiv 2102.07078"
    personal = True
    starts_global = False

    def server(self, channel: Channel, state: ServerState, sums: SecureSum) -> Iterator[None]:
        """As in fedavg, on the body."""
        yield from average_rounds(self, channel, state, sums)

    def ops(self) -> dict[str, Op]:
        """One op: train the site's head, then the received body."""
        return {"train": Op(self.train, UPDATE)}

    def shared(self, model: nn.Module) -> list[str]:
        """The body."""
        return body_names(model, self.study.model.norm, self.study.method.head)

    def train(self, site: Site, message: Message) -> Message:
        """The head on the received body, then the body below the new head."""
        received = load_global(site, message)
        params = self.study.method
        body = set(self.shared(site.model))
        head = [name for name in trained_parameters(site.model) if name not in body]
        with statistics_kept(site.model):
            site.train(purpose="head", epochs=params.head_epochs, steps=params.head_steps, only=head)
        return train_from(site, received, only=body)
