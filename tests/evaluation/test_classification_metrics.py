"""Metrics of class probabilities against scikit-learn, hand-made numbers and their own symmetries."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    log_loss,
    roc_auc_score,
    roc_curve,
)

from polyclinic.errors import DataError
from polyclinic.evaluation import CLASSIFICATION_METRICS, classification_metrics, specificity_thresholds


def draw(seed: int, images: int, classes: int, multilabel: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    if multilabel:
        targets = rng.integers(0, 2, (images, classes))
        return targets, np.clip(0.3 * targets + 0.7 * rng.random((images, classes)), 0, 1)
    targets = rng.permutation(np.arange(images) % classes)
    logits = rng.normal(size=(images, classes)) + 1.5 * np.eye(classes)[targets]
    return targets, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def test_hand_made_binary_numbers() -> None:
    targets = np.array([0, 0, 1, 1])
    second = np.array([0.1, 0.4, 0.35, 0.8])
    found = classification_metrics(targets, np.stack([1 - second, second], axis=1), multilabel=False)
    assert found["auroc"] == pytest.approx(0.75)
    assert found["auprc"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert found["accuracy"] == found["balanced_accuracy"] == pytest.approx(0.75)
    assert found["brier"] == pytest.approx((0.01 + 0.16 + 0.65**2 + 0.04) / 4)
    assert found["loss"] == pytest.approx(-np.log([0.9, 0.6, 0.35, 0.8]).mean())
    # Confidences .9, .6, .65, .8 each fall into their own of the 15 bins; the third is wrong.
    assert found["ece"] == pytest.approx((0.1 + 0.4 + 0.65 + 0.2) / 4)
    assert math.isnan(found["sensitivity_at_90_specificity"])


@pytest.mark.parametrize("classes", [3, 7])
def test_multi_class_against_scikit_learn(classes: int) -> None:
    targets, probabilities = draw(classes, 90, classes)
    found = classification_metrics(targets, probabilities, multilabel=False)
    truth = np.eye(classes)[targets]
    assert found["auroc"] == pytest.approx(roc_auc_score(targets, probabilities, multi_class="ovr"), abs=1e-12)
    assert found["auprc"] == pytest.approx(average_precision_score(truth, probabilities), abs=1e-12)
    assert found["loss"] == pytest.approx(log_loss(targets, probabilities), abs=1e-12)
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(targets, probabilities.argmax(1)))
    assert found["brier"] == pytest.approx(((probabilities - truth) ** 2).sum(1).mean(), abs=1e-12)
    assert list(found) == list(CLASSIFICATION_METRICS)


def test_multi_label_against_scikit_learn() -> None:
    targets, probabilities = draw(1, 80, 4, multilabel=True)
    found = classification_metrics(targets, probabilities, multilabel=True)
    columns = [(targets[:, k], probabilities[:, k]) for k in range(4)]
    guess = probabilities >= 0.5
    assert found["auroc"] == pytest.approx(roc_auc_score(targets, probabilities, average="macro"), abs=1e-12)
    assert found["auprc"] == pytest.approx(average_precision_score(targets, probabilities), abs=1e-12)
    assert found["loss"] == pytest.approx(np.mean([log_loss(*column) for column in columns]), abs=1e-12)
    assert found["brier"] == pytest.approx(np.mean([brier_score_loss(*column) for column in columns]), abs=1e-12)
    assert found["accuracy"] == pytest.approx((guess == targets).mean())
    assert found["balanced_accuracy"] == pytest.approx(
        np.mean([balanced_accuracy_score(targets[:, k], guess[:, k]) for k in range(4)])
    )


def test_one_class_site_has_no_auroc_and_no_warning() -> None:
    probabilities = np.array([[0.8, 0.2], [0.3, 0.7]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = classification_metrics(np.array([0, 0]), probabilities, multilabel=False)
    assert math.isnan(found["auroc"])
    assert math.isnan(found["auprc"])
    assert found["accuracy"] == found["balanced_accuracy"] == 0.5
    assert found["loss"] == pytest.approx(-(math.log(0.8) + math.log(0.3)) / 2)


def test_absent_class_is_left_out_of_the_mean() -> None:
    targets, probabilities = draw(2, 60, 3)
    keep = targets != 2
    found = classification_metrics(targets[keep], probabilities[keep], multilabel=False)
    expected = [roc_auc_score(targets[keep] == k, probabilities[keep][:, k]) for k in (0, 1)]
    assert found["auroc"] == pytest.approx(np.mean(expected), abs=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_diverged_model_has_no_metrics(bad: float) -> None:
    found = classification_metrics(np.array([0, 1]), np.array([[bad, 0.5], [0.5, 0.5]]), multilabel=False)
    assert all(math.isnan(value) for value in found.values())


def test_no_images_have_no_metrics() -> None:
    found = classification_metrics(np.zeros(0, int), np.zeros((0, 3)), multilabel=False)
    assert all(math.isnan(value) for value in found.values())


@pytest.mark.parametrize(
    ("targets", "probabilities", "multilabel", "message"),
    [
        (np.zeros(3, int), np.full((2, 2), 0.5), False, r"\(3,\).*\(2, 2\)"),
        (np.zeros(2, int), np.full((2, 2), 0.5), True, r"multi-label targets of shape \(2,\)"),
        (np.zeros(2, int), np.array([[0.5, 0.5], [3.0, 1.0]]), False, "row 1 sum to 4"),
    ],
)
def test_refusals_name_what_is_wrong(
    targets: np.ndarray, probabilities: np.ndarray, multilabel: bool, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        classification_metrics(targets, probabilities, multilabel)


def test_thresholds_come_from_validation_and_stay() -> None:
    validation = np.array([0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.6, 0.5, 0.9])
    truth = np.array([0] * 10 + [1] * 2)
    both = np.stack([1 - validation, validation], axis=1)
    threshold = specificity_thresholds(truth, both, multilabel=False)
    assert threshold.tolist() == [0.5]  # nine of ten negatives lie below 0.5, only eight below 0.45
    test = np.array([0.2, 0.7, 0.55, 0.5, 0.49])
    found = classification_metrics(
        np.array([0, 0, 1, 1, 1]), np.stack([1 - test, test], axis=1), multilabel=False, threshold_source=(truth, both)
    )
    assert found["sensitivity_at_90_specificity"] == pytest.approx(2 / 3)
    assert found["specificity_reached"] == pytest.approx(1 / 2)


def test_threshold_is_that_of_the_roc_curve() -> None:
    targets, probabilities = draw(5, 100, 3)
    for k, threshold in enumerate(specificity_thresholds(targets, probabilities, multilabel=False)):
        false_positives, _, thresholds = roc_curve(targets == k, probabilities[:, k], drop_intermediate=False)
        assert threshold == pytest.approx(thresholds[false_positives <= 0.1].min(), rel=1e-12)


def test_thresholds_without_negatives_or_images() -> None:
    only = specificity_thresholds(np.array([1, 1]), np.array([[0.5, 0.5]] * 2), multilabel=False)
    assert np.isnan(only).all()
    assert np.isnan(specificity_thresholds(np.zeros(0, int), np.zeros((0, 3)), multilabel=False)).all()
    best_is_negative = specificity_thresholds(np.array([0, 1]), np.array([[0.1, 0.9], [0.5, 0.5]]), multilabel=False)
    assert best_is_negative.tolist() == [math.inf]


def test_perfectly_calibrated_bins_have_no_error() -> None:
    second = np.array([0.9] * 10 + [0.3] * 10)
    targets = np.array([1] * 9 + [0] + [1] * 3 + [0] * 7)
    found = classification_metrics(targets, np.stack([1 - second, second], axis=1), multilabel=False)
    assert found["ece"] == pytest.approx(0, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([2, 4]), st.floats(0.2, 3))
def test_ranking_ignores_monotone_transforms(seed: int, labels: int, power: float) -> None:
    targets, probabilities = draw(seed, 40, labels, multilabel=True)
    plain = classification_metrics(targets, probabilities, multilabel=True)
    bent = classification_metrics(targets, probabilities**power, multilabel=True)
    for name in ("auroc", "auprc"):
        assert bent[name] == pytest.approx(plain[name], abs=1e-12, nan_ok=True)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([2, 3, 5]), st.booleans())
def test_order_and_doubling_of_images_change_nothing(seed: int, classes: int, multilabel: bool) -> None:
    targets, probabilities = draw(seed, 24, classes, multilabel)
    order = np.random.default_rng(seed).permutation(48) % 24
    plain = classification_metrics(targets, probabilities, multilabel, (targets, probabilities))
    twice = classification_metrics(targets[order], probabilities[order], multilabel, (targets, probabilities))
    assert twice == pytest.approx(plain, abs=1e-12, nan_ok=True)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_mirrored_scores_mirror_the_auroc(seed: int) -> None:
    targets, probabilities = draw(seed, 30, 2)
    auroc = classification_metrics(targets, probabilities, multilabel=False)["auroc"]
    mirrored = classification_metrics(targets, probabilities[:, ::-1], multilabel=False)["auroc"]
    assert auroc + mirrored == pytest.approx(1)
