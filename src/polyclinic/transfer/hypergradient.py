"""How the weights of a matching loss learn: by what following it does to the loss on held-out images.

A network with parameters θ follows ``L(θ) = L_task(θ) + β D(θ; φ)``, where ``D = mean_x Σ e(x; θ) p(x; φ)``: the errors
e hold no φ, the products p no θ. After virtual steps of size ξ the loss J on held-out images depends on φ.

- ``exact`` (Jang et al., ICML 2019, arXiv 1905.05901, algorithm 1): two virtual steps on β D alone, one on L_task, then
  dJ/dφ through all three by double backward.
- ``jvp`` (ours): one virtual step on L. D is linear in p, so that ::

      dJ/dφ = −ξ β mean_x Σ de(x) ∂p(x; φ)/∂φ,    de = derivative of e at θ in the direction v = ∇J(θ − ξ ∇L(θ))

  is exact for that step. It takes one backward pass for v, one pass in forward mode for de, and a backward pass through
  the small networks alone. Where a layer knows no forward mode, de is the central difference ``(e(θ + h v) −
  e(θ − h v)) / 2h``, ``h = 0.01 / ‖v‖``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from polyclinic.errors import SiteError

Scheme = Literal["jvp", "exact"]
How = Literal["jvp", "exact", "difference"]
"""What was computed; ``difference``: jvp was asked for, and a layer knows no forward mode."""
Parameters = dict[str, Tensor]
VIRTUAL_STEPS = 2
"""Of the exact scheme, on the matching loss."""
_LENGTH = 0.01


@dataclass(frozen=True)
class Problem:
    """One step of the outer problem. All functions take θ as tensors by name and have no side effects.

    Attributes:
        objective: J(θ): the loss on held-out images.
        task: L_task(θ): all that is followed beside D. The jvp scheme does not call it.
        errors: e(θ): one tensor ``[B, N, C]`` for each source.
        products: p(φ), for each source, of shapes that broadcast with the errors.
        shares: What each source weighs in D.
        beta: β.
        rate: ξ.
    """

    objective: Callable[[Parameters], Tensor]
    task: Callable[[Parameters], Tensor]
    errors: Callable[[Parameters], Sequence[Tensor]]
    products: Callable[[], Sequence[Tensor]]
    shares: Sequence[float]
    beta: float
    rate: float

    def matching(self, errors: Sequence[Tensor], products: Sequence[Tensor]) -> Tensor:
        """D from errors, or its derivative from theirs."""
        parts = zip(self.shares, errors, products, strict=True)
        return torch.stack([share * (e * p).sum((1, 2)).mean() for share, e, p in parts]).sum()


def jvp_gradient(
    problem: Problem, theta: Parameters, slope: Sequence[Tensor], phi: Sequence[Tensor], *, forward_mode: bool = True
) -> tuple[list[Tensor], How]:
    """dJ/dφ after one virtual step, by the cheap scheme.

    Args:
        problem: The outer problem.
        theta: Parameters; none of these tensors is changed.
        slope: ∇L(θ), in the order of ``theta``.
        phi: What is differentiated for.
        forward_mode: Try it; False: the central difference at once.

    Returns:
        The gradient for each of ``phi``, and how the derivative of the errors came about.
    """
    names = list(theta)
    with torch.no_grad():
        moved = torch._foreach_add([theta[n] for n in names], list(slope), alpha=-problem.rate)
    there = {name: value.requires_grad_() for name, value in zip(names, moved, strict=True)}
    # What J does not reach (a head for another task) cannot move it.
    direction = torch.autograd.grad(
        problem.objective(there), list(there.values()), allow_unused=True, materialize_grads=True
    )
    towards = dict(zip(names, direction, strict=True))
    changes, how = _derivative(problem, theta, towards, forward_mode)
    surrogate = -problem.rate * problem.beta * problem.matching(changes, problem.products())
    return list(torch.autograd.grad(surrogate, list(phi), materialize_grads=True, allow_unused=True)), how


@torch.no_grad()
def _derivative(
    problem: Problem, theta: Parameters, towards: Parameters, forward_mode: bool
) -> tuple[list[Tensor], How]:
    """Of the errors, at θ in a direction."""
    if forward_mode:
        try:
            with forward_ad.dual_level():
                pairs = {n: forward_ad.make_dual(theta[n].detach(), towards[n]) for n in theta}  # type: ignore[no-untyped-call]
                found = [forward_ad.unpack_dual(e) for e in problem.errors(pairs)]  # type: ignore[no-untyped-call]
            return [torch.zeros_like(e) if change is None else change for e, change in found], "jvp"
        except NotImplementedError:
            pass  # what torch raises for a layer without a derivative in forward mode
    values = list(towards.values())
    length = _LENGTH / max(float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(values)))), 1e-30)
    ends = []
    for sign in (1, -1):
        moved = torch._foreach_add([theta[n].detach() for n in towards], values, alpha=sign * length)
        ends.append(problem.errors(dict(zip(towards, moved, strict=True))))
    return [(right - left) / (2 * length) for right, left in zip(*ends, strict=True)], "difference"


def exact_gradient(problem: Problem, theta: Parameters, phi: Sequence[Tensor]) -> tuple[list[Tensor], How]:
    """dJ/dφ through two virtual steps on β D and one on L_task. Memory grows with all three passes.

    Args:
        problem: The outer problem.
        theta: Parameters, those of regressors among them; none of these tensors is changed.
        phi: What is differentiated for.
    """
    current = {name: value.detach().requires_grad_() for name, value in theta.items()}
    for _ in range(VIRTUAL_STEPS):
        loss = problem.beta * problem.matching(problem.errors(current), problem.products())
        current = _stepped(current, loss, problem.rate)
    current = _stepped(current, problem.task(current), problem.rate)
    found = torch.autograd.grad(problem.objective(current), list(phi), allow_unused=True, materialize_grads=True)
    return list(found), "exact"


def _stepped(theta: Parameters, loss: Tensor, rate: float) -> Parameters:
    """θ − ξ ∇loss, which can be differentiated again."""
    slopes = torch.autograd.grad(
        loss, list(theta.values()), create_graph=True, allow_unused=True, materialize_grads=True
    )
    return {name: value - rate * slope for (name, value), slope in zip(theta.items(), slopes, strict=True)}


def hypergradient(
    scheme: Scheme, problem: Problem, theta: Parameters, slope: Sequence[Tensor], phi: Sequence[Tensor]
) -> tuple[list[Tensor], How]:
    """dJ/dφ by one of the two schemes; arguments as there.

    Raises:
        SiteError: The exact scheme met a layer that cannot be differentiated twice.
    """
    if scheme == "jvp":
        return jvp_gradient(problem, theta, slope, phi)
    try:
        return exact_gradient(problem, theta, phi)
    except RuntimeError as error:
        raise SiteError(
            f"the exact hypergradient failed, for it differentiates the network twice: {error}. "
            "Set method.hypergradient: jvp."
        ) from error
