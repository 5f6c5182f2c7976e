"""``polyclinic vectors merge`` and ``evaluate``: from a ledger to a model that says what it is made of."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from polyclinic.errors import ContributionError
from polyclinic.models.weights import read_tensors
from polyclinic.runner import Observer, Silent
from polyclinic.secure.identity import Identity
from polyclinic.secure.key_files import to_base64
from polyclinic.study import Study
from polyclinic.vectors.admission import Admission
from polyclinic.vectors.base import SPEC_FILE, Base, weights_digest
from polyclinic.vectors.card import write_card
from polyclinic.vectors.contribution import Contribution
from polyclinic.vectors.controls import Row, control_table, judge_of
from polyclinic.vectors.coordinator import Coordinator
from polyclinic.vectors.explaining import explain_ledger
from polyclinic.vectors.folders import read_small, whole_folder, write_whole
from polyclinic.vectors.ledger import Ledger
from polyclinic.vectors.merge import MergeReport, merge
from polyclinic.vectors.merged import CARD_FILE, MODEL_FILE, RECIPE_FILE, RECORD_FILE, Merged
from polyclinic.vectors.recipe import Recipe, load_recipe
from polyclinic.vectors.recording import Happened, record_of
from polyclinic.vectors.tensor_file import TensorFile, TensorWriter, header_room

HASHING = 2
"""Threads that hash files; each keeps a core busy."""


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
    recipe = _decided(recipe, base)
    sent = verified_contributions(opened, observer or Silent())
    admitted = explain_ledger(opened, sent)
    used = used_contributions(opened, sent, admitted, recipe)
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
        weights = digest_of(path, base)
        record = record_of(Happened(opened, admitted, used, recipe, report, coordinator, rows, weights, purpose))
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
    recipe = _decided(recipe, opened.base)
    sent = verified_contributions(opened, observer or Silent())
    used = used_contributions(opened, sent, explain_ledger(opened, sent), recipe)
    with tempfile.TemporaryDirectory() as scratch:
        coordinator = Coordinator(opened.base, study, Path(scratch), observer)
        path = Path(scratch) / MODEL_FILE
        _merged_file(path, opened.base, used, recipe, coordinator, observer or Silent())
        states = {"merged": read_tensors(path)[0]}
        if recipe.restoration.needs_images:
            states["merged, restored"] = coordinator.restored(states["merged"], recipe.restoration)
        return control_table(opened.base, used, recipe, coordinator, states, observer)


def verify_model(ledger: Ledger, folder: Path) -> list[str]:
    """Check that a merged model is what its record says, and what the ledger says of it.

    A record is not signed; a release in the ledger is. Without one, somebody may have written model and record anew.

    Raises:
        ContributionError: It was altered, names contributions or a base that the ledger does not hold, or the ledger
            says something else of these values.
    """
    merged = Merged.load(folder)
    if digest_of(folder / MODEL_FILE, ledger.base) != merged.record["weights_sha256"]:
        raise ContributionError(f"{folder / MODEL_FILE} was altered: its values are not those of {RECORD_FILE}.")
    if load_recipe(folder / RECIPE_FILE).digest != Recipe.model_validate(merged.record["recipe"]).digest:
        raise ContributionError(f"{folder / RECIPE_FILE} is not the recipe of {RECORD_FILE}: one of both was altered.")
    if merged.record["base_digest"] != ledger.base.digest:
        raise ContributionError(f"{folder} was merged from another base than the ledger's.")
    known = {one.digest for one in ledger.contributions}
    used = [one["digest"] for one in merged.record["contributions"] if one["used"]]
    if missing := [digest for digest in used if digest not in known]:
        raise ContributionError(
            f"{folder} holds contribution {missing[0][:12]}, which the ledger does not, or no longer: withdraw the "
            "model and merge again."
        )
    named = [release for release in ledger.releases if release.model == merged.record["weights_sha256"]]
    if named and not any((one.recipe, list(one.contributions)) == (merged.recipe.digest, used) for one in named):
        raise ContributionError(
            f"{folder}: the ledger names this model as made by another recipe or of other contributions than "
            f"{RECORD_FILE} says: it was altered."
        )
    signed = "the ledger names it as a release" if named else "no release of the ledger names it, so nobody signed that"
    return [
        f"the model's values are those of its record: made of {len(used)} contributions that the ledger holds; {signed}"
    ]


def verified_contributions(ledger: Ledger, observer: Observer) -> tuple[Contribution, ...]:
    """All that the ledger holds, every file hashed: what is judged and merged is what was signed.

    Raises:
        ContributionError: A file was altered. One that is not merged counts too: it is what the others are judged by.
    """
    found = ledger.contributions
    with ThreadPoolExecutor(HASHING) as threads:
        for done, _ in enumerate(threads.map(Contribution.verify_files, found), 1):
            observer.working("files checked", done, len(found))
    return found


def used_contributions(
    ledger: Ledger, sent: Sequence[Contribution], admitted: Mapping[str, Admission], recipe: Recipe
) -> list[Contribution]:
    """What goes into a merge: what brings the recipe's kind of file and is not held back."""
    if recipe.rule.name == "base":
        out = {d for d, report in admitted.items() if report.verdict != "accept"}
        out |= {d for d, decided in ledger.decisions.items() if decided == "hold"}
        return [c for c in sent if recipe.head is not None and c.names("head") and c.digest not in out]
    used = [c for c in sent if c.digest in admitted and admitted[c.digest].verdict == "accept"]
    if not used:
        held = f"{len(admitted)} are held back; see polyclinic vectors explain" if admitted else "none brings a vector"
        raise ContributionError(f"there is nothing to merge: {held}.")
    return used


def _decided(recipe: Recipe, base: Base) -> Recipe:
    """The recipe with restoration ``auto`` decided; the network is not built, as its name may be somebody's code."""
    if recipe.restoration.mode != "auto":
        return recipe
    mode = "bn-recal" if any(spec.statistic for spec in base.outline.specs) else "none"
    return recipe.model_copy(update={"restoration": recipe.restoration.model_copy(update={"mode": mode})})


def _merged_file(
    path: Path,
    base: Base,
    used: Sequence[Contribution],
    recipe: Recipe,
    coordinator: Coordinator | None,
    observer: Observer,
) -> MergeReport:
    """Merge verified contributions into a file, layer by layer."""
    specs = base.outline.specs
    with TensorWriter(path, [(spec.name, spec.dtype, spec.shape) for spec in specs]) as writer:

        def write(name: str, tensor: Tensor) -> None:
            writer.write(name, tensor)
            written.append(name)
            observer.working("layers merged", len(written), len(specs))

        written: list[str] = []
        return merge(base.outline, base, used, recipe, write, judge=judge_of(coordinator, recipe))


def _write_model(path: Path, base: Base, state: Mapping[str, Tensor]) -> None:
    with TensorWriter(path, [(spec.name, spec.dtype, spec.shape) for spec in base.outline.specs]) as writer:
        for spec in base.outline.specs:
            writer.write(spec.name, state[spec.name])


def digest_of(model: Path, base: Base) -> str:
    """Of all values, read one tensor at a time.

    Raises:
        ContributionError: A value is not finite, or a variance not positive.
    """
    most = sum(spec.dtype.itemsize * math.prod(spec.shape) for spec in base.outline.specs)
    room = header_room(len(base.outline.specs))
    with TensorFile(model, max_bytes=most + room + 8, max_header=room) as file:
        return weights_digest(file, file.specs, str(model))
