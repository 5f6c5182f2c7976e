"""Frozen features: a network whose feature is the mean of each colour, so that every number can be done by hand."""

import pytest
import torch
from torch import Tensor, nn

from polyclinic.data.dataset import SiteData
from polyclinic.data.manifest import Case
from polyclinic.errors import StudyError
from polyclinic.study import ImageSettings
from polyclinic.synthesis.frozen import frozen_features
from polyclinic.synthesis.vae import shrunk_images


class Means(nn.Module):
    """The feature is the mean of each colour; the output is of no interest."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []
        self.norm = nn.BatchNorm2d(1)
        self.blocks = nn.Identity()
        self.head = nn.Linear(1, 2)
        self.feature_tap = "blocks"

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(tuple(images.shape))
        found: Tensor = self.head(self.blocks(self.norm(images)).flatten(2).mean(2))
        return found


def settings(size: int = 8, mean: float = 0.5, std: float = 0.25) -> ImageSettings:
    return ImageSettings(size=[size, size], channels=1, mean=mean, std=std)


EPS = (1 + 1e-5) ** -0.5
"""What batch norm that has seen nothing multiplies by."""


def test_features_are_of_normalised_values() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 4, 4)
    found = frozen_features(Means(), images, settings())
    # 0, 0.2 and 1, minus 0.5, over 0.25.
    assert found.flatten().tolist() == pytest.approx([-2 * EPS, -1.2 * EPS, 2 * EPS], abs=1e-5)
    assert found.dtype == torch.float32
    assert not found.requires_grad


def test_images_are_resized_to_the_study() -> None:
    model = Means()
    frozen_features(model, torch.zeros(5, 1, 4, 4, dtype=torch.uint8), settings(8), batch=2)
    assert model.seen == [(2, 1, 8, 8), (2, 1, 8, 8), (1, 1, 8, 8)]


def test_shrinking_takes_means() -> None:
    # Stripes of one pixel: without antialiasing every other line would be left, black or white.
    stripes = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    stripes[..., ::2] = 255
    captured = []
    model = Means()
    model.blocks.register_forward_hook(lambda _m, _i, output: captured.append(output))
    frozen_features(model, stripes, settings(4, mean=0.0, std=1.0))
    assert captured[0].min() > 0.3
    assert captured[0].max() < 0.7


def test_network_is_not_changed() -> None:
    model = Means().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frozen_features(model, torch.full((3, 1, 8, 8), 200, dtype=torch.uint8), settings())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training


def test_batches_make_no_difference() -> None:
    images = torch.randint(0, 256, (7, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole, parts = (frozen_features(Means(), images, settings(), batch=b) for b in (64, 3))
    assert torch.allclose(whole, parts, atol=1e-6)


def test_no_images_have_no_features() -> None:
    assert frozen_features(Means(), torch.zeros(0, 1, 4, 4, dtype=torch.uint8), settings()).shape == (0, 1)


def test_real_images_go_through_the_resolution_of_samples() -> None:
    """What differs only below the generator's resolution is the same to the gate."""
    fine = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    fine[0, :, ::2, ::2], fine[0, :, 1::2, 1::2] = 200, 200
    fine[1, :, ::2, 1::2], fine[1, :, 1::2, ::2] = 200, 200
    cases = [Case(f"{i}.png", f"p{i}", "north", label="a", split="train") for i in range(2)]
    data = SiteData("north", cases, fine, torch.zeros(2, dtype=torch.int64), {"train": torch.arange(2)})
    small = shrunk_images(data, torch.arange(2), 4)
    assert small.shape == (2, 1, 4, 4)
    assert small.unique().tolist() == [100]


def test_a_network_without_features_is_refused() -> None:
    with pytest.raises(StudyError, match="feature_tap"):
        frozen_features(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), torch.zeros(1, 1, 8, 8), settings())


def test_volumes_are_refused() -> None:
    with pytest.raises(StudyError, match="3 axes"):
        frozen_features(Means(), torch.zeros(1, 1, 8, 8), ImageSettings(size=[8, 8, 8], channels=1))
