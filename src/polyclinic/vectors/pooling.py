"""Running statistics of batch normalisation, pooled over sites without ever becoming a negative variance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polyclinic.errors import ContributionError
from polyclinic.vectors.sources import Outline, Source


def pooled_statistics(outline: Outline, sources: Sequence[Source]) -> dict[str, Tensor]:
    """Means and variances over the images of all sites, float64, by the names of the outline.

    ``mu = sum n_j mu_j / n`` and ``var = sum n_j (var_j + (mu_j - mu)^2) / n``: a sum of squares, where the equal
    ``sum n_j (var_j + mu_j^2) / n - mu^2`` could round to below zero. Exact for the moments that each site's own
    network saw, an approximation for those of the merged network.

    Raises:
        ContributionError: A site sent a variance that is not above zero, or a wrong shape; or no site has images.
    """
    images = torch.tensor([float(source.images) for source in sources], dtype=torch.float64)
    if not images.sum() > 0:
        raise ContributionError("bn-pooled weighs sites by their training images, but all contributions state none.")
    shares = images / images.sum()
    shapes = {spec.name: spec.shape for spec in outline.specs if spec.statistic}
    pooled: dict[str, Tensor] = {}
    for name in shapes:
        layer, _, leaf = name.rpartition(".")
        if leaf != "running_mean":
            continue
        of_variance = f"{layer}.running_var" if layer else "running_var"
        means = torch.stack([_read(source, name, shapes[name]) for source in sources])
        variances = torch.stack([_read(source, of_variance, shapes[name]) for source in sources])
        pooled[name] = shares @ means
        pooled[of_variance] = shares @ (variances + (means - pooled[name]).square())
    return pooled


def _read(source: Source, name: str, shape: tuple[int, ...]) -> Tensor:
    values = source.read("statistics", name).double()
    who = f"contribution {source.digest[:12]} of site {source.site!r}"
    if tuple(values.shape) != shape:
        raise ContributionError(f"{who}: {name} has shape {tuple(values.shape)}, the base has {shape}. Remove it.")
    if not bool(values.isfinite().all()) or (name.endswith("running_var") and not bool((values > 0).all())):
        raise ContributionError(f"{who}: {name} holds values that are no running statistics. Remove it.")
    return values
