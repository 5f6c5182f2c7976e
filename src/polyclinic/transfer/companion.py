"""A companion: a small network, the same at all sites, that is trained beside a site's own on the same batches.

It alone travels, so the sites' own networks may be of any architecture.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from polyclinic.errors import SiteError, StudyError
from polyclinic.federation.networks import Networks
from polyclinic.federation.site import Site
from polyclinic.models.weights import load_tensors
from polyclinic.seeds import derive_seed
from polyclinic.study import ModelSettings
from polyclinic.training import Step, learning_rate, make_optimizer, trained_parameters

ROLE = "companion"


class Companion:
    """The companion in one call of ``Site.train``.

    It is moved by the study's optimizer, rate and clipping, once a step, and sees the step's own batch. Its dropout
    comes from a stream of its own, so the site's network draws what it would draw alone.

    Args:
        site: Where it is trained.
        settings: Of the companion.
        received: Its tensors, all of them, by name.
        beside: Other parameters that are trained with it.
    """

    def __init__(
        self, site: Site, settings: ModelSettings, received: Mapping[str, Tensor], beside: Iterable[Tensor] = ()
    ) -> None:
        bench = site.networks.of(settings, ROLE)
        load_tensors(bench.model, received)
        self.model: nn.Module = bench.model.train()
        self._tensors, self._received = bench.tensors, received
        training = site.study.training
        self._parameters: list[Tensor] = [*trained_parameters(self.model).values(), *beside]
        rate = learning_rate(training, site.round, site.study.method.rounds)
        self._optimizer = make_optimizer(self._parameters, training, rate)
        self._clip = training.clip

    def loss(self, step: Step) -> Tensor:
        """Mean loss of the step's batch at the companion's current values."""
        own, step.model = step.model, self.model
        try:
            return step.loss(step.batch, derive_seed(step.seed, ROLE, step.number))
        finally:
            step.model = own

    def follow(self, loss: Tensor) -> None:
        """Take one step against the gradient of a loss, of which nothing else that is trained may depend."""
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if self._clip is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._clip, foreach=True)
        self._optimizer.step()

    def update(self) -> dict[str, Tensor]:
        """What training changed, by name.

        Raises:
            SiteError: The companion diverged.
        """
        self._optimizer.zero_grad(set_to_none=True)
        if not torch.stack(torch._foreach_norm(self._parameters)).isfinite().all():
            raise SiteError("the companion diverged. Lower training.lr, or set training.clip.")
        return {name: self._tensors[name] - tensor for name, tensor in self._received.items()}


def first_companion(networks: Networks, settings: ModelSettings) -> dict[str, Tensor]:
    """The companion's start values, of all that is averaged.

    Raises:
        StudyError: There is no such network, it does not fit the images, or its statistics are to stay at the sites.
    """
    if settings.norm == "batch-local":
        raise StudyError(
            "method.companion.norm: batch-local keeps running statistics at the sites, but no site keeps a companion. "
            "Use norm: batch or group for it."
        )
    return dict(networks.of(settings, ROLE).initial)


@contextmanager
def answering(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, what the network returns is appended to the list, once per forward pass; gradients flow."""
    seen: list[Tensor] = []
    handle = model.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()
