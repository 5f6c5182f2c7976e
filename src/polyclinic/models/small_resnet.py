"""A small residual network for classification, for trials on a CPU: three stages behind a 3x3 stem."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from polyclinic.models.normalisation import norm_layer


def _conv(before: int, after: int, dims: int, kernel: int = 3, stride: int = 1) -> nn.Module:
    kind = nn.Conv2d if dims == 2 else nn.Conv3d
    return kind(before, after, kernel, stride, padding=kernel // 2, bias=False)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with normalisation, added to the input, or to its 1x1 projection where shapes differ."""

    def __init__(self, before: int, after: int, stride: int, norm: str, dims: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(before, after, dims, stride=stride),
            norm_layer(norm, after, dims),
            nn.ReLU(inplace=True),
            _conv(after, after, dims),
            norm_layer(norm, after, dims),
        )
        alike = stride == 1 and before == after
        projected = [_conv(before, after, dims, kernel=1, stride=stride), norm_layer(norm, after, dims)]
        self.shortcut = nn.Sequential(*([] if alike else projected))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, maps: Tensor) -> Tensor:
        """Map ``[B, before, *spatial]`` to ``[B, after, *spatial / stride]``."""
        result: Tensor = self.relu(self.body(maps) + self.shortcut(maps))
        return result


class SmallResNet(nn.Module):
    """Stem, ``layer1`` to ``layer3`` of residual blocks, pooling and ``fc``.

    ``forward`` takes ``[B, in_channels, *spatial]`` and returns logits ``[B, out_channels]``. The shape of He et al.,
    CVPR 2016, section 4.2 (arXiv 1512.03385), with fewer blocks and a stem that may have a stride.
    """

    def __init__(self, stem: nn.Sequential, layers: Sequence[nn.Sequential], features: int, out_channels: int) -> None:
        super().__init__()
        self.stem = stem
        self.layer1, self.layer2, self.layer3 = layers
        self.fc = nn.Linear(features, out_channels)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[B, out_channels]``."""
        maps = self.layer3(self.layer2(self.layer1(self.stem(images))))
        logits: Tensor = self.fc(maps.flatten(2).mean(2))
        return logits


def small_resnet(
    *,
    in_channels: int,
    out_channels: int,
    spatial_dims: int,
    norm: str,
    width: int = 16,
    blocks: Sequence[int] = (1, 1, 1),
    stem_stride: int = 2,
) -> nn.Module:
    """Build the network; its stages have ``width``, 2 and 4 times ``width`` channels.

    Args:
        in_channels: Channels of the images.
        out_channels: Number of classes.
        spatial_dims: 2 or 3.
        norm: As ``model.norm``.
        width: Channels of the stem and the first stage.
        blocks: Residual blocks of each of the three stages.
        stem_stride: Stride of the first layer; 1 suits images of 32 px, at four times the cost.
    """
    if len(blocks) != 3 or min(blocks) < 1:
        raise ValueError(f"small-resnet has three stages of one block or more each, got blocks={list(blocks)}")
    stem = nn.Sequential(
        _conv(in_channels, width, spatial_dims, stride=stem_stride),
        norm_layer(norm, width, spatial_dims),
        nn.ReLU(inplace=True),
    )
    before, layers = width, []
    for index, count in enumerate(blocks):
        after, stride = width * 2**index, 1 if index == 0 else 2
        stage = [ResidualBlock(before, after, stride, norm, spatial_dims)]
        stage += [ResidualBlock(after, after, 1, norm, spatial_dims) for _ in range(count - 1)]
        layers.append(nn.Sequential(*stage))
        before = after
    return SmallResNet(stem, layers, before, out_channels)
