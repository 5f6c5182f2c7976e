"""Membership audit of a fine-tuned model: can somebody who holds it tell whose images it was trained on?

It runs at the site, on the site's own patients, before anything leaves. The attacker is the strongest reader of a data
vector: he holds the base and the fine-tuned model, and asks for each patient how much the loss has fallen. Training
patients are members; validation and test patients of the same site are not, and no patient is on both sides.

References:
    Yeom et al., CSF 2018 (loss threshold); Carlini et al., S&P 2022 (true positives at few false ones); Watson et al.,
    ICLR 2022 (the difference to a reference model); Clopper & Pearson, Biometrika 26, 1934.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from polyclinic.data.dataset import SiteData
from polyclinic.errors import ContributionError
from polyclinic.evaluation.bootstrap import interval, weighted_auroc_auprc
from polyclinic.seeds import generator
from polyclinic.tasks import Task

Values = NDArray[np.float64]

FEWEST = 10
"""Patients on either side, below which nothing can be said."""
LOWEST_RATE = 0.01
"""False-positive rate that the attack is read at, where there are non-members enough; else one of them."""
CONFIDENCE = 0.95
BATCH = 64


@dataclass(frozen=True)
class Share:
    """So many of so many, with the exact interval of Clopper and Pearson at 95%."""

    count: int
    of: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class MembershipResult:
    """What the attack found.

    Attributes:
        members, non_members: Patients on either side.
        auc: Chance that a training patient's loss fell further than another patient's; 0.5 is guessing. None where
            there are too few patients, or a loss is not finite.
        auc_low, auc_high: 95% interval: both sides' patients drawn with replacement. It collapses at an AUC of 1.
        auc_without_base: The same of the fine-tuned model's loss alone, for comparison.
        true_positives: Training patients found when at most ``false_positives.count`` others are accused. The
            threshold is the lowest that keeps to 1% of the non-members, or to one of them where 1% is less than one.
        false_positives: Others accused at that threshold.
        loss_members, loss_non_members: Mean cross-entropy per patient under the fine-tuned model.
        limit: Largest AUC that passes.
        passed: Whether ``auc`` is at most the limit. The estimate decides, not the upper end of its interval: with 20
            patients on either side that end lies some 0.18 higher, so no small site could ever pass. None where
            undefined, which is no pass.
        why: Why it is undefined; empty otherwise.
    """

    members: int
    non_members: int
    auc: float | None
    auc_low: float | None
    auc_high: float | None
    auc_without_base: float | None
    true_positives: Share | None
    false_positives: Share | None
    loss_members: float | None
    loss_non_members: float | None
    limit: float
    passed: bool | None
    why: str = ""

    @property
    def loss_gap(self) -> float | None:
        """How much larger the loss is on patients that were not trained on."""
        if self.loss_members is None or self.loss_non_members is None:
            return None
        return self.loss_non_members - self.loss_members

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return {**asdict(self), "loss_gap": self.loss_gap}


def audit_membership(
    after: nn.Module,
    before: nn.Module,
    data: SiteData,
    task: Task,
    *,
    limit: float = 0.65,
    seed: int,
    draws: int = 1000,
) -> MembershipResult:
    """Attack a fine-tuned model with its own base as the reference.

    A patient's score is the mean over his images of loss under the base minus loss under the fine-tuned model. The
    loss is the cross-entropy, whatever the study trains with; of a segmentation the mean over pixels, of multi-label
    over classes. Both networks are put into evaluation mode; images are not augmented.

    The validation patients chose which round is kept, so their loss is a little too good and the attack a little too
    weak. It is one attack; that it fails does not prove that others do.

    Args:
        after: Fine-tuned at this site.
        before: The base that it started from.
        data: The site's images.
        task: Of the study.
        limit: Largest AUC that passes, 0.5 to 1.
        seed: Of the draws for the interval.
        draws: How many.

    Raises:
        ContributionError: A patient is on both sides.
    """
    patients = {part: data.patients(part) for part in ("train", "val", "test")}
    members, others = sorted(set(patients["train"])), sorted({*patients["val"], *patients["test"]})
    if both := sorted(set(members) & set(others)):
        raise ContributionError(
            f"site {data.site!r}: {len(both)} patients are in training and in validation or test, so membership cannot "
            "be audited. Split the data by patient."
        )
    if min(len(members), len(others)) < FEWEST:
        return undefined(len(members), len(others), limit)
    rows = torch.cat([data.splits[part] for part in patients])
    of = [name for names in patients.values() for name in names]
    by_image = torch.stack([image_losses(model, data, task, rows) for model in (before, after)])
    if not bool(by_image.isfinite().all()):
        return undefined(len(members), len(others), limit, "the loss of some patients is not finite")
    reference, loss = (_by_patient(losses, of, [*members, *others]) for losses in by_image.numpy())
    return judge(reference - loss, loss, len(members), limit=limit, seed=seed, draws=draws)


def undefined(members: int, others: int, limit: float, why: str = "") -> MembershipResult:
    """The result where nothing can be said; without a reason, as there are too few patients."""
    why = why or (
        f"{members} training patients and {others} validation and test patients; {FEWEST} of each are needed to say "
        "anything"
    )
    nothing = (None,) * 8
    return MembershipResult(members, others, *nothing, limit=limit, passed=None, why=why)


def judge(scores: Values, losses: Values, members: int, *, limit: float, seed: int, draws: int) -> MembershipResult:
    """Numbers from scores; see ``MembershipResult``.

    Args:
        scores: ``[patients]``, the members first; larger speaks for membership.
        losses: ``[patients]`` under the fine-tuned model.
        members: How many are members.
        limit: Largest AUC that passes.
        seed: Of the draws for the interval.
        draws: How many.
    """
    truth = np.arange(len(scores)) < members
    auc = area(truth, scores)
    low, high = _auc_interval(truth, scores, seed, draws)
    found, accused = at_few_false_positives(scores[truth], scores[~truth])
    return MembershipResult(
        members,
        len(scores) - members,
        auc,
        low,
        high,
        area(truth, -losses),
        found,
        accused,
        float(losses[truth].mean()),
        float(losses[~truth].mean()),
        limit,
        passed=auc <= limit,
    )


def area(truth: NDArray[np.bool_], scores: Values) -> float:
    """Area under the ROC curve; ties count half."""
    return float(weighted_auroc_auprc(truth, scores, np.ones((len(scores), 1)))[0][0])


def at_few_false_positives(members: Values, others: Values) -> tuple[Share, Share]:
    """True and false positives at the lowest threshold that accuses at most 1% of the others, or one of them.

    Whoever scores above the threshold is accused; the threshold is the score of one of the others.
    """
    allowed = max(1, int(LOWEST_RATE * len(others)))
    threshold = np.sort(others)[::-1][allowed]
    return share(int((members > threshold).sum()), len(members)), share(int((others > threshold).sum()), len(others))


def share(count: int, of: int) -> Share:
    """``count`` of ``of`` with its exact interval."""
    low, high = exact_interval(count, of)
    return Share(count, of, count / of, low, high)


def exact_interval(count: float, of: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Interval of Clopper and Pearson for a share; effective numbers need not be whole."""
    from scipy.stats import beta

    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, count, of - count + 1)) if count > 0 else 0.0
    high = float(beta.ppf(1 - tail, count + 1, of - count)) if count < of else 1.0
    return low, high


