"""Somebody who can write to folders but has no key: what is judged, merged and shown is what was signed."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hospitals import SITES, all_kinds, contribute, identity, ledger_with, roster, small_base, vector
from torch import Tensor
from typer.testing import CliRunner

from polyclinic import cli
from polyclinic.errors import ContributionError
from polyclinic.models.weights import read_tensors, save_tensors
from polyclinic.secure.identity import fingerprint
from polyclinic.vectors.base import Base, weights_digest
from polyclinic.vectors.contribution import Contribution
from polyclinic.vectors.folders import canonical_json
from polyclinic.vectors.ledger import Ledger
from polyclinic.vectors.merged import Merged
from polyclinic.vectors.merging import merge_ledger, verify_model
from polyclinic.vectors.recipe import Recipe
from polyclinic.vectors.sources import InMemoryTensors, Kind

COORDINATOR = identity("coordinator")
MEAN = Recipe.model_validate({"rule": {"coefficients": "mean"}})
RIDGE = Recipe.model_validate({"rule": "base", "head": "ridge"})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return small_base(tmp_path_factory.mktemp("base") / "base")


def alike(base: Base, seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    """A direction that all sites have, and noise of each."""
    common, own = vector(base, 1000), vector(base, seed, 0.005)
    return {name: scale * (common[name] + own[name]) for name in common}


def filled(folder: Path, base: Base, loud: str = "", more: Sequence[Kind] = ()) -> Ledger:
    """A ledger with all sites' vectors; that of ``loud`` is a thousand times too long."""
    ledger = ledger_with(folder, base)
    for seed, site in enumerate(SITES):
        sent: dict[Kind, dict[str, Tensor]] = {"vector": alike(base, seed, 1000.0 if site == loud else 1.0)}
        sent |= {kind: all_kinds(base, seed)[kind] for kind in more}
        contribute(folder.parent / f"{folder.name}-{site}", base, site, tensors=sent)
        ledger.add(folder.parent / f"{folder.name}-{site}", COORDINATOR)
    return ledger


def test_a_file_that_is_not_merged_is_checked_before_the_others_are_judged_by_it(base: Base, tmp_path: Path) -> None:
    ledger = filled(tmp_path / "ledger", base)
    path = ledger.contributions[0].folder / "vector.safetensors"
    content = bytearray(path.read_bytes())
    values = torch.frombuffer(content, dtype=torch.float32, offset=8 + int.from_bytes(content[:8], "little"))
    values *= 1e6  # admission would hold it, and merge the two others as if nothing had happened
    path.write_bytes(content)
    with pytest.raises(ContributionError, match=r"vector.safetensors was altered"):
        merge_ledger(ledger.folder, tmp_path / "out", MEAN)
    assert not (tmp_path / "out").exists()


def test_a_file_exchanged_after_the_check_is_seen_though_its_time_was_set_back(base: Base, tmp_path: Path) -> None:
    contribute(tmp_path / "sent", base)
    opened = Contribution.load(tmp_path / "sent", base, roster())
    path = tmp_path / "sent" / "vector.safetensors"
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 0x40
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ContributionError, match="has changed since it was checked"):
        opened.read("vector", sorted(opened.names("vector"))[-1])


