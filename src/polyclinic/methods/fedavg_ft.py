"""FedAvg with local fine-tuning: the global model, trained on at each site before it is used there.

The simplest personalisation, and the control that a personalised method must beat: Wang, Mathews, Kiddon, Eichner,
Beaufays, Ramage: Federated evaluation of on-device personalization. 2019. arXiv 1910.10252.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Site
from polyclinic.federation.state import ServerState
from polyclinic.methods.base import Method, MethodParams, Op, load_global
from polyclinic.methods.fedavg import UPDATE, average_rounds, train_global
from polyclinic.secure.sum import SecureSum


class FedAvgFineTunedParams(MethodParams):
    """Settings of fedavg-ft."""

    name: Literal["fedavg-ft"] = "fedavg-ft"
    finetune_epochs: int = Field(1, ge=1)
    """Passes over the site's training images; ignored where ``finetune_steps`` is given."""
    finetune_steps: int | None = Field(None, ge=0)
    """Gradient steps of fine-tuning; 0 is fedavg."""
    finetune_lr: float | None = Field(None, ge=0)
    """Learning rate of fine-tuning; empty: the training's of that round."""


class FedAvgFineTuned(Method):
    """Training is fedavg's; fine-tuning starts anew from the global model each time and never flows back."""

    Params = FedAvgFineTunedParams
    title = "averaging, then fine-tuning at each site"
    reference = "Wang et al. 2019, arXiv 1910.10252"
    personal = True

    def server(self, channel: Channel, state: ServerState, sums: SecureSum) -> Iterator[None]:
        """As in fedavg."""
        yield from average_rounds(self, channel, state, sums)

    def ops(self) -> dict[str, Op]:
        """One op: train the received model."""
        return {"train": Op(train_global, UPDATE)}

    def deploy(self, site: Site, message: Message) -> None:
        """Load the global model and fine-tune it on the site's training images."""
        load_global(site, message)
        params = self.study.method
        if params.finetune_steps == 0:
            return
        site.train(
            purpose="finetune",
            epochs=params.finetune_epochs,
            steps=params.finetune_steps,
            lr=params.finetune_lr,
        )
