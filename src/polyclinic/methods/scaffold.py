"""SCAFFOLD: control variates correct the drift of local training.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh: SCAFFOLD: stochastic controlled averaging for federated learning.
ICML 2020, Algorithm 1, option II. arXiv 1910.06378.

Of the paper: the corrected gradient g(y) − cₖ + c, the update of cₖ (option II), c moving by |S|/N of the mean change.
Ours: models are averaged with the study's weights, not uniformly, as in every other method here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from polyclinic.errors import StudyError
from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Site
from polyclinic.federation.state import ServerState
from polyclinic.methods.base import Leaf, Method, MethodParams, Op, draw_cohort, keep_local, load_global
from polyclinic.methods.fedavg import UPDATE, add_update
from polyclinic.secure.sum import SecureSum
from polyclinic.study import Study
from polyclinic.training import learning_rate, trained_parameters


class ScaffoldParams(MethodParams):
    """Settings of scaffold."""

    name: Literal["scaffold"] = "scaffold"
    server_lr: float = Field(1.0, ge=0)
    """η_g: share of the mean update that the server applies."""


class Scaffold(Method):
    """Needs plain sgd at the sites: option II reads the mean gradient off (x − y) / (K η)."""

    Params = ScaffoldParams
    title = "averaging with control variates"
    reference = "Karimireddy et al., ICML 2020, arXiv 1910.06378"
    needs = "sgd without momentum, weight decay or clipping"

    @classmethod
    def check(cls, study: Study) -> None:
        """Refuse optimizers whose step is not lr times the gradient."""
        training = study.training
        if training.optimizer != "sgd" or training.momentum or training.weight_decay or training.clip is not None:
            raise StudyError(
                "method scaffold: its control variates are mean gradients, read off the steps, so training needs "
                "optimizer: sgd with momentum 0, weight_decay 0 and no clip. Set those, or use method fedprox."
            )

    def server(self, channel: Channel, state: ServerState, sums: SecureSum) -> Iterator[None]:
        """Send model x and control c; add the mean updates of both."""
        model = state.groups["model"]
        control = {name: torch.zeros_like(tensor) for name, tensor in model.items()}
        state.groups.setdefault("control", control)
        for number in state.rounds(self.study.method.rounds):
            cohort = draw_cohort(self.study, channel.sites, number)
            message = Message.pack({"model": state.groups["model"], "control": state.groups["control"]})
            total = sums.sum(channel, "train", dict.fromkeys(cohort, message))
            answered = total.weights["control"] / len(channel.sites)
            state.groups["model"] = add_update(state.groups["model"], total.mean("update"), self.study.method.server_lr)
            state.groups["control"] = add_update(state.groups["control"], total.mean("control"), answered)
            yield

    def ops(self) -> dict[str, Op]:
        """One op: train the received model with corrected gradients."""
        return {"train": Op(train_corrected, (*UPDATE, Leaf("control", "sum", "images")))}


def train_corrected(site: Site, message: Message) -> Message:
    """Lines 6 to 14 of Algorithm 1. Control variates of buffers stay zero."""
    received, control = load_global(site, message), message.group("control")
    kept = site.state.load("control")
    own = kept[0] if kept else {name: torch.zeros_like(c) for name, c in control.items()}
    trained = list(trained_parameters(site.model))
    names = [name for name in trained if name in control]
    positions = [trained.index(name) for name in names]
    correction = torch._foreach_sub([control[n] for n in names], [own[n] for n in names])

    def adjust(parameters: list[Tensor], gradients: list[Tensor]) -> None:
        torch._foreach_add_([gradients[i] for i in positions], correction)

    result = site.train(adjust=adjust)
    update = site.update(received)
    rate = learning_rate(site.study.training, site.round, site.study.method.rounds)
    if result.steps and rate:
        # cₖ⁺ = cₖ − c + (x − y) / (K η)
        change = list(torch._foreach_mul([control[n] for n in names], -1.0))
        torch._foreach_add_(change, [update[n] for n in names], alpha=-1.0 / (result.steps * rate))
    else:
        change = [torch.zeros_like(control[n]) for n in names]
    changes = {name: torch.zeros_like(c) for name, c in control.items()} | dict(zip(names, change, strict=True))
    site.state.save("control", {name: own[name] + changes[name] for name in own})
    keep_local(site, received)
    return Message.pack(
        {"update": update, "control": changes},
        loss=result.loss,
        **{"weight/update": site.weight, "weight/control": 1.0},
    )
