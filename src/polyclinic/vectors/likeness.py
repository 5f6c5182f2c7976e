"""How one vector stands to others, from the dot products of all pairs.

Throughout ``dots`` are ``[N, N]`` in float64, ``j`` is the vector in question and ``others`` are the positions of those
that it is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import median

import torch
from torch import Tensor

MAD = 1.4826
"""Times the median absolute deviation gives the standard deviation of a normal distribution."""
FEWEST_OTHERS = 2
"""With one other there is no telling who is the odd one."""


def relative_norm(dots: Tensor, j: int, others: Sequence[int], spread: float) -> tuple[float | None, float | None]:
    """A norm over the median of the others', and the robust z-score of its logarithm; norms of zero do not count."""
    squares = dots.diagonal()
    logs = [math.log(float(squares[k])) / 2 for k in others if squares[k] > 0]
    if len(logs) < FEWEST_OTHERS or squares[j] <= 0:
        return None, None
    middle = median(logs)
    difference = math.log(float(squares[j])) / 2 - middle
    deviation = MAD * median(abs(value - middle) for value in logs)
    return math.exp(difference), difference / max(deviation, spread)


def cosine_to_others(dots: Tensor, j: int, others: Sequence[int]) -> float | None:
    """Cosine to the sum of the others' unit vectors: a long one must not decide what the common direction is."""
    used = [k for k in others if dots[k, k] > 0]
    if not used or dots[j, j] <= 0:
        return None
    lengths = dots.diagonal()[used].sqrt()
    length = float((dots[used][:, used] / torch.outer(lengths, lengths)).sum())
    if length <= 1e-12:
        return None
    return float((dots[j, used] / lengths).sum()) / math.sqrt(float(dots[j, j]) * length)


def influence(dots: Tensor, j: int, others: Sequence[int]) -> float | None:
    """||mean - mean without j|| / ||mean|| = ||v_j - mean|| / ((n - 1) ||mean||), of j and the others."""
    if not others:
        return None
    group = [j, *others]
    mean = float(dots[group][:, group].sum()) / len(group) ** 2
    if mean <= 0:
        return None
    distance = float(dots[j, j]) - 2 * float(dots[j, group].sum()) / len(group) + mean
    return math.sqrt(max(distance, 0.0) / mean) / len(others)


def agreement(dots: Tensor, among: Sequence[int]) -> float | None:
    """Median cosine of all pairs among these; None where there is no pair. Vectors of zeros do not count."""
    used = [k for k in among if dots[k, k] > 0]
    pairs = [cosine(dots, a, b) for a, b in combinations(used, 2)]
    return median(pairs) if pairs else None


def cosine(dots: Tensor, a: int, b: int) -> float:
    """Cosine of two vectors that are not zero."""
    return float(dots[a, b]) / math.sqrt(float(dots[a, a]) * float(dots[b, b]))


def most_alike(dots: Tensor, j: int, others: Sequence[int]) -> float | None:
    """Largest cosine to any other, either way."""
    return max((abs(cosine(dots, j, k)) for k in others if dots[j, j] > 0 and dots[k, k] > 0), default=None)


def beyond_chance(layers: Mapping[str, Tensor], sizes: Mapping[str, int], a: int, b: int) -> float:
    """Dot product of two vectors, in standard deviations of what it would be if one were noise.

    Noise of the same norm in every layer l of d_l values has a dot product of mean 0 and variance
    ``sum_l |a_l|^2 |b_l|^2 / d_l``. 0 where a vector is zero.

    Args:
        layers: ``dots`` of each layer.
        sizes: Values of each layer.
        a, b: Positions.
    """
    total = sum(float(dots[a, b]) for dots in layers.values())
    variance = sum(float(dots[a, a]) * float(dots[b, b]) / sizes[name] for name, dots in layers.items())
    return total / math.sqrt(variance) if variance > 0 else 0.0
