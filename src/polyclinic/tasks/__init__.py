"""Tasks: what is predicted, with which loss, and how a whole image is inferred."""

from __future__ import annotations

from polyclinic.errors import StudyError
from polyclinic.study import TaskSettings, TrainingSettings
from polyclinic.tasks.base import Task

__all__ = ["PRIOR_LOSSES", "Task", "check_task", "make_task"]

PRIOR_LOSSES = ("logit-adjusted", "fedlc")
"""Losses that look at the class counts of a site's training images."""


def make_task(settings: TaskSettings, training: TrainingSettings) -> Task:
    """Build the study's task.

    Raises:
        StudyError: A loss, a patch or a way of drawing images that this kind of task does not have; names what works.
    """
    check_task(settings, training)
    classes = tuple(settings.classes)
    if settings.kind == "segmentation":
        from polyclinic.tasks.segmentation import Segmentation

        patch = None if training.patch is None else tuple(training.patch)
        return Segmentation(classes, settings.loss, patch, settings.window_overlap)
    from polyclinic.tasks.classification import MultiClass, MultiLabel

    focal = settings.loss == "focal"
    if settings.kind == "multi-label":
        return MultiLabel(classes, focal=focal)
    prior = settings.loss if settings.loss in PRIOR_LOSSES else ""
    return MultiClass(classes, focal=focal, prior=prior, tau=settings.tau)  # type: ignore[arg-type]


def check_task(settings: TaskSettings, training: TrainingSettings) -> None:
    """Refuse what this kind of task does not have.

    Raises:
        StudyError: Names what works.
    """
    kind = settings.kind
    if kind != "multi-label" and len(settings.classes) < 2:
        extra = "the background first" if kind == "segmentation" else "or set task.kind: multi-label"
        raise StudyError(f"task.classes: {kind} needs at least two classes, got {settings.classes}; add one, {extra}.")
    if kind != "segmentation" and settings.loss == "dice-ce":
        raise StudyError(f"task.loss: dice-ce compares masks, but task.kind is {kind!r}. Use cross-entropy or focal.")
    if kind != "multi-class" and settings.loss in PRIOR_LOSSES:
        raise StudyError(
            f"task.loss: {settings.loss} shifts the classes of a softmax, but task.kind is {kind!r}. Use focal."
        )
    if kind != "segmentation" and training.patch is not None:
        raise StudyError(f"training.patch is for segmentation, but task.kind is {kind!r}. Remove it.")
    if settings.threshold != 0.5 and (kind != "segmentation" or len(settings.classes) > 2):
        raise StudyError(
            f"task.threshold: {settings.threshold} is for segmentation with two classes, but task.kind is {kind!r} "
            f"with {len(settings.classes)}. Remove it."
        )
    if kind != "multi-class" and training.balanced:
        instead = (
            "task.loss: focal" if kind == "multi-label" else "training.patch (half of the patches hold foreground)"
        )
        raise StudyError(f"training.balanced is for multi-class, but task.kind is {kind!r}. Remove it; try {instead}.")
