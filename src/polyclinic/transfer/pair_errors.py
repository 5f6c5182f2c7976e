"""Squared errors between maps of two networks, for all source maps and all channels at once.

Wanted is ``e_c = mean_ij (W t + b − s)²_cij``, t a target map, s a source map resized to it by bilinear interpolation,
W and b a 1x1 convolution. Where the grid has more pixels than t has channels it is written out::

    e_c = mean (W_c t)² + 2 b_c W_c mean t + b_c² − 2 W_c · mean (s_c t) − 2 b_c mean s_c + mean s_c²

With the interpolation as a matrix, ``s = U s₀``, the fourth term is ``W_c · (s₀_c Uᵀt) / (h w)``: the target is brought
to the source's grid by the transposed interpolation. So a pair costs what the smaller of its maps costs, and nothing of
the size "all source channels on the largest grid" is ever held. The numbers are those of the definition, but for
rounding.

``pair_errors`` gives e to be differentiated in any way. ``matched`` gives ``mean_x Σ_c p_c(x) e_c(x)`` with its
gradient, which is known in closed form, at about half the cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]


@dataclass(frozen=True)
class Goal:
    """What maps on one grid are to match; without gradients.

    Attributes:
        size: The grid, of the target map.
        parts: Source maps side by side in their order, ``[B, c, h₀, w₀]`` each, on grids no larger than ``size``.
        mean: Of the resized source, ``[B, ΣC]``.
        square: Mean of its square, ``[B, ΣC]``.
    """

    size: Size
    parts: list[Tensor]
    mean: Tensor
    square: Tensor

    @property
    def pixels(self) -> int:
        """Of the grid."""
        return self.size[0] * self.size[1]

    @property
    def channels(self) -> list[int]:
        """Of the parts."""
        return [part.shape[1] for part in self.parts]


@torch.no_grad()
def goal(maps: Sequence[Tensor], size: Size) -> Goal:
    """Prepare source maps ``[B, c, h, w]`` to be matched on a grid."""
    parts: list[Tensor] = []
    for part in maps:
        if part.shape[2] * part.shape[3] > size[0] * size[1]:
            part = F.interpolate(part, size, mode="bilinear", align_corners=False)
        if parts and parts[-1].shape[2:] == part.shape[2:]:
            parts[-1] = torch.cat([parts[-1], part], 1)
        else:
            parts.append(part)
    means, squares = zip(*(_sums(part, size) for part in parts), strict=True)
    pixels = size[0] * size[1]
    return Goal(size, parts, torch.cat(means, 1) / pixels, torch.cat(squares, 1) / pixels)


def _sums(part: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """Over a grid, of a map resized to it and of its square, ``[B, c]``, without going there."""
    if part.shape[2:] == size:
        flat = part.flatten(2)
        return flat.sum(2), flat.square().sum(2)
    high, wide = _interpolation(part, size)
    across = part @ (wide.T @ wide)
    # Each new row mixes two neighbours, so the matrix between rows has three diagonals, two of them alike.
    between = high.T @ high
    mixed = across * between.diagonal()[:, None]
    mixed[:, :, :-1] += 2 * between.diagonal(1)[:, None] * across[:, :, 1:]
    return (part @ wide.sum(0)) @ high.sum(0), (part * mixed).flatten(2).sum(2)


def pair_errors(target: Tensor, weight: Tensor, bias: Tensor, wanted: Goal) -> Tensor:
    """``e``: ``[B, ΣC]``. Gradients flow to all but the goal.

    Args:
        target: A map ``[B, c, h, w]``.
        weight: ``[ΣC, c]``.
        bias: ``[ΣC]``.
        wanted: Of the source, on the target's grid.
    """
    flat = target.flatten(2)
    if wanted.pixels <= flat.shape[1]:
        return (weight @ flat + bias[:, None] - _whole(wanted)).square().mean(2)
    cross = []
    for part, rows in zip(wanted.parts, torch.split(weight, wanted.channels), strict=True):
        near = _brought(target, part).flatten(2)
        cross.append(((part.flatten(2) @ near.transpose(1, 2)) * rows).sum(2))
    moments = flat @ flat.transpose(1, 2) / wanted.pixels
    square = ((moments @ weight.T) * weight.T).sum(1)
    shifted = 2 * bias * (flat.mean(2) @ weight.T - wanted.mean) + bias.square()
    return square + shifted - (2 / wanted.pixels) * torch.cat(cross, 1) + wanted.square


def matched(target: Tensor, weight: Tensor, bias: Tensor, products: Tensor, wanted: Goal) -> Tensor:
    """``mean_x Σ_c p_c(x) e_c(x)``, a scalar. Gradients flow to target, weight and bias, once; not to the products.

    Args:
        target: As for ``pair_errors``.
        weight: The same.
        bias: The same.
        products: p, ``[B, ΣC]``, or ``[1, ΣC]`` where they are the same for all images.
        wanted: The same.
    """
    found: Tensor = _Matched.apply(target, weight, bias, products, wanted)  # type: ignore[no-untyped-call]
    return found


class _Matched(torch.autograd.Function):
    """Loss and gradients in one go."""

    @staticmethod
    def forward(ctx: Any, target: Tensor, weight: Tensor, bias: Tensor, products: Tensor, wanted: Goal) -> Tensor:
        compute = _directly if wanted.pixels <= target.shape[1] else _by_moments
        loss, *gradients = compute(target, weight, bias, products, wanted)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*(grads[0] * gradient for gradient in ctx.saved_tensors), None, None)


def _directly(target: Tensor, weight: Tensor, bias: Tensor, products: Tensor, wanted: Goal) -> tuple[Tensor, ...]:
    flat = target.flatten(2)
    error = (weight @ flat).add_(bias[:, None]).sub_(_whole(wanted))
    slope = error * (products * (2 / (len(flat) * wanted.pixels)))[:, :, None]
    loss = torch.dot(error.flatten(), slope.flatten()) / 2
    return loss, (weight.T @ slope).view_as(target), (slope @ flat.transpose(1, 2)).sum(0), slope.sum((0, 2))


def _by_moments(target: Tensor, weight: Tensor, bias: Tensor, products: Tensor, wanted: Goal) -> tuple[Tensor, ...]:
    """By sums over channels first: of p W'W (``inner``) and p W'b (``shift``), and p W's for each part."""
    flat, pixels, batch = target.flatten(2), wanted.pixels, len(target)
    mean, moments = flat.mean(2), flat @ flat.transpose(1, 2) / pixels
    scaled = products[:, :, None] * weight
    inner, shift = weight.T @ scaled, (products * bias) @ weight
    slope, crossed = inner @ flat, []
    for part, rows, p in zip(
        wanted.parts,
        torch.split(scaled, wanted.channels, 1),
        torch.split(products, wanted.channels, 1),
        strict=True,
    ):
        _subtract(slope, rows, part, wanted.size)
        crossed.append(_weighted_moments(part.flatten(2), _brought(target, part).flatten(2), p) / pixels)
    slope.add_(shift[:, :, None]).mul_(2 / (batch * pixels))
    cross = torch.cat(crossed)
    constant = products * (bias.square() - 2 * bias * wanted.mean + wanted.square)
    loss = (inner * moments).sum() + 2 * (mean * shift).sum() + constant.sum() - 2 * (weight * cross).sum()
    if len(products) == 1:
        own = products.T * (weight @ moments.mean(0) + bias[:, None] * mean.mean(0))
    else:
        own = (products[:, :, None] * (weight @ moments + bias[:, None] * mean[:, None])).mean(0)
    off = products * (mean @ weight.T + bias - wanted.mean)
    return loss / batch, slope.view_as(target), 2 * (own - cross / batch), 2 * off.mean(0)


