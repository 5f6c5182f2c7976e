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
from polyclinic.settings import Settings
from polyclinic.training import StepRule, plain_step


class FineTuning(Settings):
    """Local training before the model is used at a site."""

    epochs: int = Field(1, ge=1)
    """Passes over the site's training images; ignored where ``steps`` is given."""
    steps: int | None = Field(None, ge=0)
    """Gradient steps; 0 is none."""
    optimizer: Literal["sgd", "adam", "adamw"] | None = None
    """Empty: the training's; for per-fedavg sgd. ``sgd`` is without momentum here."""
    lr: float | None = Field(None, ge=0)
    """Learning rate; empty: the training's of that round; for per-fedavg alpha."""


class FedAvgFineTunedParams(MethodParams):
    """Settings of fedavg-ft."""

    name: Literal["fedavg-ft"] = "fedavg-ft"
    finetune: FineTuning = FineTuning()
    """The fine-tuning."""


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
        fine_tune(site, self.study.method.finetune)


def fine_tune(site: Site, settings: FineTuning, rule: StepRule = plain_step) -> None:
    """Train the loaded network on the site's training images, in a stream of its own; nothing else is touched."""
    if settings.steps != 0:
        site.train(
            purpose="finetune",
            epochs=settings.epochs,
            steps=settings.steps,
            optimizer=settings.optimizer,
            lr=settings.lr,
            rule=rule,
            samples=False,  # a personal model is fitted to the site's patients
        )
