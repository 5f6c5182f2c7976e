"""Features of images in a network that is not trained here: distances between them are not only distances of pixels.

The network is the study's with its start weights (``Workbench.initial``): publicly trained where ``model.weights``
names a file, otherwise random. Random features tell colours and coarse shapes apart and forgive a shift or a mirror
image, which pixels do not; they know nothing of lesions. Either way the network never saw a patient of the study.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyclinic.data.dataset import normalized
from polyclinic.errors import StudyError
from polyclinic.models.taps import feature_tap, features
from polyclinic.study import ImageSettings

BATCH = 64


@torch.no_grad()
def frozen_features(model: nn.Module, images: Tensor, settings: ImageSettings, batch: int = BATCH) -> Tensor:
    """Penultimate features of images, in evaluation mode, without augmentation.

    Images are resized to the study's size: by means where an axis shrinks, linearly where it grows. Real images must
    come at the generator's resolution (``vae.shrunk_images``), so that both have the same blur: else every distance
    between real and synthetic would measure resolution.

    Args:
        model: With a ``feature_tap``; its start weights are the caller's to load. Left in evaluation mode.
        images: uint8 ``[n, C, s, s]``; n may be 0.
        settings: Size and normalisation of the study's images.
        batch: Images per forward pass.

    Returns:
        float32 ``[n, F]``, on the CPU.

    Raises:
        StudyError: The network does not say where its features are, or the study's images are volumes.
    """
    feature_tap(model)
    if len(settings.size) != 2:
        raise StudyError(f"samples are images, but data.image.size has {len(settings.size)} axes. Leave out synthesis.")
    size = [settings.size[0], settings.size[1]]
    device = next(model.parameters()).device
    model.eval()
    # One image more where there are none: only a forward pass tells how many features there are.
    given = images if len(images) else images.new_zeros(1, *images.shape[1:])
    found = []
    for part in torch.split(given, batch):
        pictures = part.to(device).float() / 255
        if list(part.shape[-2:]) != size:
            pictures = F.interpolate(pictures, size=size, mode="bilinear", antialias=True).clamp_(0, 1)
        found.append(features(model, normalized(pictures, settings.mean, settings.std)).float().cpu())
    return torch.cat(found)[: len(images)]
