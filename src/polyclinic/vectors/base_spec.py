"""``base.json``: what a base is, but for its values."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

from pydantic import Field, field_serializer, field_validator

from polyclinic.settings import Settings
from polyclinic.study import ImageSettings, ModelSettings, SiteName, TaskSettings
from polyclinic.vectors.folders import Digest, Moment, canonical_json

SCHEMA: Literal["polyclinic-base/1"] = "polyclinic-base/1"
SPEC_FILE, WEIGHTS_FILE = "base.json", "base.safetensors"
LARGEST_SPEC = 2**24
"""Bytes of ``base.json``: tens of thousands of tensors."""
AT_HOME = ("cache", "cache_folder")
"""Image settings that are a site's own business."""


class TensorEntry(Settings):
    """One tensor of the base, in the order of ``state_dict``."""

    name: str = Field(min_length=1, max_length=256)
    """As in ``state_dict``."""
    dtype: Literal["F64", "F32", "F16", "BF16"]
    """As safetensors names it."""
    shape: list[int] = Field(max_length=16)
    """Sizes of its axes."""
    statistic: bool
    """A running mean or variance of batch normalisation."""


class BaseSpec(Settings):
    """``base.json``."""

    schema_: Literal["polyclinic-base/1"] = Field(alias="schema")
    """Which form."""
    id: SiteName
    """A plain name."""
    version: str = Field(min_length=1, max_length=100)
    """Free text."""
    created: Moment
    """When, in UTC."""
    task: TaskSettings
    """What is predicted; the classes in the order of the outputs."""
    image: ImageSettings
    """From file to array; where a site caches its images is its own business."""
    model: ModelSettings
    """The network; its values are in the other file."""
    head: str = Field(min_length=1, max_length=256)
    """Name of the last layer."""
    tensors: list[TensorEntry] = Field(min_length=1, max_length=100_000)
    """All floating-point tensors."""
    weights_sha256: Digest
    """Over names, types, shapes and values of all tensors, sorted by name; not of the file."""
    lineage: list[Digest] = Field([], max_length=10_000)
    """Digests of the bases that this one was merged from, and of the recipe. Whoever trained on it is not removed by
    removing a contribution here."""

    @field_validator("image")
    @classmethod
    def _image_without_home(cls, image: ImageSettings) -> ImageSettings:
        return image.model_copy(update={name: ImageSettings.model_fields[name].default for name in AT_HOME})

    @field_validator("model")
    @classmethod
    def _model_without_home(cls, model: ModelSettings) -> ModelSettings:
        return model.model_copy(update={"weights": ""})

    @field_serializer("image")
    def _dump_image(self, image: ImageSettings) -> dict[str, Any]:
        return image.model_dump(mode="json", exclude=set(AT_HOME))

    @field_serializer("model")
    def _dump_model(self, model: ModelSettings) -> dict[str, Any]:
        # Bases from before there were embeddings keep their digest.
        return model.model_dump(mode="json", exclude={"weights", *(["embedding"] if model.embedding is None else [])})

    @field_validator("tensors")
    @classmethod
    def _each_once(cls, tensors: list[TensorEntry]) -> list[TensorEntry]:
        if len({entry.name for entry in tensors}) < len(tensors):
            raise ValueError("a tensor is listed twice")
        return tensors

    @property
    def digest(self) -> str:
        """SHA-256 over everything but name, version and date, hexadecimal."""
        own = self.model_dump(mode="json", by_alias=True, exclude={"id", "version", "created"})
        return hashlib.sha256(canonical_json(own)).hexdigest()

    @property
    def preprocessing(self) -> str:
        """SHA-256 over the image settings, hexadecimal."""
        return hashlib.sha256(canonical_json(self._dump_image(self.image))).hexdigest()
