"""The results folder: written as a whole or not at all, and what it refuses."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polyclinic.errors import RunError
from polyclinic.models.weights import save_tensors
from polyclinic.results import RunFolder, environment, new_folder, plain_json
from polyclinic.study import Study

Make = Callable[..., Study]


def test_a_new_folder_holds_the_resolved_study_and_the_environment(tiny_study: Make, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "deep" / "run")
    folder.create(tiny_study())

    text = (folder.path / "study.yaml").read_text()
    assert "momentum: 0.0" in text, "defaults are written out"
    assert folder.study().method == tiny_study().method
    kept = json.loads((folder.path / "environment.json").read_text())
    assert set(kept) == set(environment())
    assert not list(folder.path.glob(".*")), "no temporary files stay"


def test_a_folder_with_rounds_is_not_overwritten(tiny_study: Make, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create(tiny_study())
    folder.add_round({"round": 1})
    with pytest.raises(RunError, match=f"already holds a run.*--resume {tmp_path}"):
        RunFolder(tmp_path).create(tiny_study(seed=1))
    assert folder.study().seed == 0


def test_a_folder_whose_run_never_began_can_be_used_again(tiny_study: Make, tmp_path: Path) -> None:
    RunFolder(tmp_path).create(tiny_study())
    RunFolder(tmp_path).create(tiny_study(seed=1))
    assert RunFolder(tmp_path).study().seed == 1


def test_resuming_another_study_says_what_changed(tiny_study: Make, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create(tiny_study())
    with pytest.raises(RunError) as caught:
        folder.open(tiny_study(training={"lr": 0.1}, method={"rounds": 9}))
    lines = str(caught.value).splitlines()
    assert lines[1:3] == ["  training.lr: 0.05 -> 0.1", "  method.rounds: 3 -> 9"]
    assert "--out" in lines[-1]
    with pytest.raises(RunError, match="method.name: 'fedavg' -> 'ditto'"):
        folder.open(tiny_study(method={"name": "ditto"}))


def test_resuming_elsewhere_is_allowed(tiny_study: Make, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create(tiny_study())
    folder.open(tiny_study(device="cuda", data={"root": "/elsewhere"}))


def test_no_results_folder(tiny_study: Make, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no results folder"):
        RunFolder(tmp_path).open(tiny_study())


def test_rounds_beyond_the_last_saved_state_are_cut_off(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.rounds() == []
    for number in (1, 2, 3):
        folder.add_round({"round": number, "loss": math.nan})
    with (tmp_path / "rounds.jsonl").open("a") as file:
        file.write('{"round": 4, "sec')

    assert [r["round"] for r in folder.rounds(upto=2)] == [1, 2]
    assert (tmp_path / "rounds.jsonl").read_text() == '{"round": 1, "loss": null}\n{"round": 2, "loss": null}\n'


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "rounds.jsonl").write_text('{"round": 1}\nnonsense\n{"round": 3}\n')
    with pytest.raises(RunError, match=r"rounds\.jsonl is damaged"):
        RunFolder(tmp_path).rounds(upto=3)


def test_a_failed_write_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    folder.write("metrics.json", "old")

    def full(self: Path, target: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(RunError, match=f"no space left on the disk.*Finished rounds are safe.*--resume {tmp_path}"):
        folder.write("metrics.json", "new")
    with pytest.raises(RunError, match="no space left on the disk"):
        folder.guard(lambda: save_tensors(tmp_path / "state.safetensors", {}))
    assert (tmp_path / "metrics.json").read_text() == "old"


@pytest.mark.parametrize(
    ("number", "said"), [(errno.EROFS, "Read-only file system"), (errno.EACCES, "Permission denied")]
)
def test_a_folder_that_cannot_be_written(tmp_path: Path, number: int, said: str) -> None:
    def write() -> None:
        raise OSError(number, said)

    with pytest.raises(RunError, match=f"cannot be written: {said}. Give another --out"):
        RunFolder(tmp_path).guard(write)


def test_a_folder_under_a_file_cannot_be_made(tiny_study: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written: Not a directory. Give another --out"):
        RunFolder(tmp_path / "file" / "run").create(tiny_study())
    with pytest.raises(RunError, match="cannot be written: File exists"):
        RunFolder(tmp_path / "file").create(tiny_study())


def test_other_errors_pass_the_guard(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        RunFolder(tmp_path).guard(lambda: 1 / 0)
    assert RunFolder(tmp_path).guard(lambda: 3) == 3


def test_the_default_folder_is_new(tiny_study: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "20300102-030405")
    study = tiny_study()
    first = new_folder(study, None)
    assert str(first) == "runs/tiny-20300102-030405"
    first.mkdir(parents=True)
    assert str(new_folder(study, None)) == "runs/tiny-20300102-030405-2"
    assert new_folder(study, tmp_path / "x") == tmp_path / "x"


def test_json_has_no_nan() -> None:
    value = {"a": [math.nan, 1.5, (math.inf, "x")], 3: {"b": -math.inf, "c": True, "d": None}}
    assert plain_json(value) == {"a": [None, 1.5, [None, "x"]], "3": {"b": None, "c": True, "d": None}}
    assert json.loads(json.dumps(plain_json(value), allow_nan=False))
