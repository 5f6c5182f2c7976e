"""Layers for the tests of merge rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from polyclinic.vectors.rules.base import Layer
from polyclinic.vectors.rules.data_vector import DataVector
from polyclinic.vectors.rules.fisher import Fisher
from polyclinic.vectors.rules.iso_c import IsoC
from polyclinic.vectors.rules.median import Median
from polyclinic.vectors.rules.regmean import RegMean
from polyclinic.vectors.rules.ties import Ties
from polyclinic.vectors.rules.trimmed_mean import TrimmedMean
from polyclinic.vectors.rules.tsv import Tsv

LAYERWISE = {
    "norm-keep": DataVector(coefficients="norm-keep"),
    "model-stock": DataVector(coefficients="model-stock"),
    "ties": Ties(),
    "ties-network": Ties(trim="network"),
    "fisher": Fisher(),
    "regmean": RegMean(),
    "regmean-proxy": RegMean(grams="proxy"),
    "regmean-proxy-exact": RegMean(grams="proxy", ridge=0),
    "tsv": Tsv(),
    "iso-c": IsoC(),
    "median": Median(),
    "trimmed-mean": TrimmedMean(trim=0),
}
"""Every rule that merges layer by layer, for what all of them promise."""


def layer_of(
    vectors: Sequence[Any], name: str = "conv.weight", extra: Mapping[str, Sequence[Tensor | None]] | None = None
) -> Layer:
    """A layer from each site's change of it; ``extra`` holds Fisher information or Gram matrices of each site."""
    tensors = tuple(v if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float32) for v in vectors)
    brought = extra or {}
    return Layer(
        name=name,
        base=torch.zeros(tensors[0].shape),
        vectors=tensors,
        images=(10,) * len(tensors),
        extra=lambda j, kind: brought[kind][j] if kind in brought else None,
        seed=1,
    )


def merged(rule: Any, layer: Layer) -> Tensor:
    """What the rule makes of a network of this one layer."""
    delta: Tensor = rule.merge(layer, rule.survey([layer])).delta
    return delta


def random_vectors(sites: int, shape: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Gaussian changes with a common part, as sites with one task have."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(shape, generator=generator)
    return [common + torch.randn(shape, generator=generator) for _ in range(sites)]


def random_extra(sites: int, shape: tuple[int, ...], seed: int = 0) -> dict[str, list[Tensor]]:
    """Fisher information and Gram matrices that fit such changes."""
    generator = torch.Generator().manual_seed(seed + 1)
    inputs = 1
    for size in shape[1:]:
        inputs *= size
    rows = [torch.randn(inputs + 3, inputs, generator=generator) for _ in range(sites)]
    fishers = [torch.rand(shape, generator=generator) for _ in range(sites)]
    return {"fisher": fishers, "gram": [x.T @ x for x in rows]}
