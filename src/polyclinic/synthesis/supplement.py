"""What the exchange adds to a site's local training: samples beside its images, and styles of other devices."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from polyclinic.data.dataset import normalized
from polyclinic.synthesis.amplitude import restyle
from polyclinic.synthesis.settings import SyntheticTraining


def sample_weight(settings: SyntheticTraining, number: int, rounds: int) -> float:
    """λ of round ``number`` (from 1) of ``rounds``: it grows, stays, and is 0 in the last round unless ``until`` is 1.

    Reconstruction, sheet 1.5 phase 5: the last rounds see real images only.
    """
    past = number / rounds
    if settings.ramp and past < settings.ramp:
        return settings.weight * past / settings.ramp
    if settings.until < 1 and past > settings.until:
        return settings.weight * (1 - past) / (1 - settings.until)
    return settings.weight


@dataclass(frozen=True)
class Supplement:
    """Samples and styles for one call of ``train``.

    Attributes:
        images: Samples, uint8 ``[m, C, H, W]`` of the size of the site's images.
        labels: Their classes, int64 ``[m]``.
        weight: λ.
        per_sample: Real images per sample in a step.
        own_statistics: Batch norm normalises samples by their own statistics, else by the running ones of images.
        styles: Windows of other devices, ``[d, C, 2 half + 1, 2 half + 1]``.
        chance: Of an image to be mixed with one of the styles.
    """

    images: Tensor
    labels: Tensor
    weight: float
    per_sample: float
    own_statistics: bool
    styles: Tensor
    chance: float

    @property
    def active(self) -> bool:
        """Whether samples have any part in this training."""
        return self.weight > 0 and len(self.images) > 0

    def mixture(self, counts: Tensor) -> Tensor:
        """Class counts as the loss weighs them: λ samples to each image, as frequent as they are drawn.

        Args:
            counts: Images per class, float ``[K]``.
        """
        if not self.active:
            return counts
        share = torch.bincount(self.labels, minlength=len(counts)).double() / len(self.labels)
        return counts + self.weight * counts.sum() * share

    def batch(self, real: int, mean: float, std: float, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Samples to go with ``real`` images, drawn with equal chance: inputs ``[b, C, H, W]`` and classes ``[b]``."""
        # Two at least: batch norm cannot train on one.
        count = max(2, round(real / self.per_sample))
        chosen = torch.from_numpy(rng.integers(len(self.images), size=count))
        return normalized(self.images[chosen], mean, std), self.labels[chosen]

    def restyled(self, inputs: Tensor, mean: float, std: float, rng: np.random.Generator) -> Tensor:
        """Inputs of which some are mixed with the style of another device; strengths are uniform in 0..1.

        Args:
            inputs: Normalised ``[B, C, H, W]``; not changed.
            mean: As inputs were normalised.
            std: As inputs were normalised.
            rng: Source of chance.
        """
        if not (self.chance and len(self.styles)):
            return inputs
        draws = rng.random((2, len(inputs)))
        styles = rng.integers(len(self.styles), size=len(inputs))
        mixed = torch.from_numpy(np.flatnonzero(draws[0] < self.chance))
        if len(mixed) == 0:
            return inputs
        strength = torch.from_numpy(draws[1]).float()[mixed]
        wanted = self.styles[torch.from_numpy(styles)[mixed]]
        images = restyle(inputs[mixed] * std + mean, wanted, strength)
        result = inputs.clone()
        result[mixed] = (images - mean) / std
        return result
