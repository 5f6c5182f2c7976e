from __future__ import annotations

import pytest
import torch

from polyclinic.data.augment import augment
from polyclinic.study import AugmentSettings


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_off_is_the_identity() -> None:
    images, masks = torch.rand(2, 1, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64)
    after = augment(images, masks, AugmentSettings(), generator())
    assert after[0] is images
    assert after[1] is masks


@pytest.mark.parametrize(("name", "axis"), [("flip", -1), ("flip_vertical", -2)])
def test_flips_move_mask_and_image_together(name: str, axis: int) -> None:
    masks = torch.randint(0, 3, (64, 4, 6), generator=generator(1), dtype=torch.uint8)
    images = masks[:, None].float()
    after, moved = augment(images, masks, AugmentSettings(**{name: True}), generator())
    assert moved is not None
    assert moved.dtype == torch.uint8
    assert torch.equal(after[:, 0], moved.float())
    turned = [torch.equal(a, b.flip(axis)) for a, b in zip(after, images, strict=True)]
    assert 20 < sum(turned) < 44
    assert all(t or torch.equal(a, b) for t, a, b in zip(turned, after, images, strict=True))


def test_rotation_keeps_a_disc_and_fills_with_the_darkest() -> None:
    y, x = torch.meshgrid(torch.arange(33) - 16.0, torch.arange(49) - 24.0, indexing="ij")
    disc = (x.square() + y.square() < 64).float()
    images = (disc * 3 - 2)[None, None].repeat(8, 1, 1, 1)
    masks = disc[None].repeat(8, 1, 1).to(torch.int64)
    after, moved = augment(images, masks, AugmentSettings(rotate_degrees=180), generator())
    assert moved is not None
    assert (moved != masks).float().mean() < 0.02
    assert (after[:, 0] - images[:, 0]).abs().mean() < 0.1
    assert after.min() >= -2 - 1e-5


def test_rotation_turns_by_the_angle(monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.zeros(1, 1, 5, 5)
    image[0, 0, 2, 4] = 1
    monkeypatch.setattr(torch, "rand", lambda count, generator: torch.ones(count))
    after, _ = augment(image, None, AugmentSettings(rotate_degrees=90), generator())
    assert after[0, 0].argmax().item() in (2, 22)
    assert after.max() == pytest.approx(1, abs=1e-5)


def test_scale_enlarges(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.zeros(1, 40, 40, dtype=torch.uint8)
    mask[:, 15:25, 15:25] = 1
    monkeypatch.setattr(torch, "rand", lambda count, generator: torch.ones(count))
    _, moved = augment(mask[:, None].float(), mask, AugmentSettings(scale=0.5), generator())
    assert moved is not None
    assert 200 <= moved.sum().item() <= 256  # 15 pixels wide instead of 10


def test_intensity_changes_mean_and_range_within_bounds() -> None:
    images = torch.rand(16, 1, 8, 8, generator=generator(1))
    after, _ = augment(images, None, AugmentSettings(intensity=0.2), generator())
    span = (after.amax((1, 2, 3)) - after.amin((1, 2, 3))) / (images.amax((1, 2, 3)) - images.amin((1, 2, 3)))
    assert span.min() >= 0.8 - 1e-5
    assert span.max() <= 1.2 + 1e-5
    assert (after.mean((1, 2, 3)) - images.mean((1, 2, 3))).abs().max() <= 0.2


def test_volumes_and_repeatability() -> None:
    images = torch.rand(3, 2, 4, 6, 5)
    masks = torch.randint(0, 2, (3, 4, 6, 5))
    settings = AugmentSettings(flip=True, rotate_degrees=20, scale=0.1, intensity=0.1)
    one = augment(images, masks, settings, generator(5))
    two = augment(images, masks, settings, generator(5))
    assert one[0].shape == images.shape
    assert one[1] is not None
    assert two[1] is not None
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert set(one[1].unique().tolist()) <= {0, 1}
