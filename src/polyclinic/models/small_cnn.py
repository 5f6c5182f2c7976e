"""A small convolutional network for classification: the default, fast on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from polyclinic.models.normalisation import norm_layer


class SmallCNN(nn.Module):
    """Convolution, normalisation and ReLU four times, global average pooling, one linear layer.

    ``forward`` takes ``[B, in_channels, *spatial]`` and returns logits ``[B, out_channels]``. With the usual strides
    the last map is an eighth of the image in each direction.
    """

    def __init__(self, blocks: nn.Sequential, features: int, out_channels: int) -> None:
        super().__init__()
        self.blocks = blocks
        self.head = nn.Linear(features, out_channels)
        self.taps = tuple(f"blocks.{i}" for i, layer in enumerate(blocks) if isinstance(layer, nn.ReLU))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[B, out_channels]``."""
        logits: Tensor = self.head(self.blocks(images).flatten(2).mean(2))
        return logits


def small_cnn(
    *,
    in_channels: int,
    out_channels: int,
    spatial_dims: int,
    norm: str,
    width: int = 16,
    strides: Sequence[int] = (2, 2, 2, 1),
) -> nn.Module:
    """Build the network; its layers have ``width``, 2, 4 and 4 times ``width`` channels.

    Args:
        in_channels: Channels of the images.
        out_channels: Number of classes.
        spatial_dims: 2 or 3.
        norm: As ``model.norm``.
        width: Channels of the first layer.
        strides: One per layer; ``[1, 2, 2, 2]`` sees finer detail at four times the cost. More or fewer layers
            are allowed.
    """
    conv = nn.Conv2d if spatial_dims == 2 else nn.Conv3d
    layers: list[nn.Module] = []
    before = in_channels
    for index, stride in enumerate(strides):
        after = width * min(2**index, 4)
        layers += [
            conv(before, after, kernel_size=3, stride=stride, padding=1, bias=False),
            norm_layer(norm, after, spatial_dims),
            nn.ReLU(inplace=True),
        ]
        before = after
    return SmallCNN(nn.Sequential(*layers), before, out_channels)
