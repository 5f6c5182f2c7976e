"""Matching the maps of two networks of different shape, with weights that say what to learn, and where.

Of a source S with M maps and a target T with N maps, on the same images x::

    D(x) = 1/(M N) Σₘₙ λₘₙ(x) Σ_c wₘₙ,c(x) mean_ij ( rₙ(Tₙ(x)) − S̄ₘ(x) )²_cij

- r: 1x1 convolutions from the channels of a target map to those of the source maps; they learn with the target.
- S̄: source maps, each channel standardised over the batch, resized to the target map. No gradient.
- w, *what*: a softmax over the channels of a source map, by a small network that sees the means of S̄ₘ(x).
- λ, *where*: how much a pair of maps counts, by the same means; a sigmoid between 0.05 and 6, about 1 at first.

Where only means over space are known of a source, those of the target are matched with them: Tₙ is then one pixel.

After Jang, Lee, Hwang, Shin: Learning what and where to transfer. ICML 2019. arXiv 1905.05901. Ours: the factor 1/(M N)
and S̄, so that one weight of D means the same for all pairs of networks; the narrow layer of the channel networks;
λ by a sigmoid, where ReLU6 gives a pair that has reached 0 no way back; ``attention``, which is near to Ji, Heo, Park:
Show, attend and distill, AAAI 2021 (arXiv 2102.02973): λ from a likeness of source and target, learned by D itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from polyclinic.transfer.pair_errors import Goal, Size, goal, matched, pair_errors

Weights = Literal["learned", "uniform", "layer-only", "channel-only", "attention"]
NARROW = 64
"""Most units of the narrow layer of a channel network."""
LEAST, MOST = 0.05, 6.0
"""Bounds of λ."""
_QUERY = 128
_START = 0.01
"""Deviation of the first weights of λ's networks."""


@dataclass(frozen=True)
class Source:
    """What a source says of a batch, ready to be matched; without gradients.

    Attributes:
        goals: S̄ as it is to be matched, by the size of the target map.
        means: Of S̄ over space, ``[B, ΣC]``.
        pooled: Whether the source's maps were means over space, so that the target's are to be as well.
    """

    goals: dict[Size, Goal]
    means: Tensor
    pooled: bool

    def like(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The target's maps as they are matched: ``[B, c, H, W]``, of one pixel where the source is pooled."""
        return [_point(part) if self.pooled else _map(part) for part in maps]


class ChannelWeights(nn.Module):
    """``softmax(W₂ relu(W₁ g) + b)`` over the channels of each source map, for each target map; 1/c at first."""

    def __init__(self, source: Sequence[int], targets: int) -> None:
        super().__init__()
        self.source, self.targets = list(source), targets
        self.narrow = nn.ModuleList(nn.Linear(c, targets * min(NARROW, c), bias=False) for c in source)
        self.wide = nn.ParameterList(torch.zeros(targets, min(NARROW, c), c) for c in source)
        self.bias = nn.ParameterList(torch.zeros(targets, c) for c in source)

    def forward(self, means: Tensor) -> Tensor:
        """``[B, N, ΣC]``, which sums to one over the channels of each map."""
        found = []
        parts = zip(torch.split(means, self.source, 1), self.narrow, self.wide, self.bias, strict=True)
        for part, narrow, wide, bias in parts:
            hidden = narrow(part).relu().unflatten(1, (self.targets, -1))
            found.append((torch.einsum("bnh,nhc->bnc", hidden, wide) + bias).softmax(2))
        return torch.cat(found, 2)


class LayerWeights(nn.Module):
    """``0.05 + 5.95 sigmoid(u·g + b)`` for each pair of maps; about 1 at first."""

    def __init__(self, source: Sequence[int], targets: int) -> None:
        super().__init__()
        self.source = list(source)
        self.layers = nn.ModuleList(nn.Linear(c, targets) for c in source)
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=_START / math.sqrt(layer.in_features))
            nn.init.constant_(layer.bias, math.log((1 - LEAST) / (MOST - 1)))

    def forward(self, means: Tensor) -> Tensor:
        """``[B, N, M]``."""
        parts = zip(torch.split(means, self.source, 1), self.layers, strict=True)
        return LEAST + (MOST - LEAST) * torch.stack([layer(part) for part, layer in parts], 2).sigmoid()


