"""A run that was killed ends with the same result as one that was not."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import TINY, changed

import polyclinic
from polyclinic import api
from polyclinic.errors import PolyclinicError, RunError
from polyclinic.study import load_study, validate_study

File = Callable[..., Path]
ROUNDS = 4
METHODS = {
    "fedavg": {"name": "fedavg", "rounds": ROUNDS, "participation": 0.7},
    "ditto": {"name": "ditto", "rounds": ROUNDS},
    "scaffold": {"name": "scaffold", "rounds": ROUNDS},
}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "polyclinic.cli", *map(str, arguments)]


def surroundings() -> dict[str, str]:
    source = str(Path(polyclinic.__file__).resolve().parents[1])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": source}


def killed(folder: Path, ready: Callable[[], bool], *arguments: str | Path) -> None:
    """Start the command and kill it as soon as ``ready``."""
    with subprocess.Popen(
        command(*arguments), env=surroundings(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        end = time.monotonic() + 200
        while process.poll() is None and not ready() and time.monotonic() < end:
            time.sleep(0.001)
        alive = process.poll() is None and ready()
        process.kill()
        said = process.stdout.read() if process.stdout else ""
    assert alive, f"it should have been killed on its way: {said}"
    assert not (folder / "metrics.json").exists()


def finished(*arguments: str | Path) -> None:
    done = subprocess.run(command(*arguments), env=surroundings(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def rounds(folder: Path) -> int:
    path = folder / "rounds.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def files(folder: Path) -> dict[str, bytes]:
    """What must be equal to the last bit."""
    found = [p for name in ("models", "predictions") for p in (folder / name).iterdir() if p.suffix != ".npz"]
    names = [*found, folder / "replicates.safetensors", folder / "splits.csv"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in names}


def timeless(value: Any) -> Any:
    """Without seconds and memory, which no two runs share."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in ("seconds", "process_peak_rss_mb")}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def assert_same(run: Path, reference: Path) -> None:
    metrics, wanted = (json.loads((folder / "metrics.json").read_text()) for folder in (run, reference))
    assert timeless(metrics) == timeless(wanted)
    records, expected = (
        [timeless(json.loads(line)) for line in (folder / "rounds.jsonl").read_text().splitlines()]
        for folder in (run, reference)
    )
    assert records == expected
    assert [record["round"] for record in records] == list(range(1, ROUNDS + 1))
    assert files(run) == files(reference)
    assert (run / "report.html").is_file()


@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_in_several_rounds_ends_the_same(tiny_file: File, tmp_path: Path, method: str) -> None:
    study, run, reference = tiny_file(method=METHODS[method]), tmp_path / "killed", tmp_path / "whole"
    api.run(study, out=reference)
    killed(run, lambda: rounds(run) >= 1, "run", study, "--out", run)
    if method == "fedavg":
        killed(run, lambda: rounds(run) >= 3, "run", study, "--resume", run)
        finished("run", "--resume", run)
    else:
        kept = {"ditto": "personal", "scaffold": "control"}[method]
        half = f"*/{kept}.{min(rounds(run) + 2, ROUNDS):06d}.safetensors"
        killed(run, lambda: any((run / "state").glob(half)), "run", study, "--resume", run)
        api.run(study, resume=run)
    assert_same(run, reference)


def test_a_killed_comparison_goes_on_with_the_run_it_was_in(tiny_file: File, tmp_path: Path) -> None:
    study = tiny_file(compare={"methods": ["ditto"], "seeds": [0, 1]}, method=METHODS["fedavg"])
    run, reference = tmp_path / "killed", tmp_path / "whole"
    api.run(study, out=reference)
    second = run / "runs" / "ditto-seed0"
    killed(run, lambda: rounds(second) >= 2, "run", study, "--out", run)
    first = run / "runs" / "fedavg-seed0" / "metrics.json"
    written = first.stat().st_mtime_ns
    api.run(None, resume=run)

    assert first.stat().st_mtime_ns == written, "a finished run is not trained again"
    for name in ("fedavg-seed0", "ditto-seed0", "fedavg-seed1", "ditto-seed1"):
        assert_same(run / "runs" / name, reference / "runs" / name)
    tables = [timeless(json.loads((folder / "metrics.json").read_text())) for folder in (run, reference)]
    assert tables[0] == tables[1]
    assert (run / "report.html").is_file()


