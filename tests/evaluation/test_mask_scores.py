"""Mask scores against hand-made masks and a brute-force Hausdorff distance."""

import math

import numpy as np
import pytest
from scipy.ndimage import binary_erosion
from scipy.spatial.distance import cdist

from polyclinic.errors import DataError
from polyclinic.evaluation import (
    CaseScores,
    case_scores,
    patient_weights,
    segmentation_metrics,
    segmentation_replicates,
)

CLASSES = ["background", "lesion"]


def square(top: int, left: int, size: int, shape: tuple[int, int] = (16, 20)) -> np.ndarray:
    mask = np.zeros(shape, dtype=np.uint8)
    mask[top : top + size, left : left + size] = 1
    return mask


def test_hand_made_squares() -> None:
    found = case_scores(square(2, 2, 4), square(2, 4, 4), CLASSES)
    assert found["dice_lesion"] == pytest.approx(2 * 8 / 32)
    assert found["iou_lesion"] == pytest.approx(8 / 24)
    assert found["hd95_lesion"] == pytest.approx(2.0)


@pytest.mark.parametrize("spacing", [None, (0.5, 2.0)])
def test_hausdorff_against_brute_force(spacing: tuple[float, float] | None) -> None:
    first, second = square(2, 3, 6), square(5, 8, 7)
    steps = np.array(spacing or (1.0, 1.0))
    edges = [np.argwhere((m == 1) & ~binary_erosion(m == 1)) * steps for m in (first, second)]
    distances = cdist(*edges)
    expected = max(np.percentile(distances.min(axis=1), 95), np.percentile(distances.min(axis=0), 95))
    assert case_scores(first, second, CLASSES, spacing)["hd95_lesion"] == pytest.approx(expected, abs=1e-5)


def test_empty_masks_follow_the_stated_rule() -> None:
    empty, lesion = np.zeros((16, 20), dtype=np.uint8), square(2, 2, 4)
    assert case_scores(empty, empty, CLASSES) == {"dice_lesion": 1, "iou_lesion": 1, "hd95_lesion": 0}
    for pair in [(empty, lesion), (lesion, empty)]:
        found = case_scores(*pair, CLASSES, (2.0, 1.0))
        assert found["dice_lesion"] == found["iou_lesion"] == 0
        assert found["hd95_lesion"] == pytest.approx(math.hypot(32, 20))


def test_volumes_and_several_classes() -> None:
    target = np.zeros((6, 8, 8), dtype=np.uint8)
    target[1:4, 2:5, 2:5], target[4:6, 6:8, 6:8] = 1, 2
    found = case_scores(target, target, ["background", "a", "b"], (2.5, 1, 1))
    assert found == {"dice_a": 1, "iou_a": 1, "hd95_a": 0, "dice_b": 1, "iou_b": 1, "hd95_b": 0}


def test_refusals() -> None:
    with pytest.raises(DataError, match=r"\(16, 20\).*\(8, 8\)"):
        case_scores(square(0, 0, 1), square(0, 0, 1, (8, 8)), CLASSES)
    with pytest.raises(DataError, match="predicted mask holds class 2"):
        case_scores(2 * square(0, 0, 1), square(0, 0, 1), CLASSES)
    with pytest.raises(DataError, match="3 axes, the mask 2"):
        case_scores(square(0, 0, 1), square(0, 0, 1), CLASSES, (1, 1, 1))


def test_means_and_replicates() -> None:
    names = [f"{score}_{name}" for name in "ab" for score in ("dice", "iou", "hd95")]
    scores = {name: np.arange(4.0) + i for i, name in enumerate(names)}
    cases = CaseScores(list("wxyz"), list("ppqr"), [""] * 4, ["test"] * 4, scores)
    classes = ["background", "a", "b"]
    means = segmentation_metrics(cases, classes)
    assert list(means)[:3] == ["dice", "iou", "hd95"]
    assert means["dice_a"] == 1.5
    assert means["dice_b"] == 4.5
    assert means["dice"] == 3.0
    weights = patient_weights(cases.patients, 20, key="north")
    replicates = segmentation_replicates(cases, classes, weights)
    for b, row in enumerate(weights):
        repeated = np.repeat(np.arange(4), row)
        assert replicates["dice_a"][b] == pytest.approx(repeated.mean())
        assert replicates["dice"][b] == pytest.approx(repeated.mean() + 1.5)
    nobody = CaseScores([], [], [], [], {name: np.zeros(0) for name in names})
    assert math.isnan(segmentation_metrics(nobody, classes)["dice"])
    assert np.isnan(segmentation_replicates(nobody, classes, np.zeros((3, 0)))["dice"]).all()
