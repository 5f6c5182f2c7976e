"""A small variational autoencoder that knows classes and devices, and its loss.

Kingma and Welling: Auto-encoding variational Bayes. ICLR 2014, arXiv 1312.6114; conditional as in Sohn, Lee and Yan,
NeurIPS 2015. Layers, loss and rates are a reconstruction of FedSSG (arXiv 2604.26324), whose own are not known.

The condition is the sum of a class's and a device's vector. So a cell that no site owns can be decoded from the two
vectors that others have trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyclinic.data.dataset import SiteData
from polyclinic.errors import MessageError
from polyclinic.seeds import derive_seed
from polyclinic.synthesis.settings import VAESettings

Outputs = tuple[Tensor, Tensor, Tensor]
"""Reconstructions in 0..1, mean and logarithm of the variance of the latent."""
CLASS_ROWS, DEVICE_ROWS = "class_rows", "device_rows"
ROWS = (CLASS_ROWS, DEVICE_ROWS)
"""Names of the two matrices of condition vectors, a row a class and a row a device."""
_LOWEST, _HIGHEST = -12.0, 8.0
_AT_ONCE = 256


@dataclass(frozen=True)
class Lines:
    """Images with their conditions, one entry an image.

    Attributes:
        images: uint8 ``[n, C, size, size]``.
        labels: int64 ``[n]``, class.
        devices: int64 ``[n]``, place in the list of devices.
    """

    images: Tensor
    labels: Tensor
    devices: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> Lines:
        """The same on another device."""
        return Lines(self.images.to(device), self.labels.to(device), self.devices.to(device))


class VAE(nn.Module):
    """Encoder of three strided convolutions (32, 64, 64), decoder of three transposed ones (64, 32, channels).

    Args:
        settings: Sizes.
        channels: 1 or 3.
        classes: How many.
        devices: How many.
    """

    def __init__(self, settings: VAESettings, channels: int, classes: int, devices: int) -> None:
        super().__init__()
        self.side = settings.size // 8
        flat = 64 * self.side**2
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, 32, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 4, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.posterior = nn.Linear(flat + settings.embedding, 2 * settings.latent)
        self.decoder_input = nn.Linear(settings.latent + settings.embedding, flat)
        self.decoder = nn.Sequential(
            nn.ReLU(),
            nn.ConvTranspose2d(64, 64, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(64, 32, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(32, channels, 4, 2, 1),
        )
        self.class_rows = nn.Parameter(torch.randn(classes, settings.embedding))
        self.device_rows = nn.Parameter(torch.randn(devices, settings.embedding))

    def condition(self, labels: Tensor, devices: Tensor) -> Tensor:
        """Class vector plus device vector, ``[B, embedding]``."""
        return self.class_rows[labels] + self.device_rows[devices]

    def encode(self, images: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of the latent, both ``[B, latent]``, of images in 0..1."""
        features = self.encoder(images)
        mean, log_variance = self.posterior(torch.cat([features, condition], dim=1)).chunk(2, dim=1)
        return mean, log_variance.clamp(_LOWEST, _HIGHEST)

    def decode(self, latent: Tensor, condition: Tensor) -> Tensor:
        """Images in 0..1, ``[B, C, size, size]``."""
        grid = self.decoder_input(torch.cat([latent, condition], dim=1))
        pictures: Tensor = self.decoder(grid.view(-1, 64, self.side, self.side)).sigmoid()
        return pictures

    def forward(self, images: Tensor, labels: Tensor, devices: Tensor, noise: Tensor) -> Outputs:
        """Reconstructions, mean and log variance; ``noise`` is standard normal ``[B, latent]``."""
        condition = self.condition(labels, devices)
        mean, log_variance = self.encode(images, condition)
        return self.decode(mean + noise * (0.5 * log_variance).exp(), condition), mean, log_variance


