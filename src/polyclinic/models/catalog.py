"""The networks that a study can name. Imports neither torch nor MONAI, so that lists and checks are instant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from polyclinic.errors import StudyError, nearest

TaskKind = Literal["multi-class", "multi-label", "segmentation"]
CLASSIFICATION: tuple[TaskKind, ...] = ("multi-class", "multi-label")
SEGMENTATION: tuple[TaskKind, ...] = ("segmentation",)


@dataclass(frozen=True, slots=True)
class Network:
    """What the registry knows of one network before it is built."""

    name: str
    """As in ``model.name``."""
    description: str
    """One line for ``polyclinic methods``."""
    builder: str
    """``module:function``, called with in_channels, out_channels, spatial_dims, norm and the options."""
    dims: tuple[int, ...]
    """2 for images, 3 for volumes."""
    tasks: tuple[TaskKind, ...]
    """Kinds of task it can do."""
    tap: str = ""
    """Module whose output map, averaged over space, is the penultimate feature; empty: none."""
    taps: tuple[str, ...] = ()
    """Modules whose output maps are features of rising depth, shallow to deep; empty: none. A builder whose networks
    differ in depth sets them itself, in the network's attribute ``taps``."""
    width: bool = False
    """Takes ``model.width``."""


_RESNET_TAPS = ("layer1", "layer2", "layer3", "layer4")
_DENSENET_TAPS = ("features.denseblock1", "features.denseblock2", "features.denseblock3", "features.denseblock4")

NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        Network(
            "small-cnn",
            "four convolutions, made for fast trials on a CPU",
            "polyclinic.models.small_cnn:small_cnn",
            (2, 3),
            CLASSIFICATION,
            tap="blocks",
            taps=("blocks.2", "blocks.5", "blocks.8", "blocks.11"),
            width=True,
        ),
        Network(
            "mobilenet",
            "MobileNetV2 at half width (options: alpha, stem_stride, dropout)",
            "polyclinic.models.mobilenet:mobilenet",
            (2,),
            CLASSIFICATION,
            tap="features",
            taps=("features.3", "features.6", "features.13", "features.17"),
        ),
        Network(
            "resnet18",
            "ResNet-18 (MONAI); for images below 64 px set conv1_t_size: 3, conv1_t_stride: 1, no_max_pool: true",
            "polyclinic.models.monai_networks:resnet18",
            (2, 3),
            CLASSIFICATION,
            tap="layer4",
            taps=_RESNET_TAPS,
        ),
        Network(
            "resnet34",
            "ResNet-34 (MONAI); options as resnet18",
            "polyclinic.models.monai_networks:resnet34",
            (2,),
            CLASSIFICATION,
            tap="layer4",
            taps=_RESNET_TAPS,
        ),
        Network(
            "resnet50",
            "ResNet-50 (MONAI); options as resnet18",
            "polyclinic.models.monai_networks:resnet50",
            (2,),
            CLASSIFICATION,
            tap="layer4",
            taps=_RESNET_TAPS,
        ),
        Network(
            "small-resnet",
            "three stages of residual blocks, made for a CPU (options: blocks, stem_stride)",
            "polyclinic.models.small_resnet:small_resnet",
            (2, 3),
            CLASSIFICATION,
            tap="layer3",
            taps=_RESNET_TAPS[:3],
            width=True,
        ),
        Network(
            "shufflenet",
            "ShuffleNetV2 at half width (options: width: 0.5 or 1.0, stem_stride)",
            "polyclinic.models.shufflenet:shufflenet",
            (2,),
            CLASSIFICATION,
            tap="conv5",
            taps=("maxpool", "stage2", "stage3", "stage4"),
        ),
        Network(
            "efficientnet-b0",
            "EfficientNet-B0 (MONAI)",
            "polyclinic.models.monai_networks:efficientnet",
            (2,),
            CLASSIFICATION,
            tap="_avg_pooling",
            taps=("_blocks.1", "_blocks.2", "_blocks.4", "_blocks.6"),
        ),
        Network(
            "densenet121",
            "DenseNet-121 (MONAI)",
            "polyclinic.models.monai_networks:densenet121",
            (2, 3),
            CLASSIFICATION,
            tap="class_layers.relu",
            taps=_DENSENET_TAPS,
        ),
        Network(
            "densenet3d",
            "the small 3D DenseNet of PPPML-HMI (MONAI blocks; option head_dropout)",
            "polyclinic.models.monai_networks:densenet3d",
            (3,),
            CLASSIFICATION,
            tap="class_layers.relu",
            taps=_DENSENET_TAPS,
        ),
        Network(
            "unet",
            "U-Net with four poolings (MONAI BasicUNet)",
            "polyclinic.models.monai_networks:unet",
            (2, 3),
            SEGMENTATION,
            width=True,
        ),
        Network(
            "unet-2.5d",
            "three 2D U-Nets: axial, coronal, sagittal slices with neighbours (option offsets: [-1, 0, 1])",
            "polyclinic.models.orthogonal_unet:orthogonal_unet",
            (3,),
            SEGMENTATION,
            width=True,
        ),
    )
}


def find_network(name: str, kind: str, spatial_dims: int) -> Network:
    """Look up a network and check that it suits the task and the images.

    Args:
        name: ``model.name`` of the study, a name of ``NETWORKS``.
        kind: ``task.kind``.
        spatial_dims: 2 or 3, the length of ``data.image.size``.

    Raises:
        StudyError: Unknown name, or a network that cannot do the task or the dimensions; names one that can.
    """
    if name not in NETWORKS:
        raise StudyError(f"model.name: there is no network {name!r}. {nearest(name, list(NETWORKS))}")
    network = NETWORKS[name]
    suitable = [n.name for n in NETWORKS.values() if kind in n.tasks and spatial_dims in n.dims]
    if kind not in network.tasks:
        raise StudyError(
            f"model.name: {name!r} does {' and '.join(network.tasks)}, but task.kind is {kind!r}. "
            f"Choose one of: {', '.join(suitable)}."
        )
    if spatial_dims not in network.dims:
        only = " or ".join(f"{d}D" for d in network.dims)
        raise StudyError(
            f"model.name: {name!r} takes {only} images, but data.image.size has {spatial_dims} numbers. "
            f"Choose one of: {', '.join(suitable)}."
        )
    return network
