"""Feature Gaussians: sums against pooled features, cell means and covariances by hand, and the new last layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy_hospitals import OWNED, hospital_study, hospitals, started

from polyclinic.federation.message import Message
from polyclinic.runner import Run
from polyclinic.secure.view import Recorder
from polyclinic.synthesis.composed import WithFeatureGaussians
from polyclinic.synthesis.generators.features import (
    PRIOR_COVARIANCE,
    PRIOR_IMAGES,
    RIDGE,
    FeatureSums,
    cell_means,
    class_covariances,
    drawn_features,
    feature_sums,
    retrained_head,
)
from polyclinic.synthesis.settings import FeaturesSettings


def seen(counts: list[list[int]], width: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features, classes and devices of so many images in each cell; cells lie far apart."""
    draw = torch.Generator().manual_seed(seed)
    cells = [(c, d, n) for c, row in enumerate(counts) for d, n in enumerate(row)]
    labels = torch.cat([torch.full((n,), c) for c, _, n in cells])
    devices = torch.cat([torch.full((n,), d) for _, d, n in cells])
    x = torch.randn(len(labels), width, generator=draw) + 4 * labels[:, None] - 7 * devices[:, None]
    return x, labels, devices


def summed(counts: list[list[int]], covariance: str = "full", **more: Any) -> FeatureSums:
    shape = len(counts), len(counts[0])
    return feature_sums(*seen(counts, **more), shape, covariance)


def added(parts: list[FeatureSums]) -> FeatureSums:
    return FeatureSums(*(torch.stack([getattr(p, n) for p in parts]).sum(0) for n in vars(parts[0])))


def test_sums_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.0, 5.0]])
    full = feature_sums(x, torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]), (2, 2), "full")
    assert full.count.tolist() == [[1, 1], [1, 0]]
    assert full.first.tolist() == [[[1, 2], [3, -1]], [[0, 5], [0, 0]]]
    assert full.second.tolist() == [[[10, -1], [-1, 5]], [[0, 0], [0, 25]]]
    assert full.negative.tolist() == [1]
    diagonal = feature_sums(x, torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]), (2, 2), "diagonal")
    assert diagonal.second.tolist() == [[10, 5], [0, 25]]
    assert {t.dtype for t in vars(full).values()} == {torch.float64}


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_sums_over_sites_are_those_of_all_images_together(covariance: str) -> None:
    x, labels, devices = seen([[4, 3], [2, 6]])
    parts = [slice(0, 5), slice(5, 6), slice(6, 6), slice(6, 15)]
    apart = added([feature_sums(x[p], labels[p], devices[p], (2, 2), covariance) for p in parts])
    together = feature_sums(x, labels, devices, (2, 2), covariance)
    for name, tensor in vars(together).items():
        torch.testing.assert_close(getattr(apart, name), tensor)


def additive(kind: Tensor, device: Tensor, count: Tensor) -> FeatureSums:
    """Sums of cells whose means are ``kind + device`` exactly."""
    first = count[..., None] * (kind[:, None] + device[None])
    width = kind.shape[1]
    return FeatureSums(count, first, torch.zeros(len(kind), width, width), torch.zeros(1))


def test_cells_that_add_up_are_found_and_the_unseen_one_with_them() -> None:
    """Class a on both devices, class b on the first: the cell (b, 1) is class b plus what device 1 adds to class a.

    With a thousand images a cell the prior of 5 hardly counts; with a million not at all.
    """
    kind, device = torch.tensor([[1.0, 0], [5, 2]]).double(), torch.tensor([[0.0, 0], [3, -4]]).double()
    for images, tolerance in ((1e3, 0.1), (1e6, 1e-3)):
        found = cell_means(*_pair(additive(kind, device, torch.tensor([[images, images], [images, 0]]).double())))
        torch.testing.assert_close(found, kind[:, None] + device[None], rtol=0, atol=tolerance)


def _pair(sums: FeatureSums) -> tuple[Tensor, Tensor]:
    return sums.count, sums.first


def test_a_balanced_toy_solved_by_hand() -> None:
    """Two devices at -1 and +1 about each class, n images a cell. By symmetry b = (-beta, beta) and a is the class mean
    after device offsets cancel, so beta = 2n / (2n + 5) in one update and ever after. Own means count n / (n + 5)."""
    n = 10.0
    kind, device = torch.tensor([[2.0], [6.0]]).double(), torch.tensor([[-1.0], [1.0]]).double()
    found = cell_means(*_pair(additive(kind, device, torch.full((2, 2), n).double())))
    beta = 2 * n / (2 * n + PRIOR_IMAGES)
    share = n / (n + PRIOR_IMAGES)
    offset = share + (1 - share) * beta
    wanted = kind[:, None] + torch.tensor([-offset, offset]).double()[None, :, None]
    torch.testing.assert_close(found, wanted)


