"""What a site says of itself in a manifest: from its study, its images and its run, every count rounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from pydantic import ValidationError

from polyclinic.audit.membership import MembershipResult
from polyclinic.data.dataset import SiteData
from polyclinic.errors import ContributionError
from polyclinic.results import RunFolder
from polyclinic.study import Study
from polyclinic.vectors.base import Base
from polyclinic.vectors.folders import now
from polyclinic.vectors.manifest import Data, Membership, Metric, Privacy, Statement, Training, binned
from polyclinic.yaml_settings import explain

if TYPE_CHECKING:
    from polyclinic.vectors.create import CreateOptions

ATTACK = "loss below the base's"
LOSS_GAP = "audit_loss_gap"
"""Name of the metric: loss on other patients less loss on training patients, of the audited model."""


@dataclass(frozen=True)
class Trained:
    """A contribution from a finished run that was audited."""

    run: RunFolder
    audit: MembershipResult


@dataclass(frozen=True)
class HeadOnly:
    """A contribution of sums over the base's own features."""


def statement_of(
    base: Base, study: Study, data: SiteData, options: CreateOptions, made: Trained | HeadOnly
) -> Statement:
    """The site's part of the manifest.

    Args:
        base: What it starts from.
        study: The site's.
        data: Its images.
        options: What it wants to say.
        made: How the tensors came about.

    Raises:
        ContributionError: What would not be a manifest: a text that is too long, for instance.
    """
    trained = made if isinstance(made, Trained) else None
    try:
        return Statement(
            sequence=options.sequence,
            created=now(),
            training=_training(study, data, trained),
            data=_data(base, study, data, options),
            metrics=_metrics(data, trained) if trained else {},
            privacy=Privacy(membership=_membership(trained.audit) if trained else None),
            licence=options.licence,
            replaces=list(options.replaces),
        )
    except ValidationError as error:
        raise ContributionError(explain(error, Statement, "this can't be said in a manifest:")) from None


def images_of_classes(study: Study, data: SiteData) -> dict[str, int]:
    """Training images of each class of the study; of a segmentation, images with a pixel of it."""
    labels = data.labels("train").cpu()
    classes = study.task.classes
    if study.task.kind == "multi-class":
        counts = torch.bincount(labels, minlength=len(classes))
    elif study.task.kind == "multi-label":
        counts = (labels > 0).sum(0)
    else:
        seen = [torch.bincount(mask.reshape(-1).long(), minlength=len(classes)) > 0 for mask in labels]
        counts = torch.stack(seen).sum(0)
    return dict(zip(classes, counts.tolist(), strict=True))


def _training(study: Study, data: SiteData, made: Trained | None) -> Training:
    import polyclinic

    settings, framework = study.training, f"polyclinic {polyclinic.__version__}, torch {torch.__version__}"
    if made is None:
        return Training(
            optimizer="none",
            lr=0,
            epochs=0,
            batch_size=1,
            seed=study.seed,
            framework=framework,
            trainable="none: sums over the base's features",
        )
    epochs = settings.epochs
    if settings.steps is not None:
        # Of the rounded number: steps over epochs would tell the exact one.
        epochs = max(1, round(settings.steps * settings.batch_size / binned(len(data.splits["train"]))))
    return Training(
        optimizer=settings.optimizer,
        lr=settings.lr,
        epochs=epochs * _chosen_round(made.run),
        batch_size=settings.batch_size,
        augment=settings.augment,
        seed=study.seed,
        framework=framework,
    )


def _data(base: Base, study: Study, data: SiteData, options: CreateOptions) -> Data:
    counts = images_of_classes(study, data)
    held = [name for name in base.classes if counts.get(name)]
    sides = [set(data.patients("train")), {*data.patients("val"), *data.patients("test")}]
    return Data(
        images=binned(len(data.splits["train"])),
        images_per_class={name: binned(counts[name]) for name in held} if options.images_per_class else None,
        classes_held=held,
        modality=options.modality,
        patient_split=not sides[0] & sides[1],
        ethics=options.ethics,
    )


def _metrics(data: SiteData, made: Trained) -> dict[str, Metric]:
    """Validation metrics of the kept round, and the loss gap of the audit; 14 of 23 to all digits would tell the 23."""
    number = _chosen_round(made.run)
    record = next((r for r in made.run.rounds() if r["round"] == number), None)
    values = (record or {}).get("sites", {}).get(data.site, {}).get("val", {})
    images = binned(len(data.splits["val"]))
    found = {name: Metric(value=round(value, 2), n=images) for name, value in values.items() if value is not None}
    if made.audit.loss_gap is not None:
        found[LOSS_GAP] = Metric(value=round(made.audit.loss_gap, 3), n=binned(made.audit.non_members))
    return found


def _chosen_round(run: RunFolder) -> int:
    from polyclinic.report.folder import read_json

    return int(read_json(run.path / "metrics.json")["chosen_round"])


def _membership(audit: MembershipResult) -> Membership | None:
    """Rounded counts, and rates that do not tell the exact ones: one false positive's rate is one over the count."""
    if audit.auc is None or audit.true_positives is None or audit.false_positives is None:
        return None
    nonmembers = binned(audit.non_members)
    return Membership(
        attack=ATTACK,
        auc=round(audit.auc, 3),
        low=round(audit.auc if audit.auc_low is None else audit.auc_low, 3),
        high=round(audit.auc if audit.auc_high is None else audit.auc_high, 3),
        tpr=round(audit.true_positives.value, 2),
        fpr=round(audit.false_positives.count / nonmembers, 3),
        members=binned(audit.members),
        nonmembers=nonmembers,
        limit=audit.limit,
        passed=bool(audit.passed),
    )
