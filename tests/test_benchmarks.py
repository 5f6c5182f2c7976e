"""The benchmarks as commands: that they run, write what they say, and resume."""

from __future__ import annotations

import importlib
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from tiny import TINY, changed

from polyclinic.api import comparison_study, run
from polyclinic.data.readers import read_picture
from polyclinic.study import validate_study

OVERHEAD = Path(__file__).resolve().parents[1] / "benchmarks" / "overhead.py"


def test_overhead_writes_its_table_and_resumes(tmp_path: Path) -> None:
    options = ["--quick", "--only", "small-cnn", "--rounds", "1", "--parts", "speed", "--results", str(tmp_path)]

    def run() -> str:
        done = subprocess.run([sys.executable, str(OVERHEAD), *options], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "speed/small-cnn/0: measuring" in run()
    table = (tmp_path / "overhead.md").read_text(encoding="utf-8")
    assert "| small-cnn, 28 px, 10 sites |" in table
    found = json.loads((tmp_path / "overhead.json").read_text(encoding="utf-8"))
    assert "--only small-cnn" in found["command"]
    assert found["seeds"] == [0]
    cell = found["cells"]["speed/small-cnn/0"]
    (one,) = cell["measured"]["rounds"]
    assert 0.2 < one["wall"]["polyclinic"] / one["wall"]["plain"] < 20
    assert cell["measured"]["difference"]["first"] < 1e-5
    assert found["tables"][0]["rows"][0][5] == "at most 1.15"

    assert "speed/small-cnn/0: measured before" in run()
    again = json.loads((tmp_path / "overhead.json").read_text(encoding="utf-8"))
    assert again["cells"] == found["cells"]
    assert again["tables"] == found["tables"]


def test_the_large_scan_is_the_same_as_nifti_and_as_dicom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(OVERHEAD.parent))
    made = importlib.import_module("volume_memory")
    shape = (5, 24, 20)
    made.write_nifti(tmp_path / "scan.nii.gz", shape)
    made.write_series(tmp_path / "series", shape)
    first, second = (read_picture(str(tmp_path), name) for name in ("scan.nii.gz", "series"))
    assert first.pixels.shape == (1, *shape)
    assert np.array_equal(first.pixels, second.pixels)
    assert first.spacing == pytest.approx(made.SPACING)
    assert second.spacing == pytest.approx(made.SPACING)
    assert made.manifest(tmp_path / "series").read_text() == "image\nseries\n"


def test_costs_of_a_step_are_measured_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(OVERHEAD.parent))
    made = importlib.import_module("personalisation_cost")
    case = {"model": "small-cnn", "size": [16, 16], "channels": 1, "batch_size": 2}
    times = made.child({"kind": "time", "case": case, "threads": 1, "turns": 2, "repeat": 0})
    assert list(times) == list(made.VARIANTS)
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in times.values())
    used = made.child({"kind": "memory", "case": case, "threads": 1, "variant": "hf"})
    assert 0 < used["before"] <= used["peak"]
    assert made.ratio([2.0, 1.0, 4.0]) == "2.00 (1.00 to 4.00)"


def test_tables_of_pppml_hmi_from_two_finished_comparisons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(OVERHEAD.parent))
    made = importlib.import_module("pppml_hmi")
    tuning = {"finetune": {"steps": 2, "optimizer": "sgd", "lr": 0.05}}
    sections = {
        "training": {"batch_size": 2, "steps": 4, "lr": 0.5},
        "evaluation": {"bootstrap": 10, "examples": 0},
        "method": {"name": "per-fedavg", "rounds": 1, **tuning},
    }
    monkeypatch.setitem(made.STUDIES, "tiny", ("auroc", "accuracy"))
    # Its pictures take longer than all the rest. By module: the package has a function of that name.
    monkeypatch.setattr(importlib.import_module("polyclinic.report"), "write_report", lambda folder: folder)

    def finished(folder: str, methods: list[object], **model: str) -> Path:
        study = validate_study(changed(TINY, {**sections, "model": model}))
        return run(comparison_study(study, methods, [0]), out=tmp_path / folder)

    first = finished("all", ["fedavg", {"name": "fedavg-ft", **tuning}])
    second = finished("local", made._local_norm(first), norm="batch-local")
    measured = json.loads(json.dumps(made.found([first, second])))
    local = [f"{name}{made.SUFFIX}" for name in made.LOCAL_NORM]
    assert list(measured["table"]) == ["per-fedavg", "fedavg", "fedavg-ft", *local]
    assert set(measured["costs"]) == set(measured["table"])

    tables = made.study_tables("tiny", measured, {"commit": "abc", "threads": 1})
    values, others, parts, costs = tables
    assert values.columns == ["method", "mean over sites", "worst site", "north", "south", "west"]
    assert all(len(row) == len(table.columns) for table in tables for row in table.rows)
    mean = {name: row["mean"]["auroc"]["value"] for name, row in measured["table"].items()}
    assert [row[0] for row in values.rows] == [row[0] for row in others.rows] == list(mean)
    assert len(set(mean.values())) > 3, "equal values would show nothing"
    assert [row[1].split()[0] for row in values.rows] == [f"{value:.3f}" for value in mean.values()]
    gains = {row[0].partition(": ")[2]: row[1].split()[0] for row in parts.rows}
    assert gains["fedavg-ft minus fedavg"] == f"{mean['fedavg-ft'] - mean['fedavg']:+.3f}"
    assert f"{local[2]} minus {local[1]}" in gains
    assert len(gains) == len(parts.rows) == 6
    assert {row[0]: row[2] for row in costs.rows}["fedavg"] == "1.00"


