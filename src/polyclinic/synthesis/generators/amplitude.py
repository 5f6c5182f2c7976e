"""Device transfer by Fourier amplitude: a site's own images in the style of another device, for cells nobody owns.

Nothing but the devices' mean windows was exchanged for it, and the images stay at the site, so no gate is needed.
(Reconstruction, sheet 1.5 phase 3: "overwrite the low-frequency amplitude window with A_d".)
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from polyclinic.data.dataset import SiteData
from polyclinic.synthesis.amplitude import restyle
from polyclinic.synthesis.cells import Counts, OwnImages

_AT_ONCE = 64
"""Images held as floats."""


def restyled_images(
    data: SiteData, own: OwnImages, wanted: Counts, styles: Tensor, strength: float, most: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Own images of a class in the style of a device that nobody has it on.

    Args:
        data: The site's images.
        own: Its training images.
        wanted: int64 ``[classes, devices]``, cells to fill; a site makes at most one image per image that it owns of
            the class.
        styles: Windows ``[devices, C, 2 half + 1, 2 half + 1]``.
        strength: How far amplitudes go over, 0..1.
        most: Images in all; of more, so many are drawn.
        rng: Source of chance.

    Returns:
        uint8 images ``[n, C, H, W]`` and int64 classes ``[n]``.
    """
    chosen: list[tuple[int, int, int]] = []
    for label, device in np.argwhere(wanted > 0).tolist():
        rows = np.flatnonzero((own.labels.numpy() == label) & (own.devices.numpy() != device))
        for row in rng.permutation(rows)[: int(wanted[label, device])].tolist():
            chosen.append((int(own.positions[row]), label, device))
    if len(chosen) > most:
        chosen = [chosen[i] for i in sorted(rng.permutation(len(chosen))[: max(0, most)].tolist())]
    shape = data.picture(0).shape
    if not chosen:
        return torch.zeros((0, *shape), dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)
    positions, labels, devices = (torch.tensor(column, dtype=torch.int64) for column in zip(*chosen, strict=True))
    made = torch.empty((len(positions), *shape), dtype=torch.uint8)
    for start in range(0, len(positions), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        images = data.inputs(positions[part]).cpu() * data.std + data.mean
        made[part] = restyle(images, styles.cpu()[devices[part]], strength).mul(255).round().to(torch.uint8)
    return made, labels
