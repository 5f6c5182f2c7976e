"""Start-up stays quick: nothing heavy is imported before it is needed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import polyclinic

HEAVY = ("torch", "monai", "sklearn", "scipy", "matplotlib", "numpy", "nibabel", "pydicom", "pyarrow", "PIL", "jinja2")
SOURCE = str(Path(polyclinic.__file__).resolve().parents[1])


def loaded(code: str) -> tuple[list[str], float]:
    """Which heavy modules the code leaves behind, and its wall time."""
    tail = f"\nimport sys; print('loaded', *[m for m in {HEAVY!r} if m in sys.modules])"
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code + tail], env={**os.environ, "PYTHONPATH": SOURCE}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()[1:], time.perf_counter() - started


def test_import_polyclinic() -> None:
    modules, seconds = loaded("import polyclinic; polyclinic.run; polyclinic.load_study; polyclinic.PolyclinicError")
    assert modules == []
    assert seconds < 5


def test_help() -> None:
    code = "import sys\nfrom polyclinic.cli import app\nsys.argv = ['polyclinic', '--help']\n"
    modules, seconds = loaded(code + "try: app()\nexcept SystemExit as end: assert end.code == 0")
    assert modules == []
    assert seconds < 5


def test_an_unknown_study_key_is_found_before_monai_is_needed() -> None:
    code = "from polyclinic import load_study\ntry: load_study('nothing.yaml')\nexcept Exception as error: print(error)"
    assert loaded(code)[0] == []
