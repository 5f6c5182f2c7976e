"""Errors of pairs against their definition, and the closed gradient against automatic differentiation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from polyclinic.transfer.pair_errors import goal, matched, pair_errors

SOURCES = [(3, (8, 8)), (2, (4, 4)), (5, (4, 4)), (4, (3, 5)), (2, (1, 1))]
TOTAL = sum(channels for channels, _ in SOURCES)
TARGETS = {"large": (4, (8, 8)), "odd": (3, (7, 5)), "middle": (6, (4, 4)), "small": (9, (2, 3)), "one": (4, (1, 1))}


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def example(kind: str) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    channels, size = TARGETS[kind]
    sources = [draws(3, c, *s, seed=i) for i, (c, s) in enumerate(SOURCES)]
    return sources, draws(3, channels, *size, seed=9), draws(TOTAL, channels, seed=10), draws(TOTAL, seed=11)


def defined(sources: list[Tensor], target: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    size = (target.shape[2], target.shape[3])
    wanted = torch.cat([F.interpolate(s, size, mode="bilinear", align_corners=False) for s in sources], 1)
    return (F.conv2d(target, weight[:, :, None, None], bias) - wanted).square().mean((2, 3))


@pytest.mark.parametrize("kind", TARGETS)
def test_errors_are_those_of_the_definition(kind: str) -> None:
    sources, target, weight, bias = example(kind)
    wanted = goal(sources, (target.shape[2], target.shape[3]))
    torch.testing.assert_close(pair_errors(target, weight, bias, wanted), defined(sources, target, weight, bias))


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("images", [1, 3], ids=["alike", "by image"])
def test_the_closed_gradient_is_that_of_the_definition(kind: str, images: int) -> None:
    sources, target, weight, bias = example(kind)
    products = draws(images, TOTAL, seed=12).exp()
    wanted = goal(sources, (target.shape[2], target.shape[3]))
    ours, theirs = ([t.clone().requires_grad_() for t in (target, weight, bias)] for _ in range(2))
    found = matched(*ours, products, wanted)
    loss = (defined(sources, *theirs) * products).sum(1).mean()
    torch.testing.assert_close(found, loss)
    (3 * found).backward()
    (3 * loss).backward()
    for own, other in zip(ours, theirs, strict=True):
        assert own.grad is not None
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-9, atol=1e-12)


def test_a_perfect_match_costs_nothing() -> None:
    source = draws(2, 3, 6, 6)
    wanted = goal([source], (6, 6))
    weight, bias = torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    assert pair_errors(source, weight, bias, wanted).abs().max() < 1e-12
