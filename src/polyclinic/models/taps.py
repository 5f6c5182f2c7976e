"""What a network knows on the way to its answer: the penultimate feature, and maps of rising depth."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from polyclinic.errors import StudyError, nearest


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


def feature_size(model: nn.Module) -> int:
    """Width F of the penultimate feature: how many values enter the last layer.

    Raises:
        StudyError: The last layer with parameters is not linear.
    """
    from polyclinic.models.last_layer import last_layer

    return last_layer(model)[1].in_features


def level_taps(model: nn.Module) -> tuple[str, ...]:
    """Name the modules whose output maps are features of rising depth, shallow to deep.

    ``build_model`` notes them in the attribute ``taps``; a network of your own sets that attribute itself, to as many
    names of modules as it likes. Each must give one map ``[B, c, *spatial]``, or a vector ``[B, c]``.

    Raises:
        StudyError: The network declares none, or one that it does not contain.
    """
    names: Any = getattr(model, "taps", ())
    modules = dict(model.named_modules())
    named = isinstance(names, (tuple, list)) and all(isinstance(name, str) for name in names)
    if not named or not names:
        some = [name for name in modules if name][:6]
        raise StudyError(
            f"network {type(model).__name__} does not say where its maps are. Set its attribute 'taps' to the names of "
            f"modules, shallow to deep, as in {tuple(some[:2])}. Its modules are: {', '.join(some)}, ..."
        )
    for name in names:
        if name not in modules or not name:
            raise StudyError(
                f"network {type(model).__name__} has no module {name!r}, which its 'taps' name. "
                f"{nearest(name, [known for known in modules if known])}"
            )
    return tuple(names)


@contextmanager
def tapped(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Inside, what the named modules return is appended to the list of their name, once per forward pass.

    Gradients flow. The caller empties the lists, or leaves the block, before the next pass where it wants only one.

    Raises:
        StudyError: The network has no such module.
    """
    modules = dict(model.named_modules())
    names = list(names)
    for name in names:
        if name not in modules:
            raise StudyError(
                f"network {type(model).__name__} has no module {name!r} to tap. {nearest(name, list(modules)[1:])}"
            )
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        modules[name].register_forward_hook(lambda _m, _i, output, kept=seen[name]: kept.append(output))
        for name in names
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
