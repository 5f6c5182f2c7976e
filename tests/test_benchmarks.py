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


def test_steps_of_natimg_fl_are_measured_in_rounds_in_which_the_central_model_teaches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(OVERHEAD.parent))
    made = importlib.import_module("natimg_cost")
    for name, value in {"BATCH": 4, "STEPS": 6, "PUBLIC": 20}.items():
        monkeypatch.setattr(made, name, value)
    public = made.draw_public(tmp_path)
    for arm, method in made.ARMS.items():
        found = made.seconds(method, "small-cnn", public, tmp_path / arm)
        assert len(found) == made.ROUNDS - made.WARM
        assert min(found) > 0
        if arm != "local":
            (told,) = (tmp_path / arm).rglob("transfer/site.json")
            rounds = json.loads(told.read_text())["rounds"][made.WARM :]
            assert all(one["matching"] > 0 for one in rounds)
            assert all(("meta_steps" in one) == (arm == "learned") for one in rounds)


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


@pytest.fixture
def merging(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(OVERHEAD.parent))
    return importlib.import_module("merge")


FAKE = """#!{python}
import json, pathlib, sys
if sys.argv[1] != "--help":
    from safetensors.numpy import load_file, save_file
    config = json.loads(pathlib.Path(sys.argv[1]).read_text())
    assert config["merge_method"] == "task_arithmetic" and config["parameters"]["normalize"] is False
    base, models = load_file(config["base_model"]), [load_file(one["model"]) for one in config["models"]]
    pathlib.Path(sys.argv[2]).mkdir()
    merged = {{name: base[name] + sum(one[name] - base[name] for one in models) for name in base}}
    save_file(merged, sys.argv[2] + "/model.safetensors")
"""


def test_merges_are_measured_side_by_side_and_their_files_removed(
    merging: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program, scratch = tmp_path / "mergekit-pytorch", tmp_path / "scratch"
    program.write_text(FAKE.format(python=sys.executable), encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setattr(merging, "QUICK", {"width": 8, "depth": 1, "sites": 3})
    monkeypatch.setattr(merging, "packages", lambda program: {"mergekit": "9.9"})
    command = ["merge.py", "--quick", "--only", "sum", "--mergekit", str(program), "--scratch", str(scratch)]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path)])
    merging.main()
    assert "sum/0: measuring" in capsys.readouterr().out
    assert list(scratch.iterdir()) == []
    cell = json.loads((tmp_path / "merge-quick.json").read_text(encoding="utf-8"))["cells"]["sum/0"]["measured"]
    assert cell["largest_tensor"] == 4 * 1000 * 8
    found = cell["programs"]
    assert set(found) == {"ours", "plain", "mergekit"}
    assert 0 < found["plain"]["apart"] < 1e-6
    assert 0 < found["mergekit"]["apart"] < 1e-6
    assert len(found["ours"]["reads"]) == 3
    assert 0 < found["ours"]["held"] <= found["ours"]["peak"]
    assert all(0 < one["start"] < one["wall"] and one["cpu"] > 0 and one["closing"] > 0 for one in found.values())
    merging.main()
    assert "measuring" not in capsys.readouterr().out


def test_merges_of_the_plain_script_are_ours(merging: ModuleType, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    probes, peers = (importlib.import_module(name) for name in ("merge_probes", "merge_peers"))
    made = probes.write(str(tmp_path), 8, 1, 4)
    base = load_file(tmp_path / "base.safetensors")
    vectors = [load_file(path) for path in probes.files(tmp_path, "vector", 4)]
    models = [load_file(path) for path in probes.files(tmp_path, "model", 4)]
    assert made["values"] == sum(tensor.numel() for tensor in base.values())
    name = "head.weight"
    assert np.allclose(models[3][name], base[name] + vectors[3][name], atol=1e-7)
    assert np.corrcoef(*(v[name].flatten() for v in vectors[:2]))[0, 1] == pytest.approx(0.5, abs=0.05)
    assert probes.shapes(768, 12)["blocks.11.mlp.fc1.weight"] == (3072, 768)
    assert sum(int(np.prod(shape)) for shape in probes.shapes(768, 12).values()) == 86_567_656  # ViT-B/16
    for rule in merging.RULES:
        out = tmp_path / f"{rule}.safetensors"
        probes.ours(str(tmp_path), rule, 4, str(out), 0.0)
        ours = load_file(out)
        for name, start in base.items():
            stack = np.stack([vector[name] for vector in vectors])
            plain = peers.merged(rule, importlib.import_module("torch").tensor(stack))
            assert np.allclose(ours[name], start + plain, atol=1e-6), (rule, name)
    # One that is not the script's: the sum of the first is told apart from the median, and by how much.
    far = probes.apart(*(str(tmp_path / f"{name}.safetensors") for name in ("base", "sum", "median")))["apart"]
    assert 0.6 < far < 0.9, "a median is about a quarter of the sum"


def test_goals_of_merges_count_the_disk_and_compare_neighbours(merging: ModuleType) -> None:
    def cell(merge: float, peak: float, read: float = 1.0) -> dict[str, object]:
        part = {"start": 5.0, "wall": 5.0 + merge, "closing": 0.5, "writing": 0.25, "hashing": 2.0, "cpu": 1.0}
        part |= {"into_nothing": 1.0, "reads": [read, 9.0, 0.1], "held": 200.0, "peak": peak, "anonymous": 1.0}
        part |= {"cold_read": 2.0, "cold_merge": 3.0}
        peer = {**part, "wall": 5.0 + 4 * merge + 1.5}
        programs = {"ours": {**part, "apart": 0.0}, "plain": {**peer, "apart": 1e-7}}
        return {"programs": programs, "sites": 10, "largest_tensor": 10**7, "values": 9, "file": 36}

    found = {"sum": [cell(1.0, 500), cell(2.0, 560, 2.0), cell(1.02, 500)], "median": [cell(1.0, 600)]}
    rows = {row[0]: row[1:] for row in merging.goals(found).rows}
    assert rows["sum: merging beside reading the files once"] == ["at most 1.5 x", "1.50 (1.25 to 1.52) x", "yes", ""]
    assert rows["sum: most memory of the process"] == ["at most 600 MB", "524 (524 to 587) MB", "yes", ""]
    assert rows["median: most memory of the process"] == ["at most 600 MB", "629 MB", "no", ""]
    assert not merging.goals({"sum": [cell(1.1, 1)]}).rows[0][3].startswith("yes")
    table = merging.side_by_side(found)
    by_program = {(row[0], row[1]): row for row in table.rows}
    assert by_program["median", "plain torch script"][6] == "4.00 x"
    assert by_program["sum", "mergekit-pytorch"][2].startswith("not installed")
    assert by_program["median", "mergekit-pytorch"][2] == "has no such method"
    tables = [table, merging.ours(found), merging.goals(found)]
    assert all(len(row) == len(one.columns) for one in tables for row in one.rows)


def test_a_watched_program_tells_its_memory_and_its_failure(merging: ModuleType) -> None:
    code = "import time; a = bytes(2**27); b = bytearray(a); time.sleep(0.2); print('first'); print('last')"
    seen = merging.watched([sys.executable, "-c", code])
    assert seen["said"] == "last"
    assert 0.2 < seen["wall"] < 60
    assert 128 < seen["anonymous"] <= seen["peak"]
    with pytest.raises(SystemExit, match="no such rule"):
        merging.watched([sys.executable, "-c", "raise ValueError('no such rule')"])
