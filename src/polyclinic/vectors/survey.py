"""Dot products between the vectors of all contributions: norms, cosines and influence follow from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polyclinic.vectors.feed import BLOCK, Feed, in_order, one_thread, spans
from polyclinic.vectors.sources import InMemoryTensors, Outline, Source


@dataclass(frozen=True)
class VectorSurvey:
    """What admission needs to know of the vectors, after one pass over the files.

    Attributes:
        digests: Of the contributions, sorted; rows and columns of the matrices are in this order.
        sites: Who sent them, in the same order.
        products: For each layer of a vector the dot products ``[N, N]``, float64.
        changed: Share of the values of each vector that differ from zero, by digest.
    """

    digests: tuple[str, ...]
    sites: tuple[str, ...]
    products: dict[str, Tensor]
    changed: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> Tensor:
        """Dot products of the whole vectors, ``[N, N]``."""
        whole = torch.zeros(len(self.digests), len(self.digests), dtype=torch.float64)
        for product in self.products.values():
            whole += product
        return whole


def norms(products: Tensor) -> Tensor:
    """Euclidean norms ``[N]`` from dot products ``[N, N]``."""
    return products.diagonal().clamp(min=0).sqrt()


def cosines(products: Tensor) -> Tensor:
    """Cosines ``[N, N]`` from dot products ``[N, N]``; zero to a vector of zeros."""
    scale = norms(products)
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    return (products * inverse[:, None] * inverse).clamp(-1, 1)


def survey_vectors(outline: Outline, sources: Sequence[Source]) -> VectorSurvey:
    """Read all vectors once, layer by layer, as they were sent.

    Raises:
        ContributionError: Two contributions with one digest, or a tensor of another shape.
    """
    ordered = in_order(sources)
    feed = Feed(outline, InMemoryTensors({}), ordered)
    rows = torch.empty(len(ordered), BLOCK, dtype=torch.float64)
    products, moved = {}, [0] * len(ordered)
    with one_thread():
        for spec in outline.weights:
            vectors = [feed.vector(j, spec).reshape(-1) for j in range(len(ordered))]
            moved = [count + int(vector.count_nonzero()) for count, vector in zip(moved, vectors, strict=True)]
            product = torch.zeros(len(ordered), len(ordered), dtype=torch.float64)
            for span in spans(vectors[0].numel() if vectors else 0):
                block = rows[:, : span.stop - span.start]
                for row, vector in zip(block, vectors, strict=True):
                    row.copy_(vector[span])
                product.addmm_(block, block.T)
            products[spec.name] = (product + product.T) / 2
            del vectors  # else they live on while the next layer is read
    values = sum(math.prod(spec.shape) for spec in outline.weights)
    changed = {source.digest: count / values for source, count in zip(ordered, moved, strict=True)}
    return VectorSurvey(tuple(s.digest for s in ordered), tuple(s.site for s in ordered), products, changed)
