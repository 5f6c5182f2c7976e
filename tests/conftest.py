"""What all tests share: real images, where this machine has them, and a study that runs in a second."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import settings
from tiny import TINY, changed

os.environ["OMP_NUM_THREADS"] = "1"
# No example of a property has a time limit: on a busy machine any of them may be slow once.
settings.register_profile("polyclinic", deadline=None)
settings.load_profile("polyclinic")
Said = tuple[int, str, str]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real images: ``POLYCLINIC_DATA``, or ``shared/data`` beside the repository."""
    named = os.environ.get("POLYCLINIC_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real images: {folder} does not exist (set POLYCLINIC_DATA)")
    return folder


@pytest.fixture
def tiny_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes the tiny study, with sections changed: ``tiny_file(method={"name": "ditto"})``."""

    def write(file: str = "tiny.yaml", **sections: Any) -> Path:
        path = tmp_path / file
        path.write_text(yaml.safe_dump(changed(TINY, sections)), encoding="utf-8")
        return path

    return write


@pytest.fixture
def tiny_study() -> Callable[..., Any]:
    """The tiny study, validated, with sections changed."""
    from polyclinic.study import validate_study

    return lambda **sections: validate_study(changed(TINY, sections))


@pytest.fixture
def polyclinic_says(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Runs the command line in this process: exit code, standard output, standard error."""

    def run(*arguments: str | Path) -> Said:
        from polyclinic import cli

        monkeypatch.setattr(sys, "argv", ["polyclinic", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run
