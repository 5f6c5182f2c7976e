"""``polyclinic vectors create``: a site audits what would leave it, and writes one signed contribution.

The audit comes first. Its numbers in full stay at the site, in ``membership.json`` of the run; the manifest gets rates
and rounded counts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from polyclinic.audit.membership import MembershipResult, audit_membership
from polyclinic.data.dataset import SiteData
from polyclinic.data.split import check_splits
from polyclinic.errors import ContributionError
from polyclinic.files import whole_file
from polyclinic.models.registry import start_model
from polyclinic.models.weights import load_tensors, read_tensors, shared_tensors
from polyclinic.prediction import load_model
from polyclinic.results import RunFolder
from polyclinic.runner import Observer, load_sites
from polyclinic.secure.identity import Identity
from polyclinic.settings import Settings
from polyclinic.study import Study, load_study
from polyclinic.tasks import Task, make_task
from polyclinic.vectors.base import Base
from polyclinic.vectors.contribution import Contribution, write_contribution
from polyclinic.vectors.fine_tuning import START
from polyclinic.vectors.folders import Digest
from polyclinic.vectors.sources import Kind
from polyclinic.vectors.statement import HeadOnly, Trained, statement_of

AUDIT_FILE = "membership.json"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class CreateOptions(Settings):
    """What goes into a contribution, and what is said with it."""

    sequence: int = Field(1, ge=1)
    """Counts the site's contributions; never used twice."""
    replaces: tuple[Digest, ...] = ()
    """Digests of the site's earlier contributions that this one revokes."""
    vector: bool = True
    """What training changed. Without it, the contribution is sums for a head alone and needs no training."""
    fisher: bool = False
    """Diagonal Fisher information of the fine-tuned model."""
    gram: bool = False
    """Gram matrices of the inputs of its layers."""
    statistics: bool = False
    """Running statistics of its batch normalisation. They can help to regenerate images: send them only where a
    restoration needs them."""
    head: bool = False
    """Sums over features, for a head in closed form. The features are the base's own: only those are the same network
    at every site."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the vector."""
    images_per_class: bool = False
    """Whether the manifest has rounded counts of each class."""
    fewest: int = Field(5, ge=1)
    """Patients that a class needs to be in the sums for a head."""
    max_auc: float = Field(0.65, ge=0.5, le=1)
    """Largest AUC of the membership audit that may leave. At 1 the audit stops nothing, and a site with too few
    patients for it may send as well."""
    licence: str = ""
    """Terms of use."""
    ethics: str = ""
    """Reference of the ethics vote."""
    modality: str = ""
    """Kind of images."""

    @model_validator(mode="after")
    def _something(self) -> CreateOptions:
        if not self.vector and (self.fisher or self.gram or self.statistics):
            raise ValueError("fisher, gram and statistics describe the fine-tuned model: send the vector with them")
        if not self.vector and not self.head:
            raise ValueError("a contribution must bring a vector or sums for a head")
        return self


@dataclass(frozen=True)
class _Site:
    """A site's images and what it does with them."""

    study: Study
    data: SiteData
    task: Task


def create_contribution(
    base: Path, run: Path, out: Path, identity: Identity, options: CreateOptions, observer: Observer | None = None
) -> Contribution:
    """Audit, then write a contribution.

    Args:
        base: Folder of the base.
        run: Results folder of ``polyclinic vectors train``; without a vector also the study file of the site's data.
        out: A new folder.
        identity: Who signs. Where the study has several sites, the one of this name contributes.
        options: What goes in.
        observer: Told of the reading of images.

    Raises:
        ContributionError: The run did not start from this base, was not trained at this site alone, the membership
            audit failed or says nothing, ``out`` exists, or the options do not fit the network.
        StudyError, DataError, RunError: The study, its images or the run cannot be read.
    """
    published = Base.load(base)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ContributionError(f"{out} is there already. Give another --out.")
    if options.vector:
        return _from_run(published, run, out, identity, options, observer)
    study = RunFolder(run).study() if run.is_dir() else load_study(run)
    site = _site(published, study, run if run.is_dir() else run.parent, identity, observer)
    statement = statement_of(published, site.study, site.data, options, HeadOnly())
    tensors: dict[Kind, dict[str, Tensor]] = {"head": _head(published, site, options.fewest)}
    return write_contribution(out, published, tensors, statement, identity)


def _from_run(
    base: Base, run: Path, out: Path, identity: Identity, options: CreateOptions, observer: Observer | None
) -> Contribution:
    study = RunFolder(run).study()
    _check_run(base, run, study)
    # Of other images or another split the audit would take training patients for others, and pass.
    site = _site(base, study, run, identity, observer, splits=run / "splits.csv")
    after = load_model(run, site.study, site.data.site)
    before = _base_at(base, site)
    audit = audit_membership(after, before, site.data, site.task, limit=options.max_auc, seed=study.seed)
    with whole_file(run / AUDIT_FILE) as file:
        file.write(json.dumps(audit.as_json(), indent=1).encode())
    _check_audit(audit)
    statement = statement_of(base, site.study, site.data, options, Trained(RunFolder(run), audit))
    tensors = _tensors(base, site, after, options)
    return write_contribution(out, base, tensors, statement, identity, precision=PRECISIONS[options.precision])