@pytest.fixture
def secure_sum(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(OVERHEAD.parent))
    return importlib.import_module("secure_sum")


def test_secure_sums_are_measured_and_what_is_not_installed_is_said(
    secure_sum: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = secure_sum.Option("a peer", ("no-such-package==9.9",))
    monkeypatch.setitem(secure_sum.OPTIONS, "flower", absent)
    command = ["secure_sum.py", "--quick", "--only", "plain", "masked-16", "flower", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    secure_sum.main()
    assert "4/masked-16/0: measuring" in capsys.readouterr().out
    table = (tmp_path / "secure_sum-quick.md").read_text(encoding="utf-8")
    assert "| a peer | not installed (pip install no-such-package==9.9) |" in table
    cells = json.loads((tmp_path / "secure_sum-quick.json").read_text(encoding="utf-8"))["cells"]
    plain, masked = (cells[f"4/{name}/0"]["measured"] for name in ("plain", "masked-16"))
    assert plain["error"] < 1e-9
    assert 0 < masked["error"] < 1e-3
    assert 400_000 < plain["up"] < 420_000
    assert 200_000 < masked["up"] < 220_000
    assert masked["seconds"]["site"]["masked-vector"][0] > 0

    secure_sum.main()
    assert "measuring" not in capsys.readouterr().out


def test_a_phase_counts_neither_phases_inside_it_nor_what_is_left_out(
    secure_sum: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = importlib.import_module("secure_sum_peers")
    now = [0.0]
    monkeypatch.setattr(peers, "clocks", lambda: (now[0], 10 * now[0]))

    def work(seconds: float) -> None:
        now[0] += seconds

    meter = peers.Meter()
    for _ in range(2):
        with meter.phase("server", "sum"):
            work(1)
            with meter.phase("site", "mask", 0.5):
                work(2)
                with meter.leave_out():
                    work(4)
            work(8)
    assert meter.seconds == {"site": {"mask": [2, 20]}, "server": {"sum": [18, 180]}}


def test_goals_compare_neighbours_and_are_met_as_shown(secure_sum: ModuleType) -> None:
    def one(site: float, up: float) -> dict[str, object]:
        seconds = {"site": {"keys": [site, 9.0], "open": [5.0, 5.0]}}
        return {"seconds": seconds, "up": up, "float32": 100, "memory": {"mask": 300 / 2**20, "keys": 0.0}}

    found = {"masked-32": [one(0.1, 100.4), one(0.2, 100.4), one(0.4, 100.4)], "flower": [one(0.8, 200), one(1, 200)]}
    by_text = {goal.text: goal for goal in secure_sum.GOALS}
    ratio = by_text["SecAgg+ beside masked: processor time of a site"]
    assert ratio.values(found) == pytest.approx([8, 5])
    assert (ratio.met(7.994), ratio.met(7.996)) == (False, True)
    own = by_text["masked, 32-bit lanes: bytes sent, beside float32"]
    assert own.values(found) == pytest.approx([1.004] * 3)
    assert (own.met(1.004), own.met(1.006)) == (True, False)
    assert by_text["NVFlare beside masked: bytes sent"].values(found) == []
    table = secure_sum.goals({4: found})
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows[ratio.text] == ["4", "at least 8 x", "6.50 (5.00 to 8.00) x", "no", ratio.cause]
    assert rows["masked: memory of a site, beside the float32 vector"][-3:] == ["3.00 (3.00 to 3.00) x", "yes", ""]
    assert rows["NVFlare beside masked: bytes sent"][-3:] == ["not measured", "", ""]
    assert "masked: processor time of the server" not in rows, "a goal for ten sites"


@pytest.mark.parametrize(("peer", "package", "apart"), [("nvflare", "tenseal", 1e-7), ("flower", "flwr", 1e-3)])
def test_peers_find_the_mean(secure_sum: ModuleType, peer: str, package: str, apart: float) -> None:
    pytest.importorskip(package)
    peers = importlib.import_module("secure_sum_peers")
    case, meter = peers.Case(3, 2000), peers.Meter()
    assert sum(case.shapes().values()) == 2000
    found = peers.PEERS[peer](case, meter)
    assert 0 < found["error"] < apart
    assert found["up"] > 2 * 4 * 2000
    assert all(spent[1] > 0 for spent in itertools.chain(*(p.values() for p in meter.seconds.values())))
