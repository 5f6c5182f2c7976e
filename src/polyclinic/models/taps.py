"""The penultimate feature of a classification network."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from polyclinic.errors import StudyError


def feature_tap(model: nn.Module) -> str:
    """Name the module whose output is the penultimate feature, as ``model.get_submodule`` knows it.

    ``build_model`` notes it in the attribute ``feature_tap``; a network of your own sets that attribute itself.

    Raises:
        StudyError: The network declares none, or one that it does not contain.
    """
    tap: Any = getattr(model, "feature_tap", "")
    modules = dict(model.named_modules())
    if not isinstance(tap, str) or not tap:
        raise StudyError(
            f"network {type(model).__name__} does not say where its features are. Set its attribute 'feature_tap' to "
            f"the name of the module before pooling, for instance {next(reversed(modules), '')!r}."
        )
    if tap not in modules:
        raise StudyError(f"network {type(model).__name__} has no module {tap!r}, which its 'feature_tap' names.")
    return tap


def features(model: nn.Module, images: Tensor) -> Tensor:
    """Return the penultimate features of a batch, averaged over space.

    One forward pass; gradients flow as in ``model(images)``.

    Args:
        model: A classification network with a ``feature_tap``.
        images: ``[B, C, *spatial]``.

    Returns:
        ``[B, F]``.
    """
    seen: list[Tensor] = []
    handle = model.get_submodule(feature_tap(model)).register_forward_hook(lambda _m, _i, output: seen.append(output))
    try:
        model(images)
    finally:
        handle.remove()
    return seen[-1].flatten(2).mean(2) if seen[-1].ndim > 2 else seen[-1]
