"""What ``model.norm`` means for a network: which layers it gets, and which of their values leave a site."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from polyclinic.errors import StudyError
from polyclinic.models.amplitude_norm import amplitude_norms

MAX_GROUPS = 8
_NORM_TYPES = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_NORM_NAME = re.compile(r"(Batch|Group|Instance|Layer|RMS)Norm")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def groups(channels: int) -> int:
    """Return the number of groups for group normalisation: the largest divisor of 8 that divides ``channels``."""
    return math.gcd(MAX_GROUPS, channels)


def norm_layer(policy: str, channels: int, spatial_dims: int) -> nn.Module:
    """Build one normalisation layer for our own networks.

    Args:
        policy: ``batch``, ``batch-local``, ``group`` or ``instance``.
        channels: Channels of the map it normalises.
        spatial_dims: 2 or 3.
    """
    if policy in ("batch", "batch-local"):
        return nn.BatchNorm2d(channels) if spatial_dims == 2 else nn.BatchNorm3d(channels)
    if policy == "group":
        return nn.GroupNorm(groups(channels), channels)
    if policy == "instance":
        instance = nn.InstanceNorm2d if spatial_dims == 2 else nn.InstanceNorm3d
        return instance(channels, affine=True)
    raise StudyError(f"model.norm: {policy!r} is unknown. Choose one of: batch, batch-local, group, instance.")


def apply_policy(model: nn.Module, policy: str, spatial_dims: int) -> None:
    """Replace every batch normalisation of a network, in place, by the layer that the policy asks for.

    So MONAI's networks are built: its ResNet ignores its ``norm`` argument inside the blocks (MONAI pull request
    9028), and its group argument is one number for all layers, whatever their channels.
    """
    if policy in ("batch", "batch-local"):
        return
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, norm_layer(policy, module.num_features, spatial_dims))


def _norm_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, _NORM_TYPES) or _NORM_NAME.search(type(module).__name__):
            yield name, module


def norm_parameter_names(model: nn.Module) -> frozenset[str]:
    """Name every parameter and buffer that belongs to a normalisation layer, as in ``state_dict``."""
    names: set[str] = set()
    for prefix, module in _norm_modules(model):
        own = [*module._parameters.items(), *module._buffers.items()]
        names.update(f"{prefix}.{name}" if prefix else name for name, tensor in own if tensor is not None)
    return frozenset(names)


def running_statistics(model: nn.Module) -> frozenset[str]:
    """Name the running means, variances and counters of batch normalisation, as in ``state_dict``."""
    return frozenset(name for name in norm_parameter_names(model) if name.rpartition(".")[2] in _STATISTICS)


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Inside, batches are normalised by their own statistics as in training, but running statistics do not move."""
    tracking = [m for m in model.modules() if isinstance(m, _NORM_TYPES[0]) and m.track_running_stats]
    for module in tracking:
        module.track_running_stats = False
    try:
        with _amplitudes_kept(model):
            yield
    finally:
        for module in tracking:
            module.track_running_stats = True


@contextmanager
def running_statistics_used(model: nn.Module) -> Iterator[None]:
    """Inside, layers that keep running statistics normalise by these, and they do not move; the rest trains."""
    # Not by track_running_stats: inside statistics_kept that is off.
    keeping = [
        m for m in model.modules() if isinstance(m, _NORM_TYPES[0]) and m.running_mean is not None and m.training
    ]
    for module in keeping:
        module.training = False
    try:
        with _amplitudes_kept(model):
            yield
    finally:
        for module in keeping:
            module.training = True


@contextmanager
def _amplitudes_kept(model: nn.Module) -> Iterator[None]:
    """Inside, no batch sets the common amplitude of ``model.harmonise``."""
    moving = [norm for norm in amplitude_norms(model) if norm.moving]
    for norm in moving:
        norm.moving = False
    try:
        yield
    finally:
        for norm in moving:
            norm.moving = True


def shared_names(model: nn.Module, policy: str) -> list[str]:
    """Name what leaves a site by default, in the order of ``state_dict``.

    All floating-point parameters and buffers; ``num_batches_tracked`` never leaves (with the fixed momentum that our
    networks use it has no effect). Under ``batch-local`` running means and variances stay too, as in FedBN's
    relative SiloBN (Andreux et al. 2020), where the learned scale and shift are still averaged.
    """
    at_home = running_statistics(model) if policy == "batch-local" else frozenset()
    return [
        name
        for name, tensor in model.state_dict().items()
        if torch.is_floating_point(tensor) and name not in at_home and not name.endswith("num_batches_tracked")
    ]


def check_policy(model: nn.Module, policy: str) -> None:
    """Refuse a network that contains batch normalisation although the study chose a policy without it.

    Raises:
        StudyError: Names the first such layer.
    """
    if policy not in ("group", "instance"):
        return
    for name, module in _norm_modules(model):
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or "BatchNorm" in type(module).__name__:
            raise StudyError(
                f"model.norm is {policy!r}, but layer {name!r} of the network is {type(module).__name__}. "
                f"Build the network with its argument 'norm', or set model.norm: batch."
            )
