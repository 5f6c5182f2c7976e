"""What a site keeps from the exchange: the samples it took, at the size of its images, and the devices' styles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polyclinic.federation.state import SiteState
from polyclinic.study import Study
from polyclinic.synthesis.supplement import Supplement, sample_weight

KEY = "shelf"
_AT_ONCE = 64


@dataclass(frozen=True)
class Shelf:
    """Samples and styles of a site.

    Attributes:
        images: uint8 ``[m, C, H, W]``.
        labels: int64 ``[m]``.
        styles: Windows of devices that are not the site's, ``[d, C, 2 half + 1, 2 half + 1]``.
    """

    images: Tensor
    labels: Tensor
    styles: Tensor

    def save(self, state: SiteState) -> None:
        """Keep it in the site's state."""
        state.save(KEY, {"images": self.images, "labels": self.labels, "styles": self.styles})

    @classmethod
    def load(cls, state: SiteState) -> Shelf | None:
        """What ``save`` kept, on the CPU, where images are drawn and augmented; None if there is nothing."""
        kept = state.load(KEY)
        if kept is None:
            return None
        return cls(*(kept[0][name].cpu() for name in ("images", "labels", "styles")))

    def supplement(self, study: Study, number: int) -> Supplement:
        """What it adds to the training of round ``number``."""
        settings = study.synthesis
        assert settings is not None
        training = settings.training
        return Supplement(
            self.images,
            self.labels,
            sample_weight(training, number, study.method.rounds),
            training.real_per_synthetic,
            training.batch_norm == "own",
            self.styles,
            settings.style,
        )


def sized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Samples at the size of a site's images, uint8 ``[m, C, H, W]``."""
    if tuple(images.shape[-2:]) == size or len(images) == 0:
        return images.new_empty((0, images.shape[1], *size)) if len(images) == 0 else images
    found = images.new_empty((len(images), images.shape[1], *size))
    for start in range(0, len(images), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        larger = torch.nn.functional.interpolate(images[part].float(), size=size, mode="bilinear", antialias=True)
        found[part] = larger.round().clamp(0, 255).to(torch.uint8)
    return found
