"""The record of a merge: what went in, what was checked and measured, and what a reader must be told."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polyclinic.results import environment
from polyclinic.vectors.admission import Admission
from polyclinic.vectors.contribution import Contribution
from polyclinic.vectors.controls import Row
from polyclinic.vectors.coordinator import Coordinator
from polyclinic.vectors.folders import now
from polyclinic.vectors.ledger import Ledger
from polyclinic.vectors.merge import MergeReport
from polyclinic.vectors.recipe import Recipe
from polyclinic.vectors.record import MergeRecord
from polyclinic.vectors.words import in_words

FEWEST_NEW = 3
"""A release that differs from another by fewer contributions than this tells much of each of them."""


@dataclass(frozen=True)
class Happened:
    """One merge.

    Attributes:
        ledger: What it was made from.
        admitted: The admission report of every contribution with a vector.
        used: What went in, in the order of digests.
        recipe: How.
        report: What the engine did.
        coordinator: Whose images restored and judged it; None: nobody's.
        rows: How the model and its controls did.
        weights: Canonical digest of the finished model's values.
        purpose: What the model is for.
    """

    ledger: Ledger
    admitted: Mapping[str, Admission]
    used: Sequence[Contribution]
    recipe: Recipe
    report: MergeReport
    coordinator: Coordinator | None
    rows: Sequence[Row]
    weights: str
    purpose: str

    @property
    def digests(self) -> list[str]:
        """Of what went in."""
        return [one.digest for one in self.used]


def record_of(happened: Happened) -> dict[str, Any]:
    """What ``merge.json`` holds; see ``MergeRecord``."""
    one = happened
    raw = {
        "schema": "polyclinic-merge/1",
        "created": now(),
        "purpose": one.purpose,
        **_about_base(one.ledger),
        "recipe": one.recipe.model_dump(mode="json"),
        "rule_in_words": in_words(one.recipe),
        "restoration": one.recipe.restoration.model_dump(mode="json") if one.recipe.restoration.mode != "none" else {},
        "restoration_data": "" if one.coordinator is None else _whose(one.coordinator),
        "contributions": [_contribution(sent, one) for sent in one.ledger.contributions],
        "shares": one.report.shares,
        "metrics": [_stage(row) for row in one.rows],
        "checks": _checks(one),
        "warnings": _warnings(one),
        "notes": [*one.report.notes, *_unrestored(one)],
        "limits": _limits(one.coordinator),
        "weights_sha256": one.weights,
        "set_digest": hashlib.sha256("\n".join(one.digests).encode()).hexdigest(),
        "chain_head": one.ledger.head,
        "software": {k: v for k, v in environment().items() if k in ("polyclinic", "commit", "python", "torch")},
        "verify": ["polyclinic vectors verify LEDGER --head HEAD --model MERGED"],
        "reproduce": [_again(one.recipe)],
    }
    return MergeRecord.model_validate(raw).model_dump(mode="json", by_alias=True)


def _about_base(ledger: Ledger) -> dict[str, Any]:
    spec = ledger.base.spec
    parts = ledger.base.study_parts()
    parameters = sum(math.prod(one.shape) for one in ledger.base.outline.weights)
    return {
        "name": f"{spec.id}, merged",
        "task": spec.task.kind,
        "classes": spec.task.classes,
        "image": parts["image"],
        "model": {**parts["model"], "parameters": parameters},
        "base_id": spec.id,
        "base_version": spec.version,
        "base_digest": ledger.base.digest,
        "base_lineage": spec.lineage,
    }


def _whose(coordinator: Coordinator) -> str:
    splits = coordinator.data.splits
    return (
        f"{len(splits['train'])} training images to restore on and {len(splits['val'])} to choose on, of "
        f"{', '.join(sorted({case.site for case in coordinator.data.cases}))} (study {coordinator.study.name}, images "
        f"{coordinator.digest[:12]})"
    )


def _stage(row: Row) -> dict[str, Any]:
    metrics = {name: {k: cell[k] for k in ("value", "low", "high")} for name, cell in row["metrics"].items()}
    return {**row, "metrics": metrics, "data": "the coordinator's test images"}


def _contribution(one: Contribution, happened: Happened) -> dict[str, Any]:
    manifest, report = one.manifest, happened.admitted.get(one.digest)
    decision = happened.ledger.decisions.get(one.digest)
    audit = manifest.privacy.membership
    privacy = manifest.privacy
    return {
        "digest": one.digest,
        "site": one.site,
        "sequence": manifest.sequence,
        "used": one.digest in happened.digests,
        "images": one.images,
        "classes_held": manifest.data.classes_held,
        "brought": [file.name.removesuffix(".safetensors") for file in manifest.files],
        "membership": None
        if audit is None
        else {k: getattr(audit, k) for k in ("auc", "low", "high", "limit", "passed")},
        "verdict": report.verdict if report else "quarantine" if decision == "hold" else "accept",
        "decision": decision,
        "reasons": report.reasons if report else [],
        "notes": report.notes if report else [],
        "privacy": {
            "mechanism": privacy.mechanism,
            "epsilon": privacy.epsilon,
            "delta": privacy.delta,
            "unit": privacy.unit or "",
        },
        "licence": manifest.licence,
        "ethics": manifest.data.ethics,
    }


def _checks(happened: Happened) -> list[dict[str, Any]]:
    """What was checked on the way here; whatever fails ends the merge."""
    base, count = happened.ledger.base, len(happened.used)
    counted = f"{count} contribution{'s'[: count != 1]}"
    specs = base.outline.specs
    passed = {
        "signature, base, classes, names, shapes and types of each contribution": counted,
        "every file is the one that was signed, hashed before it was judged and merged": counted,
        "every merged value is finite": f"{len(specs)} tensors",
        "every variance is positive": f"{sum(spec.name.endswith('running_var') for spec in specs)} tensors",
        "names and shapes are the base's": base.digest[:12],
    }
    return [{"name": name, "passed": True, "detail": detail} for name, detail in passed.items()]


def _warnings(happened: Happened) -> list[str]:
    found, digests = [], happened.digests
    for report in happened.admitted.values():
        if report.verdict != "accept":
            why = report.reasons[0] if report.reasons else "a person holds it"
            found.append(f"{report.digest[:12]} of {report.site} was left out: {why}")
    if 0 < len(digests) < FEWEST_NEW:
        found.append(
            f"made of {len(digests)} contribution{'s'[: len(digests) > 1]}: whoever knows the base and all but one can "
            "compute that one exactly."
        )
    for release in happened.ledger.releases:
        difference = set(release.contributions) ^ set(digests)
        if 0 < len(difference) < FEWEST_NEW:
            found.append(
                f"differs from release {release.model[:12]} by {len(difference)} contribution"
                f"{'s'[: len(difference) > 1]}: whoever holds both models can compute what that brought. Release in "
                f"batches of {FEWEST_NEW} or more."
            )
        if release.stale:
            found.append(f"release {release.model[:12]} holds a contribution that was removed: withdraw it.")
    return found


def _unrestored(happened: Happened) -> list[str]:
    """Batch normalisation with the running statistics of another network is often no better than guessing."""
    recipe, measured = happened.recipe, any(spec.statistic for spec in happened.ledger.base.outline.specs)
    if recipe.restoration.mode != "none" or recipe.rule.name == "base" or not measured:
        return []
    return [
        "its batch normalisation has the base's running statistics, which are not those of the merged network. Take "
        "them anew on the coordinator's images (--data STUDY.yaml --set restoration=auto), or have sites send theirs "
        "(create --statistics) and set restoration=bn-pooled."
    ]


def _again(recipe: Recipe) -> str:
    """The command that makes the same model."""
    images = " --data STUDY.yaml" if recipe.restoration.needs_images or recipe.rule.judged else ""
    return f"polyclinic vectors merge LEDGER --recipe MERGED/recipe.json{images} --out AGAIN"


def _limits(coordinator: Coordinator | None) -> list[str]:
    if coordinator is None:
        return ["It was not tested: no images were given."]
    sites = sorted({case.site for case in coordinator.data.cases})
    return [f"It was tested on images of {', '.join(sites)} only; other hospitals' scanners and patients may differ."]
