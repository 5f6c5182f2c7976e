"""Random changes of a batch of training images, drawn from a generator of the caller."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from polyclinic.study import AugmentSettings


def augment(
    images: Tensor, masks: Tensor | None, settings: AugmentSettings, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """Flip, rotate, scale, and change contrast and brightness; each image on its own.

    Rotation and scaling use one resampling (images linear, masks nearest); what comes in from outside is the image's
    smallest value and class 0. Volumes are flipped, rotated and scaled in the plane of height and width. Contrast
    changes about the image's mean; brightness by a share of the image's range.

    Args:
        images: Float ``(B, C, *spatial)``.
        masks: Class indices ``(B, *spatial)`` of any integer type, or ``None``.
        settings: What is on. With nothing on, the very tensors given are returned.
        generator: On the CPU; the same draws are made on every device.

    Returns:
        New images and masks of the same shapes and types.
    """
    count = len(images)

    def draw() -> Tensor:
        return torch.rand(count, generator=generator)

    def signed() -> Tensor:
        return draw() * 2 - 1

    if settings.flip:
        images, masks = _flip(images, masks, draw() < 0.5, -1)
    if settings.flip_vertical:
        images, masks = _flip(images, masks, draw() < 0.5, -2)
    if settings.rotate_degrees or settings.scale:
        angle = signed() * math.radians(settings.rotate_degrees)
        factor = 1 + signed() * settings.scale
        images, masks = _turn(images, masks, angle, factor)
    if settings.intensity:
        images = _brighten(images, signed() * settings.intensity, signed() * settings.intensity)
    return images, masks


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.device).view(-1, *[1] * (like.ndim - 1))


def _flip(images: Tensor, masks: Tensor | None, chosen: Tensor, axis: int) -> tuple[Tensor, Tensor | None]:
    images = torch.where(_per_image(chosen, images), images.flip(axis), images)
    if masks is not None:
        masks = torch.where(_per_image(chosen, masks), masks.flip(axis), masks)
    return images, masks


def _turn(images: Tensor, masks: Tensor | None, angle: Tensor, factor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Rotate by ``angle`` (radians) and enlarge by ``factor`` about the middle."""
    count, (height, width) = len(images), images.shape[-2:]
    cos, sin = torch.cos(angle) / factor, torch.sin(angle) / factor
    zero = torch.zeros(count)
    rows = [cos, -sin * height / width, zero, sin * width / height, cos, zero]
    theta = torch.stack(rows, dim=1).view(count, 2, 3).to(images.device, images.dtype)
    grid = F.affine_grid(theta, [count, 1, height, width], align_corners=False)
    planes = images.reshape(count, -1, height, width)
    fill = planes.amin(dim=(1, 2, 3), keepdim=True)
    turned = F.grid_sample(planes - fill, grid, align_corners=False) + fill
    if masks is not None:
        flat = masks.reshape(count, -1, height, width).to(images.dtype)
        sampled = F.grid_sample(flat, grid, mode="nearest", align_corners=False)
        masks = sampled.round().to(masks.dtype).view_as(masks)
    return turned.view_as(images), masks


def _brighten(images: Tensor, contrast: Tensor, brightness: Tensor) -> Tensor:
    axes = tuple(range(1, images.ndim))
    mean = images.mean(dim=axes, keepdim=True)
    extent = images.amax(dim=axes, keepdim=True) - images.amin(dim=axes, keepdim=True)
    return (images - mean) * (1 + _per_image(contrast, images)) + mean + _per_image(brightness, images) * extent