class Attention(nn.Module):
    """N softmax over target maps of (query of the source map) · (key of the target map) + places; 1 on average."""

    def __init__(self, source: Sequence[int], target: Sequence[int]) -> None:
        super().__init__()
        self.source = list(source)
        self.queries = nn.ModuleList(nn.Linear(c, _QUERY) for c in source)
        self.keys = nn.ModuleList(nn.Linear(c, _QUERY) for c in target)
        self.places = nn.ParameterList((torch.zeros(len(source), _QUERY), torch.zeros(len(target), _QUERY)))
        for place in self.places:
            nn.init.normal_(place, std=_START)

    def forward(self, means: Tensor, target_means: Sequence[Tensor]) -> Tensor:
        """``[B, N, M]``.

        Args:
            means: Of the source, ``[B, ΣC]``.
            target_means: ``[B, c]`` of each target map, standardised.
        """
        queries = torch.stack(
            [net(part) for part, net in zip(torch.split(means, self.source, 1), self.queries, strict=True)], 2
        )
        keys = torch.stack([net(part).relu() for part, net in zip(target_means, self.keys, strict=True)], 1)
        scores: Tensor = keys @ queries + self.places[1] @ self.places[0].T
        return (scores / math.sqrt(_QUERY)).softmax(1) * len(self.keys)


