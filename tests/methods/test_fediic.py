from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_contract import same
from toys import deployed, site_data, sites, toy_study, trained

from polyclinic.data.dataset import SiteData
from polyclinic.errors import StudyError
from polyclinic.federation.message import Message
from polyclinic.methods.fediic import class_margins, intra_contrast, prototypes
from polyclinic.results import RunFolder
from polyclinic.runner import Run, Silent

NAMES = ("1.weight", "1.bias", "2.weight", "2.bias")
NO_VIEW: dict[str, Any] = {"name": "fediic", "view": None}


def test_margins_by_hand() -> None:
    found = class_margins(torch.tensor([0.75, 0.25, 0.0]), torch.tensor([1.0, 16.0, 1.0]), 2.0, 0.25)
    # 16^0.25 = 2: a class with a loss 16 times as large is treated as if it were half as frequent.
    wanted = [2 * math.log(0.75), 2 * math.log(0.125), -math.inf]
    assert found.tolist() == pytest.approx(wanted, abs=1e-4)
    assert class_margins(torch.tensor([1.0]), torch.tensor([0.0]), 1.0, 0.25).item() == pytest.approx(math.log(1e5))


def test_prototypes_stand_at_right_angles_near_the_rows() -> None:
    assert torch.allclose(
        prototypes(torch.tensor([[3.0, 0, 0], [0, 0, -0.1]])), torch.tensor([[1.0, 0, 0], [0, 0, -1]])
    )
    # Two rows 60 degrees apart are each turned away by 15.
    rows = torch.tensor([[1.0, 0.0], [math.cos(math.pi / 3), math.sin(math.pi / 3)]])
    angles = torch.atan2(prototypes(rows)[:, 1], prototypes(rows)[:, 0]) * 180 / math.pi
    assert angles.tolist() == pytest.approx([-15, 75], abs=1e-3)


@settings(deadline=None)
@given(st.integers(2, 6), st.integers(2, 6), st.integers(0, 100))
def test_prototypes_have_unit_length(classes: int, features: int, seed: int) -> None:
    found = prototypes(torch.randn(classes, features, generator=torch.Generator().manual_seed(seed)))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(classes))
    if classes <= features:
        torch.testing.assert_close(found @ found.T, torch.eye(classes), atol=1e-5, rtol=0)


def contrast_by_hand(features: list[list[float]], labels: list[int], shares: list[float]) -> float:
    """The definition, in plain Python."""
    losses = []
    for i, a in enumerate(features):
        terms = {}
        for k, b in enumerate(features):
            if k != i:
                temperature = max(0.07, math.sqrt(shares[labels[i]] * shares[labels[k]]))
                terms[k] = sum(x * y for x, y in zip(a, b, strict=True)) / temperature
        whole = math.log(sum(math.exp(t) for t in terms.values()))
        own = [t - whole for k, t in terms.items() if labels[k] == labels[i]]
        if own:
            losses.append(-sum(own) / len(own))
    return sum(losses) / len(losses)


def test_contrast_within_a_batch_by_hand() -> None:
    features = [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6], [0.8, -0.6]]
    labels, shares = [0, 0, 1, 1, 2], [0.9, 0.099, 0.001]
    found = intra_contrast(torch.tensor(features), torch.tensor(labels), torch.tensor(shares))
    assert found.item() == pytest.approx(contrast_by_hand(features, labels, shares), rel=1e-5)
    # The only image of class 2 has nobody to be near: it is no anchor, but others keep away from it.
    assert contrast_by_hand(features[:4], labels[:4], shares) < found.item()


@pytest.mark.parametrize("labels", [[0, 1, 2], [1]])
def test_a_batch_without_pairs_has_no_contrast(labels: list[int]) -> None:
    features = torch.eye(3)[: len(labels)].requires_grad_()
    loss = intra_contrast(features, torch.tensor(labels), torch.full((3,), 1 / 3))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(features.grad, torch.zeros_like(features))


def inputs_of(data: SiteData) -> torch.Tensor:
    """Pixels of the training images as the network gets them."""
    return ((data.images[data.splits["train"]] - 0.5) / 0.25).flatten(1)


def test_losses_by_class_by_hand(tmp_path: Path) -> None:
    study = toy_study("fediic", evaluation={"batch_size": 5})
    RunFolder(tmp_path).create(study)
    run = Run(study, sites(), RunFolder(tmp_path), Silent())
    model = run.state.groups["model"]
    reply = run.channel._sites["south"].handle("difficulty", 1, Message.pack({"model": model}))
    data = sites()["south"]
    targets = data.labels("train")
    logits = (inputs_of(data) @ model["1.weight"].T + model["1.bias"]) @ model["2.weight"].T + model["2.bias"]
    losses = F.cross_entropy(logits, targets, reduction="none")
    for number in (0, 1):
        found = reply.group("classes")["losses"][number].item()
        assert found == pytest.approx(losses[targets == number].sum().item(), rel=1e-5)
    assert reply.group("classes")["images"].tolist() == [6, 6]
    assert reply.scalars == {"weight/classes": 1.0}


