"""What all tests share: real images, where this machine has them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real images: ``POLYCLINIC_DATA``, or ``shared/data`` beside the repository."""
    named = os.environ.get("POLYCLINIC_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real images: {folder} does not exist (set POLYCLINIC_DATA)")
    return folder