def _subtract(slope: Tensor, rows: Tensor, part: Tensor, size: Size) -> None:
    """Take ``W' s`` from ``slope``, ``[B, c, h w]``, in place; with W on the source's own grid first."""
    batch, channels = slope.shape[:2]
    back = rows.transpose(1, 2).expand(batch, -1, -1)
    if part.shape[2:] == size:
        slope.baddbmm_(back, part.flatten(2), alpha=-1)
        return
    high, wide = _interpolation(part, size)
    across = (back @ part.flatten(2)).view(batch * channels, *part.shape[2:]) @ wide.T
    slope.view(batch * channels, *size).baddbmm_(high.expand(len(across), -1, -1), across, alpha=-1)


def _weighted_moments(known: Tensor, near: Tensor, products: Tensor) -> Tensor:
    """``Σ_x p_c(x) Σ_ij s_cij t_dij``, ``[C, c]``."""
    near = near.transpose(1, 2)
    if len(products) == 1:
        return products.T * (known @ near).sum(0)
    return (products[:, :, None] * (known @ near)).sum(0)


def _whole(wanted: Goal) -> Tensor:
    """The source on the target's grid, ``[B, ΣC, h w]``."""
    return torch.cat([_spread(part, wanted.size) for part in wanted.parts], 1).flatten(2)


def _spread(values: Tensor, size: Size) -> Tensor:
    """U s₀: a map brought to a grid."""
    if values.shape[2:] == size:
        return values
    high, wide = _interpolation(values, size)
    return high @ (values @ wide.T)


def _brought(target: Tensor, source: Tensor) -> Tensor:
    """Uᵀ t: the target on the source's grid."""
    if target.shape[2:] == source.shape[2:]:
        return target
    high, wide = _interpolation(source, (target.shape[2], target.shape[3]))
    return high.T @ (target @ wide)


def _interpolation(source: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """Bilinear interpolation from a map's grid to another as two matrices, ``[h, h₀]`` and ``[w, w₀]``."""
    sides = zip(size, source.shape[2:], strict=True)
    high, wide = (_linear(int(after), int(before), source.dtype, source.device) for after, before in sides)
    return high, wide


@lru_cache(maxsize=256)
def _linear(after: int, before: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    unit = torch.eye(before, dtype=dtype, device=device)
    return F.interpolate(unit[None], after, mode="linear", align_corners=False)[0].T.contiguous()