def step_by_hand(data: SiteData, values: list[torch.Tensor], losses: torch.Tensor, rows: torch.Tensor) -> list[Any]:
    """One full-batch step at a site; every loss from its definition."""
    inputs, targets = inputs_of(data), data.labels("train")
    shares = torch.bincount(targets, minlength=2) / len(targets)
    leaves = [t.clone().requires_grad_() for t in values]
    body = inputs @ leaves[0].T + leaves[1]
    features = body / body.norm(dim=1, keepdim=True)
    loss = F.cross_entropy(body @ leaves[2].T + leaves[3] + (shares / losses**0.25).log(), targets)
    terms = []
    for i in range(len(targets)):
        others = [k for k in range(len(targets)) if k != i]
        t = torch.stack(
            [features[i] @ features[k] / max(0.07, (shares[targets[i]] * shares[targets[k]]).sqrt()) for k in others]
        )
        positive = torch.tensor([bool(targets[k] == targets[i]) for k in others])
        terms.append(-(t - t.exp().sum().log())[positive].mean())
    loss = loss + 0.3 * torch.stack(terms).mean()
    # Gram-Schmidt would favour the first row; the nearest orthonormal rows are (R Rᵀ)^(-1/2) R.
    values_of, vectors = torch.linalg.eigh(rows @ rows.T)
    stand = vectors @ torch.diag(values_of**-0.5) @ vectors.T @ rows
    loss = loss + 0.2 * F.cross_entropy(features @ stand.T / 0.1, targets)
    return [leaf.detach() - 0.1 * g for leaf, g in zip(leaves, torch.autograd.grad(loss, leaves), strict=True)]


def test_two_rounds_by_hand(tmp_path: Path) -> None:
    """With full batches and one view; L_c is of the images of all sites, p_c and the contrast are each site's own."""
    data = {name: uneven(name, n) for name, n in {"north": 12, "south": 9, "west": 6}.items()}
    study = toy_study({**NO_VIEW, "rounds": 2, "intra": 0.3, "inter": 0.2})
    run = trained(study, data, tmp_path)
    values = [run.bench.initial[n] for n in NAMES]
    images = {site: len(own.splits["train"]) for site, own in data.items()}
    inputs = torch.cat([inputs_of(own) for own in data.values()])
    targets = torch.cat([own.labels("train") for own in data.values()])
    for _ in range(2):
        every = F.cross_entropy((inputs @ values[0].T + values[1]) @ values[2].T + values[3], targets, reduction="none")
        losses = torch.stack([every[targets == c].mean() for c in (0, 1)])
        ends = {site: step_by_hand(own, values, losses, values[2]) for site, own in data.items()}
        values = [sum(images[s] * ends[s][i] for s in data) / sum(images.values()) for i in range(4)]
    for name, wanted in zip(NAMES, values, strict=True):
        torch.testing.assert_close(run.state.groups["model"][name], wanted, rtol=1e-3, atol=1e-5)


def uneven(site: str, images: int) -> SiteData:
    """A third of the training images is of class b."""
    data = site_data(site, images)
    data.targets[: len(data.splits["train"])] = (torch.arange(images) % 3 == 0).long()
    return data


def test_without_its_losses_it_is_fedavg_bit_for_bit(tmp_path: Path) -> None:
    sections = {"model": {"name": "toys:two_layers"}, "training": {"batch_size": 5}}
    plain = trained(toy_study("fedavg", **sections), sites(), tmp_path / "a")
    ours = trained(
        toy_study({"name": "fediic", "margin": 0, "intra": 0, "inter": 0}, **sections), sites(), tmp_path / "b"
    )
    assert same(plain.state.groups["model"], ours.state.groups["model"])


def test_each_loss_and_the_second_view_changes_the_model(tmp_path: Path) -> None:
    off = {"margin": 0, "intra": 0, "inter": 0, "view": None}
    cases: dict[str, dict[str, Any]] = {
        "margin": {**off, "margin": 1},
        "frequency alone": {**off, "margin": 1, "power": 0},
        "intra": {**off, "intra": 1},
        "inter": {**off, "inter": 1},
        "view": {**off, "inter": 1, "view": {"intensity": 0.5}},
    }
    data = {site: uneven(site, n) for site, n in {"north": 12, "south": 9, "west": 6}.items()}
    found = {
        name: trained(toy_study({"name": "fediic", **case}), data, tmp_path / name).state.groups["model"]["1.weight"]
        for name, case in cases.items()
    }
    names = list(found)
    for i, name in enumerate(names):
        assert all(not torch.allclose(found[name], found[other], atol=1e-6) for other in names[i + 1 :])


def test_without_difficulty_nobody_is_asked(tmp_path: Path) -> None:
    asked = {}
    for power in (0.25, 0.0):
        run = trained(toy_study({**NO_VIEW, "power": power}), sites(), tmp_path / str(power))
        asked[power] = set(run.records[0]["bytes"])
    assert asked[0.25] - asked[0.0] == {"difficulty"}


def test_the_row_of_a_class_that_the_site_lacks_stays(tmp_path: Path) -> None:
    """North has classes a and b alone; c is left out of its softmax, so nothing pushes c down."""
    margins_alone = {**NO_VIEW, "intra": 0, "inter": 0, "rounds": 1}
    study = toy_study(margins_alone, task={"classes": ["a", "b", "c"]})
    run = trained(study, {"north": site_data("north", 8)}, tmp_path)
    moved = (run.state.groups["model"]["2.weight"] - run.bench.initial["2.weight"]).abs().sum(1)
    assert moved[2] == 0
    assert moved[:2].min() > 0
    assert deployed(run, "north")["2.bias"].isfinite().all()


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"brings its own loss.*focal"):
        toy_study("fediic", task={"loss": "focal"})
    with pytest.raises(StudyError, match=r"brings its own loss.*multi-label"):
        toy_study("fediic", task={"kind": "multi-label"})
    with pytest.raises(StudyError, match=r"does not train on synthetic samples.*amplitude"):
        toy_study("fediic", synthesis={"generator": "amplitude"})
    study = toy_study("fediic", model={"name": "test_fediic:convolution"})
    with pytest.raises(StudyError, match="'0', is Conv2d"):
        trained(study, {"north": site_data("north", 6)}, tmp_path)


def convolution(in_channels: int, out_channels: int, spatial_dims: int, norm: str) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Conv2d(in_channels, out_channels, 4), torch.nn.Flatten())
