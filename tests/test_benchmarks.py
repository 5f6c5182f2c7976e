"""The benchmarks as commands: that they run, write what they say, and resume."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
