"""Classification: losses against numbers by hand, probabilities, impossible settings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from polyclinic.errors import StudyError
from polyclinic.study import TaskSettings, TrainingSettings
from polyclinic.tasks import Task, make_task
from polyclinic.tasks.classification import focal_loss


def task(kind: str = "multi-class", loss: str = "auto", classes: tuple[str, ...] = ("a", "b"), **training: Any) -> Task:
    return make_task(TaskSettings(kind=kind, loss=loss, classes=list(classes)), TrainingSettings(**training))


def test_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    # p of the true class: 1/2 and 1/4
    expected = (math.log(2) + math.log(4)) / 2
    for loss in ("auto", "cross-entropy"):
        assert task(loss=loss).loss(logits, torch.tensor([0, 1])).item() == pytest.approx(expected)


def test_focal_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    expected = (0.25 * math.log(2) + 0.5625 * math.log(4)) / 2
    assert task(loss="focal").loss(logits, torch.tensor([0, 1])).item() == pytest.approx(expected)


def test_multi_label_losses_by_hand() -> None:
    logits, targets = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[1.0, 0.0]])
    # p of what is true: 1/2 and 1/4
    plain = (math.log(2) + math.log(4)) / 2
    focal = (0.25 * math.log(2) + 0.5625 * math.log(4)) / 2
    assert task("multi-label").loss(logits, targets).item() == pytest.approx(plain)
    assert task("multi-label", "cross-entropy").loss(logits, targets).item() == pytest.approx(plain)
    assert task("multi-label", "focal").loss(logits, targets).item() == pytest.approx(focal)
    assert task("multi-label", classes=("a",)).loss(logits[:, :1], targets[:, :1]).item() == pytest.approx(math.log(2))


def test_focal_losses_agree_with_monai() -> None:
    from monai.losses import FocalLoss

    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(7, 3, generator=generator), torch.arange(7) % 3
    theirs = FocalLoss(to_onehot_y=True, use_softmax=True)(logits, targets.unsqueeze(1)) * 3
    torch.testing.assert_close(focal_loss(logits, targets), theirs)
    many = (torch.rand(7, 3, generator=generator) < 0.5).float()
    labels = task("multi-label", "focal", ("a", "b", "c"))
    torch.testing.assert_close(labels.loss(logits, many), FocalLoss()(logits, many))


@given(st.integers(2, 5), st.integers(1, 6), st.integers(0, 99), st.sampled_from([1.0, 1e4]))
def test_losses_are_means_and_probabilities_are_probabilities(k: int, batch: int, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, k, generator=generator) * size
    targets = torch.randint(0, k, (batch,), generator=generator)
    classes = tuple("abcdefg"[:k])
    for loss in ("auto", "focal"):
        one = task(loss=loss, classes=classes)
        single = torch.stack([one.loss(logits[i : i + 1], targets[i : i + 1]) for i in range(batch)])
        torch.testing.assert_close(one.loss(logits, targets), single.mean())
        assert torch.isfinite(single).all()
        torch.testing.assert_close(one.probabilities(logits).sum(1), torch.ones(batch))
    labels = task("multi-label", "focal", classes)
    assert torch.isfinite(labels.loss(logits, (logits > 0).float()))
    assert ((labels.probabilities(logits) >= 0) & (labels.probabilities(logits) <= 1)).all()


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_the_focal_gradient_is_finite_at_certainty(gamma: float) -> None:
    logits = torch.tensor([[1000.0, 0.0], [0.0, 1000.0]], requires_grad=True)
    focal_loss(logits, torch.tensor([0, 0]), gamma).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_half_precision_logits_are_computed_in_single() -> None:
    logits = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16)
    assert task().loss(logits, torch.tensor([0])).dtype == torch.float32
    assert task("multi-label").probabilities(logits).dtype == torch.float32


def test_predict_is_the_probabilities_of_the_forward_pass() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    images = torch.rand(3, 1, 2, 2)
    for kind in ("multi-class", "multi-label"):
        one = task(kind)
        assert (one.kind, one.classes) == (kind, ("a", "b"))
        torch.testing.assert_close(one.predict(model, images), one.probabilities(model(images)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"loss": "dice-ce"}, "dice-ce compares masks, but task.kind is 'multi-class'. Use cross-entropy or focal"),
        ({"kind": "multi-label", "loss": "dice-ce"}, "task.kind is 'multi-label'"),
        ({"classes": ("a",)}, "multi-class needs at least two classes, got ['a']; add one, or set task.kind"),
        ({"kind": "segmentation", "classes": ("a",)}, "the background first"),
        ({"patch": [8, 8]}, "training.patch is for segmentation, but task.kind is 'multi-class'"),
        ({"kind": "multi-label", "balanced": True}, "training.balanced is for multi-class"),
        ({"kind": "segmentation", "balanced": True}, "try training.patch"),
    ],
)
def test_impossible_settings_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(StudyError) as caught:
        task(**arguments)
    assert words in str(caught.value)
