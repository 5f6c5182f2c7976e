"""Segmentation: losses by hand, sliding window, random patches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from polyclinic.study import TaskSettings, TrainingSettings
from polyclinic.tasks import Task, make_task
from polyclinic.tasks.segmentation import training_patches

HALF = math.log(2)


def task(loss: str = "auto", classes: int = 2, **training: Any) -> Task:
    names = [f"class {i}" for i in range(classes)]
    return make_task(TaskSettings(kind="segmentation", loss=loss, classes=names), TrainingSettings(**training))


def test_losses_by_hand() -> None:
    logits = torch.zeros(1, 2, 2, 2)
    masks = torch.tensor([[[1, 0], [0, 0]]], dtype=torch.uint8)
    # every p is 1/2; Dice of the foreground is 2 x 0.5 / (1 + 4 x 0.5) = 1/3
    assert task("auto").loss(logits, masks).item() == pytest.approx(2 / 3 + HALF, abs=1e-4)
    assert task("dice-ce").loss(logits, masks).item() == pytest.approx(2 / 3 + HALF, abs=1e-4)
    assert task("cross-entropy").loss(logits, masks).item() == pytest.approx(HALF)
    assert task("focal").loss(logits, masks).item() == pytest.approx(HALF / 4)


def test_the_background_does_not_count_in_dice() -> None:
    masks = torch.zeros(1, 4, 4, dtype=torch.uint8)
    masks[0, 0, 0] = 1
    logits = torch.zeros(1, 2, 4, 4)
    logits[:, 0] = 20  # all background: right in 15 of 16 pixels, yet the lesion is missed
    loss = task().loss(logits, masks) - task("cross-entropy").loss(logits, masks)
    assert loss.item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("loss", ["auto", "cross-entropy", "focal"])
def test_losses_are_means_over_images_in_3d(loss: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 3, 2, 3, 4, generator=generator, requires_grad=True)
    masks = torch.randint(0, 3, (3, 2, 3, 4), generator=generator).to(torch.uint8)
    one = task(loss, classes=3)
    single = torch.stack([one.loss(logits[i : i + 1], masks[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(one.loss(logits, masks), single.mean())
    one.loss(logits, masks).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


class Pointwise(nn.Module):
    """Each pixel for itself, so that windows cannot matter; remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(tuple(images.shape))
        return torch.cat([images, 1 - images], 1)


def test_an_image_of_the_patch_size_goes_through_whole() -> None:
    torch.manual_seed(0)
    model, images = nn.Conv2d(1, 2, 3, padding=1), torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(task(patch=[8, 8]).predict(model, images), model(images).softmax(1))
        torch.testing.assert_close(task().predict(model, images), model(images).softmax(1))


@pytest.mark.parametrize(
    ("size", "patch"), [((13, 20), [8, 8]), ((8, 20), [8, 8]), ((6, 20), [8, 8]), ((5, 9, 7), [4] * 3)]
)
def test_windows_cover_a_larger_image(size: tuple[int, ...], patch: list[int]) -> None:
    model, images = Pointwise(), torch.rand(2, 1, *size)
    found = task(patch=patch).predict(model, images)
    assert type(found) is torch.Tensor
    assert len(model.seen) > 1
    assert {shape[2:] for shape in model.seen} == {tuple(patch)}
    torch.testing.assert_close(found, torch.cat([images, 1 - images], 1).softmax(1))
    torch.testing.assert_close(found.sum(1), torch.ones(2, *size))


@settings(max_examples=50)
@given(st.data(), st.integers(0, 999))
def test_patches_are_cut_alike_from_image_and_mask(data: st.DataObject, seed: int) -> None:
    size = data.draw(st.lists(st.integers(1, 7), min_size=2, max_size=3))
    patch = [data.draw(st.integers(1, s)) for s in size]
    masks = torch.arange(2 * math.prod(size)).reshape(2, *size).remainder(251).to(torch.uint8)
    images = masks.unsqueeze(1).float().expand(2, 3, *size)
    parts, cut = training_patches(images, masks, patch, torch.Generator().manual_seed(seed))
    again, _ = training_patches(images, masks, patch, torch.Generator().manual_seed(seed))
    assert list(parts.shape) == [2, 3, *patch]
    assert list(cut.shape) == [2, *patch]
    assert torch.equal(parts[:, 2], cut.float())
    assert torch.equal(parts, again)


def test_half_of_the_patches_hold_foreground() -> None:
    masks = torch.zeros(400, 40, 40, dtype=torch.uint8)
    masks[:, 0, 39] = 1  # a corner: hardly ever met by chance (1 of 1369 places)
    _, cut = training_patches(masks.unsqueeze(1), masks, (4, 4), torch.Generator().manual_seed(0))
    share = float((cut.flatten(1).amax(1) > 0).float().mean())
    assert 0.42 < share < 0.58  # three standard deviations


def test_foreground_lies_anywhere_in_the_patch() -> None:
    masks = torch.zeros(600, 9, 9, dtype=torch.uint8)
    masks[:, 4, 4] = 1
    _, cut = training_patches(masks.unsqueeze(1), masks, (3, 3), torch.Generator().manual_seed(0))
    assert (cut.sum(0) > 10).all()


def test_a_patch_that_does_not_fit_is_refused() -> None:
    images, masks = torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8)
    for patch in ((5, 4), (4,)):
        with pytest.raises(ValueError, match="does not fit into images of"):
            training_patches(images, masks, patch, torch.Generator())
