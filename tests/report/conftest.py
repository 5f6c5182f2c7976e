"""Folders that several tests read; each is made once."""

from pathlib import Path

import pytest
from made_up_folders import CLASSES, make_comparison, make_run


@pytest.fixture(scope="session")
def run_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run folder of each kind of task; the multi-class one has a site with one class."""
    root = tmp_path_factory.mktemp("runs")
    return {kind: make_run(root / kind, kind, one_class="harbor") for kind in CLASSES}


@pytest.fixture(scope="session")
def comparison_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six methods with two seeds on four sites."""
    return make_comparison(tmp_path_factory.mktemp("comparison") / "made-up")
