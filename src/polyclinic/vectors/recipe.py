"""The recipe of a merge: rule, filters, head and restoration. The same recipe and contributions give the same model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import Field, ValidationError, field_validator
from torch import nn

from polyclinic.errors import StudyError, nearest
from polyclinic.settings import Settings
from polyclinic.vectors.filters.breadcrumbs import Breadcrumbs
from polyclinic.vectors.filters.controls import RandomControl, ShuffledControl
from polyclinic.vectors.filters.dare import Dare
from polyclinic.vectors.filters.norm_clip import NormClip
from polyclinic.vectors.filters.support import Support
from polyclinic.vectors.head import LDAHead, RidgeHead
from polyclinic.vectors.restoration import Restoration
from polyclinic.vectors.rules.base_only import BaseOnly
from polyclinic.vectors.rules.data_vector import DataVector
from polyclinic.vectors.rules.fisher import Fisher
from polyclinic.vectors.rules.greedy_soup import GreedySoup
from polyclinic.vectors.rules.iso_c import IsoC
from polyclinic.vectors.rules.median import Median
from polyclinic.vectors.rules.regmean import RegMean
from polyclinic.vectors.rules.ties import Ties
from polyclinic.vectors.rules.trimmed_mean import TrimmedMean
from polyclinic.vectors.rules.tsv import Tsv
from polyclinic.vectors.sources import Kind
from polyclinic.yaml_settings import explain, override, read_yaml

AnyRule = DataVector | GreedySoup | Ties | Fisher | RegMean | Tsv | IsoC | Median | TrimmedMean | BaseOnly
AnyFilter = Dare | Breadcrumbs | NormClip | Support | RandomControl | ShuffledControl


AnyHead = RidgeHead | LDAHead


class Recipe(Settings):
    """How contributions become a model."""

    rule: Annotated[AnyRule, Field(discriminator="name")] = DataVector()
    """How the vectors of several sites become one. A name alone is short for ``{name: NAME}``."""
    filters: list[Annotated[AnyFilter, Field(discriminator="name")]] = Field(default_factory=list)
    """What each vector goes through before the rule, in this order; names alone will do here too."""
    head: Annotated[AnyHead, Field(discriminator="name")] | None = None
    """The last layer from head sums, which must have been taken on this base; goes with rule ``base``."""
    restoration: Restoration = Restoration()
    """What is done to the merged model with the coordinator's own images. A mode alone will do."""

    @field_validator("rule", mode="before")
    @classmethod
    def _named_rule(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "name" not in value:
            value = {"name": DataVector.model_fields["name"].default, **value}
        return _named(value, AnyRule, "rule")

    @field_validator("filters", mode="before")
    @classmethod
    def _named_filters(cls, value: Any) -> Any:
        return [_named(one, AnyFilter, "filter") for one in value] if isinstance(value, (list, tuple)) else value

    @field_validator("head", mode="before")
    @classmethod
    def _named_head(cls, value: Any) -> Any:
        return None if value is None else _named(value, AnyHead, "head")

    @field_validator("restoration", mode="before")
    @classmethod
    def _named_restoration(cls, value: Any) -> Any:
        return {"mode": value} if isinstance(value, str) else value

    @property
    def needs(self) -> frozenset[Kind]:
        """What contributions must bring beside their vectors; head sums apart, which are taken on another base."""
        pooled: frozenset[Kind] = frozenset({"statistics"} if self.restoration.mode == "bn-pooled" else ())
        return self.rule.needs | pooled

    def resolved(self, model: nn.Module) -> Recipe:
        """This recipe with restoration ``auto`` decided for a network."""
        return self.model_copy(update={"restoration": self.restoration.resolved(model)})

    @property
    def digest(self) -> str:
        """SHA-256 of all settings, defaults included, hexadecimal."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


def load_recipe(path: Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML or JSON file, or the defaults, with ``key=value`` texts applied as ``--set`` takes them.

    Raises:
        StudyError: The file cannot be read, or a key or value is wrong.
    """
    raw = {} if path is None else read_yaml(path)
    for text in overrides:
        override(raw, text)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise StudyError(explain(error, Recipe, f"{path or 'the recipe'} is not valid:")) from None


def _by_name(union: Any) -> dict[str, type[Settings]]:
    return {one.model_fields["name"].default: one for one in get_args(union)}


def _named(value: Any, union: Any, what: str) -> Any:
    """A name alone as a mapping.

    Raises:
        ValueError: An unknown name or key; names the nearest.
    """
    if isinstance(value, Settings):
        return value
    raw = {"name": value} if isinstance(value, str) else value
    known = _by_name(union)
    if not isinstance(raw, Mapping) or not isinstance(raw.get("name"), str):
        raise ValueError(f"give the name of a {what}, or a mapping with name and settings; seen: {value!r}")
    if raw["name"] not in known:
        raise ValueError(f"there is no {what} {raw['name']!r}. {nearest(raw['name'], known)}")
    fields = known[raw["name"]].model_fields
    if unknown := [key for key in raw if key not in fields]:
        raise ValueError(f"{what} {raw['name']} has no setting {unknown[0]!r}. {nearest(str(unknown[0]), fields)}")
    return dict(raw)
