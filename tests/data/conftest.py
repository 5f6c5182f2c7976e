"""Small DICOM files, written by pydicom."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Writer = Callable[..., Path]


def _write(path: Path, pixels: np.ndarray, **fields: Any) -> Path:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    bits = pixels.dtype.itemsize * 8
    values = {
        "SOPClassUID": CTImageStorage,
        "SOPInstanceUID": "1.2.3",
        "SeriesInstanceUID": "1.2.4",
        "PatientID": "P1",
        "Rows": pixels.shape[-2],
        "Columns": pixels.shape[-1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        **fields,
    }
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    dataset.PixelData = pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture
def write_dicom() -> Writer:
    """``write_dicom(path, pixels, Keyword=value, ...)``; explicit little endian, bits from the type."""
    return _write


@pytest.fixture
def write_series(tmp_path: Path) -> Writer:
    """``write_series(folder, volume [D, H, W], heights, **fields)``: one axial file a slice, in scrambled order."""

    def write(name: str, volume: np.ndarray, heights: list[float], **fields: Any) -> Path:
        for k in np.random.default_rng(0).permutation(len(volume)):
            place = {
                "ImagePositionPatient": [-10, -20, heights[k]],
                "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
                "PixelSpacing": [2.0, 3.0],
                **fields,
            }
            _write(tmp_path / name / f"{(k * 7) % 11:02d}.dcm", volume[k], **place)
        return tmp_path

    return write
