"""The ledger of samples: what is written comes back, and what was changed is found."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from polyclinic.errors import RunError
from polyclinic.synthesis.ledger import Entry, entries, read_ledger, verify, write_ledger
from polyclinic.synthesis.pool import Samples

CLASSES, DEVICES = ("melanoma", 'naevus, "common"'), ("derm-a", "derm ü", "x")
SAMPLES = Samples(
    torch.tensor([1, 0]),
    torch.tensor([1, 2]),
    torch.tensor([7, (1 << 63) - 1]),
    torch.tensor([[[[1, 2], [3, 4]]], [[[5, 6], [7, 8]]]], dtype=torch.uint8),
)


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    path = tmp_path / "samples.csv"
    write_ledger(path, entries(SAMPLES, CLASSES, DEVICES, ["vae", "vae"], [["south", "north"], []]))
    return path


def test_a_line_for_each_sample(ledger: Path) -> None:
    digest = hashlib.sha256(bytes([1, 2, 3, 4])).hexdigest()
    first = Entry(SAMPLES.ids()[0], CLASSES[1], "derm ü", "vae", 7, digest, ("north", "south"))
    lines = ledger.read_text().splitlines()
    assert lines[0] == "id,class,device,generator,seed,sha256,gated_by"
    assert lines[1] == f'{first.id},"naevus, ""common""",derm ü,vae,7,{digest},north|south'
    assert read_ledger(ledger)[0] == first
    assert read_ledger(ledger)[1].gated_by == ()
    assert read_ledger(ledger)[1].seed == 9223372036854775807


def test_a_true_ledger_passes(ledger: Path, tmp_path: Path) -> None:
    verify(ledger, SAMPLES, CLASSES, DEVICES)
    empty = SAMPLES.only(torch.zeros(2, dtype=torch.bool))
    write_ledger(tmp_path / "none.csv", entries(empty, CLASSES, DEVICES, [], []))
    verify(tmp_path / "none.csv", empty, CLASSES, DEVICES)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"id": "0" * 16}, "line 3: id is '0000000000000000'"),
        ({"label": CLASSES[1]}, "line 3: label"),
        ({"device": "derm-a"}, "line 3: device is 'derm-a', the released sample has 'x'"),
        ({"seed": 8}, "line 3: seed is 8"),
        ({"sha256": "f" * 64}, "line 3: sha256"),
    ],
)
def test_a_changed_line_is_found(ledger: Path, changes: dict[str, object], reason: str) -> None:
    first, second = read_ledger(ledger)
    write_ledger(ledger, [first, replace(second, **changes)])  # type: ignore[arg-type]
    with pytest.raises(RunError, match=reason):
        verify(ledger, SAMPLES, CLASSES, DEVICES)


def test_changed_samples_are_found(ledger: Path) -> None:
    assert SAMPLES.images is not None
    images = SAMPLES.images.clone()
    images[0, 0, 0, 0] = 9
    with pytest.raises(RunError, match="line 2: id"):
        verify(ledger, SAMPLES.with_images(images), CLASSES, DEVICES)
    with pytest.raises(RunError, match="line 2"):
        verify(ledger, SAMPLES.only(torch.tensor([1, 0])), CLASSES, DEVICES)
    with pytest.raises(RunError, match="lists 2 samples, 1 were released"):
        verify(ledger, SAMPLES.only(torch.tensor([0])), CLASSES, DEVICES)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "columns are"),
        ("id,class\n", "columns are"),
        ("id,class,device,generator,seed,sha256,gated_by\na,b,c\n", "line 2"),
        ("id,class,device,generator,seed,sha256,gated_by\na,b,c,d,-1,e,f\n", "line 2"),
        ("id,class,device,generator,seed,sha256,gated_by\na,b,c,d,²,e,f\n", "line 2"),
    ],
)
def test_damaged_ledgers_are_named(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "samples.csv"
    path.write_text(text)
    with pytest.raises(RunError, match=f"samples.csv.*{reason}"):
        read_ledger(path)


def test_missing_folder_and_file(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be read"):
        read_ledger(tmp_path / "none.csv")
    with pytest.raises(RunError, match="cannot be written"):
        write_ledger(tmp_path / "none" / "samples.csv", [])
