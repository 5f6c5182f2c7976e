"""The autoencoder and its training, against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from painted_sites import CLASSES, DEVICES, painted, painted_data
from torch.distributions import Normal, kl_divergence

from polyclinic.data.dataset import SiteData
from polyclinic.errors import MessageError, SiteError
from polyclinic.synthesis import vae
from polyclinic.synthesis.settings import VAESettings
from polyclinic.synthesis.vae import Lines, loaded_vae, shrunk_images, standard_normals, start_vae
from polyclinic.synthesis.vae_training import Flips, cosine, draw_lines, train_vae

SMALL = VAESettings(size=16, latent=8, batch_size=16, epochs=2)


def toy_lines(count: int = 24) -> Lines:
    draw = torch.Generator().manual_seed(1)
    cells = [(label, device) for label in CLASSES for device in DEVICES]
    images = torch.cat([painted(label, device, count, draw) for label, device in cells])
    labels, devices = (torch.tensor(column).repeat_interleave(count) for column in ([0, 0, 1, 1], [0, 1, 0, 1]))
    return Lines((images * 255).round().to(torch.uint8), labels, devices)


def test_default_network_has_the_size_that_its_layers_add_up_to() -> None:
    model = start_vae(VAESettings(), 3, (8, 6), 0)
    encoder = (3 * 32 * 16 + 32) + (32 * 64 * 16 + 64) + (64 * 64 * 16 + 64) + ((64 * 4 * 4 + 16) * 64 + 64)
    decoder = ((32 + 16) * 1024 + 1024) + (64 * 64 * 16 + 64) + (64 * 32 * 16 + 32) + (32 * 3 * 16 + 3)
    assert sum(p.numel() for p in model.parameters()) == encoder + decoder + (8 + 6) * 16


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [16, 24, 64])
def test_reconstructions_have_the_shape_of_images(channels: int, size: int) -> None:
    model = start_vae(VAESettings(size=size, latent=5), channels, (2, 2), 0)
    images, rows = torch.rand(3, channels, size, size), torch.tensor([0, 1, 1])
    pictures, mean, log_variance = model(images, rows, rows, torch.zeros(3, 5))
    assert pictures.shape == images.shape
    assert mean.shape == log_variance.shape == (3, 5)
    low, high = pictures.detach().aminmax()
    assert 0 <= float(low) <= float(high) <= 1


def test_condition_is_the_sum_of_a_class_and_a_device() -> None:
    model = start_vae(SMALL, 3, (2, 3), 0)
    found = model.condition(torch.tensor([1, 0]), torch.tensor([2, 2]))
    assert torch.equal(found[0], model.class_rows[1] + model.device_rows[2])
    # The device's share is the same whatever the class.
    assert torch.allclose(found[0] - found[1], model.class_rows[1] - model.class_rows[0], atol=1e-6)


def test_kl_is_that_of_torch_distributions() -> None:
    mean, log_variance = torch.randn(4, 6), torch.randn(4, 6)
    wanted = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).sum(dim=1)
    assert torch.allclose(vae.kl_divergence(mean, log_variance), wanted, atol=1e-5)


def test_loss_sums_over_pixels_and_over_the_latent() -> None:
    settings = VAESettings(size=16, deviation=0.5, beta=3.0)
    images = torch.zeros(1, 1, 16, 16)
    pictures = images.clone()
    pictures[0, 0, 0, :2] = torch.tensor([0.5, 1.0])
    mean = torch.tensor([[1.0, 2.0]])

    def model(*_: torch.Tensor) -> vae.Outputs:
        return pictures, mean, torch.zeros(1, 2)

    batch = (images, torch.tensor([0]), torch.tensor([0]))
    # (0.25 + 1) / (2 * 0.25) + 3 * (1 + 4) / 2
    assert float(vae.image_losses(model, batch, torch.zeros(1, 2), settings)) == pytest.approx(2.5 + 7.5)


def test_images_shrink_by_means_over_areas() -> None:
    pixels = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4) * 10
    data = painted_data("x", {("a", "bright"): 1}, per_patient=1)
    every = {"train": torch.tensor([0]), "val": torch.tensor([]), "test": torch.tensor([])}
    wanted = torch.tensor([[[[25, 45], [105, 125]]]], dtype=torch.uint8)
    for images in (pixels, pixels.float() / 255):
        own = SiteData("x", data.cases, images, data.targets, every)
        assert torch.equal(shrunk_images(own, torch.tensor([0]), 2), wanted)
    assert shrunk_images(own, torch.tensor([], dtype=torch.int64), 2).shape == (0, 1, 2, 2)


def test_shrinking_in_pieces_keeps_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    data = painted_data("x", {("a", "bright"): 3, ("b", "dark"): 2})
    chosen = torch.tensor([9, 0, 5, 3, 3])
    whole = shrunk_images(data, chosen, 8)
    monkeypatch.setattr(vae, "_AT_ONCE", 2)
    assert torch.equal(shrunk_images(data, chosen, 8), whole)
    assert not torch.equal(whole[0], whole[1])


def test_a_class_is_drawn_as_the_root_of_its_images() -> None:
    labels = torch.tensor([0] * 400 + [1] * 100 + [3] * 4)
    drawn = labels[torch.from_numpy(draw_lines(labels, 60_000, np.random.default_rng(0)))]
    share = torch.bincount(drawn, minlength=4) / len(drawn)
    # Roots 20, 10 and 2. Four standard errors of a share are below 0.0082.
    assert share.tolist() == pytest.approx([20 / 32, 10 / 32, 0, 2 / 32], abs=0.0082)
    assert (torch.bincount(torch.from_numpy(draw_lines(labels, 60_000, np.random.default_rng(0)))) > 0).all()


def test_rate_falls_by_a_half_cosine_and_ends_above_zero() -> None:
    rates = [cosine(2.0, number, 4) for number in (1, 2, 3, 4)]
    assert rates == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)])


def test_flips_are_those_of_the_study() -> None:
    images = torch.arange(4.0).view(1, 1, 2, 2).repeat(64, 1, 1, 1)
    rng = np.random.default_rng(0)
    assert torch.equal(Flips().mirrored(images, rng), images)
    across = {tuple(image.flatten().tolist()) for image in Flips(across=True).mirrored(images, rng)}
    assert across == {(0, 1, 2, 3), (1, 0, 3, 2)}
    down = {tuple(image.flatten().tolist()) for image in Flips(down=True).mirrored(images, rng)}
    assert down == {(0, 1, 2, 3), (2, 3, 0, 1)}


def test_training_repeats_bit_for_bit_and_counts_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    lines, sizes = toy_lines(5), []
    real = vae.image_losses
    monkeypatch.setattr(
        "polyclinic.synthesis.vae_training.image_losses",
        lambda model, batch, *rest: (sizes.append(len(batch[0])), real(model, batch, *rest))[1],
    )
    models = [start_vae(SMALL, 3, (2, 2), 0) for _ in range(3)]
    for model, seed in zip(models, (7, 7, 8), strict=True):
        train_vae(model, lines, SMALL, Flips(across=True), rates=[1e-3], seed=seed)
    first, again, other = (list(model.parameters()) for model in models)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    # 20 images, two passes, in even batches of at most 16.
    assert sizes == 3 * [14, 13, 13]


def test_posterior_does_not_collapse() -> None:
    lines = toy_lines()
    model = start_vae(SMALL, 3, (2, 2), 0)
    losses = [train_vae(model, lines, SMALL, Flips(), rates=[4e-3] * 6, seed=k) for k in range(6)]
    assert losses[-1] < 0.3 * losses[0]
    images = lines.images.float() / 255
    with torch.no_grad():
        noise = torch.randn(len(images), 8, generator=torch.Generator().manual_seed(0))
        pictures, mean, log_variance = model(images, lines.labels, lines.devices, noise)
    # The square has 25 places: log 25 = 3.2 nats tell where it is.
    assert float(vae.kl_divergence(mean, log_variance).mean()) > 2
    cells = torch.stack([lines.labels == 0, lines.labels == 1])[lines.labels] & (
        lines.devices[:, None] == lines.devices[None, :]
    )
    typical = torch.einsum("ij,jchw->ichw", cells / cells.sum(1, keepdim=True), images)
    # Reconstructions know more of an image than the mean image of its cell does.
    assert float((pictures - images).square().mean()) < 0.5 * float((typical - images).square().mean())


def test_plain_network_has_no_condition_and_gets_none() -> None:
    model = start_vae(SMALL, 3, (2, 2), 0, plain=True)
    before = model.posterior.weight.detach().clone()
    train_vae(model, toy_lines(4), SMALL, Flips(), rates=[1e-3], seed=0)
    assert not model.class_rows.any()
    assert not model.device_rows.any()
    assert not torch.equal(model.posterior.weight, before)


def test_training_that_diverges_is_an_error() -> None:
    with pytest.raises(SiteError, match="generator's training diverged.*generator.lr"):
        train_vae(start_vae(SMALL, 3, (2, 2), 0), toy_lines(4), SMALL, Flips(), rates=[1e30], seed=0)


def test_loaded_network_is_a_copy_and_draws_nothing() -> None:
    tensors = dict(start_vae(SMALL, 3, (2, 2), 5).state_dict())
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    model = loaded_vae(SMALL, 3, (2, 2), tensors)
    assert torch.equal(torch.rand(1), wanted)
    train_vae(model, toy_lines(4), SMALL, Flips(), rates=[1e-2], seed=0)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in kept.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("change", [{"class_rows": torch.zeros(3, 16)}, {"elsewhere": torch.zeros(1)}])
def test_network_of_another_study_is_refused(change: dict[str, torch.Tensor]) -> None:
    tensors = dict(start_vae(SMALL, 3, (2, 2), 0).state_dict()) | change
    with pytest.raises(MessageError, match=next(iter(change))):
        loaded_vae(SMALL, 3, (2, 2), tensors)


def test_start_weights_are_the_study_seeds_and_leave_the_global_stream() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    one, same, other = (start_vae(SMALL, 1, (2, 2), seed).class_rows for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), wanted)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_normal_numbers_follow_from_their_own_seed() -> None:
    seeds = torch.arange(2000)
    rows = standard_normals(seeds, 16)
    assert torch.equal(standard_normals(seeds[[7, 3]], 16), rows[[7, 3]])
    assert standard_normals(seeds[:0], 16).shape == (0, 16)
    # 32,000 numbers: four standard errors of mean and variance.
    assert abs(float(rows.mean())) < 4 / math.sqrt(32_000)
    assert abs(float(rows.var()) - 1) < 4 * math.sqrt(2 / 32_000)