def test_on_one_device_means_are_those_of_the_classes() -> None:
    """The limit that is CCVR: nothing is shrunk anywhere, whatever the counts."""
    sums = summed([[3], [40], [1]])
    torch.testing.assert_close(cell_means(*_pair(sums)), sums.first / sums.count[..., None])


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 30), min_size=2, max_size=2), min_size=1, max_size=3), st.integers(0, 9))
def test_means_are_finite_and_full_cells_keep_their_own(counts: list[list[int]], seed: int) -> None:
    sums = summed([*counts, [500, 500]], seed=seed)
    found = cell_means(*_pair(sums))
    held = sums.count.sum(1) > 0
    assert torch.isfinite(found[held]).all()
    torch.testing.assert_close(found[-1], sums.first[-1] / 500, rtol=0, atol=0.3)


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_covariances_by_hand(covariance: str) -> None:
    """Within cells: cells are eleven apart, but no distance between them is in a class's spread."""
    counts = [[30, 50], [20, 0], [0, 0]]
    x, labels, devices = seen(counts)
    x = x.double()
    within = torch.cat([x[(labels == c) & (devices == d)] - _mean(x, labels, devices, c, d) for c, d in _cells(counts)])
    of_class = [within[:80], within[80:]]
    scatter = [part.T @ part for part in of_class]
    if covariance == "diagonal":
        scatter = [torch.diag(part.diagonal()) for part in scatter]
    pooled = (scatter[0] + scatter[1]) / 100
    found = class_covariances(summed(counts, covariance))
    for c, n in ((0, 80), (1, 20)):
        share = n / (n + PRIOR_COVARIANCE)
        wanted = share * scatter[c] / n + (1 - share) * pooled + RIDGE * torch.eye(3, dtype=torch.float64)
        torch.testing.assert_close(found[c], wanted)
    torch.testing.assert_close(found[2], pooled + RIDGE * torch.eye(3, dtype=torch.float64))


def _cells(counts: list[list[int]]) -> list[tuple[int, int]]:
    return [(c, d) for c, row in enumerate(counts) for d, n in enumerate(row) if n]


def _mean(x: Tensor, labels: Tensor, devices: Tensor, c: int, d: int) -> Tensor:
    return x[(labels == c) & (devices == d)].mean(0)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=2), min_size=1, max_size=3), st.integers(0, 9))
def test_covariances_are_positive_definite(counts: list[list[int]], seed: int) -> None:
    """Also with one image, or none."""
    for covariance in ("full", "diagonal"):
        found = class_covariances(summed(counts, covariance, width=4, seed=seed))
        torch.testing.assert_close(found, found.transpose(1, 2))
        assert (torch.linalg.eigvalsh(found) >= RIDGE / 2).all()


def test_drawn_features_have_the_means_and_the_spread() -> None:
    """Class 1 has no image on device 1, and still half of its draws; class 2 has none at all, and no draws."""
    sums = summed([[4000, 4000], [4000, 0], [0, 0]])
    x, labels = drawn_features(sums, 20_000, torch.Generator().manual_seed(0))
    assert x.dtype == torch.float32
    assert torch.bincount(labels).tolist() == [20_000, 20_000]
    means, spread = cell_means(*_pair(sums)), class_covariances(sums)
    for label in (0, 1):
        own = x[labels == label].double()
        for device in (0, 1):
            part = own[device::2]
            assert len(part) == 10_000
            torch.testing.assert_close(part.mean(0), means[label, device], rtol=0, atol=0.06)
            torch.testing.assert_close(part.T.cov(), spread[label], rtol=0, atol=0.06)
    unseen = means[1, 0] - 7
    torch.testing.assert_close(means[1, 1], unseen, rtol=0, atol=0.1)


