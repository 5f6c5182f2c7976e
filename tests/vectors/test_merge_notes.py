"""What a person is told beside a merged model: notes, the command that makes it again, figures of admission."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hospitals import contribute, identity, roster, small_base, small_study, vector

from polyclinic.vectors.admission import Admission
from polyclinic.vectors.explaining import explain_ledger
from polyclinic.vectors.ledger import Ledger
from polyclinic.vectors.merging import merge_ledger
from polyclinic.vectors.recipe import Recipe
from polyclinic.vectors.verdicts import figures_of

SITES = ("north", "south", "west")
CLASSES = ("normal", "pneumonia")


def started(folder: Path, norm: str = "batch") -> Ledger:
    """Three sites, whose vectors are one direction, once, once and twice as long."""
    base = small_base(folder / "base", CLASSES, model={"name": "small-cnn", "width": 2, "norm": norm})
    ledger = Ledger.create(folder / "ledger", base.folder, identity("coordinator"), roster(SITES))
    for site, scale in zip(SITES, (1.0, 1.0, 2.0), strict=True):
        moved = {name: scale * tensor for name, tensor in vector(base).items()}
        contribute(folder / site, base, site, 1, tensors={"vector": moved})
        ledger.add(folder / site, identity("coordinator"))
        for decided in ledger.contributions:
            ledger.accept(decided.digest, "copies, in a test", identity("coordinator"))
    return ledger


@pytest.mark.parametrize(
    ("norm", "mode", "told"), [("batch", "none", True), ("batch", "auto", False), ("group", "none", False)]
)
def test_running_statistics_of_the_base_are_told_of(norm: str, mode: str, told: bool, tmp_path: Path) -> None:
    """A merged network with the base's running statistics often only guesses."""
    study = small_study(CLASSES, model={"name": "small-cnn", "width": 2, "norm": norm})
    recipe = Recipe.model_validate({"rule": {"coefficients": "mean"}, "restoration": mode})
    record = merge_ledger(started(tmp_path, norm).folder, tmp_path / "out", recipe, study=study)
    assert any("restoration=auto" in note for note in record["notes"]) == told
    assert ("--data STUDY.yaml" in record["reproduce"][0]) == (mode == "auto")


def test_notes_are_printed(polyclinic_says: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    ledger = started(tmp_path)
    code, _, errors = polyclinic_says("vectors", "merge", ledger.folder, "--out", tmp_path / "out")
    assert code == 0
    assert "note: its batch normalisation has the base's running statistics" in errors


def test_explain_gives_the_figures(polyclinic_says: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    ledger = started(tmp_path)
    west = next(report for report in explain_ledger(ledger).values() if report.site == "west")
    # Twice as long as the others; without it the mean is 1 instead of 4/3: a quarter of itself less.
    assert f"norm {west.norm:.3g}, 2.00 times the others' median" in figures_of(west)
    assert "cosine to the others +1.00" in figures_of(west)
    assert "the mean changes by 25% without it" in figures_of(west)
    code, said, _ = polyclinic_says("vectors", "explain", ledger.folder)
    assert code == 0
    assert said.count("cosine to the others +1.00") == len(SITES)


def test_figures_that_need_others_are_left_out_without_them() -> None:
    nothing = dict.fromkeys(Admission.__dataclass_fields__)
    assert figures_of(Admission(**{**nothing, "norm": 1.5})) == "norm 1.5"  # type: ignore[arg-type]
