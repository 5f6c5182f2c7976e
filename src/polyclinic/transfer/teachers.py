"""Who teaches: what another network says of public images, from its weights or from what it said beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from polyclinic.data.proxies import Proxies
from polyclinic.errors import StudyError
from polyclinic.models.domain_statistics import natural
from polyclinic.models.taps import feature_tap, level_taps, tapped
from polyclinic.study import ImageSettings
from polyclinic.transfer.wire import halved, widened


class Said(NamedTuple):
    """What a network says of a batch of public images.

    Attributes:
        maps: Of rising depth, ``[B, c, H, W]``, or pooled ``[B, c]``.
        features: Penultimate, pooled ``[B, F]``; empty ``[B, 0]`` where they did not travel.
        logits: ``[B, K]``.
    """

    maps: list[Tensor]
    features: Tensor
    logits: Tensor


class Teacher(Protocol):
    """A network that another learns from."""

    @property
    def channels(self) -> list[int]:
        """Of its maps."""

    def say(self, positions: Tensor, images: Tensor) -> Said:
        """Without gradients.

        Args:
            positions: Of the images in the public set, int64 ``[B]``.
            images: As the pupil sees them, on its device.
        """


@dataclass(frozen=True)
class Shape:
    """Taps of a network, and how wide they and its outputs are.

    Attributes:
        levels: Modules whose outputs are the maps.
        channels: Of the maps.
        feature: Module whose output is the penultimate feature.
        features: How many.
        outputs: How many.
    """

    levels: tuple[str, ...]
    channels: list[int]
    feature: str
    features: int
    outputs: int

    @classmethod
    def of(cls, model: nn.Module, image: ImageSettings) -> Shape:
        """Try the network on an empty image.

        Raises:
            StudyError: It does not say where its maps or its features are, or names a module that it does not have, or
                one that gives no map.
        """
        levels, feature = level_taps(model), feature_tap(model)
        device = next(model.parameters()).device
        was = model.training
        with torch.no_grad(), tapped(model, dict.fromkeys((*levels, feature))) as seen:
            logits = model.eval()(torch.zeros(1, image.channels, *image.size, device=device))
        model.train(was)
        channels = {name: _channels(model, name, outputs) for name, outputs in seen.items()}
        return cls(levels, [channels[name] for name in levels], feature, channels[feature], logits.shape[1])


def _channels(model: nn.Module, name: str, outputs: Sequence[object]) -> int:
    """Of what a tapped module gave in one pass of the network.

    Raises:
        StudyError: Nothing, or no map and no vector.
    """
    given = outputs[-1] if outputs else None
    if isinstance(given, Tensor) and given.ndim in (2, 4):
        return given.shape[1]
    if isinstance(given, Tensor):
        found = f"a tensor of shape {list(given.shape)}"
    else:
        found = f"a {type(given).__name__}" if outputs else "nothing, as the network does not call it"
    raise StudyError(
        f"network {type(model).__name__}: module {name!r}, which 'taps' or 'feature_tap' names, gives {found}. "
        "A map [batch, channels, height, width] or a vector [batch, channels] is wanted. Name another module; tokens "
        "[batch, tokens, channels] become a map in a module that moves the channels to the second axis and unflattens "
        "the tokens."
    )


def say(model: nn.Module, images: Tensor, levels: Sequence[str], feature: str) -> Said:
    """One forward pass, with gradients where they are on."""
    with tapped(model, dict.fromkeys((*levels, feature))) as seen:
        logits = model(images)
    return Said([seen[name][-1] for name in levels], pooled(seen[feature][-1]), logits)


def pooled(values: Tensor) -> Tensor:
    """``[B, c]``: a map averaged over space."""
    return values.flatten(2).mean(2) if values.ndim > 2 else values


class NetworkTeacher:
    """A network with received weights, in evaluation mode.

    Args:
        model: The module, which is put into evaluation mode and else not changed: several teachers may share it.
        tensors: All its parameters and running statistics; the statistics are those of public images. They are kept in
            their precision on the module's device, and widened for each pass, as one of many teachers rarely speaks.
        shape: Its taps.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor], shape: Shape) -> None:
        self._asked = _Asked(model.eval(), shape)
        device = next(model.parameters()).device
        self._tensors = {f"model.{name}": tensor.to(device) for name, tensor in tensors.items()}
        self.channels = shape.channels

    @torch.no_grad()
    def say(self, positions: Tensor, images: Tensor) -> Said:
        """One forward pass with the received weights."""
        found: Said = functional_call(self._asked, widened(self._tensors, images.device), (images,))
        return found


class _Asked(nn.Module):
    """A network that answers with all it says, so that one functional call gives everything."""

    def __init__(self, model: nn.Module, shape: Shape) -> None:
        super().__init__()
        self.model, self._shape = model, shape

    def forward(self, images: Tensor) -> Said:
        return say(self.model, images, self._shape.levels, self._shape.feature)


class VectorTeacher:
    """What a network said beforehand of certain public images: pooled maps and logits.

    Args:
        arrays: ``tap0``, ``tap1``, ... ``[n, c]`` and ``logits`` ``[n, K]``, as ``vectors`` makes them.
        positions: Of these images in the public set, int64 ``[n]``, ascending.
        device: Where the pupil is.
    """

    def __init__(self, arrays: Mapping[str, Tensor], positions: Tensor, device: torch.device) -> None:
        self._logits = arrays["logits"].to(device)
        self._maps = [arrays[f"tap{number}"].to(device) for number in range(len(arrays) - 1)]
        self._positions = positions.to(device)
        self.channels = [part.shape[1] for part in self._maps]

    def say(self, positions: Tensor, images: Tensor) -> Said:
        """Look the images up."""
        rows = torch.searchsorted(self._positions, positions.to(self._positions.device))
        logits = self._logits[rows].float()
        return Said([part[rows].float() for part in self._maps], logits.new_zeros(len(rows), 0), logits)


@torch.no_grad()
def vectors(
    model: nn.Module, shape: Shape, statistics: Mapping[str, Tensor], proxies: Proxies, positions: Tensor, size: int
) -> dict[str, Tensor]:
    """What the loaded network says of public images, as it travels: float16, without augmentation.

    Args:
        model: Put into evaluation mode.
        shape: Its taps.
        statistics: Its running statistics for public images.
        proxies: The public set.
        positions: Which of them, int64 ``[n]``.
        size: Images per pass.
    """
    device = next(model.parameters()).device
    model.eval()
    with natural(model, statistics):
        parts = [
            say(model, proxies.inputs(p).to(device), shape.levels, shape.feature) for p in torch.split(positions, size)
        ]
    maps = [torch.cat([pooled(part.maps[i]) for part in parts]) for i in range(len(shape.levels))]
    logits = torch.cat([part.logits for part in parts])
    return halved({**{f"tap{i}": part for i, part in enumerate(maps)}, "logits": logits})


def like_vectors(shape: Shape, count: int) -> dict[str, Tensor]:
    """Tensors without values, of the names and shapes of what ``vectors`` gives for so many images."""
    widths = {**{f"tap{i}": width for i, width in enumerate(shape.channels)}, "logits": shape.outputs}
    return {name: torch.empty(count, width, device="meta") for name, width in widths.items()}
