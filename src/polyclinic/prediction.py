"""A finished run's model, or a merged one, on new files: probabilities to CSV, masks as PNG or NIfTI."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn

from polyclinic.data.build import find_images
from polyclinic.data.dataset import normalized
from polyclinic.data.readers import Picture, read_picture, write_nifti_like
from polyclinic.data.tables import load_table
from polyclinic.data.transforms import Placement, place
from polyclinic.errors import DataError, RunError, nearest
from polyclinic.evaluation.central import CENTRAL
from polyclinic.evaluation.inference import FALLBACK_THRESHOLD
from polyclinic.evaluation.results import read_results
from polyclinic.models.normalisation import shared_names
from polyclinic.models.registry import start_model, untrained_model
from polyclinic.models.weights import load_tensors, read_tensors
from polyclinic.results import RunFolder
from polyclinic.study import ModelSettings, Study
from polyclinic.tasks import Task, make_task
from polyclinic.tasks.segmentation import Segmentation
from polyclinic.vectors.merged import Merged


def predict_files(run_folder: Path, images: Path, out: Path, *, site: str | None = None) -> Path:
    """Predict one image, every image below a folder, or the images of a table.

    Args:
        run_folder: Of a finished run (one method and seed), or of a model that ``polyclinic vectors merge`` wrote.
        images: An image file, a folder, or a CSV or Parquet table with a column ``image`` of paths relative to it.
        out: A CSV file (classification), or a folder (segmentation) that gets one mask per image, PNG for flat
            images and NIfTI for volumes, at the image's own size, its values the indices of the classes.
        site: Whose personal model to use, each with the site's own network; needed where the method keeps one per site.
            ``central``: the server's own, where there is one. Where one model serves all but
            each site chose its threshold on validation images, whose threshold; without it their mean.

    Returns:
        ``out``.

    Raises:
        RunError: The run is not finished, is a comparison, or has no such model; or ``out`` cannot be written.
        DataError: No images, or one that cannot be read.
    """
    merged = Merged.load(run_folder) if Merged.is_there(run_folder) else None
    study = RunFolder(run_folder).study() if merged is None else merged.study()
    model = load_model(run_folder, study, site) if merged is None else _load_merged(merged, study, site)
    task = make_task(study.task, study.training)
    source, references = _references(images)
    if isinstance(task, Segmentation):
        unchosen = merged is not None and study.task.threshold == "validation"
        threshold = FALLBACK_THRESHOLD if unchosen else kept_threshold(run_folder, study, site)
        for reference, path in _mask_names(references, len(study.data.image.size), out).items():
            mask, picture = _predicted_mask(model, task, study, threshold, source, reference)
            _write_mask(mask, path, source, reference, picture)
        return out
    rows = []
    for start in range(0, len(references), study.evaluation.batch_size):
        part = references[start : start + study.evaluation.batch_size]
        inputs = torch.stack([_normalised(_placed(source, name, study), study) for name in part])
        found = _probabilities(model, task, inputs)
        rows += [[name, _decision(row, study), *map(repr, row)] for name, row in zip(part, found, strict=True)]
    with _writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["image", "prediction", *(f"p_{name}" for name in study.task.classes)])
            writer.writerows(rows)
    return out


def load_model(run_folder: Path, study: Study, site: str | None = None) -> nn.Module:
    """The kept model of a finished run, in evaluation mode on the CPU.

    Raises:
        RunError: There is no such model; names those there are.
    """
    folder = run_folder / "models"
    names = sorted(path.stem for path in folder.glob("*.safetensors")) if RunFolder(run_folder).finished else []
    own = [name for name in names if name != CENTRAL]
    if not own:
        hint = " It is a comparison: give one of the folders below runs/." if (run_folder / "runs").is_dir() else ""
        raise RunError(f"{run_folder} has no models: the run is not finished.{hint}")
    if own == ["global"] and site not in (None, CENTRAL) and study.task.threshold != "validation":
        raise RunError(f"method {study.method.name} has one model for all sites: leave out --site.")
    wanted = "global" if own == ["global"] and site != CENTRAL else site
    if wanted is None:
        raise RunError(f"method {study.method.name} keeps a model per site: give --site, one of {', '.join(names)}.")
    if wanted not in names:
        raise RunError(f"{run_folder} has no model of {wanted!r}. {nearest(wanted, names)}")
    tensors, metadata = read_tensors(folder / f"{wanted}.safetensors")
    settings = study.model_of(wanted)
    if wanted == CENTRAL:
        settings = _central_settings(metadata.get("model", ""), folder / f"{CENTRAL}.safetensors")
    model = untrained_model(study, settings.model_copy(update={"weights": ""}))
    missing = [name for name in shared_names(model, "batch") if name not in tensors]
    if missing:
        raise RunError(f"{folder / wanted}.safetensors lacks {missing[0]!r}: it belongs to another network.")
    load_tensors(model, tensors)
    return model.eval()


def _central_settings(told: str, path: Path) -> ModelSettings:
    """The network of the server's own model, which it was saved with.

    Raises:
        RunError: The file does not say, or its running statistics are not those of patients.
    """
    try:
        settings = ModelSettings.model_validate_json(told)
    except ValidationError as error:
        raise RunError(f"{path} does not say which network it belongs to. Finish the run again.") from error
    if settings.norm.startswith("batch"):
        raise RunError(
            f"{path} was trained where there are no patients, and its batch normalisation has the statistics of public "
            "images, with which it knows nothing of yours. Give --site with a site's name; or train with norm: group "
            "for the central network."
        )
    return settings


def _load_merged(merged: Merged, study: Study, site: str | None) -> nn.Module:
    if site is not None:
        raise RunError(f"{merged.folder} holds one merged model for all sites: leave out --site.")
    model = start_model(study)
    load_tensors(model, merged.tensors())
    return model.eval()


def kept_threshold(run_folder: Path, study: Study, site: str | None = None) -> float:
    """From which probability on a pixel is foreground: the study's value, or what the sites chose.

    Args:
        run_folder: Of a finished run.
        study: Of that run.
        site: Whose; without it the mean over sites.

    Raises:
        RunError: The run had no such site; names those it had.
    """
    if study.task.threshold != "validation":
        return study.task.threshold
    chosen = {name: result.threshold for name, result in read_results(run_folder).items()}
    if site is not None and site not in chosen:
        raise RunError(f"{run_folder} has no threshold of {site!r}. {nearest(site, list(chosen))}")
    values = [value for name, value in chosen.items() if value is not None and site in (None, name)]
    return float(np.mean(values))


def _references(images: Path) -> tuple[str, list[str]]:
    """The folder of the images, and the images in it."""
    if images.is_dir():
        found = find_images(images)
        if not found:
            raise DataError(f"{images} holds no images.")
        return str(images.absolute()), found
    if not images.is_file():
        raise DataError(f"{images} does not exist. Give an image, a folder of images, or a table with an image column.")
    if not images.name.lower().endswith((".csv", ".csv.gz", ".parquet")):
        return str(images.parent.absolute()), [images.name]
    table = load_table(images)
    at = table.column("image", "paths of the images, relative to the table")
    return str(images.parent.absolute()), [row[at] for _, row in table.rows]


def _mask_names(references: Sequence[str], dims: int, out: Path) -> dict[str, Path]:
    """Where each image's mask goes."""
    names: dict[str, Path] = {}
    for reference in references:
        stem = reference.removesuffix(".gz")
        stem = stem[: -len(suffix)] if (suffix := PurePosixPath(stem).suffix) else stem
        path = out / f"{stem}_mask{'.png' if dims == 2 else '.nii.gz'}"
        if path in names.values():
            other = next(name for name, taken in names.items() if taken == path)
            raise DataError(f"{other} and {reference} would both give {path.name}. Predict them one by one.")
        names[reference] = path
    return names


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"{out} cannot be written: {error.strerror or error}. Give another --out.") from error


