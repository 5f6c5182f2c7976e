"""Combinations with ``synthesis`` that cannot work, found before anything starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyclinic.errors import StudyError

if TYPE_CHECKING:
    from polyclinic.methods.base import Method
    from polyclinic.study import Study


def check_synthesis(study: Study, method: type[Method]) -> None:
    """Refuse what cannot work.

    Args:
        study: As the method runs it.
        method: Its class.

    Raises:
        StudyError: With the reason and the nearest combination that works.
    """
    settings = study.synthesis
    if settings is None:
        return
    if study.task.kind != "multi-class" or len(study.data.image.size) != 2:
        raise StudyError(
            f"synthesis makes samples by class and device of 2D images with one class each, but task.kind is "
            f"{study.task.kind!r} and images have {len(study.data.image.size)} dimensions. Leave synthesis out; "
            "training.augment changes images of every task."
        )
    if min(study.data.image.size) < 2 * settings.window + 1:
        raise StudyError(
            f"synthesis.window: {settings.window} needs images of {2 * settings.window + 1} pixels or more, but "
            f"data.image.size is {study.data.image.size}. Lower it."
        )
    if settings.of_kind("features") is not None and not method.starts_global:
        raise StudyError(
            f"synthesis.generator features re-calibrates the last layer of the global model, but sites of method "
            f"{study.method.name} deploy models with a last layer of their own. Use generator vae or amplitude, or "
            "method per-fedavg, fedavg-ft or fedavg."
        )
