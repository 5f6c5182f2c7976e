"""Networks that MONAI has, with our defaults and normalisation policies. MONAI is imported when one is built."""

from __future__ import annotations

from typing import Any

from torch import nn

from polyclinic.models.construct import construct
from polyclinic.models.normalisation import apply_policy


def resnet18(*, in_channels: int, out_channels: int, spatial_dims: int, norm: str, **options: Any) -> nn.Module:
    """Build ResNet-18 in the shape of its paper (first convolution 7x7, stride 2; He et al., arXiv 1512.03385).

    Args:
        in_channels: Channels of the images.
        out_channels: Number of classes.
        spatial_dims: 2 or 3.
        norm: As ``model.norm``.
        options: Of MONAI's ``ResNet``, for instance ``conv1_t_size``, ``conv1_t_stride``, ``no_max_pool``,
            ``widen_factor``. Images of 28 px want 3, 1 and true: with the defaults only one pixel reaches the end.
    """
    return _resnet({"block": "basic", "layers": [2, 2, 2, 2]} | options, in_channels, out_channels, spatial_dims, norm)


def resnet34(*, in_channels: int, out_channels: int, spatial_dims: int, norm: str, **options: Any) -> nn.Module:
    """Build ResNet-34; arguments as for ``resnet18``."""
    return _resnet({"block": "basic", "layers": [3, 4, 6, 3]} | options, in_channels, out_channels, spatial_dims, norm)


def resnet50(*, in_channels: int, out_channels: int, spatial_dims: int, norm: str, **options: Any) -> nn.Module:
    """Build ResNet-50, whose blocks narrow and widen again; arguments as for ``resnet18``."""
    return _resnet(
        {"block": "bottleneck", "layers": [3, 4, 6, 3]} | options, in_channels, out_channels, spatial_dims, norm
    )


def _resnet(shape: dict[str, Any], in_channels: int, out_channels: int, spatial_dims: int, norm: str) -> nn.Module:
    from monai.networks.nets import ResNet

    fixed = {
        "n_input_channels": in_channels,
        "num_classes": out_channels,
        "spatial_dims": spatial_dims,
        "norm": "batch",
    }
    usual = {"block_inplanes": [64, 128, 256, 512], "conv1_t_stride": 2, "bias_downsample": False}
    model = construct(ResNet, fixed, usual | shape)
    apply_policy(model, norm, spatial_dims)
    return model


def efficientnet(*, in_channels: int, out_channels: int, spatial_dims: int, norm: str) -> nn.Module:
    """Build EfficientNet-B0 (Tan and Le, arXiv 1905.11946).

    Batch normalisation has the momentum and ε of the other networks (0.1 and 1e-5; MONAI: 0.01 and 1e-3), since
    running statistics that need hundreds of steps would never fit a small site. Convolutions pad on both sides alike
    (MONAI: as TensorFlow does for 224 px, which fits no other size). The swish is the plain one: the other saves
    memory, but has no forward-mode derivative.

    Args:
        in_channels: Channels of the images.
        out_channels: Number of classes.
        spatial_dims: 2.
        norm: As ``model.norm``.
    """
    from monai.networks.nets import EfficientNetBN

    if spatial_dims != 2:
        raise ValueError(f"efficientnet-b0 is offered as a 2D network, got spatial_dims={spatial_dims}")
    made = EfficientNetBN(
        "efficientnet-b0",
        pretrained=False,
        spatial_dims=2,
        in_channels=in_channels,
        num_classes=out_channels,
        norm=("batch", {"eps": 1e-5, "momentum": 0.1}),
    )
    made.set_swish(memory_efficient=False)
    model: nn.Module = made
    _pad_evenly(model)
    apply_policy(model, norm, spatial_dims)
    return model