def test_a_device_that_nobody_has_enough_of_is_not_drawn() -> None:
    sums = summed([[400, 0], [400, 0]])
    x, labels = drawn_features(sums, 1000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(x[labels == 1].mean(0), torch.full((3,), 4.0), rtol=0, atol=0.2)


def test_features_that_are_never_negative_are_drawn_so() -> None:
    x, labels, devices = seen([[50, 50]])
    for values, below in ((x.abs(), False), (x, True)):
        sums = feature_sums(values, labels, devices, (1, 2), "full")
        found, _ = drawn_features(sums, 500, torch.Generator().manual_seed(0))
        assert bool((found < 0).any()) is below


def test_draws_hardly_move_when_sums_are_rounded() -> None:
    """Equal eigenvalues: their vectors turn about with any rounding, draws must not."""
    sums = FeatureSums(
        torch.full((1, 1), 1000.0).double(),
        torch.zeros(1, 1, 6).double(),
        1000 * torch.eye(6).double()[None],
        torch.ones(1).double(),
    )
    noise = 1e-7 * torch.randn(6, 6, generator=torch.Generator().manual_seed(1)).double()
    rounded = FeatureSums(sums.count, sums.first, sums.second + (noise + noise.T)[None], sums.negative)
    draws = [drawn_features(part, 50, torch.Generator().manual_seed(0))[0] for part in (sums, rounded)]
    torch.testing.assert_close(*draws, rtol=0, atol=1e-5)


def head(bias: list[float]) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {"weight": 0.01 * torch.randn(len(bias), 3, generator=draw), "bias": torch.tensor(bias)}


def accuracy(of: dict[str, Tensor], x: Tensor, labels: Tensor) -> float:
    return ((x @ of["weight"].T + of["bias"]).argmax(1) == labels).float().mean().item()


def test_a_biased_last_layer_becomes_a_good_one() -> None:
    """It says class 0 of everything; a last layer trained on draws tells both classes, on images it never saw."""
    x, labels, devices = seen([[300], [300]])
    biased = head([5.0, 0.0])
    assert accuracy(biased, x, labels) < 0.6
    sums = feature_sums(x, labels, devices, (2, 1), "full")
    found = retrained_head(biased, sums, FeaturesSettings(), seed=1)
    fresh, truth, _ = seen([[300], [300]], seed=8)
    assert accuracy(found, fresh, truth) > 0.97
    again = retrained_head(biased, sums, FeaturesSettings(), seed=1)
    assert all(torch.equal(found[n], again[n]) for n in found)
    other = retrained_head(biased, sums, FeaturesSettings(), seed=2)
    assert not torch.equal(found["weight"], other["weight"])


def test_no_passes_leave_the_last_layer_as_it_is() -> None:
    start = head([1.0, 0.0])
    found = retrained_head(start, summed([[30], [30]]), FeaturesSettings(epochs=0), seed=1)
    assert all(torch.equal(found[n], start[n]) for n in start)


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_class_without_draws_is_not_unlearned(gone: int) -> None:
    """Its row stays bit for bit, and the other two are trained as if it were not there."""
    labels = torch.arange(3).repeat_interleave(200)
    x = torch.randn(600, 3, generator=torch.Generator().manual_seed(0)) + 4 * torch.eye(3)[labels]
    device, rest = torch.zeros_like(labels), torch.arange(3) != gone
    good = retrained_head(head([0.0] * 3), feature_sums(x, labels, device, (3, 1), "full"), FeaturesSettings(), seed=1)
    there = labels != gone
    sums = feature_sums(x[there], labels[there], device[there], (3, 1), "full")
    found = retrained_head(good, sums, FeaturesSettings(), seed=1)
    assert all(torch.equal(found[name][gone], good[name][gone]) for name in good)
    assert accuracy(found, x[~there], labels[~there]) > 0.95
    alone = FeatureSums(sums.count[rest], sums.first[rest], sums.second[rest], sums.negative)
    made = retrained_head({name: rows[rest] for name, rows in good.items()}, alone, FeaturesSettings(), seed=1)
    for name, rows in made.items():
        assert not torch.equal(rows, good[name][rest])
        torch.testing.assert_close(rows, found[name][rest], rtol=0, atol=1e-6)


# Over sites, in a run.

SMALL = {"name": "features", "devices": True, "samples": 50, "epochs": 5}
FEATURES: dict[str, Any] = {"generator": [SMALL], "style": 0.0}


def run_of(tmp_path: Path, owned: Any = None, features: dict[str, Any] | None = None, **sections: Any) -> Run:
    generator = [{**FEATURES["generator"][0], **(features or {})}]
    study = hospital_study(synthesis={**FEATURES, "generator": generator}, **sections)
    return started(study, tmp_path, hospitals(owned))


def calibrated(run: Run) -> dict[str, Tensor]:
    run.train()
    return run.state.groups["calibrated"]


def test_the_sites_answer_is_of_what_enters_the_last_layer(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    site = run.channel._sites["west"]
    message = Message.pack({"model": run.state.groups["model"]}, devices=json.dumps(["bright", "dark"]))
    reply = site.handle("gaussians", 1, message)
    run.bench.restart()
    network = run.bench.model.eval()
    name = next(n for n in reversed([n for n, m in network.named_modules() if isinstance(m, torch.nn.Linear)]))
    entered: list[Tensor] = []
    network.get_submodule(name).register_forward_pre_hook(lambda _m, given: entered.append(given[0]))
    with torch.no_grad():
        network(site.data.inputs(site.data.splits["train"]))
    assert reply.arrays["features/count"].tolist() == [[6, 6], [0, 0]]
    torch.testing.assert_close(reply.arrays["features/first"].sum((0, 1)), entered[0].double().sum(0))
    torch.testing.assert_close(reply.arrays["features/second"].sum(0), entered[0].double().T @ entered[0].double())
    assert reply.scalars["weight/features"] == 1


def test_cells_below_the_floor_are_in_no_sum(tmp_path: Path) -> None:
    small = {("b", "rare"): 4, ("a", "dark"): 3}
    answers = []
    for name, extra in (("with", small), ("without", {})):
        run = run_of(tmp_path / name, {**OWNED, "north": {**OWNED["north"], **extra}})
        recorder = Recorder(run.channel)
        method = run.method
        assert isinstance(method, WithFeatureGaussians)
        recorder.begin_round(1)
        method.gaussians.calibrated(recorder, run.aggregation.sums, run.state.groups["model"], run.bench.model)
        answers.append([(s.op, s.message.digest()) for s in recorder.seen if s.sender == "north"])
    assert answers[0] == answers[1]
    assert [op for op, _ in answers[0]] == ["name-devices", "gaussians"]


def test_the_order_of_sites_and_a_hidden_sum_hardly_matter(tmp_path: Path) -> None:
    plain = calibrated(run_of(tmp_path / "a"))
    backward = calibrated(run_of(tmp_path / "b", dict(reversed(OWNED.items()))))
    assert all(torch.equal(plain[n], backward[n]) for n in plain)
    hidden = calibrated(run_of(tmp_path / "c", aggregation="masked"))
    for name, tensor in plain.items():
        torch.testing.assert_close(hidden[name], tensor, rtol=0, atol=1e-3)


@pytest.mark.parametrize("changes", [{"devices": False}, {"covariance": "diagonal"}])
def test_simpler_gaussians_run(changes: dict[str, Any], tmp_path: Path) -> None:
    found = calibrated(run_of(tmp_path, features=changes))
    assert all(torch.isfinite(tensor).all() for tensor in found.values())


def test_only_the_last_layer_changes_and_only_where_the_model_is_used(tmp_path: Path) -> None:
    plain = started(hospital_study(), tmp_path / "plain", hospitals())
    plain.train()
    run = run_of(tmp_path / "features")
    new = calibrated(run)
    assert all(torch.equal(run.state.groups["model"][n], t) for n, t in plain.state.groups["model"].items())
    used = run.method.deployment(run.state).group("model")
    assert {n for n, t in used.items() if not torch.equal(t, run.state.groups["model"][n])} == set(new)
    assert set(new) == {f"{next(iter(new)).rpartition('.')[0]}.{leaf}" for leaf in ("weight", "bias")}


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_a_site_without_a_cell_adds_zeros(norm: str, tmp_path: Path) -> None:
    owned = {**OWNED, "east": {("a", "bright"): 2, ("b", "dark"): 1}}
    run = run_of(tmp_path, owned, model={"name": "small-cnn", "width": 4, "norm": norm})
    message = Message.pack({"model": run.state.groups["model"]}, devices=json.dumps(["bright", "dark"]))
    reply = run.channel._sites["east"].handle("gaussians", 1, message)
    other = run.channel._sites["north"].handle("gaussians", 1, message)
    assert {n: a.shape for n, a in reply.arrays.items()} == {n: a.shape for n, a in other.arrays.items()}
    assert not any(array.any() for array in reply.arrays.values())


def test_where_nobody_has_enough_patients_the_last_layer_stays(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    method = run.method
    assert isinstance(method, WithFeatureGaussians)
    method.gaussians.floor = 100
    run.channel.begin_round(1)
    found = method.gaussians.calibrated(run.channel, run.aggregation.sums, run.state.groups["model"], run.bench.model)
    assert all(torch.equal(tensor, run.state.groups["model"][name]) for name, tensor in found.items())


def test_rounds_that_can_be_chosen_are_those_with_a_new_last_layer(tmp_path: Path) -> None:
    run = run_of(
        tmp_path,
        features={"every": 2},
        method={"name": "fedavg", "rounds": 5},
        evaluation={"every": 1, "select": "best", "bootstrap": 0},
    )
    assert [number for number in range(1, 6) if run.method.ready(number)] == [2, 4, 5]
    run.train()
    judged = [record["round"] for record in run.records if any("val" in part for part in record["sites"].values())]
    assert judged == [2, 4, 5]
    assert run.state.scalars["chosen_round"] in judged


def test_a_site_that_drops_out_is_left_out_of_the_sums(tmp_path: Path) -> None:
    run = run_of(tmp_path, federation={"on_absent": "continue"})
    site = run.channel._sites["south"]
    broken = site._ops["gaussians"]

    def fail(*_: Any) -> Message:
        raise ValueError("no memory")

    site._ops = {**site._ops, "gaussians": type(broken)(fail, broken.leaves)}
    found = calibrated(run)
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
    assert run.records[-1]["absent"] == {"south": "ValueError: no memory"}
