"""The methods: one file each, both sides of it. A method joins by one line here."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from polyclinic.errors import StudyError

if TYPE_CHECKING:
    from polyclinic.methods.base import Method, MethodParams
    from polyclinic.study import Study

METHODS: dict[str, str] = {
    "local": "polyclinic.methods.local:Local",
    "pooled": "polyclinic.methods.pooled:Pooled",
    "fedavg": "polyclinic.methods.fedavg:FedAvg",
    "fedavg-ft": "polyclinic.methods.fedavg_ft:FedAvgFineTuned",
    "fedprox": "polyclinic.methods.fedprox:FedProx",
    "scaffold": "polyclinic.methods.scaffold:Scaffold",
    "fedbn": "polyclinic.methods.fedbn:FedBN",
    "ditto": "polyclinic.methods.ditto:Ditto",
}


def method_class(name: str) -> type[Method]:
    """The class of a method by its name.

    Raises:
        ValueError: There is no such method; names the nearest.
    """
    from polyclinic.yaml_settings import nearest

    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}.{nearest(name, list(METHODS))}")
    module, _, attribute = METHODS[name].partition(":")
    found: type[Method] = getattr(importlib.import_module(module), attribute)
    return found


def params_class(name: str) -> type[MethodParams]:
    """The settings of a method by its name."""
    return method_class(name).Params


def parse_params(value: Any) -> MethodParams:
    """Settings from a study file: a name, a mapping with a name, or settings already made.

    Raises:
        ValueError: Unknown name. ValidationError: wrong settings.
    """
    from polyclinic.methods.base import MethodParams

    if isinstance(value, MethodParams):
        return value
    wanted = {"name": value} if isinstance(value, str) else value
    if not isinstance(wanted, Mapping) or not isinstance(wanted.get("name", "fedavg"), str):
        raise ValueError("give a method's name, or a mapping with name and settings")
    return params_class(wanted.get("name", "fedavg")).model_validate(dict(wanted))


def make_method(study: Study) -> Method:
    """The method that the study names, with its settings."""
    return method_class(study.method.name)(study)


def check_combination(study: Study) -> None:
    """Refuse a combination that cannot work.

    Raises:
        StudyError: With the reason and the nearest combination that works.
    """
    task, loss = study.task.kind, study.task.loss
    if task == "multi-class" and len(study.task.classes) < 2:
        raise StudyError("task.classes: multi-class needs at least two classes. Use multi-label for a single finding.")
    if task == "segmentation" and len(study.task.classes) < 2:
        raise StudyError("task.classes: segmentation needs the background first and at least one more class.")
    if (loss == "dice-ce") != (task == "segmentation") and loss != "auto":
        raise StudyError(f"task.loss: {loss} does not go with {task}. Use auto.")
    if study.training.balanced and task != "multi-class":
        raise StudyError(f"training.balanced: drawing by class needs a multi-class task, not {task}. Leave it off.")
    if study.training.patch is not None:
        size = study.data.image.size
        if task != "segmentation":
            raise StudyError(f"training.patch: patches are for segmentation, not {task}. Leave it out.")
        if len(study.training.patch) != len(size) or any(
            p > s for p, s in zip(study.training.patch, size, strict=True)
        ):
            raise StudyError(f"training.patch: {study.training.patch} does not fit into data.image.size {size}.")
    method_class(study.method.name).check(study)