def _check_run(base: Base, run: Path, study: Study) -> None:
    """Whether it was trained from this base, by this site alone."""
    if study.method.name != "local":
        raise ContributionError(
            f"{run} was trained with method {study.method.name!r}, so other sites are in it too and it could never be "
            "removed from a merge. Train with polyclinic vectors train."
        )
    start = run / START
    if not start.is_file():
        raise ContributionError(f"{run} has no {START}: it was not trained from a base. Use polyclinic vectors train.")
    tensors, _ = read_tensors(start)
    wanted = base.start_tensors(study.task.classes)
    for spec in base.outline.weights:
        if spec.name not in tensors or not torch.equal(tensors[spec.name], wanted[spec.name]):
            raise ContributionError(
                f"{run} did not start from the base {base.spec.id!r} ({base.digest[:12]}): {spec.name} differs. Train "
                "again from this base, or give the base that it started from."
            )


def _site(
    base: Base, study: Study, folder: Path, identity: Identity, observer: Observer | None, splits: Path | None = None
) -> _Site:
    own = base.site_study(study)
    sites = load_sites(own, folder, observer)
    if splits is not None:
        check_splits({name: data.cases for name, data in sites.items()}, splits)
    if identity.site not in sites and len(sites) > 1:
        raise ContributionError(
            f"study {study.name!r} has the sites {', '.join(sorted(sites))}, none of which is {identity.site!r}, who "
            "signs. Give the key of one of them."
        )
    data = sites[identity.site] if identity.site in sites else next(iter(sites.values()))
    if len(data.splits["train"]) == 0:
        raise ContributionError(f"site {data.site!r} has no training images, so it has nothing to contribute.")
    return _Site(own, data, make_task(own.task, own.training))


def _base_at(base: Base, site: _Site) -> nn.Module:
    """The base's network with its head in the site's order of classes."""
    model = start_model(site.study)
    load_tensors(model, base.start_tensors(site.study.task.classes))
    return model.eval()


def _check_audit(audit: MembershipResult) -> None:
    """Stop what must not leave; a limit of 1 stops nothing.

    Raises:
        ContributionError: With the number, what it means, and what helps.
    """
    if audit.limit >= 1:
        return
    if audit.auc is None:
        raise ContributionError(
            f"the membership audit says nothing: {audit.why}. Put more patients into validation and test, or, if the "
            "site takes that risk, send without a measurement: --max-auc 1."
        )
    if not audit.passed:
        assert audit.true_positives is not None
        found, gap = audit.true_positives, audit.loss_gap
        raise ContributionError(
            f"the membership audit failed, so nothing was written: AUC {audit.auc:.3f}, limit {audit.limit:g}. Shown a "
            "training patient and another patient, somebody with the base and this vector picks the training patient "
            f"{audit.auc:.0%} of the time (guessing: 50%), and finds {found.count} of {found.of} training patients "
            f"with hardly a false accusation. The loss is {gap:.3f} higher on patients that it was not trained on. "
            "What helps: fewer epochs or rounds, evaluation.select: best (early stopping), augmentation, weight decay, "
            "more patients. A higher --max-auc sends it as it is; agree on that with your privacy officer."
        )


def _tensors(base: Base, site: _Site, model: nn.Module, options: CreateOptions) -> dict[Kind, dict[str, Tensor]]:
    from polyclinic.vectors.statistics import fisher_diagonal, input_grams, running_statistics_of

    classes, seed = site.study.task.classes, site.study.seed
    weights = shared_tensors(model, [spec.name for spec in base.outline.weights])
    found: dict[Kind, dict[str, Tensor]] = {"vector": base.site_vector(weights, classes)}
    if options.fisher:
        fisher = fisher_diagonal(model, site.data, site.task, seed=seed)
        found["fisher"] = {name: _rows(base, name, tensor, classes) for name, tensor in fisher.items()}
    if options.gram:
        found["gram"] = input_grams(model, site.data, seed=seed)
    if options.statistics:
        found["statistics"] = running_statistics_of(model)
        if not found["statistics"]:
            raise ContributionError("this network has no running statistics. Leave out --statistics.")
    if options.head:
        found["head"] = _head(base, site, options.fewest)
    return found


def _head(base: Base, site: _Site, fewest: int) -> dict[str, Tensor]:
    from polyclinic.vectors.statistics import head_sums

    return head_sums(_base_at(base, site), site.data, site.task, fewest=fewest, classes=base.classes)


def _rows(base: Base, name: str, tensor: Tensor, classes: Sequence[str]) -> Tensor:
    """A tensor of the site's network with the rows of its head where the base has them; others are zero."""
    if not base.outline.has_classes(name):
        return tensor
    whole = torch.zeros(len(base.classes), *tensor.shape[1:], dtype=tensor.dtype)
    whole[[base.classes.index(own) for own in classes]] = tensor
    return whole