def test_a_folder_that_grows_while_it_is_taken_in_does_not_fill_the_disk(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = ledger_with(tmp_path / "ledger", base)
    contribute(tmp_path / "sent", base)
    load = Contribution.load

    def then_grows(folder: Path, *args: Any, **settings: Any) -> Contribution:
        found = load(folder, *args, **settings)
        if folder == tmp_path / "sent":
            os.truncate(folder / "vector.safetensors", 2**24)
        return found

    monkeypatch.setattr(Contribution, "load", then_grows)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # what was copied stays to be looked at
    with pytest.raises(ContributionError, match="it changed meanwhile"):
        ledger.add(tmp_path / "sent", COORDINATOR)
    copied = (tmp_path / "ledger" / "contributions").rglob("vector.safetensors")
    assert sum(path.stat().st_size for path in copied) < 2**20


def test_the_head_sums_of_a_held_vector_are_held_too(base: Base, tmp_path: Path) -> None:
    ledger = filled(tmp_path / "ledger", base, loud="west", more=["head"])
    record = merge_ledger(ledger.folder, tmp_path / "out", RIDGE)
    assert {one["site"]: one["used"] for one in record["contributions"]} == {
        "north": True,
        "south": True,
        "west": False,
    }
    west = next(one.digest for one in ledger.contributions if one.site == "west")
    ledger.accept(west, "asked the site", COORDINATOR)
    record = merge_ledger(ledger.folder, tmp_path / "accepted", RIDGE)
    assert all(one["used"] for one in record["contributions"])


def rewritten(folder: Path, out: Path, edit: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Path:
    """A merged model with other values and a record that fits them: nothing in the folder is signed."""
    shutil.copytree(folder, out)
    tensors, _ = read_tensors(out / "model.safetensors")
    record = json.loads((out / "merge.json").read_bytes())
    edit(tensors, record)
    save_tensors(out / "model.safetensors", tensors)
    record["weights_sha256"] = weights_digest(InMemoryTensors(tensors), tensors, "")
    (out / "merge.json").write_text(json.dumps(record))
    (out / "recipe.json").write_text(json.dumps(record["recipe"]))
    return out


def test_a_model_that_nobody_signed_is_not_said_to_be_made_of_the_ledger(base: Base, tmp_path: Path) -> None:
    ledger = filled(tmp_path / "ledger", base)
    merge_ledger(ledger.folder, tmp_path / "out", MEAN, identity=COORDINATOR)
    ledger = Ledger.open(ledger.folder)
    assert verify_model(ledger, tmp_path / "out")[0].endswith("the ledger names it as a release")

    def other_values(tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        for name in tensors:
            tensors[name] = tensors[name] + 1

    def other_recipe(tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        record["recipe"]["rule"]["scale"] = 0.5

    def other_set(tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        record["contributions"][0]["used"] = False

    said = verify_model(ledger, rewritten(tmp_path / "out", tmp_path / "values", other_values))[0]
    assert said.endswith("no release of the ledger names it, so nobody signed that")
    for name, edit in {"recipe": other_recipe, "set": other_set}.items():
        with pytest.raises(ContributionError, match="made by another recipe or of other contributions"):
            verify_model(ledger, rewritten(tmp_path / "out", tmp_path / name, edit))


def test_classes_of_a_merged_model_cannot_be_exchanged(base: Base, tmp_path: Path) -> None:
    ledger = filled(tmp_path / "ledger", base)
    merge_ledger(ledger.folder, tmp_path / "out", MEAN)
    path = tmp_path / "out" / "base.json"
    raw = json.loads(path.read_bytes())
    raw["task"]["classes"].reverse()
    path.write_text(json.dumps(raw))
    with pytest.raises(ContributionError, match=r"base.json is not the base that merge.json names"):
        Merged.load(tmp_path / "out")


def test_verify_shows_whose_key_the_ledger_is_signed_with(base: Base, tmp_path: Path) -> None:
    """Somebody who makes the whole ledger anew gives its coordinator the same name, but has no such key."""
    said = "\n".join(ledger_with(tmp_path / "ledger", base).verify())
    assert fingerprint("coordinator", COORDINATOR.public) in said


def test_head_sums_alone_are_added_without_a_word_on_vectors(base: Base, tmp_path: Path) -> None:
    ledger = ledger_with(tmp_path / "ledger", base)
    COORDINATOR.save(tmp_path / "coordinator.key", None)
    contribute(tmp_path / "sent", base, tensors={"head": all_kinds(base)["head"]})
    parts = [ledger.folder, tmp_path / "sent", "--key", tmp_path / "coordinator.key"]
    done = CliRunner().invoke(cli.app, ["vectors", "add", *map(str, parts)])
    assert done.exit_code == 0, done.output
    assert "brings no vector" in done.output
    assert Ledger.open(ledger.folder).head in done.output


def test_what_a_file_says_does_not_control_the_terminal(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = ledger_with(tmp_path / "ledger", base)
    COORDINATOR.save(tmp_path / "coordinator.key", None)
    contribute(tmp_path / "sent", base)
    path = tmp_path / "sent" / "manifest.json"
    path.write_bytes(canonical_json({**json.loads(path.read_bytes()), "\x1b[2J\u202eseen": 1}))
    parts = [ledger.folder, tmp_path / "sent", "--key", tmp_path / "coordinator.key"]
    monkeypatch.setattr(sys, "argv", ["polyclinic", "vectors", "add", *map(str, parts)])
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().err
    assert "\x1b[2J" not in said
    assert "\u202e" not in said
    assert r"\x1b[2J\u202eseen" in said
