"""Combinations with ``synthesis`` that cannot work, found before anything starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyclinic.errors import StudyError

if TYPE_CHECKING:
    from polyclinic.methods.base import Method
    from polyclinic.study import Study
    from polyclinic.synthesis.settings import SynthesisSettings


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
    if study.aggregation.backend == "ring-as-published":
        _check_published_ring(settings)
    if settings.of_kind("features") is not None and study.mixed:
        raise StudyError(
            "synthesis.generator features describes the features of one network, but models gives sites different "
            "ones. Leave models out, or use generator vae or amplitude."
        )
    if settings.of_kind("features") is not None and not method.starts_global:
        raise StudyError(
            f"synthesis.generator features re-calibrates the last layer of the global model, but sites of method "
            f"{study.method.name} deploy models with a last layer of their own. Use generator vae or amplitude, or "
            "method per-fedavg, fedavg-ft or fedavg."
        )


def _check_published_ring(settings: SynthesisSettings) -> None:
    """Its mask rounds sums to about 1e-3: enough for counts, styles and updates, not for squares of features."""
    needs = "generator features" if settings.of_kind("features") is not None else ""
    if not needs and settings.filter > 0 and settings.of_kind("vae") is not None:
        needs = f"filter: {settings.filter:g}"
    if needs:
        raise StudyError(
            f"synthesis.{needs} solves for discriminants in sums of squared features, but the mask of aggregation "
            "ring-as-published rounds sums to steps of about 1e-3. Use aggregation ring-he or masked, or generator vae "
            "with filter: 0."
        )
