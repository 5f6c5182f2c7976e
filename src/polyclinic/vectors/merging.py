"""``polyclinic vectors merge`` and ``evaluate``: from a ledger to a model that says what it is made of."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from polyclinic.errors import ContributionError
from polyclinic.models.weights import read_tensors
from polyclinic.results import environment
from polyclinic.runner import Observer, Silent
from polyclinic.secure.identity import Identity
from polyclinic.secure.key_files import to_base64
from polyclinic.study import Study
from polyclinic.vectors.admission import Admission
from polyclinic.vectors.base import SPEC_FILE, Base, weights_digest
from polyclinic.vectors.card import write_card
from polyclinic.vectors.contribution import Contribution
from polyclinic.vectors.controls import Row, control_table, judging
from polyclinic.vectors.coordinator import Coordinator
from polyclinic.vectors.explaining import explain_ledger
from polyclinic.vectors.folders import now, read_small, whole_folder, write_whole
from polyclinic.vectors.ledger import Ledger
from polyclinic.vectors.merge import MergeReport, merge
from polyclinic.vectors.merged import CARD_FILE, MODEL_FILE, RECIPE_FILE, RECORD_FILE, Merged
from polyclinic.vectors.recipe import Recipe
from polyclinic.vectors.record import MergeRecord
from polyclinic.vectors.tensor_file import TensorFile, TensorWriter, header_room
from polyclinic.vectors.words import in_words

HASHING = 2
"""Threads that hash files; each keeps a core busy."""
FEWEST_NEW = 3
"""A release that differs from another by fewer contributions than this tells much of each of them."""


def merge_ledger(
    ledger: Path,
    out: Path,
    recipe: Recipe,
    *,
    study: Study | None = None,
    identity: Identity | None = None,
    purpose: str = "",
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Merge the contributions that a ledger holds and that admission, or a person, lets through.

    ``model.safetensors`` and ``recipe.json`` are a function of the set of these contributions, the base, the recipe
    and the coordinator's images alone, to the last bit.

    Args:
        ledger: Its folder.
        out: A new folder, written whole or not at all; see ``merged``.
        recipe: How.
        study: The coordinator's own images, to restore and choose on, and for the table of controls.
        identity: The coordinator's key, to note the release in the ledger; None: it is not noted.
        purpose: What the model is for.
        observer: Told of the reading of images.

    Returns:
        What ``merge.json`` holds.

    Raises:
        ContributionError: Nothing to merge, a file was altered, or the recipe asks for what nobody brought.
    """
    opened = Ledger.open(ledger)
    base = opened.base
    if identity is not None and to_base64(identity.public) != opened.about.key:
        raise ContributionError(
            f"the ledger is signed by {opened.about.coordinator!r}, but the key is that of {identity.site!r}, "
            f"{identity.fingerprint}: the model could not be noted in it. Give the coordinator's --key, or none."
        )
    admitted = explain_ledger(opened)
    used = used_contributions(opened, admitted, recipe)
    if recipe.restoration.needs_images and study is None:
        raise ContributionError(
            f"restoration {recipe.restoration.mode} needs images of the coordinator's: give their study (--data), or "
            "restoration: none."
        )
    with tempfile.TemporaryDirectory() as scratch, whole_folder(out) as staged:
        coordinator = None if study is None else Coordinator(base, study, Path(scratch), observer)
        path = staged / MODEL_FILE
        report = _merged_file(path, base, used, recipe, coordinator, observer or Silent())
        states = {}
        if coordinator is not None:
            states["merged"] = read_tensors(path)[0]
            if recipe.restoration.needs_images:
                states["merged, restored"] = coordinator.restored(states["merged"], recipe.restoration)
                _write_model(path, base, states["merged, restored"])
        rows = [] if coordinator is None else control_table(base, used, recipe, coordinator, states, observer)
        record = _record(opened, base, admitted, used, recipe, report, path, rows, coordinator, purpose)
        text = json.dumps(recipe.model_dump(mode="json"), indent=1, sort_keys=True)
        write_whole(staged / RECIPE_FILE, text.encode() + b"\n")
        write_whole(staged / SPEC_FILE, read_small(base.folder / SPEC_FILE, 2**24))
        write_whole(staged / RECORD_FILE, json.dumps(record, indent=1).encode() + b"\n")
        write_card(record, staged / CARD_FILE)
    if identity is not None:
        opened.record_release(record["weights_sha256"], recipe.digest, [one.digest for one in used], identity)
    return record


