"""Training of the autoencoder at one place: at a site, or at the server on public images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyclinic.errors import SiteError
from polyclinic.seeds import generator
from polyclinic.synthesis.settings import VAESettings
from polyclinic.synthesis.vae import VAE, Lines, image_losses

Positions = NDArray[np.int64]


def draw_lines(labels: Tensor, count: int, rng: np.random.Generator) -> Positions:
    """Positions of ``count`` images, int64: a class with chance as the root of its images, then any image of it.

    Args:
        labels: int64 ``[n]``, n above zero.
        count: How many, with repeats.
        rng: Source of chance.
    """
    own = labels.cpu().numpy()
    images = np.bincount(own).astype(np.float64)[own]
    chance = 1 / np.sqrt(images)  # sqrt(images of the class) shared by its images
    return rng.choice(len(own), size=count, p=chance / chance.sum())


def cosine(lr: float, number: int, rounds: int) -> float:
    """The rate of round ``number`` (from 1) of ``rounds``: a half cosine that ends above zero."""
    return lr * 0.5 * (1 + math.cos(math.pi * (number - 1) / rounds))


@dataclass(frozen=True)
class Flips:
    """Whether training images are mirrored at random: as the study's own training does."""

    across: bool = False
    """Left and right."""
    down: bool = False
    """Top and bottom."""

    def mirrored(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        """Each image on its own, with even chance."""
        for wanted, axis in ((self.across, -1), (self.down, -2)):
            if wanted:
                chosen = torch.from_numpy(rng.random(len(images)) < 0.5).to(images.device).view(-1, 1, 1, 1)
                images = torch.where(chosen, images.flip(axis), images)
        return images


def train_vae(
    model: VAE, lines: Lines, settings: VAESettings, flips: Flips, *, rates: Sequence[float], seed: int
) -> float:
    """Train in place with adam: for each rate as many images as ``epochs`` passes have, drawn by ``draw_lines``.

    Args:
        model: On the device where it is to be trained.
        lines: At least one.
        settings: ``epochs``, ``batch_size`` and the loss.
        flips: What is mirrored.
        rates: Learning rates, one after another.
        seed: Of everything drawn.

    Returns:
        Mean loss over the images seen.

    Raises:
        SiteError: The loss is not finite.
    """
    rng = generator(seed, "vae training")
    device = model.class_rows.device
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=rates[0], fused=True)
    images = settings.epochs * len(lines)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for rate in rates:
        for group in optimizer.param_groups:
            group["lr"] = rate
        drawn = draw_lines(lines.labels, images, rng)
        for chosen in np.array_split(drawn, math.ceil(images / settings.batch_size)):
            batch, noise = next_batch(lines, chosen, flips, settings, rng)
            optimizer.zero_grad(set_to_none=True)
            losses = image_losses(model, batch, noise, settings)
            losses.mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += losses.detach().sum()
    return checked_loss(model, float(total) / (images * len(rates)), max(rates))


def next_batch(
    lines: Lines, chosen: Positions, flips: Flips, settings: VAESettings, rng: np.random.Generator
) -> tuple[tuple[Tensor, ...], Tensor]:
    """What ``image_losses`` takes of the chosen images: mirrored at random, and the latent's noise."""
    places = torch.from_numpy(chosen).to(lines.images.device)
    images = flips.mirrored(lines.images[places].float() / 255, rng)
    noise = torch.from_numpy(rng.standard_normal((len(chosen), settings.latent), dtype=np.float32))
    return (images, lines.labels[places], lines.devices[places]), noise.to(images.device)


def checked_loss(model: VAE, loss: float, lr: float) -> float:
    """The loss, or SiteError where it or the network is not finite."""
    norms = torch.stack(torch._foreach_norm(list(model.parameters())))
    if not (math.isfinite(loss) and bool(norms.isfinite().all())):
        raise SiteError(
            f"the generator's training diverged (loss {loss}) at learning rate {lr:g}. Lower synthesis.generator.lr."
        )
    return loss
