"""Metrics of class probabilities: point estimates, through scikit-learn where it has the metric.

A metric that the images cannot define (AUROC where every image is of one class) is NaN, never a silent 0.5.
``bootstrap.classification_replicates`` computes the same numbers for many patient weights at once.
"""

from __future__ import annotations

import numpy as np

from polyclinic.errors import DataError
from polyclinic.evaluation.names import CLASSIFICATION_METRICS

ECE_BINS = 15
SPECIFICITY = 0.9
_ROUNDING = 1e-3


def classification_metrics(
    targets: np.ndarray,
    probabilities: np.ndarray,
    multilabel: bool,
    threshold_source: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, float]:
    """Judge probabilities against the truth.

    * ``loss``: log loss; multi-label: mean of the labels' binary log losses.
    * ``accuracy``: of the most probable class; multi-label: share of right answers at 0.5 over all images and labels.
    * ``balanced_accuracy``: mean recall of the classes present; multi-label: mean of the labels' (sensitivity +
      specificity) / 2 at 0.5, over labels with both sides.
    * ``auroc``, ``auprc`` (average precision): one against the rest, mean over the classes that have images on
      both sides; two classes: of the second class.
    * ``sensitivity_at_90_specificity``: mean over the same classes, at the thresholds chosen on ``threshold_source``;
      ``specificity_reached`` is the specificity that those thresholds have here.
    * ``brier``: mean squared distance to the truth: of the second class for two classes, summed over classes for
      more, mean over labels for multi-label.
    * ``ece``: 15 equal bins of the probability of the predicted class (Guo et al., ICML 2017, arXiv 1706.04599);
      multi-label: of each label's probability, mean over labels.

    Args:
        targets: int ``[N]``, or 0/1 ``[N, K]`` for multi-label.
        probabilities: float ``[N, K]`` in 0..1; multi-class rows sum to 1.
        multilabel: Which of the two.
        threshold_source: Targets and probabilities of the validation images, which choose the thresholds. Without
            them the two threshold metrics are NaN.

    Returns:
        All ``CLASSIFICATION_METRICS``; NaN where undefined, and all NaN without images or when a probability is not
        finite (a diverged model).

    Raises:
        DataError: Shapes do not match, or rows do not sum to 1.
    """
    targets, probabilities = checked(targets, probabilities, multilabel)
    if len(targets) == 0 or not np.isfinite(probabilities).all():
        return dict.fromkeys(CLASSIFICATION_METRICS, float("nan"))
    thresholds = None if threshold_source is None else specificity_thresholds(*threshold_source, multilabel)
    values = _decisions(targets, probabilities, multilabel)
    values |= _rankings(targets, probabilities, multilabel, thresholds)
    values["brier"] = float(brier_terms(targets, probabilities, multilabel).mean())
    confidence, right = calibration_pairs(targets, probabilities, multilabel)
    values["ece"] = float(np.mean([_ece(confidence[:, k], right[:, k]) for k in range(confidence.shape[1])]))
    return {name: values[name] for name in CLASSIFICATION_METRICS}


def checked(targets: np.ndarray, probabilities: np.ndarray, multilabel: bool) -> tuple[np.ndarray, np.ndarray]:
    """Targets as int64 and probabilities as float64, multi-class rows freed of float32 rounding (they sum to 1);
    untouched where any is not finite.

    Raises:
        DataError: Shapes do not match, or a row's sum is off by more than rounding.
    """
    targets = np.asarray(targets).astype(np.int64)
    probabilities = np.asarray(probabilities, dtype=np.float64)
    wanted = probabilities.shape if multilabel else probabilities.shape[:1]
    if probabilities.ndim != 2 or targets.shape != wanted:
        kind = "multi-label" if multilabel else "multi-class"
        raise DataError(
            f"{kind} targets of shape {targets.shape} do not fit probabilities of shape {probabilities.shape}: wanted "
            + ("[N, K] and [N, K]" if multilabel else "[N] and [N, K]")
        )
    if multilabel or len(probabilities) == 0 or not np.isfinite(probabilities).all():
        return targets, probabilities
    sums = probabilities.sum(axis=1, keepdims=True)
    off = np.abs(sums[:, 0] - 1)
    if off.max() > _ROUNDING:
        row = int(off.argmax())
        raise DataError(f"probabilities of row {row} sum to {sums[row, 0]:.6g}, wanted 1: were they soft-maxed?")
    return targets, probabilities / sums


