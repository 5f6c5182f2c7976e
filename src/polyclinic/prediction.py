"""A finished run's model on new files: probabilities to CSV, masks as PNG or NIfTI."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from polyclinic.data.readers import Picture, read_picture
from polyclinic.data.transforms import to_array
from polyclinic.errors import DataError, RunError
from polyclinic.models.normalisation import shared_names
from polyclinic.models.weights import load_tensors, read_tensors
from polyclinic.results import RunFolder
from polyclinic.runner import start_model
from polyclinic.study import Study, nearest
from polyclinic.tasks import Task, make_task

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm", ".nii", ".nii.gz")


def predict_files(run_folder: Path, images: Path, out: Path, *, site: str | None = None) -> Path:
    """Predict one image, every image below a folder, or the images of a table.

    Args:
        run_folder: Of a finished run (one method and seed).
        images: An image file, a folder, or a CSV with an ``image`` column of paths relative to it.
        out: A CSV file (classification), or a folder (segmentation) that gets one mask per image, PNG for flat
            images and NIfTI for volumes, at the image's own size.
        site: Whose personal model to use; needed where the method keeps one per site.

    Returns:
        ``out``.

    Raises:
        RunError: The run is not finished, is a comparison, or has no such model.
        DataError: No images, or one that cannot be read.
    """
    study = RunFolder(run_folder).study()
    model = load_model(run_folder, study, site)
    task = make_task(study.task, study.training)
    files = list(_references(images))
    if study.task.kind == "segmentation":
        out.mkdir(parents=True, exist_ok=True)
        for source, reference in files:
            _write_mask(_masked(model, task, study, source, reference), out, source, reference)
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "prediction", *(f"p_{name}" for name in study.task.classes)])
        for start in range(0, len(files), study.evaluation.batch_size):
            part = files[start : start + study.evaluation.batch_size]
            arrays = [_normalised(read_picture(*f), study, f[1]) for f in part]
            for (_, reference), row in zip(part, _probabilities(model, task, torch.stack(arrays)), strict=True):
                writer.writerow([reference, _decision(row, study), *map(repr, row)])
    return out


def load_model(run_folder: Path, study: Study, site: str | None = None) -> nn.Module:
    """The kept model of a finished run, in evaluation mode on the CPU.

    Raises:
        RunError: There is no such model; names those there are.
    """
    folder = run_folder / "models"
    names = sorted(path.stem for path in folder.glob("*.safetensors"))
    if not names:
        hint = " It is a comparison: give one of the folders below runs/." if (run_folder / "runs").is_dir() else ""
        raise RunError(f"{run_folder} has no models: the run is not finished.{hint}")
    wanted = "global" if names == ["global"] and site is None else site
    if wanted is None:
        raise RunError(f"method {study.method.name} keeps a model per site: give --site, one of {', '.join(names)}.")
    if wanted not in names:
        raise RunError(f"{run_folder} has no model of {wanted!r}.{nearest(wanted, names)}")
    model = start_model(study.model_copy(update={"model": study.model.model_copy(update={"weights": ""})}))
    tensors, _ = read_tensors(folder / f"{wanted}.safetensors")
    missing = [name for name in shared_names(model, "batch") if name not in tensors]
    if missing:
        raise RunError(f"{folder / wanted}.safetensors lacks {missing[0]!r}: it belongs to another network.")
    load_tensors(model, tensors)
    return model.eval()


def _references(images: Path) -> Iterator[tuple[str, str]]:
    """``(source, reference)`` of each image."""
    if not images.exists():
        raise DataError(f"{images} does not exist. Give an image, a folder of images, or a CSV with an image column.")
    if images.is_file() and images.suffix.lower() == ".csv":
        with images.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            if "image" not in (table.fieldnames or []):
                raise DataError(f"{images.name} has no column 'image'. It has: {', '.join(table.fieldnames or [])}.")
            yield from [(str(images.parent.absolute()), row["image"]) for row in table]
        return
    if images.is_file():
        yield str(images.parent.absolute()), images.name
        return
    found = sorted(p for p in images.rglob("*") if p.is_file() and p.name.lower().endswith(SUFFIXES))
    if not found:
        raise DataError(f"{images} holds no image ({', '.join(SUFFIXES)}).")
    yield from [(str(images.absolute()), PurePosixPath(p.relative_to(images)).as_posix()) for p in found]


def _normalised(picture: Picture, study: Study, name: str) -> Tensor:
    array = torch.from_numpy(to_array(picture, study.data.image, name))
    unit = 255.0 if array.dtype == torch.uint8 else 1.0
    return (array.float() / unit - study.data.image.mean) / study.data.image.std


def _probabilities(model: nn.Module, task: Task, inputs: Tensor) -> list[list[float]]:
    with torch.inference_mode():
        rows: list[list[float]] = task.predict(model, inputs).double().tolist()
    return rows


def _decision(row: Sequence[float], study: Study) -> str:
    if study.task.kind == "multi-label":
        return "|".join(name for name, p in zip(study.task.classes, row, strict=True) if p >= 0.5)
    return study.task.classes[int(np.argmax(row))]


def _masked(model: nn.Module, task: Task, study: Study, source: str, reference: str) -> NDArray[np.uint8]:
    """Class index of each pixel, at the size of the file."""
    from polyclinic.data.transforms import restore_mask

    picture = read_picture(source, reference)
    with torch.inference_mode():
        found = task.predict(model, _normalised(picture, study, reference)[None])[0].argmax(0)
    return restore_mask(found.to(torch.uint8).numpy(), picture.pixels.shape[1:], study.data.image)


def _write_mask(mask: NDArray[np.uint8], out: Path, source: str, reference: str) -> None:
    stem = reference.removesuffix(".gz").rsplit(".", 1)[0]
    path = out / f"{stem}_mask{'.png' if mask.ndim == 2 else '.nii.gz'}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if mask.ndim == 2:
        from PIL import Image

        Image.fromarray(mask).save(path)
        return
    from polyclinic.data.readers import write_nifti_like

    write_nifti_like(mask, path, Path(source) / reference)
