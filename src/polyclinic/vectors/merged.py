"""The folder of a merged model, and opening it again.

``model.safetensors`` (every tensor of the network), ``recipe.json``, ``base.json`` (of the base it was merged from),
``merge.json`` (the record: what went in, in which order, with which share, what was checked and measured) and
``card.html``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from polyclinic.errors import ContributionError, RunError
from polyclinic.models.weights import read_tensors
from polyclinic.study import DataSettings, Study, TableSettings
from polyclinic.vectors.base import LARGEST_SPEC, SPEC_FILE, BaseSpec
from polyclinic.vectors.folders import read_small, validated
from polyclinic.vectors.recipe import Recipe
from polyclinic.vectors.record import MergeRecord
from polyclinic.yaml_settings import explain

MODEL_FILE, RECIPE_FILE, RECORD_FILE, CARD_FILE = "model.safetensors", "recipe.json", "merge.json", "card.html"
LARGEST_RECORD = 2**26


@dataclass(frozen=True)
class Merged:
    """A merged model.

    Attributes:
        folder: Where it lies.
        base_spec: Network, preprocessing and classes.
        record: What ``merge.json`` holds.
    """

    folder: Path
    base_spec: BaseSpec
    record: dict[str, Any]

    @staticmethod
    def is_there(folder: Path) -> bool:
        """Whether a folder holds a merged model."""
        return (folder / RECORD_FILE).is_file()

    @classmethod
    def load(cls, folder: Path) -> Merged:
        """Open the folder that ``polyclinic vectors merge`` wrote.

        Raises:
            ContributionError: It is none, or damaged.
        """
        if not cls.is_there(folder):
            raise ContributionError(f"{folder} holds no merged model: it has no {RECORD_FILE}.")
        spec = validated(BaseSpec, read_small(folder / SPEC_FILE, LARGEST_SPEC), str(folder / SPEC_FILE))
        raw = read_small(folder / RECORD_FILE, LARGEST_RECORD)
        record = validated(MergeRecord, raw, str(folder / RECORD_FILE))
        if (record.base_digest, record.classes) != (spec.digest, tuple(spec.task.classes)):
            raise ContributionError(f"{folder / SPEC_FILE} is not the base that {RECORD_FILE} names: one was altered.")
        return cls(folder, spec, json.loads(raw))

    def study(self) -> Study:
        """A study with the base's network, preprocessing and classes, and no images of its own."""
        spec = self.base_spec
        data = DataSettings(tables=[TableSettings(path="none")], image=spec.image)
        return Study(name=spec.id, task=spec.task, data=data, model=spec.model)

    @property
    def lineage(self) -> list[str]:
        """What the next base made of this model must name: the bases before it, and the recipe."""
        return [*self.base_spec.lineage, self.base_spec.digest, self.recipe.digest]

    @property
    def recipe(self) -> Recipe:
        """How it was merged.

        Raises:
            ContributionError: The record holds no recipe.
        """
        try:
            return Recipe.model_validate(self.record["recipe"])
        except ValidationError as error:
            raise ContributionError(explain(error, Recipe, f"{self.folder / RECORD_FILE}: recipe:")) from None

    def tensors(self) -> dict[str, Tensor]:
        """All values of the network.

        Raises:
            ContributionError: The file cannot be read.
        """
        try:
            return read_tensors(self.folder / MODEL_FILE)[0]
        except RunError as error:
            raise ContributionError(str(error)) from error
