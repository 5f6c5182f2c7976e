"""Settings in YAML: reading, ``--set``, and messages that name the place of a fault and the nearest valid key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from polyclinic.errors import StudyError, nearest

SHORT_FORMS = {"method": "name", "aggregation": "backend", "rule": "name", "head": "name", "restoration": "mode"}
"""Sections that a name alone may stand for, and the key that it is the value of."""


def explain(error: ValidationError, model: type[BaseModel], heading: str, raw: Mapping[str, Any] | None = None) -> str:
    """One line per fault: where it is, what was seen, what is wanted.

    Args:
        error: What pydantic found.
        model: The settings that were validated.
        heading: First line: whose settings they are.
        raw: The settings as given, where ``model`` is a study: its method decides which keys ``method`` has.
    """
    lines = [heading]
    for fault in error.errors():
        path = [str(part) for part in fault["loc"]]
        place = ".".join(path) or "(top level)"
        if fault["type"] == "extra_forbidden":
            fields = _fields_at(model, fault["loc"][:-1], raw)
            lines.append(f"  {place}: there is no such key. {nearest(path[-1], fields)}")
        elif fault["type"] == "missing":
            lines.append(f"  {place}: this key is required.")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            seen = "" if fault["type"] == "value_error" else f" Seen: {fault['input']!r}."
            end = "" if message.endswith(("?", ".")) else "."
            lines.append(f"  {place}: {message}{end}{seen}")
    return "\n".join(lines)


def _fields_at(model: type[BaseModel], loc: tuple[int | str, ...], raw: Mapping[str, Any] | None) -> list[str]:
    """Names of the fields of the settings class that ``loc`` leads to."""
    from polyclinic.methods import params_class

    current: Any = model
    if loc == ("method",) and raw is not None:
        return list(params_class(raw["method"].get("name", "fedavg")).model_fields)
    for part in loc:
        if isinstance(part, int):
            continue
        annotation = current.model_fields[part].annotation if part in current.model_fields else None
        while annotation is not None and not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            candidates = [a for a in getattr(annotation, "__args__", ()) if a is not type(None)]
            annotation = candidates[0] if candidates else None
        if annotation is None:
            return []
        current = annotation
    return list(current.model_fields)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which plain YAML keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        StudyError: It is missing, cannot be read, is no YAML, holds something else, or a key stands twice.
    """
    if not path.is_file():
        raise StudyError(f"there is no study file {path}. Give the path of a YAML file; see examples/.")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StudyError(f"{path} is not YAML: {error}") from None
    except OSError as error:
        raise StudyError(f"{path} cannot be read: {error.strerror or error}.") from None
    if not isinstance(raw, dict):
        raise StudyError(f"{path} holds {type(raw).__name__}, not a mapping of settings.")
    return raw


def override(raw: dict[str, Any], setting: str) -> None:
    """Apply one ``key.path=value`` to raw settings in place; a list is indexed by number.

    Raises:
        StudyError: It has no such form, or leads to a place that cannot be.
    """
    key, found, text = setting.partition("=")
    if not found or not key.strip():
        raise StudyError(f"--set {setting!r}: write key.path=value, for instance method.rounds=5.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise StudyError(f"--set {setting!r}: {text!r} is not YAML: {error}") from None
    assign(raw, key.strip(), value, f"--set {setting!r}")


def assign(raw: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set ``key.path`` of raw settings in place; a list is indexed by number.

    Raises:
        StudyError: The path leads to a place that cannot be; begins with ``where``.
    """
    parts = key.split(".")
    target: Any = raw
    for depth, part in enumerate(parts):
        try:
            if depth == len(parts) - 1:
                target[_index(target, part)] = value
                return
            if isinstance(target, dict):
                _prepare(target, part)
            target = target[_index(target, part)]
        except (LookupError, TypeError):
            raise StudyError(f"{where}: there is no {'.'.join(parts[: depth + 1])} in the study.") from None


def _prepare(target: dict[str, Any], part: str) -> None:
    """Make room for keys below ``part``: an absent section becomes an empty one, a short form a mapping."""
    if target.get(part) is None:
        target[part] = {}
    elif part in SHORT_FORMS and isinstance(target[part], str):
        target[part] = {SHORT_FORMS[part]: target[part]}


def _index(target: Any, part: str) -> Any:
    """``part``, as a number where ``target`` is a list."""
    if isinstance(target, list) and part.isdecimal():
        return int(part)
    if not isinstance(target, dict):
        raise TypeError
    return part