def evaluate_ledger(ledger: Path, recipe: Recipe, study: Study, observer: Observer | None = None) -> list[Row]:
    """The table of controls for a recipe, without writing a model.

    Raises:
        ContributionError, StudyError, DataError: As ``merge_ledger``.
    """
    opened = Ledger.open(ledger)
    used = used_contributions(opened, explain_ledger(opened), recipe)
    with tempfile.TemporaryDirectory() as scratch:
        coordinator = Coordinator(opened.base, study, Path(scratch), observer)
        path = Path(scratch) / MODEL_FILE
        _merged_file(path, opened.base, used, recipe, coordinator, observer or Silent())
        states = {"merged": read_tensors(path)[0]}
        if recipe.restoration.needs_images:
            states["merged, restored"] = coordinator.restored(states["merged"], recipe.restoration)
        return control_table(opened.base, used, recipe, coordinator, states, observer)


def verify_model(ledger: Ledger, folder: Path) -> list[str]:
    """Check that a merged model is what its record says and was made of what this ledger holds.

    Raises:
        ContributionError: It was altered, or names contributions or a base that the ledger does not hold.
    """
    merged = Merged.load(folder)
    if _digest_of(folder / MODEL_FILE, ledger.base) != merged.record["weights_sha256"]:
        raise ContributionError(f"{folder / MODEL_FILE} was altered: its values are not those of {RECORD_FILE}.")
    if merged.record["base_digest"] != ledger.base.digest:
        raise ContributionError(f"{folder} was merged from another base than the ledger's.")
    known = {one.digest for one in ledger.contributions}
    used = [one["digest"] for one in merged.record["contributions"] if one["used"]]
    if missing := [digest for digest in used if digest not in known]:
        raise ContributionError(
            f"{folder} holds contribution {missing[0][:12]}, which the ledger does not, or no longer: withdraw the "
            "model and merge again."
        )
    return [f"the model's values are those of its record, made of {len(used)} contributions that the ledger holds"]


def used_contributions(ledger: Ledger, admitted: Mapping[str, Admission], recipe: Recipe) -> list[Contribution]:
    """What goes into a merge: what brings the recipe's kind of file and is not held back."""
    if recipe.rule.name == "base":
        kinds = {"head"} if recipe.head is not None else set()
        return [
            c for c in ledger.contributions if kinds and c.names("head") and ledger.decisions.get(c.digest) != "hold"
        ]
    used = [c for c in ledger.contributions if c.digest in admitted and admitted[c.digest].verdict == "accept"]
    if not used:
        held = f"{len(admitted)} are held back; see polyclinic vectors explain" if admitted else "none brings a vector"
        raise ContributionError(f"there is nothing to merge: {held}.")
    return used


def _merged_file(
    path: Path,
    base: Base,
    used: Sequence[Contribution],
    recipe: Recipe,
    coordinator: Coordinator | None,
    observer: Observer,
) -> MergeReport:
    """Merge into a file, layer by layer. Every contribution is hashed first: what is merged is what was signed."""
    with ThreadPoolExecutor(HASHING) as threads:
        for done, _ in enumerate(threads.map(Contribution.verify_files, used), 1):
            observer.working("files checked", done, len(used))
    judge: Callable[[Mapping[str, Tensor]], float] | None = None
    if coordinator is not None:
        chosen = coordinator

        def judge(candidate: Mapping[str, Tensor]) -> float:
            return chosen.score(chosen.restored(candidate, judging(recipe.restoration)))

    specs = base.outline.specs
    with TensorWriter(path, [(spec.name, spec.dtype, spec.shape) for spec in specs]) as writer:

        def write(name: str, tensor: Tensor) -> None:
            writer.write(name, tensor)
            written.append(name)
            observer.working("layers merged", len(written), len(specs))

        written: list[str] = []
        return merge(base.outline, base, used, recipe, write, judge=judge)


def _write_model(path: Path, base: Base, state: Mapping[str, Tensor]) -> None:
    with TensorWriter(path, [(spec.name, spec.dtype, spec.shape) for spec in base.outline.specs]) as writer:
        for spec in base.outline.specs:
            writer.write(spec.name, state[spec.name])


