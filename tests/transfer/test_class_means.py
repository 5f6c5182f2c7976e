from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from polyclinic.data.dataset import SiteData
from polyclinic.data.manifest import Case
from polyclinic.errors import StudyError
from polyclinic.federation.networks import Networks
from polyclinic.federation.site import Site
from polyclinic.study import Study, validate_study
from polyclinic.tasks import make_task
from polyclinic.training import Batch
from polyclinic.transfer.class_means import class_sums, drawn_to, equal_features, means_of, membership

LABELS = torch.tensor([0, 1, 0, 2, 0, 1, 2])
PATIENTS = ["p", "q", "p", "r", "s", "t", "r"]
FOUND = torch.tensor([[1, 0], [1, 1], [0, 0], [1, 0], [0, 1], [1, 0], [0, 0]]).float()


def small_site(folder: Path, targets: torch.Tensor) -> Site:
    """Seven training images of five patients, and one for validation that no sum may see."""
    kind, classes = ("multi-class", ["a", "b", "c"]) if targets.ndim == 1 else ("multi-label", ["a", "b"])
    study = small_study(kind, classes)
    cases = [Case(f"{i}.png", p, "north", label="a", split="train") for i, p in enumerate(PATIENTS)]
    cases.append(Case("7.png", "v", "north", label="a", split="val"))
    pixels = torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    splits = {"train": torch.arange(7), "val": torch.tensor([7]), "test": torch.arange(0)}
    data = SiteData("north", cases, pixels, torch.cat([targets, targets[:1]]), splits)
    networks = Networks(study)
    task = make_task(study.task, study.training)
    bench = networks.of_site("north")
    return Site("north", study, data, task, workbench=bench, ops={}, folder=folder, networks=networks)


def small_study(kind: str, classes: list[str]) -> Study:
    return validate_study(
        {
            "name": "sums",
            "task": {"kind": kind, "classes": classes},
            "data": {"phantom": {"sites": [{"name": "unused"}]}, "image": {"size": [16, 16]}},
            "model": {"width": 2},
            "method": "local",
            "evaluation": {"batch_size": 3},
        }
    )


def features_of(site: Site) -> torch.Tensor:
    """Of the training images, from the network's own parts."""
    site.model.eval()
    with torch.no_grad():
        found: torch.Tensor = site.model.blocks(site.data.inputs(torch.arange(7))).flatten(2).mean(2)  # type: ignore[operator]
    return found.double()


def test_sums_of_features_by_class_image_by_image(tmp_path: Path) -> None:
    site = small_site(tmp_path, LABELS)
    sums, counts = class_sums(site, floor=1)
    features = features_of(site)
    for c in range(3):
        wanted = torch.stack([features[i] for i in range(7) if LABELS[i] == c]).sum(0)
        torch.testing.assert_close(sums[c], wanted, rtol=1e-6, atol=1e-8)
    assert counts.tolist() == [3, 2, 2]
    assert sums.dtype == counts.dtype == torch.float64
    means = means_of(sums, counts)
    torch.testing.assert_close(means["means"], (sums / torch.tensor([[3.0], [2.0], [2.0]])).float())
    assert means["held"].tolist() == [True, True, True]


def test_the_floor_counts_patients_not_images(tmp_path: Path) -> None:
    """Class a has three images of two patients, b two of two, c two of one."""
    site = small_site(tmp_path, LABELS)
    sums, counts = class_sums(site, floor=2)
    assert counts.tolist() == [3, 2, 0]
    assert not sums[2].any()
    assert sums[0].any()
    sums, counts = class_sums(site, floor=3)
    assert not sums.any()
    assert not counts.any()
    assert means_of(sums, counts)["held"].tolist() == [False, False, False]


def test_findings_and_their_opposites(tmp_path: Path) -> None:
    site = small_site(tmp_path, FOUND)
    features = features_of(site)
    sums, counts = class_sums(site, floor=1)
    both, numbers = class_sums(site, floor=1, opposites=True)
    for k in range(2):
        torch.testing.assert_close(sums[k], features[FOUND[:, k] == 1].sum(0), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(both[k + 2], features[FOUND[:, k] == 0].sum(0), rtol=1e-6, atol=1e-8)
    assert torch.equal(both[:2], sums)
    assert counts.tolist() == [4, 2]
    assert numbers.tolist() == [4, 2, 3, 5]


class LoneStep:
    """A step of a network on one batch, as a rule sees it."""

    def __init__(self, model: nn.Module, batch: Batch, kind: str) -> None:
        self.model, self.batch, self.kind = model, batch, kind

    def loss(self, batch: Batch) -> torch.Tensor:
        logits = self.model(batch.inputs)
        if self.kind == "multi-class":
            return F.cross_entropy(logits, batch.targets)
        return F.binary_cross_entropy_with_logits(logits, batch.targets)


@pytest.mark.parametrize("kind", ["multi-class", "multi-label"])
def test_the_rule_against_the_formula_in_loops(kind: str) -> None:
    """CE + 0.7 times the mean over pairs of image and class of the mean squared difference; class 1 has no mean.

    What is returned is the CE alone.
    """
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    targets = torch.tensor([0, 1, 0]) if kind == "multi-class" else torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    batch = Batch(torch.rand(3, 4).double(), targets.double() if kind == "multi-label" else targets)
    means = {"means": torch.rand(2, 3).double(), "held": torch.tensor([True, False])}
    step = LoneStep(model, batch, kind)
    found = drawn_to(means, 0.7)(step)  # type: ignore[arg-type]
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    rows = membership(targets, 2)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(3):
        feature = model[:3](batch.inputs[i : i + 1])[0]
        for c in range(2):
            if rows[i, c] and bool(means["held"][c]):
                total = total + ((feature - means["means"][c]) ** 2).sum() / 3
    torch.testing.assert_close(found, step.loss(batch))
    (step.loss(batch) + 0.7 * total / float(rows.sum())).backward()
    # Features enter the rule in float32, whatever the network's type.
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-7)


def test_features_of_different_sizes_are_refused_by_name() -> None:
    networks = {"north": nn.Sequential(nn.Linear(64, 2)), "south": nn.Sequential(nn.Linear(160, 2))}
    with pytest.raises(StudyError, match=r"north 64, south 160.*model\.embedding: 64"):
        equal_features("fedproto", networks)
    equal_features("fedproto", {"north": networks["north"], "west": nn.Linear(64, 3)})
