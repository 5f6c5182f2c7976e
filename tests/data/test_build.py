from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from polyclinic.data.build import build_manifest
from polyclinic.data.manifest import read_manifest
from polyclinic.errors import DataError
from polyclinic.study import TaskSettings

Writer = Callable[..., Path]
TASK = TaskSettings(classes=["sick", "well"])


def pngs(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((2, 2), np.uint8)).save(folder / name)


def labels(folder: Path, *rows: str) -> Path:
    path = folder / "labels.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def test_joins_by_path_name_and_stem(tmp_path: Path) -> None:
    pngs(tmp_path, "x/a.png", "x/b.png", "y/c.png", "masks/a.png", ".hidden/d.png")
    (tmp_path / "readme.txt").write_text("hello")
    table = labels(
        tmp_path,
        "image,label,patient,site,device,mask,split",
        "x/a.png,sick,p1,north,GE,masks/a.png,train",
        "b.png,well,p2,north,,,",
        "c,well,p3,south,,,test",
    )
    built = build_manifest(tmp_path, table, tmp_path / "cases.csv")
    assert (built.ignored, built.masks) == (["readme.txt"], 1)
    cases = read_manifest(tmp_path / "cases.csv", TASK)
    assert [(c.image, c.label, c.patient, c.site, c.device, c.mask, c.split) for c in cases] == [
        ("x/a.png", "sick", "p1", "north", "GE", "masks/a.png", "train"),
        ("x/b.png", "well", "p2", "north", "", "", ""),
        ("y/c.png", "well", "p3", "south", "", "", "test"),
    ]
    again = build_manifest(tmp_path, table, tmp_path / "cases.csv")
    assert again.cases == built.cases


def test_unmatched_is_reported_both_ways(tmp_path: Path) -> None:
    pngs(tmp_path, "a.png", "b.png", "c.png")
    table = labels(tmp_path, "image,label,patient", "a.png,sick,p1", "q.png,sick,p2")
    with pytest.raises(
        DataError, match=r"1 of its 2 rows name no image \(first: row 3, 'q.png'\); 2 images have no row"
    ):
        build_manifest(tmp_path, table, tmp_path / "cases.csv", site="north")
    pngs(tmp_path, "sub/a.png")
    with pytest.raises(DataError, match=r"row 2: 'a' could be a.png or sub/a.png"):
        build_manifest(tmp_path, labels(tmp_path, "image,patient", "a,p"), tmp_path / "cases.csv", site="north")
    with pytest.raises(DataError, match=r"row 3: 'b' is the image of row 2 already"):
        build_manifest(tmp_path, labels(tmp_path, "image,patient", "b.png,p", "b,p"), tmp_path / "cases.csv", site="n")
    assert not (tmp_path / "cases.csv").exists()


def test_patients_and_site_are_needed(tmp_path: Path) -> None:
    pngs(tmp_path, "a.png")
    with pytest.raises(DataError, match=r"1 of 1 images have no patient \(first: a.png\). Add a 'patient' column"):
        build_manifest(tmp_path, None, tmp_path / "cases.csv", site="north")
    table = labels(tmp_path, "file,label,patient", "a.png,sick,p1")
    with pytest.raises(DataError, match="have no site"):
        build_manifest(tmp_path, table, tmp_path / "cases.csv")
    with pytest.raises(DataError, match="'no rth' is not a valid name"):
        build_manifest(tmp_path, table, tmp_path / "cases.csv", site="no rth")
    with pytest.raises(DataError, match="does not lie below"):
        build_manifest(tmp_path, table, tmp_path / "else" / "cases.csv", site="north")


def test_dicom_series_become_rows_with_patient_and_device(
    tmp_path: Path, write_dicom: Writer, write_series: Writer
) -> None:
    volume = np.arange(4 * 2 * 3, dtype=np.int16).reshape(4, 2, 3)
    maker = {"Manufacturer": "GE", "ManufacturerModelName": "Revolution"}
    write_series("s1", volume, [0.0, 1.0, 2.0, 3.0], **maker)
    write_dicom(tmp_path / "xray", volume[0], SeriesInstanceUID="8.8", PatientID="P2")
    np.savez(tmp_path / "d.npz", train_images=np.zeros((2, 4, 4), np.uint8), train_labels=np.zeros(2))
    table = labels(
        tmp_path,
        "image,label,patient",
        "s1,sick,",
        "xray,well,",
        *(f"d.npz/train_images#{k},well,n{k}" for k in (0, 1)),
    )
    build_manifest(tmp_path, table, tmp_path / "m.parquet", site="north")
    cases = read_manifest(tmp_path / "m.parquet", TASK)
    assert [(c.image, c.patient, c.device) for c in cases] == [
        ("d.npz/train_images#0", "n0", ""),
        ("d.npz/train_images#1", "n1", ""),
        ("s1", "P1", "GE Revolution"),
        ("xray", "P2", ""),
    ]


def test_a_series_needs_its_own_folder(tmp_path: Path, write_dicom: Writer, write_series: Writer) -> None:
    volume = np.zeros((4, 2, 3), np.int16)
    write_series("s1", volume, [0.0, 1.0, 2.0, 3.0])
    write_dicom(tmp_path / "s1" / "scout.dcm", volume[0], SeriesInstanceUID="8.8")
    with pytest.raises(DataError, match=r"series 1.2.4 \(4 files, .* lies with s1/scout.dcm of another series"):
        build_manifest(tmp_path, None, tmp_path / "m.csv", site="north")
    (tmp_path / "s1" / "scout.dcm").unlink()
    write_dicom(tmp_path / "s2" / "a.dcm", volume[0])
    with pytest.raises(DataError, match=r"series 1.2.4 lies in 2 folders: s1, s2"):
        build_manifest(tmp_path, None, tmp_path / "m.csv", site="north")


def test_refuses_an_empty_or_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no DICOM"):
        build_manifest(tmp_path, None, tmp_path / "m.csv")
    with pytest.raises(DataError, match="is not a folder"):
        build_manifest(tmp_path / "none", None, tmp_path / "m.csv")
