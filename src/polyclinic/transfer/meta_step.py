"""One step of the meta-networks of a pupil: the outer problem put together, solved, and followed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor
from torch.func import functional_call

from polyclinic.models.normalisation import statistics_kept
from polyclinic.transfer.dual_weights import Source
from polyclinic.transfer.hypergradient import How, Parameters, Problem, Scheme, hypergradient
from polyclinic.transfer.kept import Kept
from polyclinic.transfer.pupil import Pupil, chance

_NETWORK = "network."
T = TypeVar("T")


class MetaStep:
    """Moves φ of a pupil's matchings.

    Args:
        pupil: In training mode.
        scheme: How the gradient of φ comes about.
        beta: β of the pupil's loss.
        rate: ξ, of virtual steps.
        kept: φ with its optimizer.

    Attributes:
        done: How often each way of computing was used; ``skipped`` counts gradients that were not finite.
    """

    def __init__(self, pupil: Pupil, scheme: Scheme, beta: float, rate: float, kept: Kept) -> None:
        self.pupil, self.scheme, self.beta, self.rate, self.kept = pupil, scheme, beta, rate, kept
        self.done: Counter[How | str] = Counter()

    def __call__(
        self,
        images: Tensor,
        sources: Mapping[str, Source],
        shares: Mapping[str, float],
        objective: Callable[[Parameters], Tensor],
        task: Callable[[Parameters], Tensor],
        seed: int,
    ) -> None:
        """One step, after the backward pass of the pupil's loss and before its optimizer moves anything.

        Args:
            images: Public images of the step.
            sources: What teachers said of them.
            shares: πₖ.
            objective: J: the loss on held-out images, given the pupil's parameters by name.
            task: All of the pupil's loss but β D; the exact scheme alone calls it.
            seed: Of dropout, the same in all passes.
        """
        pupil = self.pupil
        parameters = self._parameters(set(sources))
        phi = [p for name in sources for p in pupil.matching[name].meta_parameters]
        slope = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters.values()]
        problem = Problem(
            objective=self._drawn(objective, seed),
            task=self._drawn(task, seed),
            errors=self._drawn(lambda theta: functional_call(pupil, theta, (images, sources)).errors, seed),
            # With attention there is no φ, so the target's own maps are never asked for.
            products=lambda: [pupil.matching[name].products(source, []) for name, source in sources.items()],
            shares=[shares[name] for name in sources],
            beta=self.beta,
            rate=self.rate,
        )
        with statistics_kept(pupil.network), pupil.statistics.natural(pupil.network):
            gradients, how = hypergradient(self.scheme, problem, parameters, slope, phi)
        if not bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all()):
            self.done["skipped"] += 1
            return
        for parameter, gradient in zip(phi, gradients, strict=True):
            parameter.grad = gradient
        self.kept.step()
        self.done[how] += 1

    def _drawn(self, run: Callable[[Parameters], T], seed: int) -> Callable[[Parameters], T]:
        """The same, with dropout from a stream that starts anew at each call."""

        def drawn(theta: Parameters) -> T:
            with chance(seed, self.pupil.device):
                return run(theta)

        return drawn

    def _parameters(self, teachers: set[str]) -> Parameters:
        """θ: network and head; the exact scheme moves the regressors of these teachers too."""
        pupil = self.pupil
        found: Parameters = {f"{_NETWORK}{n}": p for n, p in pupil.network.named_parameters() if p.requires_grad}
        found |= {f"head.{name}": p for name, p in pupil.head.named_parameters()}
        if self.scheme == "exact":
            for number, name in enumerate(pupil.names):
                if name in teachers:
                    regressors = pupil.matching[name].regressors.named_parameters()
                    found |= {f"matchings.{number}.regressors.{n}": p for n, p in regressors}
        return found


def network_of(theta: Parameters) -> Parameters:
    """The network's own among a pupil's parameters, by the network's names."""
    return {name.removeprefix(_NETWORK): value for name, value in theta.items() if name.startswith(_NETWORK)}
