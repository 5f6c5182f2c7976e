"""Calling a network's constructor with the options of a study, with errors that name the option."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from polyclinic.errors import StudyError, nearest


def find_builder(reference: str) -> Callable[..., Any]:
    """Import ``module:function``.

    Raises:
        StudyError: The reference has another form, the module cannot be imported, or has no such function.
    """
    module_name, colon, function_name = reference.partition(":")
    if not (module_name and colon and function_name):
        raise StudyError(f"model.name: {reference!r} is not of the form module:function, as in my_networks:build.")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise StudyError(
            f"model.name: {reference!r} needs the Python module {error.name!r}, which is not found. "
            f"Install it, or add its folder to PYTHONPATH, at every site."
        ) from error
    except ImportError as error:
        raise StudyError(f"model.name: importing {module_name!r} failed: {error}") from error
    builder: Callable[..., Any] | None = getattr(module, function_name, None)
    if builder is None or not callable(builder):
        public = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise StudyError(
            f"model.name: module {module_name!r} has no function {function_name!r}. {nearest(function_name, public)}"
        )
    return builder


def construct(builder: Callable[..., Any], fixed: Mapping[str, Any], options: Mapping[str, Any]) -> nn.Module:
    """Call ``builder(**fixed, **options)``.

    Args:
        builder: A function or class that makes a network.
        fixed: Arguments that the study decides elsewhere (channels, dimensions, normalisation).
        options: ``model.options``, possibly with defaults of ours beneath.

    Raises:
        StudyError: An option is unknown (names the nearest) or decided elsewhere, an argument is refused by the
            builder, or the result is not a network.
    """
    called = getattr(builder, "__name__", str(builder))
    parameters = inspect.signature(builder).parameters
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for name in options:
        if name in fixed:
            raise StudyError(f"model.options: {name!r} is decided by the study itself. Remove it.")
        if name not in parameters and not anything:
            own = [p for p in parameters if p not in fixed]
            raise StudyError(f"model.options: {called} has no argument {name!r}. {nearest(name, own)}")
    if missing := [name for name in fixed if name not in parameters and not anything]:
        raise StudyError(
            f"model.name: {called} must take the arguments in_channels, out_channels, spatial_dims and norm; "
            f"it lacks {', '.join(missing)}."
        )
    try:
        model = builder(**fixed, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        given = ", ".join(f"{k}={v!r}" for k, v in {**fixed, **options}.items())
        raise StudyError(f"model: {called}({given}) failed: {error}. See model.options.") from error
    if not isinstance(model, nn.Module):
        raise StudyError(f"model.name: {called} returned {type(model).__name__}, not a torch.nn.Module.")
    return model
