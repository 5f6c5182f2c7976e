"""What the server thinks of candidates before owners see them: which are unlikely, odd, or there twice.

FedSSG (reconstruction; sheet 1.5, phase 4, step 2). What a class looks like is known from sums of frozen features over
the sites, whose linear discriminants are the class probabilities. The sheet takes the current global model for both;
before the first round that model is untrained, and its discriminants are the best that its features give.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from polyclinic.federation.message import Message
from polyclinic.federation.site import Site
from polyclinic.synthesis.cells import OwnImages
from polyclinic.synthesis.frozen import frozen_features
from polyclinic.synthesis.vae import shrunk_images
from polyclinic.vectors.head import HeadSums, solve_lda

LEAST = 0.2
"""Lowest probability of its own class that a sample may have, as a share of that of the likeliest class.

The sheet (1.5, phase 4) has 0.2 of one, under a trained model. Features that nobody trained give probabilities near
those of chance: of real skin lesions of seven classes at 32 pixels two in five lie below 0.2 of one, one in eight below
0.2 of the likeliest."""
QUANTILE = 0.99
"""A sample further from the centre of its class than this share of the class's samples is left out (same source)."""
DUPLICATE = 0.05
"""Samples of a class nearer to each other than this share of the typical (root mean square) distance of two real images
of one class are the same sample twice. Chosen here: the sheet names no number. If features had a normal distribution of
8 independent directions, one pair in 10^11 would be that near, of 4 directions one in 10^5."""
SHRINKAGE = 0.1
"""Of the covariance in the discriminants: ten times that of a head, because there may be hardly more images than
features, and because only clearly unlikely samples are to go."""
_BLOCK = 1024


class Kept(NamedTuple):
    """What ``keep`` left.

    Attributes:
        mask: bool ``[n]``.
        dropped: Samples by reason: ``unlikely``, ``far``, ``duplicate``. Each is counted under the first that holds.
    """

    mask: Tensor
    dropped: dict[str, int]


def feature_sums(site: Site, own: OwnImages, size: int) -> Message:
    """A site's sums of frozen features over its training images in cells of enough patients.

    Squares are summed over all classes together. That is all that discriminants ask for, it is a class-th of the bytes,
    and it shows less of a rare class than its own covariance would.

    Args:
        site: Its workbench is loaded with the start weights.
        own: Its images.
        size: Of generated images, in pixels.

    Returns:
        Group ``features`` of weight 1, float64: ``count [K]``, ``first [K, F+1]``, ``second [1, F+1, F+1]``, as
        ``HeadSums`` names them. They are counters: lanes of 64 bits.
    """
    site.load(site.initial)
    images = shrunk_images(site.data, own.positions, size)
    found = frozen_features(site.model, images, site.study.data.image)
    tensors = sums_of(found, own.labels, len(site.task.classes)).tensors()
    return Message.pack({"features": tensors}, **{"weight/features": 1.0})


def sums_of(features: Tensor, labels: Tensor, classes: int) -> HeadSums:
    """Sums over images, with one ``second`` ``[1, F+1, F+1]`` for all classes together.

    Args:
        features: ``[n, F]``; n may be 0.
        labels: int64 ``[n]``.
        classes: K.
    """
    x = torch.cat([features.double(), torch.ones(len(features), 1, dtype=torch.float64)], dim=1)
    member = torch.nn.functional.one_hot(labels, classes).double()
    return HeadSums(member.sum(0), member.T @ x, (x.T @ x)[None])


def keep(features: Tensor, labels: Tensor, sums: HeadSums, *, least: float = LEAST, quantile: float = QUANTILE) -> Kept:
    """Which samples are worth an owner's look.

    In this order: a sample whose class is less than ``least`` times as probable as the likeliest class, by linear
    discriminants (classes equally frequent beforehand, so rare ones are not dropped for being rare); one whose distance
    from the centre of the real images of its class is above the quantile of those of all samples of the class; and one
    that nearly equals an earlier sample of its class that stays. A class of at most ``1 / (1 - quantile)`` samples
    loses none for being far.

    Args:
        features: Of the samples, ``[n, F]``.
        labels: int64 ``[n]``.
        sums: Over the real images of all sites, from ``feature_sums``. Samples of a class without images are unlikely.
        least: Lowest probability of the own class, over that of the likeliest.
        quantile: Of distances within a class.

    Raises:
        ContributionError: The real images' features do not vary, or there are none.
    """
    values = features.double()
    likely = _probability(values, labels, sums) >= least
    near = torch.zeros_like(likely)
    single = likely.clone()
    typical = _typical_distance(sums)
    for c in sorted(set(labels.tolist())):
        rows = torch.nonzero(labels == c).flatten()
        if sums.count[c] <= 0:
            continue
        away = (values[rows] - sums.first[c, :-1] / sums.count[c]).norm(dim=1)
        near[rows] = away <= torch.quantile(away, quantile, interpolation="higher")
        stay = rows[likely[rows] & near[rows]]
        single[stay] = _first_of_equals(values[stay], DUPLICATE * typical)
    mask = likely & near & single
    dropped = {
        "unlikely": int((~likely).sum()),
        "far": int((likely & ~near).sum()),
        "duplicate": int((likely & near & ~single).sum()),
    }
    return Kept(mask, dropped)


def _probability(features: Tensor, labels: Tensor, sums: HeadSums) -> Tensor:
    """Of each sample's own class over that of its likeliest, ``[n]``; 0 where the class has no real image."""
    present = torch.nonzero(sums.count > 0).flatten()
    weight, bias = solve_lda(replace(sums, count=sums.count[present], first=sums.first[present]), SHRINKAGE)
    logits = features.new_full((len(features), len(sums.count)), -torch.inf)
    logits[:, present] = features @ weight.T + bias
    return (logits.gather(1, labels[:, None]).flatten() - logits.amax(1)).exp()


def _typical_distance(sums: HeadSums) -> float:
    """Root mean square distance of two images of one class: the square root of twice the trace of the covariance."""
    squares = float(sums.second.diagonal(dim1=1, dim2=2).sum() - sums.count.sum())
    of_means = float((sums.first[:, :-1].square().sum(1) / sums.count.clamp(min=1)).sum())
    return float((2 * max(squares - of_means, 0.0) / max(float(sums.count.sum()), 1.0)) ** 0.5)


def _first_of_equals(features: Tensor, distance: float) -> Tensor:
    """Which rows are not within ``distance`` of an earlier row that stays, bool ``[n]``; pairs are made in blocks."""
    stays = torch.ones(len(features), dtype=torch.bool)
    for start in range(0, len(features), _BLOCK):
        block = features[start : start + _BLOCK]
        for before in range(0, start, _BLOCK):
            earlier = features[before : before + _BLOCK][stays[before : before + _BLOCK]]
            if len(earlier):
                stays[start : start + len(block)] &= torch.cdist(block, earlier).amin(1) > distance
        within = torch.cdist(block, block) <= distance
        for i in torch.nonzero(within.tril(-1).any(1)).flatten().tolist():
            if stays[start + i]:
                stays[start + i] = not bool((within[i, :i] & stays[start : start + i]).any())
    return stays