@torch.inference_mode()
def image_losses(model: nn.Module, data: SiteData, task: Task, indices: Tensor) -> Tensor:
    """Cross-entropy of each image, float64 ``[len(indices)]``, on the CPU; the network is left in evaluation mode."""
    device = next(model.parameters()).device
    model.eval()
    batch = 1 if task.kind == "segmentation" and data.targets.ndim > 3 else BATCH
    parts = []
    for part in torch.split(indices, batch):
        inputs = data.inputs(part).to(device)
        targets = data.targets[part.to(data.targets.device)].to(device)
        if task.kind == "segmentation":
            # Through ``predict``, which covers large images by windows.
            likelihood = task.predict(model, inputs).gather(1, targets.long().unsqueeze(1))
            losses = -likelihood.double().clamp_min(1e-12).log().flatten(1).mean(1)
        elif task.kind == "multi-label":
            each = F.binary_cross_entropy_with_logits(model(inputs).double(), targets.double(), reduction="none")
            losses = each.mean(1)
        else:
            # In float64 from the outputs: float32 probabilities of well-learned images would all be 1.
            losses = F.cross_entropy(model(inputs).double(), targets, reduction="none")
        parts.append(losses.cpu())
    return torch.cat(parts)


def _by_patient(losses: Values, of: Sequence[str], patients: Sequence[str]) -> Values:
    at = {name: i for i, name in enumerate(patients)}
    index = np.array([at[name] for name in of])
    mean: Values = np.bincount(index, weights=losses, minlength=len(at)) / np.bincount(index, minlength=len(at))
    return mean


def _auc_interval(truth: NDArray[np.bool_], scores: Values, seed: int, draws: int) -> tuple[float | None, float | None]:
    """Percentile interval over draws of as many members and as many others, with replacement."""
    if draws == 0:
        return None, None
    rng = generator(seed, "membership audit")
    weights = np.zeros((len(scores), draws))
    for side in (truth, ~truth):
        count = int(side.sum())
        weights[side] = rng.multinomial(count, np.full(count, 1 / count), size=draws).T
    found = interval(weighted_auroc_auprc(truth, scores, weights)[0], CONFIDENCE)
    return found.low, found.high