class Matching(nn.Module):
    """Everything that a target needs to learn from the maps of one source.

    Args:
        source: Channels of each source map.
        target: Channels of each target map.
        weights: ``learned`` (both), ``layer-only``, ``channel-only``, ``uniform`` (λ = 1, w = 1/c) or ``attention``.
    """

    def __init__(self, source: Sequence[int], target: Sequence[int], weights: Weights) -> None:
        super().__init__()
        self.source, self.target, self.kind = list(source), list(target), weights
        self.regressors = nn.ModuleList(nn.Linear(c, sum(source)) for c in target)
        self.what = ChannelWeights(source, len(target)) if weights in ("learned", "channel-only") else None
        self.where = LayerWeights(source, len(target)) if weights in ("learned", "layer-only") else None
        self.attention = Attention(source, target) if weights == "attention" else None
        spread = torch.repeat_interleave(torch.eye(len(source)), torch.tensor(source), dim=1)
        self.register_buffer("spread", spread, persistent=False)

    @property
    def meta_parameters(self) -> list[nn.Parameter]:
        """φ: what learns from held-out images; empty for ``uniform`` and ``attention``."""
        return [p for net in (self.what, self.where) if net is not None for p in net.parameters()]

    @property
    def joint_parameters(self) -> list[nn.Parameter]:
        """What learns with the target, by D."""
        return [*self.regressors.parameters(), *(self.attention.parameters() if self.attention is not None else ())]

    @torch.no_grad()
    def see(self, maps: Sequence[Tensor], like: Sequence[Tensor]) -> Source:
        """Standardise the maps of a source and resize them to those of the target.

        Args:
            maps: ``[B, c, *spatial]``, one for each source map, on images that ``like`` is of as well; or ``[B, c]``,
                their means over space.
            like: The target's maps, for their sizes.
        """
        flat = [_standardised(_map(part)) for part in maps]
        pooled = all(part.ndim == 2 for part in maps)
        sizes = [(1, 1)] if pooled else dict.fromkeys(_size(_map(part)) for part in like)
        means = torch.cat([part.mean((2, 3)) for part in flat], 1)
        return Source({size: goal(flat, size) for size in sizes}, means, pooled)

    def errors(self, source: Source, maps: Sequence[Tensor]) -> Tensor:
        """Mean squared error of every pair and channel, by image: ``[B, N, ΣC]``, no weight in it.

        Args:
            source: From ``see``.
            maps: The target's, with gradients.
        """
        found = []
        for part, regressor in zip(source.like(maps), self.regressors, strict=True):
            assert isinstance(regressor, nn.Linear)
            part = _wide(part)
            found.append(pair_errors(part, regressor.weight, regressor.bias, source.goals[_size(part)]))
        return torch.stack(found, 1)

    def products(self, source: Source, maps: Sequence[Tensor]) -> Tensor:
        """``λ w / (M N)``: ``[B, N, ΣC]``, or ``[1, 1, ΣC]`` where they are the same for all.

        Gradients flow to φ, and with ``attention`` to its networks; never to the target.
        """
        what = self._what(source)
        where = self._where(source, maps)
        if where is not None:
            what = what * (where @ self.get_buffer("spread"))
        scaled: Tensor = what / (len(self.source) * len(self.target))
        return scaled

    def _what(self, source: Source) -> Tensor:
        if self.what is not None:
            found: Tensor = self.what(source.means)
            return found
        spread = self.get_buffer("spread")
        return (spread / spread.sum(1, keepdim=True)).sum(0)[None, None]

    def _where(self, source: Source, maps: Sequence[Tensor]) -> Tensor | None:
        found: Tensor | None = None
        if self.where is not None:
            found = self.where(source.means)
        elif self.attention is not None:
            pooled = [_standardised(part.detach()).mean((2, 3)) for part in source.like(maps)]
            found = self.attention(source.means, pooled)
        return found

    def forward(self, source: Source, maps: Sequence[Tensor]) -> Tensor:
        """D, the mean over the batch. Gradients flow to the target and to ``joint_parameters``, not to φ."""
        products = self.products(source, maps)
        if self.attention is not None:
            return (self.errors(source, maps) * products).sum((1, 2)).mean()
        products = products.detach().expand(-1, len(self.target), -1)
        each = []
        for number, (part, regressor) in enumerate(zip(source.like(maps), self.regressors, strict=True)):
            assert isinstance(regressor, nn.Linear)
            part = _wide(part)
            wanted = source.goals[_size(part)]
            each.append(matched(part, regressor.weight, regressor.bias, products[:, number], wanted))
        return torch.stack(each).sum()

    @torch.no_grad()
    def summary(self, source: Source, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """What the weights look like on a batch.

        Returns:
            ``where`` ``[M, N]``: mean λ. ``entropy`` ``[M, N]``: mean entropy of w over its largest value, 0..1.
            ``channels`` ``[ΣC]``: mean w over images and target maps. ``floor``: share of the λ near their lower bound,
            below 0.1.
        """
        where = self._where(source, maps)
        if where is None:
            where = source.means.new_ones(1, len(self.target), len(self.source))
        what = self._what(source).expand(-1, len(self.target), -1)
        parts = torch.split(what, self.source, 2)
        entropy = [torch.special.entr(part).sum(2).mean(0) / math.log(max(part.shape[2], 2)) for part in parts]
        return {
            "where": where.mean(0).T,
            "entropy": torch.stack(entropy),
            "channels": what.mean((0, 1)),
            "floor": (where < 2 * LEAST).float().mean(),
        }


def _map(values: Tensor) -> Tensor:
    """A map with two axes of space: pooled vectors are maps of one pixel."""
    return values if values.ndim == 4 else values[:, :, None, None] if values.ndim == 2 else values.flatten(3)


def _point(values: Tensor) -> Tensor:
    """A map of one pixel: its mean over space."""
    return _wide(_map(values)).mean((2, 3), keepdim=True)


def _size(values: Tensor) -> Size:
    return int(values.shape[2]), int(values.shape[3])


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _standardised(values: Tensor) -> Tensor:
    """Zero mean and unit deviation of each channel over batch and space; channels that never vary are zero."""
    values = _wide(values)
    # Not torch.var_mean, which takes many times as long.
    centred = values - values.mean((0, 2, 3), keepdim=True)
    deviation = centred.square().mean((0, 2, 3), keepdim=True).sqrt()
    # Relative to the map: an absolute bound would make one of a source that is 100 times as large.
    least = 1e-6 * deviation.amax() + torch.finfo(values.dtype).tiny
    return centred.mul_(torch.where(deviation > least, 1 / deviation.clamp(min=least), 0.0))
