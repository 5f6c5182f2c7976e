"""The methods: one file each, both sides of it. A method joins by one line here."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from polyclinic.errors import StudyError, nearest

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
    "per-fedavg": "polyclinic.methods.per_fedavg:PerFedAvg",
    "fedper": "polyclinic.methods.fedper:FedPer",
    "fedrep": "polyclinic.methods.fedrep:FedRep",
    "apfl": "polyclinic.methods.apfl:APFL",
    "pfedme": "polyclinic.methods.pfedme:PFedMe",
    "fedssg": "polyclinic.methods.fedssg:FedSSG",
    "fediic": "polyclinic.methods.fediic:FedIIC",
    "creff": "polyclinic.methods.creff:CReFF",
    "fedmd": "polyclinic.methods.fedmd:FedMD",
    "feddf": "polyclinic.methods.feddf:FedDF",
    "ds-fl": "polyclinic.methods.ds_fl:DSFL",
    "fccl": "polyclinic.methods.fccl:FCCL",
    "kt-pfl": "polyclinic.methods.kt_pfl:KTpFL",
    "fedproto": "polyclinic.methods.fedproto:FedProto",
    "fedtgp": "polyclinic.methods.fedtgp:FedTGP",
    "fedgh": "polyclinic.methods.fedgh:FedGH",
    "lg-fedavg": "polyclinic.methods.lg_fedavg:LGFedAvg",
    "fml": "polyclinic.methods.fml:FML",
    "fedkd": "polyclinic.methods.fedkd:FedKD",
    "heterofl": "polyclinic.methods.heterofl:HeteroFL",
    "natimg-fl": "polyclinic.methods.natimg_fl:NatIMGFL",
    "data-vectors": "polyclinic.methods.data_vectors:DataVectors",
}


def method_class(name: str) -> type[Method]:
    """The class of a method by its name.

    Raises:
        ValueError: There is no such method; names the nearest.
    """
    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}. {nearest(name, list(METHODS))}")
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
    """The method that the study names; its ``study`` is the one to run, with all left open filled in."""
    found = method_class(study.method.name)
    method = found(found.adapted(study))
    if method.study.synthesis is None or method.study.synthesis.of_kind("features") is None:
        return method
    from polyclinic.synthesis.composed import WithFeatureGaussians

    return WithFeatureGaussians(method)


def check_combination(study: Study) -> None:
    """Refuse a combination that cannot work.

    Raises:
        StudyError: With the reason and the nearest combination that works.
    """
    from polyclinic.models.registry import seen_size
    from polyclinic.synthesis.checks import check_synthesis
    from polyclinic.tasks import check_task

    found = method_class(study.method.name)
    _check_mixed(study, found)
    found.check(study)
    adapted = found.adapted(study)
    check_task(adapted.task, adapted.training)
    seen_size(adapted.data.image, adapted.training.patch)
    check_synthesis(adapted, found)


def _check_mixed(study: Study, found: type[Method]) -> None:
    if not study.mixed or found.mixed_networks:
        return
    others = ", ".join(name for name in METHODS if method_class(name).mixed_networks)
    unlike = ", ".join(name for name, own in study.models.items() if own != study.model)
    raise StudyError(
        f"method {study.method.name} needs the same network at every site, but models gives another to {unlike}. "
        f"Leave models out (in a comparison: set: {{models: {{}}}}), or use a method for different networks: {others}."
    )
