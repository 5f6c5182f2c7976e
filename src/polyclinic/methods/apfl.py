"""APFL: each site mixes a model of its own with the global one, and may learn how much of each.

Deng, Kamani, Mahdavi: Adaptive personalized federated learning. 2020, Algorithm 1. arXiv 2003.13461.

A site has the local copy w of the global model, an own model v and a share α; it uses v̄ = α v + (1 − α) w. One local
step, both gradients on the same batch::

    w ← w − η ∇f(w)
    v ← v − η α ∇f(v̄)
    α ← α − η ⟨v − w, ∇f(v̄)⟩              where adaptive: at the first step of a round, kept within 0 and 1

All right-hand sides are values before the step. w is averaged as in fedavg, v and α never leave. Gradients per local
step: 2, twice fedavg's.

Ours: v starts as the model that the site first receives, which with full participation is the start weights, as in the
paper. w is moved by the study's optimizer, v always by plain gradient descent, clipped as the training is, without
momentum or weight decay. Running statistics: w's passes move w's, the passes of v̄ move a set of their own that stays
at the site and is used with v̄. The paper does not say how often α moves; once a round is what its authors' code does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from polyclinic.errors import SiteError
from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Site
from polyclinic.federation.state import ServerState
from polyclinic.methods.base import Method, MethodParams, Op, load_global
from polyclinic.methods.fedavg import UPDATE, average_rounds, train_from
from polyclinic.models.weights import snapshot
from polyclinic.secure.sum import SecureSum
from polyclinic.seeds import derive_seed
from polyclinic.training import Step, learning_rate, plain_step, trained_parameters


class APFLParams(MethodParams):
    """Settings of apfl."""

    name: Literal["apfl"] = "apfl"
    alpha: float = Field(0.5, ge=0, le=1)
    """α: share of the own model, at the start where it is adaptive; 0: the global weights, 1: local training."""
    adaptive: bool = True
    """Each site learns its α; false: it stays."""
    personal_lr: float | None = Field(None, ge=0)
    """η of v and α, which follows the training's schedule; empty: the training's. Plain gradient descent, so of another
    size than the rate of adam."""


class APFL(Method):
    """The server averages w; a site uses α v + (1 − α) w with the averaged w."""

    Params = APFLParams
    title = "mixtures of an own and the global model"
    reference = "Deng et al. 2020, arXiv 2003.13461"
    personal = True
    starts_global = False

    def server(self, channel: Channel, state: ServerState, sums: SecureSum) -> Iterator[None]:
        """As in fedavg: own models never leave."""
        yield from average_rounds(self, channel, state, sums)

    def ops(self) -> dict[str, Op]:
        """One op: train w and v side by side."""
        return {"train": Op(self.train, UPDATE)}

    def train(self, site: Site, message: Message) -> Message:
        """Train the received model as in fedavg, and v along with it."""
        received = load_global(site, message)
        mixture = self.mixture(site)
        reply = train_from(site, received, rule=mixture.rule)
        if not torch.stack(torch._foreach_norm(list(mixture.own.values()))).isfinite().all():
            raise SiteError("the own model diverged. Lower method.personal_lr, or set training.clip.")
        site.state.save("personal", mixture.own, alpha=mixture.alpha)
        return reply

    def deploy(self, site: Site, message: Message) -> None:
        """Load the mixture of the site's v and the global model."""
        load_global(site, message)
        self.mixture(site).enter()

    def mixture(self, site: Site) -> Mixture:
        """The site's v and α beside the loaded model, from which v starts."""
        params, training = self.study.method, self.study.training
        if params.personal_lr is not None:
            training = training.model_copy(update={"lr": params.personal_lr})
        kept = site.state.load("personal")
        own, scalars = kept if kept else (snapshot(site.tensors), {"alpha": params.alpha})
        return Mixture(
            site.model,
            site.tensors,
            own,
            float(scalars["alpha"]),
            adaptive=params.adaptive,
            lr=learning_rate(training, site.round, params.rounds),
            clip=training.clip,
        )


class Mixture:
    """v and α of a site beside the network, which holds w.

    Args:
        model: The network.
        live: Its tensors: what is trained, and the rest (running statistics).
        own: v and its statistics, by the same names; changed in place.
        alpha: α.
        adaptive: α moves.
        lr: η of v and α.
        clip: Largest norm of the gradient at v̄.
    """

    def __init__(
        self,
        model: nn.Module,
        live: dict[str, Tensor],
        own: dict[str, Tensor],
        alpha: float,
        *,
        adaptive: bool = False,
        lr: float = 0.0,
        clip: float | None = None,
    ) -> None:
        self.own, self.alpha, self.adaptive, self.lr, self.clip = own, alpha, adaptive, lr, clip
        trained = list(trained_parameters(model))
        rest = [name for name in live if name not in set(trained)]
        self._w, self._v = [live[n] for n in trained], [own[n] for n in trained]
        self._rest, self._own_rest = [live[n] for n in rest], [own[n] for n in rest]
        self._saved: list[Tensor] = []  # made at the first step, for the whole call of ``train``

    def enter(self) -> None:
        """Put v̄ and its statistics into the network."""
        torch._foreach_lerp_(self._w, self._v, self.alpha)
        _copy(self._rest, self._own_rest)

    def rule(self, step: Step) -> Tensor:
        """One step: leave ∇f(w) for the optimizer, move v and α."""
        loss = plain_step(step)
        live = [*self._w, *self._rest]
        if not self._saved:
            self._saved = [torch.empty_like(tensor) for tensor in live]
        _copy(self._saved, live)
        self.enter()
        # Dropout from another stream, so that w sees what it would see without v.
        mixed = step.loss(step.batch, derive_seed(step.seed, "mixed", step.number))
        gradients = torch.autograd.grad(mixed, step.parameters, materialize_grads=True)
        _copy(self._own_rest, self._rest)
        _copy(live, self._saved)
        self._move(gradients, first=step.number == 1)
        return loss

    @torch.no_grad()
    def _move(self, gradients: tuple[Tensor, ...], first: bool) -> None:
        scale = 1.0
        if self.clip is not None:
            scale = min(1.0, self.clip / (float(nn.utils.get_total_norm(gradients, foreach=True)) + 1e-6))
        alpha = self.alpha
        if self.adaptive and first:
            slope = sum(float(torch.sum((v - w) * g)) for v, w, g in zip(self._v, self._w, gradients, strict=True))
            self.alpha = min(1.0, max(0.0, alpha - self.lr * scale * slope))
        torch._foreach_add_(self._v, gradients, alpha=-self.lr * scale * alpha)


@torch.no_grad()
def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    if to:
        torch._foreach_copy_(to, source)
