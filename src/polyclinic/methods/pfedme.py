"""pFedMe: personal models near the global one, which follows them by the gradient of a Moreau envelope.

Dinh, Tran, Nguyen: Personalized federated learning with Moreau envelopes. NeurIPS 2020, Algorithm 1. arXiv 2006.08848.

Sites minimise F(w) = min over θ of f(θ) + λ/2 ‖θ − w‖², whose gradient is λ (w − θ) at the minimising θ. A local step
on one batch::

    θ ← θ − inner_lr (∇f(θ) + λ (θ − w))     K times
    w ← w − η λ (w − θ)

The server mixes: w ← (1 − β) w + β Σₖ nₖ wₖ / Σₖ nₖ. θ is the site's personal model and never leaves. Gradients per
local step: K, so K times fedavg's cost. With K = 1 and inner_lr = 1/λ the first step of a round is fedavg's.

Of the authors' code, where the paper leaves it open: θ starts each round at the received w and goes on from step to
step. Ours: inner_lr is 1/λ unless it is given, so that it suits every optimizer of w, which is the study's (plain sgd
being the paper's); sites are weighted as the study says. The first of the K passes moves the running statistics, which
w and θ have in common. A site that has not trained yet uses the global model. ``training.clip`` bounds the gradient of
w, not the inner steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from polyclinic.errors import StudyError
from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Site
from polyclinic.federation.state import ServerState
from polyclinic.methods.base import Method, MethodParams, Op, load_global
from polyclinic.methods.fedavg import UPDATE, average_rounds, train_from
from polyclinic.models.normalisation import statistics_kept
from polyclinic.models.weights import snapshot
from polyclinic.secure.sum import SecureSum
from polyclinic.study import Study
from polyclinic.training import Step, StepRule, trained_parameters


class PFedMeParams(MethodParams):
    """Settings of pfedme."""

    name: Literal["pfedme"] = "pfedme"
    strength: float = Field(15.0, gt=0)
    """λ: how strongly the personal model is pulled to the global one."""
    inner_steps: int = Field(5, ge=1)
    """K: gradient steps of the personal model per local step; the cost grows with it."""
    inner_lr: float | None = Field(None, ge=0)
    """Rate of the inner steps, plain gradient descent; empty: 1/λ. Times λ it must stay below 2."""
    beta: float = Field(1.0, ge=0)
    """β: share of the mean update that the server applies."""


class PFedMe(Method):
    """The server averages w; a site uses its θ."""

    Params = PFedMeParams
    title = "personal models by Moreau envelopes"
    reference = "Dinh et al., NeurIPS 2020, arXiv 2006.08848"
    needs = "inner_lr × strength below 2"
    personal = True
    starts_global = False

    @classmethod
    def check(cls, study: Study) -> None:
        """Refuse inner steps that overshoot w more each time."""
        params = study.method
        if params.inner_lr is not None and params.inner_lr * params.strength >= 2:
            raise StudyError(
                f"method pfedme: inner steps of rate {params.inner_lr:g} with strength {params.strength:g} diverge, "
                f"whatever the images. Set method.inner_lr below {2 / params.strength:g}, or lower method.strength."
            )

    def server(self, channel: Channel, state: ServerState, sums: SecureSum) -> Iterator[None]:
        """As in fedavg, mixed with β."""
        yield from average_rounds(self, channel, state, sums, server_lr=self.study.method.beta)

    def ops(self) -> dict[str, Op]:
        """One op: train w through θ."""
        return {"train": Op(self.train, UPDATE)}

    def train(self, site: Site, message: Message) -> Message:
        """Train the received model, and keep θ."""
        received = load_global(site, message)
        theta = snapshot({name: site.tensors[name] for name in trained_parameters(site.model)})
        params = self.study.method
        rate = 1 / params.strength if params.inner_lr is None else params.inner_lr
        rule = envelope_gradient(list(theta.values()), params.strength, params.inner_steps, rate)
        reply = train_from(site, received, rule=rule)
        site.state.save("personal", {**site.tensors, **theta})
        return reply

    def deploy(self, site: Site, message: Message) -> None:
        """Load θ."""
        kept = site.state.load("personal")
        if kept:
            site.load(kept[0])
        else:
            load_global(site, message)


def envelope_gradient(theta: list[Tensor], strength: float, inner_steps: int, inner_lr: float) -> StepRule:
    """The rule of one step of w: move ``theta`` in place, leave λ (w − θ) as the gradient.

    Args:
        theta: θ, in the order of the trained parameters.
        strength: λ.
        inner_steps: K.
        inner_lr: Rate of the inner steps.
    """
    anchor = [torch.empty_like(tensor) for tensor in theta]  # w during the inner steps, then the gradient

    def rule(step: Step) -> Tensor:
        parameters = step.parameters
        with torch.no_grad():
            torch._foreach_copy_(anchor, parameters)
            torch._foreach_copy_(parameters, theta)
        losses = []
        for number in range(inner_steps):
            with statistics_kept(step.model) if number else nullcontext():
                loss = step.loss(step.batch)
            losses.append(loss.detach())
            gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
            with torch.no_grad():
                torch._foreach_lerp_(parameters, anchor, inner_lr * strength)
                torch._foreach_add_(parameters, gradients, alpha=-inner_lr)
        with torch.no_grad():
            torch._foreach_copy_(theta, parameters)
            torch._foreach_copy_(parameters, anchor)
            torch._foreach_sub_(anchor, theta)
            torch._foreach_mul_(anchor, strength)
        for parameter, pull in zip(parameters, anchor, strict=True):
            parameter.grad = pull
        return losses[0]

    return rule