class Killed(BaseException):
    """Stands for a kill: no handler of the program catches it."""


def kill_at(number: int, monkeypatch: pytest.MonkeyPatch, error: BaseException, half: bool = False) -> None:
    """Let the ``number``-th file that is put into place fail, before or just after it."""
    original, calls = Path.replace, iter(range(10_000))

    def replace(self: Path, target: Any) -> Path:
        if next(calls) == number:
            if half:
                original(self, target)
            raise error
        return original(self, target)

    monkeypatch.setattr(Path, "replace", replace)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of ditto."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return api.run(validate_study(changed(TINY, {"method": METHODS["ditto"]})), out=folder)


@pytest.mark.parametrize("number", [2, 5, 8, 9, 13, 16, 21, 29])
@pytest.mark.parametrize("half", [False, True])
def test_a_kill_at_any_write_loses_no_finished_round(
    tiny_file: File, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, number: int, half: bool
) -> None:
    study, run = tiny_file(method=METHODS["ditto"]), tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_at(number, patch, Killed(), half)
        with pytest.raises(Killed):
            api.run(study, out=run)
    seen = rounds(run)
    api.run(study, resume=run)
    assert_same(run, whole)
    assert seen <= ROUNDS


@pytest.mark.parametrize("number", [3, 9, 17])
def test_a_full_disk_keeps_the_finished_rounds(
    tiny_file: File, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    study, run = tiny_file(method=METHODS["ditto"], federation={"on_absent": "continue"}), tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_at(number, patch, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(RunError, match=f"no space left on the disk of.*Finished rounds are safe.*--resume {run}"):
            api.run(study, out=run)
    assert not list(run.rglob("*.tmp")), "what could not be written is taken away"
    api.run(study, resume=run)
    assert_same(run, whole)


def test_a_run_that_is_finished_stays_as_it_is(tmp_path: Path, whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    api.run(None, resume=whole)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()} == before


def test_a_report_that_is_missing_is_written_on_resume(tiny_file: File, tmp_path: Path) -> None:
    run = api.run(tiny_file(method={"rounds": 1}), out=tmp_path / "run")
    (run / "report.html").unlink()
    api.run(None, resume=run)
    assert (run / "report.html").is_file()


def test_what_cannot_be_resumed(tiny_file: File, tmp_path: Path, whole: Path) -> None:
    other = load_study(tiny_file(method=METHODS["ditto"]), overrides=["training.lr=0.2"])
    with pytest.raises(RunError, match=r"other settings.*\n  training.lr: 0.05 -> 0.2\n"):
        api.run(other, resume=whole)
    with pytest.raises(RunError, match="already holds a run"):
        api.run(other, out=whole)
    with pytest.raises(RunError, match="is no results folder"):
        api.run(other, resume=tmp_path / "nothing")
    with pytest.raises(RunError, match="not both"):
        api.run(other, resume=whole, out=tmp_path / "new")
    with pytest.raises(PolyclinicError, match="give a study file, or --resume"):
        api.run(None)


def test_wrong_data_leave_the_folder_free(tiny_file: File, tmp_path: Path) -> None:
    classes = {"classes": ["normal", "pneumonia", "unicorn"]}
    with pytest.raises(PolyclinicError):
        api.run(tiny_file(task=classes), out=tmp_path / "run")
    api.run(tiny_file(method={"rounds": 1}), out=tmp_path / "run")
    assert (tmp_path / "run" / "metrics.json").is_file()