def _record(
    ledger: Ledger,
    base: Base,
    admitted: Mapping[str, Admission],
    used: Sequence[Contribution],
    recipe: Recipe,
    report: MergeReport,
    model: Path,
    rows: Sequence[Row],
    coordinator: Coordinator | None,
    purpose: str,
) -> dict[str, Any]:
    digests = [one.digest for one in used]
    warnings = _warnings(ledger, admitted, digests)
    spec = base.spec
    parameters = sum(math.prod(one.shape) for one in base.outline.weights)
    restored = recipe.restoration.model_dump(mode="json") if recipe.restoration.mode != "none" else {}
    raw = {
        "schema": "polyclinic-merge/1",
        "name": f"{spec.id}, merged",
        "created": now(),
        "purpose": purpose,
        "task": spec.task.kind,
        "classes": spec.task.classes,
        "image": spec.model_dump(mode="json")["image"],
        "model": {
            **spec.model_dump(mode="json")["model"],
            "parameters": parameters,
        },
        "base_id": spec.id,
        "base_version": spec.version,
        "base_digest": base.digest,
        "base_lineage": spec.lineage,
        "recipe": recipe.model_dump(mode="json"),
        "rule_in_words": in_words(recipe),
        "restoration": restored,
        "restoration_data": "" if coordinator is None else _whose(coordinator),
        "contributions": [
            _contribution(one, admitted.get(one.digest), ledger, digests) for one in ledger.contributions
        ],
        "shares": report.shares,
        "metrics": [_stage(row) for row in rows],
        "checks": _checks(base, used),
        "warnings": warnings,
        "notes": report.notes,
        "limits": _limits(coordinator),
        "weights_sha256": _digest_of(model, base),
        "set_digest": hashlib.sha256("\n".join(digests).encode()).hexdigest(),
        "chain_head": ledger.head,
        "software": {k: v for k, v in environment().items() if k in ("polyclinic", "commit", "python", "torch")},
        "verify": ["polyclinic vectors verify LEDGER --head HEAD --model MERGED"],
        "reproduce": ["polyclinic vectors merge LEDGER --recipe MERGED/recipe.json --out AGAIN"],
    }
    return MergeRecord.model_validate(raw).model_dump(mode="json", by_alias=True)


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


def _contribution(
    one: Contribution, report: Admission | None, ledger: Ledger, digests: Sequence[str]
) -> dict[str, Any]:
    manifest = one.manifest
    audit = manifest.privacy.membership
    privacy = manifest.privacy
    return {
        "digest": one.digest,
        "site": one.site,
        "sequence": manifest.sequence,
        "used": one.digest in digests,
        "images": one.images,
        "classes_held": manifest.data.classes_held,
        "brought": [file.name.removesuffix(".safetensors") for file in manifest.files],
        "membership": None
        if audit is None
        else {k: getattr(audit, k) for k in ("auc", "low", "high", "limit", "passed")},
        "verdict": "accept" if report is None else report.verdict,
        "decision": ledger.decisions.get(one.digest),
        "reasons": [] if report is None else report.reasons,
        "notes": [] if report is None else report.notes,
        "privacy": {
            "mechanism": privacy.mechanism,
            "epsilon": privacy.epsilon,
            "delta": privacy.delta,
            "unit": privacy.unit or "",
        },
        "licence": manifest.licence,
        "ethics": manifest.data.ethics,
    }


def _digest_of(model: Path, base: Base) -> str:
    """Of all values, read one tensor at a time.

    Raises:
        ContributionError: A value is not finite, or a variance not positive.
    """
    most = sum(spec.dtype.itemsize * math.prod(spec.shape) for spec in base.outline.specs)
    room = header_room(len(base.outline.specs))
    with TensorFile(model, max_bytes=most + room + 8, max_header=room) as file:
        return weights_digest(file, file.specs, str(model))


def _checks(base: Base, used: Sequence[Contribution]) -> list[dict[str, Any]]:
    """What was checked on the way here; whatever fails ends the merge."""
    counted = f"{len(used)} contribution{'s'[: len(used) != 1]}"
    specs = base.outline.specs
    passed = {
        "signature, base, classes, names, shapes and types of each contribution": counted,
        "every file is the one that was signed, hashed just before it was merged": counted,
        "every merged value is finite": f"{len(specs)} tensors",
        "every variance is positive": f"{sum(spec.name.endswith('running_var') for spec in specs)} tensors",
        "names and shapes are the base's": base.digest[:12],
    }
    return [{"name": name, "passed": True, "detail": detail} for name, detail in passed.items()]


def _warnings(ledger: Ledger, admitted: Mapping[str, Admission], digests: Sequence[str]) -> list[str]:
    found = []
    for report in admitted.values():
        if report.verdict != "accept":
            why = report.reasons[0] if report.reasons else "a person holds it"
            found.append(f"{report.digest[:12]} of {report.site} was left out: {why}")
    if 0 < len(digests) < FEWEST_NEW:
        found.append(
            f"made of {len(digests)} contribution{'s'[: len(digests) > 1]}: whoever knows the base and all but one can "
            "compute that one exactly."
        )
    for release in ledger.releases:
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


def _limits(coordinator: Coordinator | None) -> list[str]:
    if coordinator is None:
        return ["It was not tested: no images were given."]
    sites = sorted({case.site for case in coordinator.data.cases})
    return [f"It was tested on images of {', '.join(sites)} only; other hospitals' scanners and patients may differ."]
