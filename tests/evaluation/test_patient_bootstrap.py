"""The vectorised bootstrap equals scikit-learn on repeated images, and its intervals cover."""

import time
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyclinic.evaluation import (
    classification_metrics,
    classification_replicates,
    interval,
    patient_weights,
    specificity_thresholds,
)


def draw(seed: int, images: int, classes: int, multilabel: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    raw = np.round(rng.random((images, classes)), 1) + 0.05  # rounded: many ties
    if multilabel:
        return rng.integers(0, 2, (images, classes)), np.clip(raw, 0, 1)
    return rng.integers(0, classes, images), raw / raw.sum(axis=1, keepdims=True)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 40), st.sampled_from([2, 3, 5]), st.booleans())
def test_unit_weights_equal_scikit_learn(seed: int, images: int, classes: int, multilabel: bool) -> None:
    targets, probabilities = draw(seed, images, classes, multilabel)
    source = draw(seed + 1, 30, classes, multilabel)
    found = classification_replicates(
        targets, probabilities, multilabel, np.ones((1, images)), specificity_thresholds(*source, multilabel)
    )
    expected = classification_metrics(targets, probabilities, multilabel, source)
    assert {name: values[0] for name, values in found.items()} == pytest.approx(expected, abs=1e-12, nan_ok=True)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([2, 3, 5]), st.booleans())
def test_integer_weights_equal_scikit_learn_on_repeated_images(seed: int, classes: int, multilabel: bool) -> None:
    targets, probabilities = draw(seed, 12, classes, multilabel)
    source = draw(seed + 1, 30, classes, multilabel)
    patients = [f"p{i // 2}" for i in range(12)]
    weights = patient_weights(patients, 5, key=str(seed))
    thresholds = specificity_thresholds(*source, multilabel)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = classification_replicates(targets, probabilities, multilabel, weights, thresholds)
    for b, row in enumerate(weights):
        repeated = np.repeat(np.arange(12), row)
        expected = classification_metrics(targets[repeated], probabilities[repeated], multilabel, source)
        assert {n: v[b] for n, v in found.items()} == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_weights_are_of_patients_and_of_the_key_alone() -> None:
    patients = ["a", "a", "b", "c", "c", "c"]
    weights = patient_weights(patients, 200, key="north")
    assert weights.shape == (200, 6)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, [0, 2, 3]].sum(axis=1) == 3).all()
    assert np.array_equal(weights, patient_weights(patients, 200, key="north"))
    assert np.array_equal(weights[:, ::-1], patient_weights(patients[::-1], 200, key="north"))
    assert np.array_equal(weights[:50], patient_weights(patients, 50, key="north"))
    assert not np.array_equal(weights, patient_weights(patients, 200, key="south"))


def test_blocks_join_seamlessly(monkeypatch: pytest.MonkeyPatch) -> None:
    targets, probabilities = draw(3, 20, 3, multilabel=False)
    weights = patient_weights([str(i) for i in range(20)], 7, key="x")
    whole = classification_replicates(targets, probabilities, False, weights)
    monkeypatch.setattr("polyclinic.evaluation.bootstrap._BLOCK_VALUES", 40)
    parts = classification_replicates(targets, probabilities, False, weights)
    assert all(np.allclose(whole[name], parts[name], equal_nan=True, atol=1e-14) for name in whole)


def test_nothing_drawn_nothing_shown() -> None:
    targets, probabilities = draw(3, 20, 3, multilabel=False)
    found = classification_replicates(targets, probabilities, False, np.zeros((0, 20)))
    assert found["auroc"].shape == (0,)
    empty = classification_replicates(targets[:0], probabilities[:0], False, patient_weights([], 4, key="x"))
    assert np.isnan(empty["auroc"]).all()
    assert empty["auroc"].shape == (4,)


def test_interval_is_a_percentile_and_refuses_a_selection() -> None:
    values = np.arange(101, dtype=float)
    assert interval(values, 0.9)[:2] == pytest.approx((5, 95))
    values[:5] = np.nan
    low, high, undefined = interval(values, 0.9)
    assert (low, high) == (pytest.approx(9.75), pytest.approx(95.25))
    assert undefined == pytest.approx(5 / 101)
    values[5] = np.nan
    assert np.isnan(interval(values, 0.9).low)
    assert np.isnan(interval(np.zeros(0), 0.9).high)


def test_coverage_of_the_interval_with_several_images_per_patient() -> None:
    """95% intervals of an accuracy whose errors are shared by the images of a patient: 300 studies, 40 patients."""
    rng = np.random.default_rng(0)
    patients = [str(i // 3) for i in range(120)]
    targets = np.zeros(120, dtype=int)
    inside = 0
    for study in range(300):
        right = np.repeat(rng.random(40) < 0.7, 3)
        probabilities = np.where(right[:, None], [[0.8, 0.2]], [[0.2, 0.8]])
        weights = patient_weights(patients, 300, key=str(study))
        accuracy = classification_replicates(targets, probabilities, False, weights)["accuracy"]
        low, high, _ = interval(accuracy, 0.95)
        inside += low <= 0.7 <= high
    assert 0.90 <= inside / 300 <= 0.98


def test_a_thousand_replicates_take_seconds() -> None:
    targets, probabilities = draw(0, 700, 7, multilabel=False)
    weights = patient_weights([str(i) for i in range(700)], 1000, key="x")
    start = time.process_time()
    classification_replicates(targets, probabilities, False, weights)
    assert time.process_time() - start < 5
