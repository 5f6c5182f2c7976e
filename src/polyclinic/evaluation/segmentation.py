"""Scores of masks: per case through MONAI, per site as means over cases."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np

from polyclinic.errors import DataError
from polyclinic.evaluation.bootstrap import mean_replicates
from polyclinic.evaluation.names import SEGMENTATION_METRICS
from polyclinic.evaluation.predictions import CaseScores


def case_scores(
    prediction: np.ndarray, target: np.ndarray, classes: Sequence[str], spacing: Sequence[float] | None = None
) -> dict[str, float]:
    """Dice, IoU and 95th-percentile Hausdorff distance of each class but the first (background).

    Empty masks: both empty gives Dice = IoU = 1 and HD95 = 0 (nothing was there, nothing was found); one
    empty gives Dice = IoU = 0 and HD95 = the diagonal of the image, the farthest that a surface could be.

    Args:
        prediction: Class index of each pixel, ``[*spatial]`` (2D or 3D).
        target: The same for the truth.
        classes: Names in order of the index.
        spacing: Millimetres per pixel along each axis; HD95 is then in mm, without it in pixels.

    Returns:
        ``dice_<class>``, ``iou_<class>``, ``hd95_<class>``.

    Raises:
        DataError: Shapes differ, or an index is none of the classes.
    """
    _check_masks(prediction, target, classes, spacing)
    import torch
    from monai.metrics import compute_dice, compute_hausdorff_distance, compute_iou

    steps = [1.0] * target.ndim if spacing is None else [float(step) for step in spacing]
    diagonal = math.sqrt(sum((size * step) ** 2 for size, step in zip(target.shape, steps, strict=True)))
    scores: dict[str, float] = {}
    for index, name in enumerate(classes[1:], start=1):
        found, wanted = (torch.from_numpy(mask == index)[None, None].float() for mask in (prediction, target))
        scores[f"dice_{name}"] = float(compute_dice(found, wanted, include_background=True, ignore_empty=False))
        scores[f"iou_{name}"] = float(compute_iou(found, wanted, include_background=True, ignore_empty=False))
        empty = [not bool(mask.any()) for mask in (found, wanted)]
        if any(empty):
            scores[f"hd95_{name}"] = 0.0 if all(empty) else diagonal
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # MONAI 1.6 warns of an argument that it passes to itself
            distance = compute_hausdorff_distance(found, wanted, include_background=True, percentile=95, spacing=steps)
        scores[f"hd95_{name}"] = float(distance)
    return scores


def segmentation_metrics(cases: CaseScores, classes: Sequence[str]) -> dict[str, float]:
    """Mean over cases: ``dice_<class>`` and so on, and ``dice``, ``iou``, ``hd95``, the means over classes; NaN
    without cases."""
    values = {
        f"{score}_{name}": float(np.mean(cases.scores[f"{score}_{name}"])) if cases.images else float("nan")
        for score in SEGMENTATION_METRICS
        for name in classes[1:]
    }
    macro = {s: float(np.mean([values[f"{s}_{name}"] for name in classes[1:]])) for s in SEGMENTATION_METRICS}
    return macro | values


def segmentation_replicates(cases: CaseScores, classes: Sequence[str], weights: np.ndarray) -> dict[str, np.ndarray]:
    """The same means for every replicate of ``patient_weights`` (``[B, N]``): ``[B]`` by metric."""
    if not cases.images:
        return {name: np.full(len(weights), np.nan) for name in segmentation_metrics(cases, classes)}
    values = {
        f"{score}_{name}": mean_replicates(cases.scores[f"{score}_{name}"], weights)
        for score in SEGMENTATION_METRICS
        for name in classes[1:]
    }
    macro = {s: np.mean([values[f"{s}_{name}"] for name in classes[1:]], axis=0) for s in SEGMENTATION_METRICS}
    return macro | values


def _check_masks(
    prediction: np.ndarray, target: np.ndarray, classes: Sequence[str], spacing: Sequence[float] | None
) -> None:
    if prediction.shape != target.shape or target.ndim not in (2, 3):
        raise DataError(f"predicted mask {prediction.shape} and true mask {target.shape}: wanted one 2D or 3D shape")
    if spacing is not None and len(spacing) != target.ndim:
        raise DataError(f"spacing {tuple(spacing)} has {len(spacing)} axes, the mask {target.ndim}")
    for what, mask in (("predicted", prediction), ("true", target)):
        if mask.size and not 0 <= int(mask.min()) <= int(mask.max()) < len(classes):
            raise DataError(
                f"the {what} mask holds class {int(mask.max() if mask.min() >= 0 else mask.min())}, "
                f"wanted 0 to {len(classes) - 1} ({', '.join(classes)})"
            )
