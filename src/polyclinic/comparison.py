"""Several methods with several seeds on the same data: one table with paired differences."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyclinic.data.dataset import SiteData
from polyclinic.errors import StudyError
from polyclinic.evaluation.results import read_results
from polyclinic.evaluation.summary import differences, table
from polyclinic.federation.networks import check_models, site_networks
from polyclinic.methods import make_method, method_class
from polyclinic.methods.base import Method
from polyclinic.results import Json, RunFolder, plain_json
from polyclinic.runner import Observer, run_one
from polyclinic.secure.backends import Aggregation
from polyclinic.study import Study, with_method

CONTROLS = ("local", "fedavg", "fedavg-ft", "pooled")
"""What every claim is measured against."""


def with_controls(study: Study) -> Study:
    """The study with the controls that its methods must stand beside; those that are there already are left alone.

    A method that is listed several times with different settings has its controls once.
    """
    if not (study.compare.methods or study.compare.seeds):
        return study
    listed = [study.method.model_dump(), *study.compare.methods]
    tried = [with_method(study, method, study.seed).method for method in listed]
    titles = {params.title for params in tried}
    added: list[dict[str, Any]] = []
    for params in {params.name: params for params in reversed(tried)}.values():
        added += [c for c in method_class(params.name).controls(params) if c["label"] not in titles]
    chosen = study.compare.model_copy(update={"methods": [*study.compare.methods, *added]})
    return study.model_copy(update={"compare": chosen})


def planned(study: Study) -> dict[str, list[Study]]:
    """The studies of a comparison, by method name, one per seed: the study's own method first.

    Raises:
        StudyError: A method is listed twice, or cannot work with this study.
    """
    seeds = study.compare.seeds or [study.seed]
    wanted: list[str | Mapping[str, Any]] = [study.method.model_dump(), *study.compare.methods]
    plans: dict[str, list[Study]] = {}
    for method in wanted:
        studies = [with_method(study, method, seed) for seed in dict.fromkeys(seeds)]
        name = studies[0].method.title
        if name in plans:
            raise StudyError(
                f"compare.methods: {name} is already there. To list a method twice, give one of them a label, as in "
                f"{{name: {studies[0].method.name}, label: {studies[0].method.name}-2, ...}}."
            )
        plans[name] = studies
    return plans


def run_comparison(
    study: Study, sites: Mapping[str, SiteData], folder: RunFolder, observer: Observer | None = None
) -> Json:
    """Run what is not yet finished, then write the table and the report.

    Args:
        study: With ``compare``.
        sites: From ``load_sites``: every method sees the same images and splits.
        folder: Of the whole comparison; each run has its own below ``runs/``.
        observer: Told of progress.

    Returns:
        What ``metrics.json`` of the comparison holds.

    Raises:
        DataError: A site's images that one of the methods cannot train on, before any of them runs.
    """
    plans = planned(study)
    check_sites(plans, sites)
    for number in range(len(next(iter(plans.values())))):
        for studies in plans.values():
            one = studies[number]
            run = RunFolder(run_path(folder.path, one))
            if (run.path / "study.yaml").exists():
                run.open(one)
            else:
                run.create(one)
            run_one(one, sites, run, observer)
    metrics = tabulate(study, plans, folder.path)
    folder.write("metrics.json", json.dumps(plain_json(metrics), indent=1))
    from polyclinic.report import write_report

    write_report(folder.path)
    return metrics


def check_sites(plans: Mapping[str, Sequence[Study]], sites: Mapping[str, SiteData]) -> None:
    """Find what would stop one of the methods before its first round.

    Raises:
        DataError: Images that it cannot train on, or a network for a site that is not there. StudyError: Sums that
            cannot be hidden, or networks that it cannot bring together.
    """
    for studies in plans.values():
        method = make_method(studies[0])
        Aggregation(method.study, method, sorted(sites))
        for data in sites.values():
            method.check_data(data)
        check_models(method.study, sites)
        if method.study.mixed or type(method).check_networks is not Method.check_networks:
            method.check_networks(site_networks(method.study, sites))


def run_path(folder: Path, study: Study) -> Path:
    """Where one run of a comparison lies."""
    return folder / "runs" / f"{study.method.title}-seed{study.seed}"


def tabulate(study: Study, plans: Mapping[str, Sequence[Study]], folder: Path) -> Json:
    """The comparison's table from the finished runs; differences are against fedavg, else against the first method."""
    runs = {name: {one.seed: read_results(run_path(folder, one)) for one in studies} for name, studies in plans.items()}
    confidence = study.evaluation.confidence
    baseline = "fedavg" if "fedavg" in runs else next(iter(runs))
    return {
        "study": study.name,
        "task": study.task.kind,
        "classes": study.task.classes,
        "methods": list(runs),
        "seeds": [one.seed for one in next(iter(plans.values()))],
        "baseline": baseline,
        "missing_controls": [name for name in CONTROLS if name not in runs],
        "table": {name: table(seeds, confidence) for name, seeds in runs.items()},
        "differences": differences(runs, baseline, confidence) if len(runs) > 1 else [],
    }