def start_vae(settings: VAESettings, channels: int, shape: tuple[int, int], seed: int, *, plain: bool = False) -> VAE:
    """A network with start weights from the study's seed; ``plain``: its condition vectors are zero and stay so."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, "vae", "start weights"))
        model = VAE(settings, channels, *shape)
    if plain:
        for rows in (model.class_rows, model.device_rows):
            nn.init.zeros_(rows).requires_grad_(False)
    return model


def loaded_vae(
    settings: VAESettings,
    channels: int,
    shape: tuple[int, int],
    tensors: Mapping[str, Tensor],
    device: torch.device | str = "cpu",
) -> VAE:
    """A network made of copies of ``tensors``, by parameter name; where some are missing, their part cannot be used.

    Args:
        settings: Sizes.
        channels: 1 or 3.
        shape: Classes and devices.
        tensors: Any floating type, which the network then has.
        device: Where it runs.

    Raises:
        MessageError: A tensor has another name or shape than the settings ask for.
    """
    with torch.device("meta"):  # no start weights are drawn
        model = VAE(settings, channels, *shape)
    copies = {name: tensor.detach().to(device, copy=True) for name, tensor in tensors.items()}
    try:
        unknown = model.load_state_dict(copies, strict=False, assign=True).unexpected_keys
    except RuntimeError as error:
        raise MessageError(f"a generator does not fit synthesis.generator of the study: {error}") from error
    if unknown:
        raise MessageError(f"a generator holds {unknown[0]!r}, which the network of the study has not.")
    return model


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """``KL(N(mean, e^log_variance) || N(0, I))`` summed over the latent, ``[B]``, in nats."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1)


def image_losses(
    model: Callable[..., Outputs], lines: tuple[Tensor, ...], noise: Tensor, settings: VAESettings
) -> Tensor:
    """The loss of each image: ``sum_pixels (x_hat - x)^2 / (2 s^2) + beta KL``.

    Both terms are sums. A mean over pixels beside a sum over latent numbers makes the posterior collapse.

    Args:
        model: A ``VAE``, or one whose parameters were replaced.
        lines: Images float ``[B, C, size, size]`` in 0..1, labels and devices int64 ``[B]``.
        noise: Standard normal ``[B, latent]``.
        settings: ``deviation`` s and ``beta``.

    Returns:
        ``[B]``, in nats but for a constant.
    """
    images, labels, devices = lines
    pictures, mean, log_variance = model(images, labels, devices, noise)
    error = (pictures - images).square().flatten(1).sum(dim=1) / (2 * settings.deviation**2)
    loss: Tensor = error + settings.beta * kl_divergence(mean, log_variance)
    return loss


def shrunk_images(data: SiteData, positions: Tensor, size: int) -> Tensor:
    """Images of a site as the generator sees them: means over areas, rounded to 8 bits.

    Args:
        data: Its images, two-dimensional.
        positions: int64 ``[n]``.
        size: Height and width in pixels; another aspect ratio is stretched.

    Returns:
        uint8 ``[n, C, size, size]``, on the CPU.
    """
    parts = [
        shrunk_pictures(torch.stack([data.picture(i) for i in positions[start : start + _AT_ONCE].tolist()]), size)
        for start in range(0, len(positions), _AT_ONCE)
    ]
    channels = data.picture(0).shape[0]
    return torch.cat(parts) if parts else torch.empty(0, channels, size, size, dtype=torch.uint8)


def shrunk_pictures(pictures: Tensor, size: int) -> Tensor:
    """Means over areas, uint8 ``[B, C, size, size]``, of uint8 or of floats in 0..1."""
    unit = 1.0 if pictures.dtype == torch.uint8 else 255.0
    return as_bytes(F.interpolate(pictures.float().cpu() * unit, size=(size, size), mode="area"))


def as_bytes(pictures: Tensor) -> Tensor:
    """Values in 0..255 rounded to uint8."""
    return pictures.round_().clamp_(0, 255).to(torch.uint8)


def standard_normals(seeds: Tensor, count: int) -> Tensor:
    """Standard normal numbers, float64 ``[m, count]``; a row depends on its own seed alone.

    Args:
        seeds: int64 ``[m]``, not negative.
        count: Numbers a row.
    """
    rows = [np.random.Generator(np.random.Philox(key=seed)).standard_normal(count) for seed in seeds.tolist()]
    return torch.from_numpy(np.array(rows, dtype=np.float64).reshape(len(rows), count))
