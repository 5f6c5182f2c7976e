from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_by_hand import LR, Weights, close, descended, naive_kl, own_images, public, scores, start, trained_alone
from test_public_images import opened, recorded
from toy_proxies import MIXED
from toys import IMAGES, deployed, sites, toy_study, trained

from polyclinic.errors import StudyError
from polyclinic.methods.fccl import batches, correlation_loss, cosines, similarity_loss, without_target

FCCL_PLUS: dict[str, Any] = {"features": 3.0, "temperature": 3.0, "non_target": True, "pretrained": 0.0}


def naive_correlation_loss(own: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Entry by entry, with population deviations."""

    def column(scores: torch.Tensor, k: int) -> torch.Tensor:
        return (scores[:, k] - scores[:, k].mean()) / scores[:, k].std(correction=0)

    total = own.new_zeros(())
    for u in range(own.shape[1]):
        for v in range(own.shape[1]):
            entry = (column(own, u) * column(mean, v)).mean()
            total = total + ((1 - entry) ** 2 if u == v else 0.0051 * (1 + entry) ** 2)
    return total


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_correlation_loss_entry_by_entry() -> None:
    own, mean = drawn(12, 4), drawn(12, 4, seed=1)
    torch.testing.assert_close(correlation_loss(own, mean), naive_correlation_loss(own, mean), rtol=1e-9, atol=0)


def test_scores_that_exclude_each_other_and_agree_cost_nothing() -> None:
    first = drawn(12, 1)
    opposite = torch.cat([first, 5 - 3 * first], 1)
    assert float(correlation_loss(opposite, 2 * opposite - 7)) < 1e-12
    alike = torch.cat([first, 5 + 3 * first], 1)
    # Off the diagonal the entries are 1 where -1 is wanted: (1 + 1)^2, twice.
    assert float(correlation_loss(alike, alike)) == pytest.approx(2 * 4 * 0.0051)


def test_a_constant_column_has_a_gradient_that_is_finite() -> None:
    own = torch.zeros(6, 3, requires_grad=True)
    correlation_loss(own, drawn(6, 3).float()).backward()
    assert own.grad is not None
    assert own.grad.isfinite().all()


def test_similarities_row_by_row_and_whatever_the_size_of_features() -> None:
    own, other = drawn(5, 3), drawn(5, 7, seed=1)
    goal = (cosines(own) + cosines(other)) / 2

    def row(matrix: torch.Tensor, i: int) -> torch.Tensor:
        return torch.stack([matrix[i, j] / 0.02 for j in range(5) if j != i]).softmax(0)

    matrix = torch.stack([torch.stack([F.cosine_similarity(a, b, dim=0) for b in own]) for a in own])
    torch.testing.assert_close(cosines(own), matrix)
    wanted = naive_kl(torch.stack([row(goal, i) for i in range(5)]), torch.stack([row(matrix, i) for i in range(5)]))
    torch.testing.assert_close(similarity_loss(own, goal), wanted, rtol=1e-6, atol=1e-9)
    assert abs(float(similarity_loss(own, cosines(3 * own)))) < 1e-9


def test_the_other_classes_are_those_that_are_left() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert without_target(logits, torch.tensor([1, 0])).tolist() == [[1.0, 3.0], [5.0, 6.0]]


def test_public_batches_have_no_batch_of_one() -> None:
    assert [len(rows) for rows in batches(9, 4)] == [4, 5]
    assert [len(rows) for rows in batches(8, 4)] == [4, 4]
    assert torch.equal(torch.cat(batches(9, 4)), torch.arange(9))


def by_hand(run: Any, rounds: int, previous: float, pretrained: float, temperature: float) -> dict[str, Weights]:
    """The whole method on the linear network, all images in one step; the first training is plain."""
    data, shown = sites(), public(run.study)
    own = {site: start(run) for site in data}
    first: dict[str, Weights] = {}
    mean = torch.zeros(())
    for number in range(rounds):
        for site, weights in own.items():
            if number == 0:
                own[site] = first[site] = trained_alone(weights, data[site])
                continue
            before, inputs, classes = weights, *own_images(data[site])
            goal = mean
            weights = descended(weights, lambda w, goal=goal: naive_correlation_loss(scores(w, shown), goal))

            def soft(w: Weights, inputs: torch.Tensor = inputs) -> torch.Tensor:
                return (scores(w, inputs) / temperature).softmax(1)

            def loss(
                w: Weights, site: str = site, before: Weights = before, inputs: Any = inputs, classes: Any = classes
            ) -> torch.Tensor:
                held = [soft(before, inputs), soft(first[site], inputs)]
                near = [temperature**2 * naive_kl(goal, soft(w, inputs)) for goal in held]
                return F.cross_entropy(scores(w, inputs), classes) + previous * near[0] + pretrained * near[1]

            own[site] = descended(weights, loss, LR)
        mean = sum(scores(weights, shown) for weights in own.values()) / 3
    return own


@pytest.mark.parametrize(("previous", "pretrained", "temperature"), [(1.0, 1.0, 1.0), (2.0, 0.0, 3.0), (0.0, 0.5, 1.0)])
def test_three_rounds_by_hand(previous: float, pretrained: float, temperature: float, tmp_path: Path) -> None:
    settings = {"previous": previous, "pretrained": pretrained, "temperature": temperature}
    run = trained(toy_study({"name": "fccl", **settings, "digest": {"batch_size": 100}}), sites(), tmp_path)
    for site, weights in by_hand(run, 3, previous, pretrained, temperature).items():
        close(deployed(run, site), weights)


def test_similarities_travel_by_batch_and_unlike_features_go_together(tmp_path: Path) -> None:
    """FCCL+ with features of 5 and of 3 values."""
    settings = {"name": "fccl", "rounds": 2, "proxies": 10, **FCCL_PLUS, "digest": {"batch_size": 4}}
    models = {**MIXED, "west": {"name": "toy_proxies:wide", "options": {"hidden": 4}}}
    study = toy_study(settings, models=models, model={"name": "toy_proxies:wide"}, task={"classes": ["a", "b", "c"]})
    run = opened(study, tmp_path)
    calls = recorded(run)
    run.train()
    wanted = {"scores": [10, 3], "similarities.0": [4, 4], "similarities.1": [4, 4], "similarities.2": [2, 2]}
    trainings = [(n, came, left) for n, op, _, came, left in calls if op == "train"]
    for number, came, left in trainings:
        assert {name: list(t.shape) for name, t in left.group("answers").items()} == wanted
        assert {name: list(t.shape) for name, t in came.group("targets").items()} == (wanted if number == 2 else {})
    first = [left.group("answers")["similarities.1"] for number, _, left in trainings if number == 1]
    told = next(came for number, came, _ in trainings if number == 2).group("targets")["similarities.1"]
    torch.testing.assert_close(told, sum(first) / 3)
    torch.testing.assert_close(told.diagonal(), torch.ones(4))


def test_similarities_move_the_features_towards_the_mean(tmp_path: Path) -> None:
    """Of the same run with and without the term, features are nearer to the mean's similarities with it."""
    from polyclinic.methods.fccl import FCCL

    losses = {}
    for weight in (0.0, 3.0):
        found: list[float] = []
        settings = {"name": "fccl", "rounds": 4, "features": weight or 1e-9, "digest": {"epochs": 4, "batch_size": 64}}
        study = toy_study(settings, models=MIXED, model={"name": "toy_proxies:wide"}, training={"lr": 0.05})
        run = opened(study, tmp_path / str(weight))
        calls = recorded(run)
        run.train()
        assert isinstance(run.method, FCCL)
        last = [left.group("answers")["similarities.0"] for n, op, _, _, left in calls if (n, op) == (4, "train")]
        for one in last:
            found += [float((one - other).square().mean()) for other in last]
        losses[weight] = math.fsum(found)
    assert losses[3.0] < losses[0.0]


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"non_target needs one class an image.*multi-label.*non_target: false"):
        toy_study({"name": "fccl", "non_target": True}, task={"kind": "multi-label", "classes": ["a", "b", "c"]})
    with pytest.raises(StudyError, match=r"of two classes one is left.*non_target: false"):
        toy_study({"name": "fccl", "non_target": True})
    with pytest.raises(StudyError, match="does not say where its features are"):
        opened(toy_study({"name": "fccl", "features": 3.0}), tmp_path)


def test_the_first_model_is_that_of_a_sites_own_first_training(tmp_path: Path) -> None:
    run = trained(toy_study("fccl"), sites(), tmp_path / "fccl")
    alone = trained(toy_study({"name": "local", "rounds": 1}), sites(), tmp_path / "local")
    for name in IMAGES:
        site = run.channel._sites[name]
        kept = site.state.load("pretrained")
        assert kept is not None
        wanted = deployed(alone, name)
        assert all(torch.equal(kept[0][key], wanted[key]) for key in wanted)
