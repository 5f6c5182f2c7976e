"""Writes the tables of ``study-file.md`` anew from the schema of the study file: ``python docs/make_study_file.py``.

A table stands between ``<!-- table: PATH -->`` and ``<!-- end -->``. PATH is a place in the study file: ``study`` for
the top level, ``data.image``, ``data.tables[]`` for an entry of a list or mapping, ``method.ditto`` for a method's own
settings, ``method.data-vectors.recipe.rule.ties`` for one of several kinds.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("study-file.md")
BLOCK = re.compile(r"(<!-- table: (?P<path>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
COMMON = ("label", "rounds", "participation")
"""Settings that every method has; they have a table of their own, ``method``."""

Json = dict[str, Any]


def fill(page: str, schema: Json) -> str:
    """The page with every table made from the schema."""
    return BLOCK.sub(lambda found: f"{found[1]}{table(schema, found['path'])}{found[3]}", page)


def paths(page: str) -> list[str]:
    """The places that the page has tables of."""
    return [found["path"] for found in BLOCK.finditer(page)]


def settings_at(schema: Json, path: str) -> Json:
    """The part of the schema that describes the settings at a place of the study file.

    Raises:
        KeyError: There is no such place.
    """
    if path == "study":
        return schema
    current, keys = schema, path.split(".")
    if keys[0] == "method":
        names = {part["properties"]["name"]["const"]: part for part in schema["$defs"].values() if _is_method(part)}
        current, keys = names[keys[1] if len(keys) > 1 else "local"], keys[2:]
    choices: dict[str, Json] = {}
    for key in keys:
        if choices:
            current, choices = choices[key], {}
            continue
        found = current["properties"][key.removesuffix("[]")]
        found = _member(found) if key.endswith("[]") else found
        choices = _choices(schema, found)
        current = current if choices else _resolved(schema, found)
    return current


def table(schema: Json, path: str) -> str:
    """A Markdown table of the keys at a place: key, values, default, meaning."""
    part = settings_at(schema, path)
    required = part.get("required", [])
    rows = ["| key | values | default | meaning |", "| --- | --- | --- | --- |"]
    for name, entry in part["properties"].items():
        if path.startswith("method") and (name in COMMON) != (path == "method"):
            continue
        default = "required" if name in required else _default(entry)
        meaning = " ".join(_description(schema, entry).split()).replace("``", "`")
        cells = [f"`{name}`", _values(schema, entry), default, meaning]
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows) + "\n"


def _choices(schema: Json, entry: Json) -> dict[str, Json]:
    """Where an entry is one of several kinds of settings that their ``name`` tells apart: the kinds by name."""
    for choice in [entry, *entry.get("anyOf", [])]:
        if "discriminator" in choice:
            parts = [schema["$defs"][one["$ref"].rpartition("/")[2]] for one in choice["oneOf"]]
            return {part["properties"]["name"]["const"]: part for part in parts}
    return {}


def _is_method(part: Json) -> bool:
    return set(COMMON) <= set(part.get("properties", {}))


def _member(entry: Json) -> Json:
    """What an entry of a list or mapping is."""
    found: Json = entry["items"] if "items" in entry else next(iter(entry["patternProperties"].values()))
    return found


def _resolved(schema: Json, entry: Json) -> Json:
    """The settings that an entry refers to, itself or as the first of several choices."""
    for choice in [entry, *entry.get("anyOf", [])]:
        if "$ref" in choice:
            found: Json = schema["$defs"][choice["$ref"].rpartition("/")[2]]
            return found
    raise KeyError("this entry refers to no settings")


def _description(schema: Json, entry: Json) -> str:
    """Of the entry; pydantic leaves it out where it says what the settings it refers to say of themselves."""
    if "description" not in entry and "$ref" in entry:
        entry = _resolved(schema, entry)
    return str(entry.get("description", ""))


def _default(entry: Json) -> str:
    if "default" not in entry:
        return ""
    value = entry["default"]
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        value = [one["name"] for one in value]
    if "$ref" in entry or (isinstance(value, dict) and value):
        return "see its table"
    if value is None or value in ("", [], {}):
        return "none"
    return f"`{json.dumps(value).strip(chr(34))}`"


def _values(schema: Json, entry: Json) -> str:
    """What may stand there, in words."""
    if "const" in entry:
        return f"`{entry['const']}`"
    if "enum" in entry:
        return ", ".join(f"`{value}`" for value in entry["enum"])
    if "$ref" in entry:
        return "settings"
    if "anyOf" in entry:
        choices = dict.fromkeys(_values(schema, choice) for choice in entry["anyOf"] if choice.get("type") != "null")
        return " or ".join(choices)
    kind = entry.get("type", "")
    if kind == "array":
        items = entry.get("items") or entry.get("prefixItems", [{}])[0]
        inner = _values(schema, items) if items else "values"
        return f"list of {inner.replace('number', 'numbers')}{_count(entry)}"
    if kind == "object":
        of = entry.get("additionalProperties")
        return f"mapping to {_values(schema, of)}" if isinstance(of, dict) and of else "mapping"
    names = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true`, `false`"}
    return names.get(kind, "a name or settings") + _bounds(entry)


def _count(entry: Json) -> str:
    low, high = entry.get("minItems"), entry.get("maxItems")
    if low is None:
        return ""
    if high is None:
        return f", at least {low}"
    return f", {low}" if low == high else f", {low} to {high}"


def _bounds(entry: Json) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [f"{sign} {entry[key]:g}" for key, sign in signs.items() if key in entry]
    return f" {', '.join(found)}" if found else ""


def main() -> None:
    """Rewrite the page."""
    from polyclinic.study import study_schema

    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), study_schema()), encoding="utf-8")


if __name__ == "__main__":
    main()
