"""The cheap and the exact hypergradient against automatic differentiation through the steps, in double precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from polyclinic.errors import SiteError
from polyclinic.models.taps import tapped
from polyclinic.transfer.dual_weights import Matching
from polyclinic.transfer.hypergradient import Problem, exact_gradient, hypergradient, jvp_gradient
from polyclinic.transfer.pair_errors import pair_errors

RATE, BETA = 0.1, 0.7


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Doubled(torch.autograd.Function):
    """A function that knows no forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


class Single(torch.autograd.Function):
    """A function that knows no second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        if grads[0].requires_grad:
            raise RuntimeError("no second derivative")
        return 2 * grads[0]


class Once(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = Single.apply(x)
        return found


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = Doubled.apply(x)
        return found


class Toy:
    """A target with two taps, two sources, and all of the outer problem."""

    def __init__(self, middle: Callable[[], nn.Module] = nn.Tanh) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(1, 3, 3), middle(), nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)
        ).double()
        self.matchings = [Matching((2, 3), (3, 4), "learned").double() for _ in range(2)]
        for matching in self.matchings:
            for p in matching.meta_parameters:
                p.data += 0.3 * draws(*p.shape, seed=p.numel())
        self.images, self.labels = draws(5, 1, 6, 6), torch.tensor([0, 1, 0, 1, 1])
        self.held, self.held_labels = draws(4, 1, 6, 6, seed=1), torch.tensor([1, 0, 1, 0])
        own = self.maps(dict(self.net.named_parameters()))
        self.sources = [
            matching.see([draws(5, 2, 4, 4, seed=i), draws(5, 3, 2, 2, seed=i + 1)], own)
            for i, matching in enumerate(self.matchings, 2)
        ]
        self.theta = {f"net.{n}": p.detach().clone() for n, p in self.net.named_parameters()}
        for i, matching in enumerate(self.matchings):
            self.theta |= {f"{i}.{n}": p.detach().clone() for n, p in matching.regressors.named_parameters()}
        self.phi = [p for matching in self.matchings for p in matching.meta_parameters]
        self.problem = Problem(
            objective=lambda t: F.cross_entropy(functional_call(self.net, part(t, "net"), self.held), self.held_labels),
            task=self.task,
            errors=self.errors,
            products=lambda: [m.products(s, []) for m, s in zip(self.matchings, self.sources, strict=True)],
            shares=[0.25, 0.75],
            beta=BETA,
            rate=RATE,
        )

    def maps(self, theta: dict[str, Tensor]) -> list[Tensor]:
        with tapped(self.net, ["1", "3"]) as seen:
            functional_call(self.net, theta, self.images)
        return [seen["1"][0], seen["3"][0]]

    def task(self, theta: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(self.net, part(theta, "net"), self.images), self.labels)

    def errors(self, theta: dict[str, Tensor]) -> list[Tensor]:
        maps = self.maps(part(theta, "net"))
        found = []
        for i, (matching, source) in enumerate(zip(self.matchings, self.sources, strict=True)):
            own = part(theta, str(i))
            rows = [
                pair_errors(m, own[f"{n}.weight"], own[f"{n}.bias"], source.goals[(m.shape[2], m.shape[3])])
                for n, m in enumerate(maps)
            ]
            found.append(torch.stack(rows, 1))
            assert len(matching.regressors) == len(rows)
        return found

    def full(self, theta: dict[str, Tensor], matching_alone: bool = False) -> Tensor:
        """β D, with or without the task, as one would write it down."""
        total = torch.zeros(()).double() if matching_alone else self.task(theta)
        parts = zip((0.25, 0.75), self.errors(theta), self.problem.products(), strict=True)
        return total + BETA * sum(share * (e * p).sum((1, 2)).mean() for share, e, p in parts)


def part(theta: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(f"{prefix}."): t for n, t in theta.items() if n.startswith(f"{prefix}.")}


def close(found: list[Tensor], wanted: list[Tensor]) -> float:
    a, b = (torch.cat([t.flatten() for t in side]) for side in (found, wanted))
    assert b.norm() > 0
    return float((a - b).norm() / b.norm())


def unrolled(toy: Toy, losses: list[Callable[[dict[str, Tensor]], Tensor]]) -> list[Tensor]:
    current = {n: t.clone().requires_grad_() for n, t in toy.theta.items()}
    for loss in losses:
        slopes = torch.autograd.grad(
            loss(current), list(current.values()), create_graph=True, allow_unused=True, materialize_grads=True
        )
        current = {n: t - RATE * s for (n, t), s in zip(current.items(), slopes, strict=True)}
    return list(torch.autograd.grad(toy.problem.objective(current), toy.phi))


def slope(toy: Toy) -> list[Tensor]:
    theta = {n: t.clone().requires_grad_() for n, t in toy.theta.items()}
    return list(torch.autograd.grad(toy.full(theta), list(theta.values())))


def test_the_cheap_scheme_is_autograd_through_one_step() -> None:
    toy = Toy()
    found, how = jvp_gradient(toy.problem, toy.theta, slope(toy), toy.phi)
    assert how == "jvp"
    assert close(found, unrolled(toy, [toy.full])) < 1e-10


def test_the_exact_scheme_is_autograd_through_three_steps() -> None:
    toy = Toy()
    found, how = exact_gradient(toy.problem, toy.theta, toy.phi)
    assert how == "exact"

    def matching(theta: dict[str, Tensor]) -> Tensor:
        return toy.full(theta, matching_alone=True)

    assert close(found, unrolled(toy, [matching, matching, toy.task])) < 1e-10
    assert close(found, unrolled(toy, [toy.full])) > 1e-3  # they are not the same thing


def test_a_layer_without_forward_mode_gets_a_central_difference() -> None:
    toy = Toy(Unknown)
    found, how = jvp_gradient(toy.problem, toy.theta, slope(toy), toy.phi)
    assert how == "difference"
    assert close(found, unrolled(toy, [toy.full])) < 1e-3


def test_the_exact_scheme_says_what_to_do_when_a_layer_cannot() -> None:
    toy = Toy(Once)
    with pytest.raises(SiteError, match="hypergradient: jvp"):
        hypergradient("exact", toy.problem, toy.theta, [], toy.phi)


@pytest.mark.parametrize("scheme", ["jvp", "exact"])
def test_parameters_are_left_where_they_were(scheme: Any) -> None:
    toy = Toy()
    before = {n: t.clone() for n, t in toy.theta.items()}
    gradients = slope(toy)
    hypergradient(scheme, toy.problem, toy.theta, gradients, toy.phi)
    assert all(torch.equal(before[n], t) for n, t in toy.theta.items())
    assert all(p.grad is None for p in toy.phi)