def _pad_evenly(model: nn.Module) -> None:
    """Let each convolution pad by itself instead of the layer ``<name>_padding`` before it."""
    for module in model.modules():
        for name in [name for name, _ in module.named_children() if name.endswith("_padding")]:
            conv = module.get_submodule(name.removesuffix("_padding"))
            if isinstance(conv, nn.Conv2d):  # a block that does not widen has an identity there
                conv.padding = tuple(size // 2 for size in conv.kernel_size)
            setattr(module, name, nn.Identity())


def densenet121(*, in_channels: int, out_channels: int, spatial_dims: int, norm: str, **options: Any) -> nn.Module:
    """Build DenseNet-121 (Huang et al., arXiv 1608.06993); options of MONAI's ``DenseNet``, as ``dropout_prob``.

    Arguments as for ``resnet18``.
    """
    from monai.networks.nets import DenseNet

    fixed = _arguments(in_channels, out_channels, spatial_dims)
    model = construct(DenseNet, fixed, {"block_config": (6, 12, 24, 16)} | options)
    apply_policy(model, norm, spatial_dims)
    return model


def densenet3d(
    *,
    in_channels: int,
    out_channels: int,
    spatial_dims: int,
    norm: str,
    head_dropout: float = 0.5,
    **options: Any,
) -> nn.Module:
    """Build the 3D DenseNet of PPPML-HMI's code: blocks of 1, 3, 6 and 4 layers, head 256 -> 20 -> classes.

    The first convolution keeps the resolution along the first axis, as there. 1,845,470 parameters for one channel
    and two classes.

    Args:
        in_channels: Channels of the images.
        out_channels: Number of classes.
        spatial_dims: 3; it has no 2D form.
        norm: As ``model.norm``.
        head_dropout: Dropout between the two layers of the head.
        options: Of MONAI's ``DenseNet``.
    """
    from monai.networks.nets import DenseNet

    if spatial_dims != 3:
        raise ValueError(f"densenet3d is a 3D network, got spatial_dims={spatial_dims}")
    shape = {"init_features": 32, "growth_rate": 32, "block_config": (1, 3, 6, 4)}
    model = construct(DenseNet, _arguments(in_channels, out_channels, 3), shape | options)
    first, head = model.get_submodule("features.conv0"), model.get_submodule("class_layers.out")
    assert isinstance(first, nn.Conv3d)
    assert isinstance(head, nn.Linear)
    first.stride = (1, 2, 2)
    layers = nn.Linear(head.in_features, 20), nn.Dropout(head_dropout), nn.Linear(20, out_channels)
    model.get_submodule("class_layers").out = nn.Sequential(*layers)
    apply_policy(model, norm, 3)
    return model


def unet(
    *, in_channels: int, out_channels: int, spatial_dims: int, norm: str, width: int = 16, **options: Any
) -> nn.Module:
    """Build a U-Net with four poolings; its levels have ``width`` times 1, 2, 4, 8 and 16 channels.

    With width 16 it has the shape of the 2D U-Net of PPPML-HMI's code: 1,942,594 parameters for three channels and
    two classes. Images whose size is no multiple of 16 are padded inside.

    Args:
        in_channels: Channels of the images.
        out_channels: Number of classes, the background among them.
        spatial_dims: 2 or 3.
        norm: As ``model.norm``.
        width: Channels of the first level.
        options: Of MONAI's ``BasicUNet``: ``act``, ``bias``, ``dropout``, ``upsample``.
    """
    from monai.networks.nets import BasicUNet
    from monai.networks.nets.basic_unet import UpCat

    levels = tuple(width * factor for factor in (1, 2, 4, 8, 16, 1))
    fixed = _arguments(in_channels, out_channels, spatial_dims) | {"features": levels}
    shape = {"act": ("relu", {"inplace": True}), "bias": False, "dropout": 0.0, "upsample": "deconv"} | options
    model = construct(BasicUNet, fixed, shape)
    # BasicUNet does not halve the channels on the way to its last level; U-Net does at every level.
    model.upcat_1 = UpCat(spatial_dims, levels[1], levels[0], levels[5], norm="batch", **shape)
    apply_policy(model, norm, spatial_dims)
    return model


def _arguments(in_channels: int, out_channels: int, spatial_dims: int) -> dict[str, Any]:
    return {"in_channels": in_channels, "out_channels": out_channels, "spatial_dims": spatial_dims, "norm": "batch"}
