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
from polyclinic.tasks import PRIOR_LOSSES, Task, make_task
from polyclinic.tasks.classification import MultiClass, fedlc_margins, focal_loss, logit_adjustment


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


def test_logit_adjustment_by_hand() -> None:
    """7 and 1 images, half an image added to each: frequencies 7.5/9 and 1.5/9."""
    assert logit_adjustment(torch.tensor([7, 1]), 1.0).tolist() == pytest.approx([math.log(5 / 6), math.log(1 / 6)])
    assert logit_adjustment(torch.tensor([7, 1]), 0.5).tolist() == pytest.approx(
        [math.log(5 / 6) / 2, math.log(1 / 6) / 2]
    )
    assert logit_adjustment(torch.tensor([7, 0]), 1.0)[1].item() == pytest.approx(math.log(0.5 / 8))
    found = task(loss="logit-adjusted").among(torch.tensor([7.0, 1.0]))
    logits = torch.tensor([[0.0, math.log(5)], [0.0, 0.0]])
    # With the shift both classes of the first image are equally likely; of the second class 1 has 1/6.
    expected = (math.log(2) + math.log(6)) / 2
    assert found.loss(logits, torch.tensor([0, 1])).item() == pytest.approx(expected)


def test_fedlc_by_hand() -> None:
    """16 and 81 images: margins of tau / 2 and tau / 3; a class without images is out of the softmax."""
    assert fedlc_margins(torch.tensor([16, 81]), 1.0).tolist() == pytest.approx([-1 / 2, -1 / 3])
    assert fedlc_margins(torch.tensor([16, 81]), 0.6).tolist() == pytest.approx([-0.3, -0.2])
    assert fedlc_margins(torch.tensor([16.0, 0.0]), 1.0).tolist() == pytest.approx([-0.5, -math.inf])
    found = task(loss="fedlc", classes=("a", "b", "c")).among(torch.tensor([16.0, 81.0, 0.0]))
    logits = torch.tensor([[0.5, 1 / 3 + math.log(3), 1000.0]], requires_grad=True)
    loss = found.loss(logits, torch.tensor([1]))
    assert loss.item() == pytest.approx(math.log(4 / 3))
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.tolist()[0] == pytest.approx([1 / 4, -1 / 4, 0])


@given(st.lists(st.just(0.0) | st.floats(1e-3, 1e6), min_size=2, max_size=8), st.floats(0, 3))
def test_shifts_favour_rare_classes_and_none_favours_at_strength_0(counts: list[float], tau: float) -> None:
    numbers = torch.tensor(counts)
    adjusted, margins = logit_adjustment(numbers, tau), fedlc_margins(numbers, tau)
    assert torch.isfinite(adjusted).all()
    order = numbers.argsort()
    assert (adjusted[order].diff() >= -1e-6).all(), "what is added grows with the count, and is learnt against"
    held = [i for i in order.tolist() if counts[i] > 0]
    assert (margins[held].diff() >= -1e-6).all()
    assert not torch.isnan(margins).any()
    if tau == 0:
        assert not adjusted.any()
        assert not margins[held].any()


def test_only_losses_with_a_prior_look_at_counts() -> None:
    counts = torch.tensor([7.0, 1.0])
    for loss in ("auto", "cross-entropy", "focal"):
        one = task(loss=loss)
        assert one.among(counts) is one
    one = task("multi-label")
    assert one.among(counts) is one


@pytest.mark.parametrize("loss", PRIOR_LOSSES)
def test_a_task_with_a_prior_judges_without_it(loss: str) -> None:
    """Before the counts of a training set are known it is cross-entropy; probabilities never know of them."""
    one, logits = task(loss=loss), torch.tensor([[0.0, math.log(3)]])
    among = one.among(torch.tensor([100.0, 1.0]))
    assert one.loss(logits, torch.tensor([0])).item() == pytest.approx(math.log(4))
    assert among.loss(logits, torch.tensor([0])).item() != pytest.approx(math.log(4), rel=0.01)
    assert torch.equal(among.probabilities(logits), one.probabilities(logits))


def test_strength_comes_from_the_study() -> None:
    made = make_task(TaskSettings(classes=["a", "b"], loss="fedlc", tau=0.6), TrainingSettings())
    assert isinstance(made, MultiClass)
    assert (made.prior, made.tau, made.shift) == ("fedlc", 0.6, None)


@pytest.mark.parametrize("kind", ["multi-label", "segmentation"])
@pytest.mark.parametrize("loss", PRIOR_LOSSES)
def test_priors_are_for_one_class_an_image(kind: str, loss: str) -> None:
    with pytest.raises(StudyError, match=rf"task.loss: {loss} shifts the classes.*{kind}.*Use focal"):
        task(kind, loss)
