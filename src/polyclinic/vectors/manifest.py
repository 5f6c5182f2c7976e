"""What a site states of its contribution: a manifest in one JSON form, which is hashed and signed.

The fields are those that a hospital's reviewer asks for: the base, the training, the data in rounded numbers, the
metrics, the privacy mechanism and what an attack of the site's own found, the files with their digests.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from polyclinic.errors import ContributionError
from polyclinic.settings import Settings
from polyclinic.study import AugmentSettings, SiteName
from polyclinic.vectors.folders import Digest, Moment, canonical_json, parse_json, validated

SCHEMA = "polyclinic-contribution/1"
FILES = ("fisher.safetensors", "gram.safetensors", "head.safetensors", "statistics.safetensors", "vector.safetensors")
"""What a contribution may hold beside its manifest and signature."""
LARGEST = 2**18
"""Bytes of a manifest."""
_STEPS = (10, 15, 22, 33, 47, 68)
_MOST = 10**9

Text = Annotated[str, Field(max_length=500)]
Name = Annotated[str, Field(min_length=1, max_length=200)]


def binned(n: int) -> int:
    """A count as other sites may know it: the nearest of 0, 10, 15, 22, 33, 47, 68, 100, 150, ... (six a decade).

    Nearest by ratio, so a count is known to about a quarter; 1 to 9 become 10, so that nobody is counted out.

    Raises:
        ValueError: It is negative, or over 10^9.
    """
    if not 0 <= n <= _MOST:
        raise ValueError(f"a count must be 0 to {_MOST}; got {n}")
    if n == 0:
        return 0
    scale = 1
    while True:
        rungs = [step * scale for step in (*_STEPS, 10 * _STEPS[0])]
        for low, high in pairwise(rungs):
            if n * n <= low * high:
                return low
        scale *= 10


def _is_binned(n: int) -> int:
    if binned(n) != n:
        raise ValueError(f"{n} is an exact count; give the rounded one, {binned(n)}")
    return n


Binned = Annotated[int, Field(ge=0, le=_MOST), AfterValidator(_is_binned)]


class BaseReference(Settings):
    """The base that a vector starts from."""

    id: Name
    """Its name."""
    sha256: Digest
    """Its digest, which decides."""
    model: Name
    """The network's name."""
    version: Name
    """Its version."""


class Training(Settings):
    """How the site trained."""

    optimizer: Name
    """As in ``training.optimizer``."""
    lr: float = Field(ge=0)
    """Learning rate."""
    epochs: int = Field(ge=0, le=10**6)
    """Passes over the training images."""
    batch_size: int = Field(ge=1, le=10**6)
    """Images per step."""
    augment: AugmentSettings = AugmentSettings()
    """Random changes of the images."""
    seed: int = Field(ge=0)
    """Seed of the training."""
    framework: Text = ""
    """Program and version."""
    trainable: Text = "all"
    """Which weights were trained."""


class Data(Settings):
    """What the site trained on, in rounded numbers."""

    images: Binned
    """Training images, rounded by ``binned``."""
    images_per_class: dict[Name, Binned] | None = Field(None, max_length=10_000)
    """Rounded by ``binned``; may be left out."""
    classes_held: list[Name] = Field(max_length=10_000)
    """Classes of which the site had training images, in the base's order."""
    modality: Text = ""
    """Kind of images."""
    devices: list[Name] = Field([], max_length=100)
    """Families of scanners or cameras."""
    dates: Text = ""
    """When the images were taken, roughly."""
    patient_split: bool
    """Whether no patient is on both sides of the site's splits."""
    ethics: Text = ""
    """Reference of the ethics vote."""


class Metric(Settings):
    """A number that the site measured on its own validation images."""

    value: float
    """The metric."""
    n: int = Field(ge=0, le=_MOST)
    """Images that it was measured on."""


class Membership(Settings):
    """What the site's own membership attack on its vector found."""

    attack: Name
    """Which attack."""
    auc: float = Field(ge=0, le=1)
    """Area under its curve; 0.5 is chance."""
    low: float = Field(ge=0, le=1)
    """Lower end of the interval of ``auc``."""
    high: float = Field(ge=0, le=1)
    """Upper end."""
    tpr: float = Field(ge=0, le=1)
    """True positive rate at ``fpr``."""
    fpr: float = Field(ge=0, le=1)
    """False positive rate."""
    members: int = Field(ge=0, le=_MOST)
    """Training images attacked."""
    nonmembers: int = Field(ge=0, le=_MOST)
    """Other images attacked."""
    limit: float = Field(ge=0, le=1)
    """The pass mark."""
    passed: bool
    """Whether the attack stayed below it."""


