"""MobileNetV2 for 2D classification, with the module names and shapes of its common implementation."""

from __future__ import annotations

from torch import Tensor, nn

from polyclinic.models.normalisation import norm_layer

# expansion, channels, repeats, stride of the first: table 2 of the paper
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def _channels(number: float) -> int:
    """Round to a multiple of 8, never below 90 percent of ``number``."""
    rounded = max(8, int(number + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * number else rounded + 8


def _conv(before: int, after: int, norm: str, *, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        norm_layer(norm, after, 2),
        nn.ReLU6(inplace=True),
    )


class InvertedResidual(nn.Module):
    """Widen by 1x1, filter each channel by itself, narrow by 1x1; added to the input where shapes allow."""

    def __init__(self, before: int, after: int, norm: str, *, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = before * expansion
        self.add = stride == 1 and before == after
        self.conv = nn.Sequential(
            *([_conv(before, hidden, norm, kernel=1)] if expansion > 1 else []),
            _conv(hidden, hidden, norm, stride=stride, groups=hidden),
            nn.Conv2d(hidden, after, kernel_size=1, bias=False),
            norm_layer(norm, after, 2),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Map ``[B, before, H, W]`` to ``[B, after, H/stride, W/stride]``."""
        result: Tensor = self.conv(maps)
        return maps + result if self.add else result


class MobileNetV2(nn.Module):
    """Stem, 17 inverted residuals, a last 1x1 convolution (``features``), pooling and ``classifier``.

    References:
        Sandler et al., CVPR 2018 (arXiv 1801.04381).
    """

    def __init__(self, features: nn.Sequential, last: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.features = features
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, out_channels))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[B, out_channels]`` of images ``[B, in_channels, H, W]``."""
        logits: Tensor = self.classifier(self.features(images).flatten(2).mean(2))
        return logits


def mobilenet(
    *,
    in_channels: int,
    out_channels: int,
    spatial_dims: int,
    norm: str,
    alpha: float = 0.5,
    stem_stride: int = 2,
    dropout: float = 0.2,
) -> nn.Module:
    """Build the network.

    Args:
        in_channels: Channels of the images.
        out_channels: Number of classes.
        spatial_dims: 2; it has no 3D form.
        norm: As ``model.norm``.
        alpha: Multiplies the channels; 1 is the paper's network (2.2 million values and the classifier).
        stem_stride: Stride of the first layer; 1 suits images below 64 px, at four times the cost.
        dropout: Before the classifier.
    """
    if spatial_dims != 2:
        raise ValueError(f"mobilenet is a 2D network, got spatial_dims={spatial_dims}")
    before = _channels(32 * alpha)
    layers: list[nn.Module] = [_conv(in_channels, before, norm, stride=stem_stride)]
    for expansion, channels, repeats, stride in _STAGES:
        after = _channels(channels * alpha)
        for index in range(repeats):
            step = stride if index == 0 else 1
            layers.append(InvertedResidual(before, after, norm, stride=step, expansion=expansion))
            before = after
    last = _channels(1280 * max(1.0, alpha))
    layers.append(_conv(before, last, norm, kernel=1))
    model = MobileNetV2(nn.Sequential(*layers), last, out_channels, dropout)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)
    return model
