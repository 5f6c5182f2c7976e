"""Gaussians of the latent space by class and device, from sums that sites add up.

Reconstruction of FedSSG (arXiv 2604.26324), placement at the server: sites send means and variances, once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyclinic.errors import SiteError
from polyclinic.synthesis.generators.features import cell_means

MEAN, DEVIATION = "cell_mean", "cell_deviation"
LEAST_VARIANCE = 1e-6


def latent_sums(
    mean: Tensor, log_variance: Tensor, labels: Tensor, devices: Tensor, shape: tuple[int, int]
) -> dict[str, Tensor]:
    """What a site adds: by cell the number of images, the sum of posterior means, and of their second moments.

    Args:
        mean: ``[n, L]``.
        log_variance: ``[n, L]``.
        labels: int64 ``[n]``.
        devices: int64 ``[n]``.
        shape: Classes and devices.

    Returns:
        float64 ``count [C, D]``, ``mean [C, D, L]``, ``square [C, D, L]`` (mean² + variance).
    """
    cell = (labels * shape[1] + devices).cpu()
    own = mean.double().cpu()
    square = own.square() + log_variance.double().cpu().exp()
    flat = torch.zeros(shape[0] * shape[1], own.shape[1], dtype=torch.float64)
    count = torch.bincount(cell, minlength=len(flat)).double()
    return {
        "count": count.view(shape),
        "mean": flat.index_add(0, cell, own).view(*shape, -1),
        "square": flat.index_add(0, cell, square).view(*shape, -1),
    }


def cell_gaussians(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A diagonal Gaussian for every cell.

    Means are those of ``features.cell_means``: a cell's own, drawn to the sum of a class and a device effect, which is
    all that a cell has that nobody owns. Variances are within cells: a cell's own, else its class's. For a class that
    nobody owns nothing is planned; it has some Gaussian.

    Args:
        sums: Of ``latent_sums`` over all sites.

    Returns:
        float32 ``cell_mean [C, D, L]`` and ``cell_deviation [C, D, L]``, the latter above zero.

    Raises:
        SiteError: No site has an image.
    """
    # Sums that went through noisy arithmetic may hold a little less than nothing.
    count = sums["count"].double().cpu().round().clamp(min=0)
    if not bool(count.any()):
        raise SiteError("no site has a cell of synthesis.floor patients: there is nothing to make samples from.")
    weight = count.unsqueeze(-1)
    first, second = (sums[name].double().cpu() * (weight > 0) for name in ("mean", "square"))
    each = weight.clamp(min=1)
    variance = (second / each - (first / each).square()).clamp(min=LEAST_VARIANCE)
    spread = weight * variance
    of_class = spread.sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True).clamp(min=1)
    overall = spread.sum(dim=(0, 1)) / count.sum()
    wider = torch.where(weight.sum(dim=1, keepdim=True) > 0, of_class, overall)
    deviation = torch.where(weight > 0, variance, wider).sqrt()
    return {MEAN: cell_means(count, first).float(), DEVIATION: deviation.float()}
