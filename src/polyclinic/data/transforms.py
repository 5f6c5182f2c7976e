"""From pixels to the array that the network sees: window, size, channels; and masks to class indices."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyclinic.data.readers import Picture
from polyclinic.errors import DataError
from polyclinic.study import ImageSettings, TaskSettings

GREY_TOLERANCE = 8


def to_array(picture: Picture, settings: ImageSettings, name: str = "image") -> NDArray[Any]:
    """Window, resize and give the wanted channels.

    8-bit pictures stay 8-bit: 0..255 stands for 0..1 and no window applies to them. Others are mapped to 0..1 by the
    study's window, else the file's own, else their own smallest and largest value. A grey picture in a colour study
    is repeated in all channels. A colour picture whose channels differ by at most 8 of 255 counts as grey.

    Args:
        picture: As read.
        settings: Size, channels, fit and window. Depth is always stretched; ``fit`` is about height and width.
        name: How errors name the picture.

    Returns:
        ``[channels, *size]``, uint8 or float32 in 0..1.

    Raises:
        DataError: A volume in a 2D study or the reverse, or a colour picture in a grey study.
    """
    pixels = picture.pixels
    dims = len(settings.size)
    if dims == 2 and pixels.ndim == 4 and pixels.shape[1] == 1:
        pixels = pixels[:, 0]
    if pixels.ndim - 1 != dims:
        raise DataError(
            f"{name} has {pixels.ndim - 1} dimensions {pixels.shape[1:]}, data.image.size {settings.size} has {dims}. "
            "Set data.image.size to the images' kind: [height, width] or [depth, height, width]."
        )
    if pixels.dtype != np.uint8:
        pixels = _to_unit(picture, pixels, settings)
    pixels = _match_channels(pixels, settings.channels, name)
    if pixels.shape[1:] == tuple(settings.size):
        return np.ascontiguousarray(pixels)
    return _resize_plane(pixels, settings) if dims == 2 else _resize_volume(pixels, settings)


def _to_unit(picture: Picture, pixels: NDArray[Any], settings: ImageSettings) -> NDArray[np.float32]:
    """Map to 0..1 by the study's window, the file's window or the range; a constant picture becomes 0."""
    if settings.window is not None:
        center, width = settings.window.center, settings.window.width
    elif picture.window is not None:
        center, width = picture.window
    else:
        low, high = float(pixels.min()), float(pixels.max())
        center, width = (low + high) / 2, high - low
        if width == 0:
            return np.zeros(pixels.shape, np.float32)
    unit = (pixels - np.float32(center - width / 2)) / np.float32(width)
    clipped: NDArray[np.float32] = np.clip(unit, 0, 1, dtype=np.float32)
    return clipped


def _match_channels(pixels: NDArray[Any], channels: int, name: str) -> NDArray[Any]:
    if pixels.shape[0] == channels:
        return pixels
    if pixels.shape[0] == 1:
        return np.repeat(pixels, channels, axis=0)
    if pixels.shape[0] != 3:
        raise DataError(f"{name} has {pixels.shape[0]} channels; 1 or 3 are read.")
    red, green, blue = pixels
    largest = np.maximum(np.maximum(red, green), blue)
    spread = float((largest - np.minimum(np.minimum(red, green), blue)).max())
    if pixels.dtype != np.uint8:
        spread *= 255
    if spread > GREY_TOLERANCE:
        raise DataError(
            f"{name} is a colour image in a grey study: its channels differ by up to {spread:.0f} of 255 "
            f"(allowed: {GREY_TOLERANCE}). Set data.image.channels to 3, or convert the image."
        )
    if pixels.dtype == np.uint8:
        total = red.astype(np.uint16) + green + blue + 1
        return np.asarray(total // 3, dtype=np.uint8)[None]
    return np.asarray((red + green + blue) / 3, dtype=np.float32)[None]


def _geometry(shape: tuple[int, int], target: tuple[int, int], fit: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Size after resizing, and the offset of the target's corner in it (negative: padding)."""
    if fit == "stretch":
        return target, (0, 0)
    ratios = (target[0] / shape[0], target[1] / shape[1])
    ratio = min(ratios) if fit == "pad" else max(ratios)
    scaled = tuple(t if r == ratio else max(1, round(n * ratio)) for n, t, r in zip(shape, target, ratios, strict=True))
    return (scaled[0], scaled[1]), ((scaled[0] - target[0]) // 2, (scaled[1] - target[1]) // 2)


def _place(pixels: NDArray[Any], target: tuple[int, int], offset: tuple[int, int]) -> NDArray[Any]:
    """Cut or pad the last two axes with zeros so that they have the target size."""
    height, width = pixels.shape[-2:]
    if (height, width) == target:
        return np.ascontiguousarray(pixels)
    result = np.zeros((*pixels.shape[:-2], *target), pixels.dtype)
    top, left = max(0, offset[0]), max(0, offset[1])
    down, right = max(0, -offset[0]), max(0, -offset[1])
    cut = pixels[..., top : top + target[0], left : left + target[1]]
    result[..., down : down + cut.shape[-2], right : right + cut.shape[-1]] = cut
    return result


def _resize_plane(pixels: NDArray[Any], settings: ImageSettings, nearest: bool = False) -> NDArray[Any]:
    """Resize [C, H, W] with an antialiased linear filter, or nearest."""
    from PIL import Image

    target = (settings.size[-2], settings.size[-1])
    scaled, offset = _geometry((pixels.shape[1], pixels.shape[2]), target, settings.fit)
    method = Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR
    size = (scaled[1], scaled[0])
    if pixels.dtype == np.uint8 and pixels.shape[0] == 3:
        colour = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        resized = np.asarray(colour.resize(size, method)).transpose(2, 0, 1)
    else:
        planes = [Image.fromarray(np.ascontiguousarray(plane)).resize(size, method) for plane in pixels]
        resized = np.stack([np.asarray(plane) for plane in planes])
    return _place(resized, target, offset)


def _resize_volume(pixels: NDArray[Any], settings: ImageSettings, nearest: bool = False) -> NDArray[Any]:
    """Resize [C, D, H, W]: averages where an axis shrinks, trilinear where it grows, or nearest."""
    import torch
    import torch.nn.functional as F

    target = (settings.size[-2], settings.size[-1])
    scaled, offset = _geometry((pixels.shape[2], pixels.shape[3]), target, settings.fit)
    size = (settings.size[0], *scaled)
    volume = torch.from_numpy(np.ascontiguousarray(pixels)).to(torch.float32)[None]
    if nearest:
        volume = F.interpolate(volume, size=size, mode="nearest-exact")
    else:
        shrunk = [min(a, b) for a, b in zip(volume.shape[2:], size, strict=True)]
        volume = F.adaptive_avg_pool3d(volume, (shrunk[0], shrunk[1], shrunk[2]))
        volume = F.interpolate(volume, size=size, mode="trilinear", align_corners=False)
    resized = volume[0].numpy()
    if pixels.dtype == np.uint8:
        resized = np.rint(resized).astype(np.uint8)
    return _place(resized, target, offset)


def mask_array(
    mask: NDArray[Any], shape: tuple[int, ...], task: TaskSettings, settings: ImageSettings, name: str = "mask"
) -> NDArray[np.uint8]:
    """Class index of every pixel, resized like its image but with the nearest value.

    With two classes a mask of 0 and one other value is taken as it is meant; a grey one with more values (a resized or
    JPEG mask) is cut above 127. With more classes the values are the indices.

    Args:
        mask: ``[H, W]`` or ``[D, H, W]`` as read.
        shape: Spatial shape of its image before resizing.
        task: Its classes.
        settings: Size and fit.
        name: How errors name the mask.

    Returns:
        uint8 ``[*size]``; padding is class 0.

    Raises:
        DataError: Another size than the image, or values that are no class.
    """
    if mask.ndim == len(shape) + 1 and mask.shape[0] == 1:
        mask = mask[0]
    if len(shape) == mask.ndim + 1 and shape[0] == 1:
        shape = shape[1:]
    if tuple(mask.shape) != tuple(shape):
        raise DataError(f"{name} has size {tuple(mask.shape)}, its image {tuple(shape)}. They must be equal.")
    classes = _classes(mask, len(task.classes), name)
    if classes.shape == tuple(settings.size):
        return np.ascontiguousarray(classes)
    resize = _resize_plane if classes.ndim == 2 else _resize_volume
    resized: NDArray[np.uint8] = resize(classes[None], settings, nearest=True)[0]
    return resized


def _classes(mask: NDArray[Any], count: int, name: str) -> NDArray[np.uint8]:
    values = np.flatnonzero(np.bincount(mask.reshape(-1), minlength=256)) if mask.dtype == np.uint8 else np.unique(mask)
    if values[0] >= 0 and values[-1] < count and (values == np.rint(values)).all():
        return mask.astype(np.uint8)
    if count == 2:
        if len(values) == 1 or (len(values) == 2 and values[0] == 0):
            return np.asarray(mask != 0, dtype=np.uint8)
        if mask.dtype == np.uint8 and values[-1] > 127:
            return np.asarray(mask > 127, dtype=np.uint8)
    shown = ", ".join(f"{value:g}" for value in values[:6]) + (", ..." if len(values) > 6 else "")
    raise DataError(
        f"{name} has the values {shown}; with {count} classes they must be 0 to {count - 1}"
        + (" (or 0 and one other value)." if count == 2 else ".")
    )


def restore_mask(mask: NDArray[np.uint8], shape: tuple[int, ...], settings: ImageSettings) -> NDArray[np.uint8]:
    """Bring a predicted mask back to its image's own size; the reverse of what ``to_array`` does to pixels.

    Args:
        mask: Class indices ``[*settings.size]``.
        shape: Spatial shape of the image as read.
        settings: As for ``to_array``.

    Returns:
        uint8 of ``shape`` (without a depth of one in a 2D study): the nearest class, 0 where the image was cut off.
    """
    if len(shape) == mask.ndim + 1 and shape[0] == 1:
        shape = shape[1:]
    plane = (shape[-2], shape[-1])
    scaled, offset = _geometry(plane, (settings.size[-2], settings.size[-1]), settings.fit)
    whole = _place(mask, scaled, (-offset[0], -offset[1]))
    stretch = settings.model_copy(update={"size": list(shape), "fit": "stretch"})
    resize = _resize_plane if mask.ndim == 2 else _resize_volume
    restored: NDArray[np.uint8] = resize(whole[None], stretch, nearest=True)[0].astype(np.uint8)
    return restored
