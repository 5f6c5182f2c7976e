"""The last linear layer of a classification network, and what goes into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from polyclinic.errors import StudyError
from polyclinic.models.registry import head_name


def last_layer(model: nn.Module) -> tuple[str, nn.Linear]:
    """Name and layer.

    Raises:
        StudyError: The last layer with parameters is not linear.
    """
    name = head_name(model)
    layer = model.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise StudyError(
            f"a linear last layer is needed, but that of network {type(model).__name__}, {name!r}, is "
            f"{type(layer).__name__}. Choose another model.name or method."
        )
    return name, layer


@contextmanager
def entering(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, what enters the layer is appended to the list, once per forward pass; gradients flow."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()
