"""ShuffleNetV2 for 2D classification, with the module names and shapes of its common implementation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polyclinic.models.normalisation import norm_layer

# width: channels of stem, three stages, last convolution (table 5 of the paper)
_CHANNELS = {0.5: (24, 48, 96, 192, 1024), 1.0: (24, 116, 232, 464, 1024)}
_REPEATS = (4, 8, 4)


def shuffled(maps: Tensor) -> Tensor:
    """Interleave the two halves of the channels of ``[B, C, H, W]``: 0, C/2, 1, C/2 + 1, ..."""
    batch, channels, height, width = maps.shape
    return maps.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)


def _pointwise(before: int, after: int, norm: str) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 1, bias=False), norm_layer(norm, after, 2), nn.ReLU(inplace=True)]


def _depthwise(channels: int, stride: int, norm: str) -> list[nn.Module]:
    conv = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
    return [conv, norm_layer(norm, channels, 2)]


class ShuffleUnit(nn.Module):
    """Half of the channels passes, half is filtered, then both are shuffled; with a stride both are filtered."""

    def __init__(self, before: int, after: int, stride: int, norm: str) -> None:
        super().__init__()
        half = after // 2
        down = stride > 1
        self.branch1 = nn.Sequential(
            *([*_depthwise(before, stride, norm), *_pointwise(before, half, norm)] if down else [])
        )
        self.branch2 = nn.Sequential(
            *_pointwise(before if down else half, half, norm),
            *_depthwise(half, stride, norm),
            *_pointwise(half, half, norm),
        )
        self.down = down

    def forward(self, maps: Tensor) -> Tensor:
        """Map ``[B, before, H, W]`` to ``[B, after, H/stride, W/stride]``."""
        kept, filtered = (maps, maps) if self.down else maps.chunk(2, dim=1)
        return shuffled(torch.cat([self.branch1(kept), self.branch2(filtered)], dim=1))


class ShuffleNetV2(nn.Module):
    """Stem and pooling, three stages of shuffle units, a last 1x1 convolution, pooling and ``fc``.

    References:
        Ma et al., ECCV 2018 (arXiv 1807.11164).
    """

    def __init__(
        self, in_channels: int, channels: tuple[int, ...], out_channels: int, norm: str, stem_stride: int
    ) -> None:
        super().__init__()
        stem, *stages, last = channels
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_channels, stem, 3, stem_stride, padding=1, bias=False),
            norm_layer(norm, stem, 2),
            nn.ReLU(inplace=True),
        )
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        before, made = stem, []
        for after, repeats in zip(stages, _REPEATS, strict=True):
            units = [ShuffleUnit(before, after, 2, norm)]
            units += [ShuffleUnit(after, after, 1, norm) for _ in range(repeats - 1)]
            made.append(nn.Sequential(*units))
            before = after
        self.stage2, self.stage3, self.stage4 = made
        self.conv5 = nn.Sequential(*_pointwise(before, last, norm))
        self.fc = nn.Linear(last, out_channels)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[B, out_channels]`` of images ``[B, in_channels, H, W]``."""
        maps = self.stage4(self.stage3(self.stage2(self.maxpool(self.conv1(images)))))
        logits: Tensor = self.fc(self.conv5(maps).flatten(2).mean(2))
        return logits


def shufflenet(
    *,
    in_channels: int,
    out_channels: int,
    spatial_dims: int,
    norm: str,
    width: float = 0.5,
    stem_stride: int = 2,
) -> nn.Module:
    """Build the network.

    Args:
        in_channels: Channels of the images.
        out_channels: Number of classes.
        spatial_dims: 2; it has no 3D form.
        norm: As ``model.norm``.
        width: 0.5 or 1.0, the paper's two small networks (0.3 and 1.3 million values and the last layer).
        stem_stride: Stride of the first layer; 1 suits images below 64 px, at four times the cost.
    """
    if spatial_dims != 2:
        raise ValueError(f"shufflenet is a 2D network, got spatial_dims={spatial_dims}")
    if width not in _CHANNELS:
        raise ValueError(f"shufflenet has width 0.5 or 1.0, got {width}")
    return ShuffleNetV2(in_channels, _CHANNELS[width], out_channels, norm, stem_stride)
