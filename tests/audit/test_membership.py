"""The membership audit: numbers that can be done by hand, and networks that did and did not learn by heart."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from polyclinic.audit.membership import area, at_few_false_positives, audit_membership, image_losses, judge, share
from polyclinic.data.dataset import SiteData
from polyclinic.data.manifest import Case
from polyclinic.errors import ContributionError
from polyclinic.tasks.classification import MultiClass, MultiLabel
from polyclinic.tasks.segmentation import Segmentation

AB = MultiClass(("a", "b"))
SIDE = 6


def noise_site(train: int, held: int, per_patient: int = 1, seed: int = 0) -> SiteData:
    """Random pixels with random labels: whatever a network knows of them it has learned by heart."""
    draw = torch.Generator().manual_seed(seed)
    count = (train + 2 * held) * per_patient
    parts = ["train"] * train + ["val"] * held + ["test"] * held
    split = [part for part in parts for _ in range(per_patient)]
    cases = [Case(f"{i}.png", f"p{i // per_patient}", "north", label="a", split=split[i]) for i in range(count)]
    pixels = torch.rand(count, 1, SIDE, SIDE, generator=draw)
    targets = torch.randint(0, 2, (count,), generator=draw)
    splits = {p: torch.tensor([i for i, part in enumerate(split) if part == p]) for p in ("train", "val", "test")}
    return SiteData("north", cases, pixels, targets, splits)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 64), nn.ReLU(), nn.Linear(64, 2))


def learned_by_heart(data: SiteData, steps: int = 300) -> nn.Module:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        AB.loss(model(data.inputs(data.splits["train"])), data.labels("train")).backward()
        optimizer.step()
    return model


def test_area_counts_pairs() -> None:
    # 3 > 2, 3 > 0, 1 < 2, 1 > 0: three of four pairs; a tie counts half.
    truth = np.array([True, True, False, False])
    assert area(truth, np.array([3.0, 1.0, 2.0, 0.0])) == 0.75
    assert area(truth, np.array([3.0, 2.0, 2.0, 0.0])) == 0.875


def test_separable_scores_are_told_apart_and_fail() -> None:
    scores = np.r_[np.arange(20.0) + 100, np.arange(20.0)]
    found = judge(scores, -scores, 20, limit=0.65, seed=0, draws=200)
    assert found.auc == 1.0
    assert found.auc_without_base == 1.0
    assert found.passed is False
    assert (found.auc_low, found.auc_high) == (1.0, 1.0)
    assert found.true_positives is not None
    assert found.true_positives.value == 1.0
    assert found.loss_gap == pytest.approx(100)


def test_identical_scores_are_guessing() -> None:
    found = judge(np.zeros(40), np.ones(40), 20, limit=0.65, seed=0, draws=200)
    assert found.auc == 0.5
    assert found.passed is True
    assert found.true_positives is not None
    assert found.true_positives.count == 0
    assert found.loss_gap == 0


@pytest.mark.parametrize(
    ("count", "of", "low", "high"),
    [
        # Printed in tables of exact binomial limits.
        (1, 10, 0.0025, 0.4450),
        (5, 10, 0.1871, 0.8129),
        # Closed forms: 1 - 0.025**(1/n) and 0.025**(1/n).
        (0, 30, 0.0, 1 - 0.025 ** (1 / 30)),
        (30, 30, 0.025 ** (1 / 30), 1.0),
    ],
)
def test_clopper_pearson(count: int, of: int, low: float, high: float) -> None:
    found = share(count, of)
    assert found.value == count / of
    assert found.low == pytest.approx(low, abs=5e-5)
    assert found.high == pytest.approx(high, abs=5e-5)


@pytest.mark.parametrize(("count", "of"), [(3, 17), (12, 40)])
def test_limits_leave_a_fortieth_of_the_binomial_on_either_side(count: int, of: int) -> None:
    def chance(p: float, counts: range) -> float:
        return sum(math.comb(of, i) * p**i * (1 - p) ** (of - i) for i in counts)

    found = share(count, of)
    assert chance(found.low, range(count, of + 1)) == pytest.approx(0.025)
    assert chance(found.high, range(count + 1)) == pytest.approx(0.025)


def test_threshold_accuses_one_of_few_others() -> None:
    # Ten others: 1% of them is less than one, so one may be accused. Threshold 8: 9 is accused, and 8.5 and 20 found.
    found, accused = at_few_false_positives(np.array([20.0, 8.5, 8.0, 1.0]), np.arange(10.0))
    assert (accused.count, accused.of) == (1, 10)
    assert (found.count, found.of) == (2, 4)


def test_threshold_keeps_to_one_percent_of_many_others() -> None:
    # 300 others 0..299: three may be accused (299, 298, 297), so the threshold is 296.
    found, accused = at_few_false_positives(np.array([296.0, 296.5, 500.0]), np.arange(300.0))
    assert accused.count == 3
    assert found.count == 2


def test_ties_never_accuse_more_than_allowed() -> None:
    found, accused = at_few_false_positives(np.full(5, 7.0), np.full(12, 7.0))
    assert (found.count, accused.count) == (0, 0)


def test_a_network_that_learned_by_heart_is_caught() -> None:
    data = noise_site(24, 12)
    found = audit_membership(learned_by_heart(data), network(), data, AB, seed=0)
    assert found.auc is not None
    assert found.auc > 0.75
    assert found.passed is False
    assert found.loss_gap is not None
    assert found.loss_gap > 0.5
    assert found.auc_low is not None
    assert found.auc_high is not None
    assert found.auc_low <= found.auc <= found.auc_high


def test_a_network_that_did_not_move_is_guessing_exactly() -> None:
    data = noise_site(24, 12, per_patient=2)
    found = audit_membership(network(), network(), data, AB, seed=0)
    assert found.auc == 0.5
    assert found.passed is True
    assert (found.members, found.non_members) == (24, 24)


def test_patients_not_images_are_counted() -> None:
    # 9 patients with five images each are still 9 patients.
    found = audit_membership(network(), network(), noise_site(9, 20, per_patient=5), AB, seed=0)
    assert found.members == 9
    assert found.passed is None
    assert found.auc is None
    assert "9 training patients" in found.why
    assert found.as_json()["loss_gap"] is None


def test_a_patients_score_is_the_mean_over_his_images() -> None:
    data = noise_site(10, 5, per_patient=2)
    data.cases[2] = Case("2.png", "p0", "north", label="a", split="train")  # now p0 has three images and p1 one
    after = learned_by_heart(data, steps=5)
    found = audit_membership(after, network(), data, AB, seed=0)
    with torch.no_grad():
        outputs = after(data.inputs(torch.arange(20))).double()
    each = nn.functional.cross_entropy(outputs, data.targets[:20], reduction="none").tolist()
    patients = [sum(each[:3]) / 3, each[3], *((each[i] + each[i + 1]) / 2 for i in range(4, 20, 2))]
    assert found.loss_members == pytest.approx(sum(patients) / 10, rel=1e-5)
    assert found.loss_members != pytest.approx(sum(each) / 20, rel=1e-3)


def test_a_loss_that_is_not_finite_is_no_pass() -> None:
    """Its patients cannot be ranked; taken for numbers they would hide the others."""
    data, after = noise_site(12, 6), network()
    with torch.no_grad():
        for tensor in after.parameters():
            tensor.mul_(1e30)
    found = audit_membership(after, network(), data, AB, seed=0)
    assert (found.auc, found.passed) == (None, None)
    assert "not finite" in found.why


def test_a_patient_on_both_sides_is_an_error() -> None:
    data = noise_site(12, 12)
    data.cases[-1] = Case("x.png", "p0", "north", label="a", split="test")
    with pytest.raises(ContributionError, match="1 patients are in training and in validation or test"):
        audit_membership(network(), network(), data, AB, seed=0)


def test_an_interval_is_the_same_whenever_it_is_drawn() -> None:
    scores = np.random.default_rng(1).normal(size=60)
    first, second = (judge(scores, -scores, 30, limit=0.65, seed=3, draws=300) for _ in range(2))
    assert (first.auc_low, first.auc_high) == (second.auc_low, second.auc_high)


class Answer(nn.Module):
    """Says the same of every image."""

    def __init__(self, outputs: torch.Tensor) -> None:
        super().__init__()
        self.outputs = nn.Parameter(outputs)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.outputs.expand(len(images), *self.outputs.shape)


def test_losses_of_each_task_by_hand() -> None:
    data = noise_site(2, 1)
    rows = torch.arange(2)
    p = 1 / (1 + math.exp(-2))

    data.targets = torch.tensor([0, 1, 0, 0])
    found = image_losses(Answer(torch.tensor([2.0, 0.0])), data, AB, rows)
    assert found.tolist() == pytest.approx([-math.log(p), -math.log(1 - p)])

    data.targets = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    found = image_losses(Answer(torch.tensor([2.0, 0.0])), data, MultiLabel(("a", "b")), rows)
    assert found.tolist() == pytest.approx([(-math.log(p) + math.log(2)) / 2, (-math.log(1 - p) + math.log(2)) / 2])

    outputs = torch.zeros(2, SIDE, SIDE)
    outputs[1] = 2
    data.targets = torch.zeros(4, SIDE, SIDE, dtype=torch.uint8)
    data.targets[1, 0] = 1  # one of six rows
    found = image_losses(Answer(outputs), data, Segmentation(("background", "lesion")), rows)
    assert found.tolist() == pytest.approx([-math.log(1 - p), (-math.log(p) - 5 * math.log(1 - p)) / 6])
