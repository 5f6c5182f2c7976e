"""What a network says about images: batches of probabilities, and from them predictions and example pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from polyclinic.evaluation.predictions import CaseScores, Predictions
from polyclinic.evaluation.segmentation import case_scores

if TYPE_CHECKING:
    from polyclinic.data.dataset import SiteData
    from polyclinic.tasks import Task


def probabilities(
    model: nn.Module, data: SiteData, task: Task, indices: Tensor, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``(indices, probabilities)`` of each batch, on the CPU in float32: ``[B, K]`` or ``[B, K, *spatial]``.

    The network is put into evaluation mode and left there.
    """
    device = next(model.parameters()).device
    model.eval()
    with torch.inference_mode():
        for part in torch.split(indices, batch_size):
            yield part, task.predict(model, data.inputs(part).to(device)).float().cpu()


def predict_cases(
    model: nn.Module, data: SiteData, task: Task, splits: Sequence[str], batch_size: int
) -> Predictions | CaseScores:
    """Predictions (classification) or scores of the masks (segmentation) for every image of some splits, in order."""
    indices = torch.cat([data.splits[name] for name in splits])
    names = [name for name in splits for _ in range(len(data.splits[name]))]
    cases = [data.cases[i] for i in indices.tolist()]
    head = (
        [case.image_id for case in cases],
        [case.patient for case in cases],
        [case.device for case in cases],
        names,
    )
    batches = probabilities(model, data, task, indices, batch_size)
    if task.kind != "segmentation":
        found = [p.double().numpy() for _, p in batches]
        rows = np.concatenate(found) if found else np.zeros((0, len(task.classes)))
        if task.kind == "multi-class" and len(rows):
            rows /= rows.sum(axis=1, keepdims=True)  # float32 rows sum to 1 only to 1e-7
        return Predictions(*head, targets=data.targets[indices].long().numpy(), probabilities=rows)
    scores = [
        case_scores(mask.numpy(), data.targets[i].numpy(), task.classes)
        for part, p in batches
        for i, mask in zip(part.tolist(), p.argmax(1), strict=True)
    ]
    columns = list(scores[0]) if scores else []
    return CaseScores(*head, scores={c: np.array([s[c] for s in scores]) for c in columns})


def example_pictures(
    model: nn.Module, data: SiteData, task: Task, count: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """A few test images with truth and prediction, for the report; volumes by their middle slice.

    Returns:
        ``images`` uint8 ``[n, C, H, W]``, ``targets``, ``predictions`` (class index ``[n]``, 0/1 ``[n, K]`` or masks
        uint8 ``[n, H, W]``) and ``probabilities`` ``[n, K]`` (classification).
    """
    test = data.splits["test"]
    chosen = test[np.sort(rng.choice(len(test), size=min(count, len(test)), replace=False))]
    parts = [p for _, p in probabilities(model, data, task, chosen, max(1, len(chosen)))]
    found = torch.cat(parts) if parts else torch.zeros(0, len(task.classes))
    pictures = data.images[chosen]
    if pictures.dtype != torch.uint8:
        pictures = (pictures.clamp(0, 1) * 255).round().to(torch.uint8)
    result: dict[str, Any] = {"images": _middle(pictures).numpy()}
    targets = data.targets[chosen]
    if task.kind == "segmentation":
        masks = found.argmax(1).to(torch.uint8)
        return result | {"targets": _middle(targets, 3).numpy(), "predictions": _middle(masks, 3).numpy()}
    decided = (found >= 0.5).long() if task.kind == "multi-label" else found.argmax(1)
    return result | {
        "targets": targets.long().numpy(),
        "predictions": decided.numpy(),
        "probabilities": found.double().numpy(),
    }


def _middle(stack: Tensor, flat_dims: int = 4) -> Tensor:
    """The middle slice of each volume of ``[n, (C,) D, H, W]``; flat pictures as they are."""
    return stack if stack.dim() == flat_dims else stack[..., stack.shape[-3] // 2, :, :]