def _placed(source: str, reference: str, study: Study) -> Placement:
    return place(read_picture(source, reference), study.data.image, reference)


def _normalised(placed: Placement, study: Study) -> Tensor:
    pixels = np.require(placed.image(), requirements="W")  # a copy only of what cannot be written to
    return normalized(torch.from_numpy(pixels), study.data.image.mean, study.data.image.std)


def _probabilities(model: nn.Module, task: Task, inputs: Tensor) -> list[list[float]]:
    with torch.inference_mode():
        rows: list[list[float]] = task.predict(model, inputs).double().tolist()
    return rows


def _decision(row: Sequence[float], study: Study) -> str:
    if study.task.kind == "multi-label":
        return "|".join(name for name, p in zip(study.task.classes, row, strict=True) if p >= 0.5)
    return study.task.classes[int(np.argmax(row))]


def _predicted_mask(
    model: nn.Module, task: Segmentation, study: Study, threshold: float, source: str, reference: str
) -> tuple[NDArray[np.uint8], Picture]:
    """The mask of one image at its own size, and the image without its pixels.

    Of a large scan little more is in memory than the network needs.
    """
    placed = _placed(source, reference, study)
    inputs = _normalised(placed, study)[None]
    with torch.inference_mode():
        mask = task.mask(task.predict(model, inputs), threshold)[0]
    return placed.restore(mask.numpy()), replace(placed.picture, pixels=np.empty(0, np.uint8))


def _write_mask(mask: NDArray[np.uint8], path: Path, source: str, reference: str, picture: Picture) -> None:
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if mask.ndim == 3:
            write_nifti_like(mask, path, source, reference, picture)
        else:
            Image.fromarray(mask).save(path)
