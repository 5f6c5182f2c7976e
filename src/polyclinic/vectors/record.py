"""What ``merge.json`` holds: everything that a reader of a merged model must be able to look up.

``MergeRecord(...).model_dump(mode="json", by_alias=True)`` is the file's content, and what the model card is
made of.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from polyclinic.settings import Settings

SCHEMA: Literal["polyclinic-merge/1"] = "polyclinic-merge/1"


class Value(Settings):
    """A metric with its interval."""

    value: float | None
    """None where it is undefined."""
    low: float | None = None
    high: float | None = None


class Stage(Settings):
    """One model, measured."""

    name: str
    """``base``, ``merged``, ``restored``, ``mean of sites``, a control, ..."""
    metrics: dict[str, Value]
    """By the metric's key: ``auroc``, ``balanced_accuracy``, ``dice``, ..."""
    images: int
    """That it was measured on."""
    patients: int | None = None
    """Of these images; None where the images do not say."""
    data: str = ""
    """Which images: ``coordinator's test images``, for instance."""


class Membership(Settings):
    """The site's own membership audit, as its manifest states it."""

    auc: float | None
    """None where there were too few patients."""
    low: float | None = None
    high: float | None = None
    limit: float = 0.65
    passed: bool | None = None
    why: str = ""
    """Why it is undefined."""


class Privacy(Settings):
    """A guarantee of differential privacy. An epsilon without its unit and delta says nothing."""

    mechanism: str = "none"
    """``none``, or what was done, for instance ``DP-SGD``."""
    epsilon: float | None = None
    delta: float | None = None
    unit: str = ""
    """Whose presence is hidden: ``record``, ``patient`` or ``site``."""


class ContributionRecord(Settings):
    """One contribution that the ledger holds, whether it went in or not."""

    digest: str
    site: str
    sequence: int
    used: bool
    """Whether it went into this model."""
    images: int
    """Training images, binned, as the site states them."""
    classes_held: tuple[str, ...]
    """Classes that the site had training images of."""
    brought: tuple[str, ...]
    """Kinds of files: ``vector``, ``fisher``, ``gram``, ``statistics``, ``head``."""
    membership: Membership | None = None
    """None where no vector came, so nothing was trained."""
    verdict: Literal["accept", "quarantine"]
    """Of admission, people's decisions included."""
    decision: Literal["accept", "hold"] | None = None
    """What a person decided."""
    reasons: tuple[str, ...] = ()
    """Of admission."""
    notes: tuple[str, ...] = ()
    """Of admission."""
    privacy: Privacy = Privacy()
    licence: str = ""
    """Terms under which the site gives it."""
    ethics: str = ""
    """Reference of its ethics approval."""


class Check(Settings):
    """One thing that was checked."""

    name: str
    """``every variance is positive and finite``, for instance."""
    passed: bool
    detail: str = ""


class MergeRecord(Settings):
    """A merged model: from what, how, how good, and what to beware of."""

    schema_: Literal["polyclinic-merge/1"] = Field(SCHEMA, alias="schema")
    name: str
    """Of the model."""
    created: str
    """ISO 8601, UTC."""
    purpose: str = ""
    """What the model is for, in a sentence or two."""
    task: str
    """``multi-class``, ``multi-label`` or ``segmentation``."""
    classes: tuple[str, ...]
    """In the order of the outputs."""
    image: dict[str, Any]
    """Settings from file to array: size, channels, mean, std, ..."""
    model: dict[str, Any]
    """The network: ``name`` and its settings; ``parameters``, its number of weights, where known."""
    base_id: str
    base_version: str = ""
    base_digest: str
    base_lineage: tuple[str, ...] = ()
    """Digests of the bases that the base itself was merged from, and of the recipe."""
    recipe: dict[str, Any]
    """Every setting: ``rule``, ``filters``, ``head``, ``statistics``, ... as the recipe file has them."""
    recipe_digest: str = ""
    """Of these settings."""
    rule_in_words: str
    """What the rule does, in a sentence or two."""
    restoration: dict[str, Any] = Field(default_factory=dict)
    """``mode`` and its settings; empty where nothing was restored."""
    restoration_data: str = ""
    """Which images it was done on, and how many."""
    contributions: tuple[ContributionRecord, ...]
    """In the order of digests."""
    shares: dict[str, tuple[float, ...] | None]
    """For each layer the share of each vector that was used, in the order of digests; None where the rule makes no
    linear combination."""
    metrics: tuple[Stage, ...] = ()
    """Before and after."""
    checks: tuple[Check, ...] = ()
    warnings: tuple[str, ...] = ()
    """What a reader must be told first."""
    notes: tuple[str, ...] = ()
    """Of the merge."""
    privacy: Privacy = Privacy()
    """Of the merged model."""
    limits: tuple[str, ...] = ()
    """What the model is not for, and was not tested on."""
    weights_sha256: str
    """Of the merged tensors: canonical, over sorted (name, dtype, shape, bytes)."""
    set_digest: str
    """Of the digests of what went in."""
    chain_head: str
    """Of the ledger's hash chain when it was merged."""
    software: dict[str, Any]
    """``polyclinic``, ``torch``, ``python``, ... versions."""
    verify: tuple[str, ...] = ()
    """Commands that check the ledger and the model."""
    reproduce: tuple[str, ...] = ()
    """Commands that make the same model again."""