class Privacy(Settings):
    """The privacy mechanism, with its unit, or none."""

    mechanism: Literal["none", "dp-sgd"] = "none"
    """``none``: no formal guarantee."""
    epsilon: float | None = Field(None, gt=0)
    """Budget spent."""
    delta: float | None = Field(None, gt=0, lt=1)
    """Failure probability."""
    clip: float | None = Field(None, gt=0)
    """Largest norm of a unit's gradient."""
    noise: float | None = Field(None, gt=0)
    """Noise multiplier."""
    accountant: Name | None = None
    """Which accountant."""
    unit: Literal["record", "patient", "site"] | None = None
    """Whose presence is hidden."""
    membership: Membership | None = None
    """The site's own attack on its vector; None: not made."""

    @model_validator(mode="after")
    def _whole(self) -> Privacy:
        parts = ("epsilon", "delta", "clip", "noise", "accountant", "unit")
        given = [name for name in parts if getattr(self, name) is not None]
        if self.mechanism == "none" and given:
            raise ValueError(f"mechanism none has no {given[0]}")
        if self.mechanism != "none" and len(given) < len(parts):
            raise ValueError(f"mechanism {self.mechanism} needs {', '.join(p for p in parts if p not in given)}")
        return self


class File(Settings):
    """One file of tensors."""

    name: str = Field(max_length=100)
    """One of ``FILES``."""
    sha256: Digest
    """Of the file as it lies there."""
    bytes: int = Field(ge=0)
    """Its size."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in FILES:
            raise ValueError(f"{name!r} is no file of a contribution; known: {', '.join(FILES)}")
        return name


class Statistics(Settings):
    """Running statistics of batch normalisation."""

    included: bool
    """Whether the contribution brings them."""
    policy: Name
    """``model.norm`` of the base."""


class Statement(Settings):
    """What the site itself says; ``write_contribution`` adds the rest of the manifest."""

    sequence: int = Field(ge=1, le=_MOST)
    """Counts a site's contributions; never used twice."""
    created: Moment
    """When, in UTC."""
    training: Training
    """How it was trained."""
    data: Data
    """What on."""
    metrics: dict[Name, Metric] = Field({}, max_length=100)
    """On the site's own validation images."""
    privacy: Privacy = Privacy()
    """With what guarantee."""
    licence: Text = ""
    """Terms of use."""
    replaces: list[Digest] = Field([], max_length=100)
    """Digests of the site's earlier contributions that this one revokes."""


class Manifest(Statement):
    """``manifest.json``."""

    schema_: Literal["polyclinic-contribution/1"] = Field(alias="schema")
    """Which form."""
    site: SiteName
    """Who signs."""
    base: BaseReference
    """What the vector starts from."""
    classes: list[Name] = Field(min_length=1, max_length=10_000)
    """The base's classes in their order."""
    preprocessing: Digest
    """Of the base's image settings."""
    files: list[File] = Field(min_length=1, max_length=len(FILES))
    """Sorted by name."""
    statistics: Statistics
    """Whether running statistics are in it."""

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        names = [file.name for file in self.files]
        if names != sorted(set(names)):
            raise ValueError("files must be sorted by name, each once")
        if self.statistics.included != ("statistics.safetensors" in names):
            raise ValueError("statistics.included must say whether statistics.safetensors is there")
        named = {"data.classes_held": self.data.classes_held, "data.images_per_class": self.data.images_per_class or {}}
        for field, given in named.items():
            if strange := [name for name in given if name not in self.classes]:
                raise ValueError(f"{field} names {strange[0]!r}, which is not among the classes")
        lists = {"classes": self.classes, "data.classes_held": self.data.classes_held, "replaces": self.replaces}
        for field, listed in lists.items():
            if len(set(listed)) < len(listed):
                raise ValueError(f"{field} names one twice")
        return self


def canonical(manifest: Manifest) -> bytes:
    """The manifest as it lies in ``manifest.json`` and is signed."""
    return canonical_json(manifest.model_dump(mode="json", by_alias=True))


def digest(manifest: Manifest) -> str:
    """The contribution's digest: SHA-256 of the manifest, which holds the digests of its files. Hexadecimal."""
    return hashlib.sha256(canonical(manifest)).hexdigest()


def parse_manifest(content: bytes, where: str) -> Manifest:
    """A manifest from the bytes of its file.

    Raises:
        ContributionError: They are no JSON, another schema, break a rule, or are not in the canonical form.
    """
    found = parse_json(content, where)
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise ContributionError(f"{where}: its schema is {str(schema)[:80]!r}; this version reads {SCHEMA!r}.")
    manifest = validated(Manifest, content, where)
    if canonical(manifest) != content:
        raise ContributionError(
            f"{where} is not in the canonical form (ASCII, sorted keys, no spaces): it was altered after signing."
        )
    return manifest
