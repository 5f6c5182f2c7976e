"""Settings in YAML: reading, ``--set``, and messages that name the place of a fault and the nearest valid key."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from polyclinic.errors import StudyError


def nearest(name: str, known: Sequence[str]) -> str:
    """``" Did you mean 'x'?"`` or the list of what is known, for error messages."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(sorted(known))}."


def explain(
    error: ValidationError, model: type[BaseModel], where: str, raw: Mapping[str, Any] | None = None
) -> str:
    """One line per fault: where it is, what was seen, what is wanted.

    Args:
        error: What pydantic found.
        model: The settings that were validated.
        where: Origin of the settings.
        raw: The settings as given, where ``model`` is a study: its method decides which keys ``method`` has.
    """
    lines = [f"{where} is not a valid study:"]
    for fault in error.errors():
        path = [str(part) for part in fault["loc"]]
        place = ".".join(path) or "(top level)"
        if fault["type"] == "extra_forbidden":
            fields = _fields_at(model, fault["loc"][:-1], raw)
            lines.append(f"  {place}: there is no such key.{nearest(path[-1], fields)}")
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


def override(raw: dict[str, Any], override: str) -> None:
    """Apply one ``key.path=value`` to the raw study in place; a list is indexed by number."""
    key, found, text = override.partition("=")
    if not found or not key.strip():
        raise StudyError(f"--set {text!r}: write key.path=value, for instance method.rounds=5.")
    parts = key.strip().split(".")
    target: Any = raw
    for depth, part in enumerate(parts[:-1]):
        if isinstance(target, dict):
            if target.get(part) is None:
                target[part] = {}
            elif part == "method" and isinstance(target[part], str):
                target[part] = {"name": target[part]}
        try:
            target = target[_index(target, part)]
        except (KeyError, IndexError, TypeError):
            raise StudyError(f"--set {text!r}: there is no {'.'.join(parts[: depth + 1])} in the study.") from None
    try:
        target[_index(target, parts[-1])] = yaml.safe_load(text)
    except (IndexError, TypeError):
        raise StudyError(f"--set {text!r}: there is no {key.strip()} in the study.") from None
    except yaml.YAMLError as error:
        raise StudyError(f"--set {text!r}: {text!r} is not YAML: {error}") from None


def _index(target: Any, part: str) -> Any:
    """``part`` as an index where ``target`` is a list; texts are no containers."""
    if isinstance(target, list) and part.isdecimal():
        return int(part)
    if not isinstance(target, dict):
        raise TypeError
    return part
