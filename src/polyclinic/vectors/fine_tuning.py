"""``polyclinic vectors train``: a site fine-tunes the base as any study is trained, alone."""

from __future__ import annotations

from pathlib import Path

from polyclinic import api
from polyclinic.errors import ContributionError
from polyclinic.models.weights import save_tensors
from polyclinic.results import new_folder
from polyclinic.runner import Observer
from polyclinic.study import ComparisonSettings, Study, with_method
from polyclinic.vectors.base import Base

START = "start.safetensors"


def fine_tune_base(
    base: Path, study: Study, *, out: Path | None = None, resume: Path | None = None, observer: Observer | None = None
) -> Path:
    """Train the base on a site's own images; nothing leaves the site.

    Args:
        base: Folder of the base.
        study: The site's study: its data and training; network, preprocessing and classes must be the base's. Its
            classes may be some of the base's, in any order: the head's rows follow them by name.
        out: Results folder; by default ``runs/<study>-<time>``.
        resume: Results folder of a training that was stopped.
        observer: Told of progress.

    Returns:
        An ordinary results folder of method ``local``; the kept round is the best on the site's validation images.

    Raises:
        ContributionError: The study does not fit the base. Others: as ``polyclinic run``.
    """
    published = Base.load(base)
    own = published.site_study(study)
    own = with_method(own, {"name": "local", "rounds": own.method.rounds}, own.seed)
    folder = resume if resume is not None else new_folder(own, out)
    start = folder.absolute() / START
    own = own.model_copy(
        update={
            "model": own.model.model_copy(update={"weights": str(start)}),
            "compare": ComparisonSettings(),
            "name": study.name,
        }
    )
    if resume is None:
        if folder.exists() and any(folder.iterdir()):
            raise ContributionError(f"{folder} is there already. Give another --out, or --resume {folder}.")
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(start, published.start_tensors(own.task.classes), {"base": published.digest})
    return api.run(own, out=None if resume else folder, resume=resume, observer=observer)