def one_vs_rest(
    targets: np.ndarray, probabilities: np.ndarray, multilabel: bool
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """The binary questions that ranking metrics average over.

    Returns:
        Truth (bool ``[N, Q]``), scores (float ``[N, Q]``) and the class of each question: all classes, but only the
        second of two.
    """
    count = probabilities.shape[1]
    asked = [1] if count == 2 and not multilabel else list(range(count))
    truth = targets.astype(bool) if multilabel else targets[:, None] == np.arange(count)
    return truth[:, asked], probabilities[:, asked], asked


def specificity_thresholds(
    targets: np.ndarray, probabilities: np.ndarray, multilabel: bool, specificity: float = SPECIFICITY
) -> np.ndarray:
    """For each question of ``one_vs_rest`` the lowest score at which these images have the specificity wanted.

    An image is positive when its score is at or above the threshold. Give validation images, never test images.

    Returns:
        float ``[Q]``: one of the scores, infinity where even the highest lets too many negatives through, NaN where
        there is no negative image or a probability is not finite.
    """
    targets, probabilities = checked(targets, probabilities, multilabel)
    truth, scores, asked = one_vs_rest(targets, probabilities, multilabel)
    chosen = np.full(len(asked), np.nan)
    if not np.isfinite(scores).all():
        return chosen
    for q in range(len(asked)):
        negatives = np.sort(scores[~truth[:, q], q])
        if len(negatives) == 0:
            continue
        candidates = np.append(np.unique(scores[:, q]), np.inf)
        below = np.searchsorted(negatives, candidates, side="left") / len(negatives)
        chosen[q] = candidates[np.argmax(below >= specificity)]
    return chosen


def loss_terms(targets: np.ndarray, probabilities: np.ndarray, multilabel: bool) -> np.ndarray:
    """Log loss of each image, ``[N]``, clipped as in scikit-learn."""
    tiny = np.finfo(np.float64).eps
    clipped = np.clip(probabilities, tiny, 1 - tiny)
    if multilabel:
        terms: np.ndarray = -np.log(np.where(targets == 1, clipped, 1 - clipped)).mean(axis=1)
        return terms
    return np.asarray(-np.log(clipped[np.arange(len(targets)), targets]))


def brier_terms(targets: np.ndarray, probabilities: np.ndarray, multilabel: bool) -> np.ndarray:
    """Brier score of each image, ``[N]``; see ``classification_metrics`` for the scale."""
    truth = targets if multilabel else targets[:, None] == np.arange(probabilities.shape[1])
    squares = (probabilities - truth) ** 2
    if multilabel or probabilities.shape[1] == 2:
        return np.asarray(squares.mean(axis=1))
    return np.asarray(squares.sum(axis=1))


def calibration_pairs(
    targets: np.ndarray, probabilities: np.ndarray, multilabel: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Stated and actual: confidence and 0/1 outcome, each ``[N, 1]`` (top label) or ``[N, K]`` (multi-label)."""
    if multilabel:
        return probabilities, targets.astype(np.float64)
    right = probabilities.argmax(axis=1) == targets
    return probabilities.max(axis=1, keepdims=True), right[:, None].astype(np.float64)


def calibration_bins(confidence: np.ndarray) -> np.ndarray:
    """Bin of each confidence, 0..14: bin b holds (b/15, (b+1)/15], bin 0 also 0."""
    bins: np.ndarray = np.clip(np.ceil(confidence * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)
    return bins


def _ece(confidence: np.ndarray, right: np.ndarray) -> float:
    gaps = np.bincount(calibration_bins(confidence), weights=confidence - right, minlength=ECE_BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def _decisions(targets: np.ndarray, probabilities: np.ndarray, multilabel: bool) -> dict[str, float]:
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss, recall_score

    if not multilabel:
        guess = probabilities.argmax(axis=1)
        recall = recall_score(targets, guess, labels=np.unique(targets), average="macro", zero_division=0)
        return {
            "loss": float(log_loss(targets, probabilities, labels=np.arange(probabilities.shape[1]))),
            "accuracy": float(accuracy_score(targets, guess)),
            "balanced_accuracy": float(recall),
        }
    guess = (probabilities >= 0.5).astype(np.int64)
    columns = range(probabilities.shape[1])
    both = [k for k in columns if 0 < targets[:, k].sum() < len(targets)]
    balanced = [balanced_accuracy_score(targets[:, k], guess[:, k]) for k in both]
    return {
        "loss": float(np.mean([log_loss(targets[:, k], probabilities[:, k], labels=[0, 1]) for k in columns])),
        "accuracy": float(accuracy_score(targets.ravel(), guess.ravel())),
        "balanced_accuracy": float(np.mean(balanced)) if both else float("nan"),
    }


def _rankings(
    targets: np.ndarray, probabilities: np.ndarray, multilabel: bool, thresholds: np.ndarray | None
) -> dict[str, float]:
    from sklearn.metrics import average_precision_score, roc_auc_score

    truth, scores, asked = one_vs_rest(targets, probabilities, multilabel)
    found: dict[str, list[float]] = {
        name: [] for name in ("auroc", "auprc", "sensitivity_at_90_specificity", "specificity_reached")
    }
    for q in range(len(asked)):
        positive, score = truth[:, q], scores[:, q]
        if positive.all() or not positive.any():
            continue
        found["auroc"].append(roc_auc_score(positive, score))
        found["auprc"].append(average_precision_score(positive, score))
        if thresholds is not None and not np.isnan(thresholds[q]):
            found["sensitivity_at_90_specificity"].append(np.mean(score[positive] >= thresholds[q]))
            found["specificity_reached"].append(np.mean(score[~positive] < thresholds[q]))
    return {name: float(np.mean(values)) if values else float("nan") for name, values in found.items()}
