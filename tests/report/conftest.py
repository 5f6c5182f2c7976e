"""Folders that several tests read; each is made once."""

from pathlib import Path

import pytest
from made_up_exchange import make_exchange_run
from made_up_folders import CLASSES, OTHERS, make_comparison, make_run

from polyclinic.report import write_report


@pytest.fixture(scope="session")
def run_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run folder of each kind of task; the multi-class one has a site with one class."""
    root = tmp_path_factory.mktemp("runs")
    return {kind: make_run(root / kind, kind, one_class="harbor") for kind in CLASSES}


@pytest.fixture(scope="session")
def comparison_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Six methods with two seeds on four sites; two methods with one seed for the other kinds of task."""
    root = tmp_path_factory.mktemp("comparisons")
    made = {kind: make_comparison(root / kind, kind, ("fedavg", "ditto"), seeds=1) for kind in OTHERS}
    return {**made, "multi-class": make_comparison(root / "multi-class")}


@pytest.fixture(scope="session")
def comparison_folder(comparison_folders: dict[str, Path]) -> Path:
    """The comparison of six methods."""
    return comparison_folders["multi-class"]


@pytest.fixture(scope="session")
def exchange_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an exchange of synthetic samples."""
    return make_exchange_run(tmp_path_factory.mktemp("exchange") / "run")


@pytest.fixture(scope="session")
def exchange_page(exchange_folder: Path) -> str:
    """Its report."""
    return write_report(exchange_folder).read_text()


@pytest.fixture(scope="session")
def pages(run_folders: dict[str, Path], comparison_folders: dict[str, Path], exchange_page: str) -> dict[str, str]:
    """The report of every folder: by kind of task for a run, ``compared`` and the kind, or by name."""
    compared = {f"compared {kind}": comparison_folders[kind] for kind in OTHERS}
    folders = {**run_folders, **compared, "comparison": comparison_folders["multi-class"]}
    written = {kind: write_report(folder).read_text() for kind, folder in folders.items()}
    return {**written, "exchange": exchange_page}
