"""Batch normalisation for two kinds of images: running statistics of their own, scale and shift in common.

A network that is trained on patients' images and on public ones must not mix their running statistics: those of
patients are what it is used with. So the public images have a set of their own, which takes the place of the network's
while they pass. After Chang et al., CVPR 2019 (arXiv 1906.03950), whose scale and shift are separate too; ours are
shared.

Networks with group or instance normalisation have no running statistics; for them nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_BUFFERS = ("running_mean", "running_var")


class NaturalStatistics:
    """Running statistics of one network for public images.

    Attributes:
        tensors: By name, as in ``state_dict``; empty for a network without running statistics. Training inside
            ``natural`` changes them in place. They fit into a state and a message as they are.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    @classmethod
    def of(cls, model: nn.Module) -> NaturalStatistics:
        """A copy of what the network has now: at the start both kinds of images begin with the same."""
        return cls({name: buffer.detach().clone() for name, _, _, buffer in _statistics(model)})

    @contextmanager
    def natural(self, model: nn.Module) -> Iterator[None]:
        """Inside, the network has these statistics."""
        with natural(model, self.tensors):
            yield


@contextmanager
def natural(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the network uses and, in training mode, updates ``tensors`` as its running statistics.

    They are put in place of the network's buffers, not copied into them: nothing is written to values that a graph of
    an earlier pass still needs, so a pass of patients' images and one of public images may share a backward pass. Views
    of the network's own buffers (``Site.tensors``) keep showing those of patients.

    Args:
        model: Any network.
        tensors: As ``NaturalStatistics.of`` names them, on the network's device.

    Raises:
        KeyError: One is missing.
    """
    own = list(_statistics(model))
    for name, module, leaf, _ in own:
        module._buffers[leaf] = tensors[name]
    try:
        yield
    finally:
        for _, module, leaf, buffer in own:
            module._buffers[leaf] = buffer


@torch.no_grad()
def estimate_statistics(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the running statistics, in place, to the mean over batches of their means and variances.

    Dropout is off, everything else stands still; the network is left in evaluation mode. With group or instance
    normalisation nothing happens, and no batch is asked for.

    Args:
        model: The network.
        batches: Normalised images ``[B, C, *spatial]`` on its device; of more than one each.
    """
    norms = list(dict.fromkeys(module for _, module, _, _ in _statistics(model)))
    model.eval()
    if not norms:
        return
    before = [module.momentum for module in norms]
    for module in norms:
        module.reset_running_stats()
        module.momentum = None  # the plain mean of all batches
        module.train()
    try:
        for images in batches:
            model(images)
    finally:
        for module, momentum in zip(norms, before, strict=True):
            module.momentum = momentum
        model.eval()


def _statistics(model: nn.Module) -> Iterator[tuple[str, nn.modules.batchnorm._NormBase, str, Tensor]]:
    """Name, layer, name in the layer, and buffer of every running mean and variance."""
    for prefix, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            for leaf in _BUFFERS:
                buffer = module._buffers.get(leaf)
                if buffer is not None:
                    yield f"{prefix}.{leaf}" if prefix else leaf, module, leaf, buffer
