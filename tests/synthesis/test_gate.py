"""The memorisation gate: generators that copy are blocked, those that know nobody pass."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gated_sites import gated_site
from torch import Tensor

from polyclinic.errors import DataError
from polyclinic.synthesis.cells import own_images
from polyclinic.synthesis.copies import find_copies
from polyclinic.synthesis.distances import ByPatient, two_nearest
from polyclinic.synthesis.gate import GateImages, GateResult, judge, vet
from polyclinic.synthesis.measures import failures, measure
from polyclinic.synthesis.pool import Samples
from polyclinic.synthesis.settings import GateSettings, SynthesisSettings
from polyclinic.synthesis.vae import shrunk_images

SETTINGS = GateSettings()
WIDTH = 12
ROW = {
    *("space", "class", "device", "candidates", "train", "holdout", "dcr_ratio", "closer", "closer_low", "closer_high"),
    *("nndr", "nndr_holdout", "copies", "auc", "tpr", "fpr", "passed", "why"),
}


class Toys:
    """Images are points about the centre of their class, two images a patient, close to each other."""

    def __init__(self, seed: int) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        self.met = 0

    def people(self, labels: list[int], devices: list[int] | None = None, per_patient: int = 2) -> GateImages:
        """New patients, one for each label."""
        of = torch.tensor(labels).repeat_interleave(per_patient)
        anatomy = torch.randn(len(labels), WIDTH, generator=self.draw).repeat_interleave(per_patient, 0)
        points = 4.0 * of[:, None] + anatomy + 0.3 * torch.randn(len(of), WIDTH, generator=self.draw)
        names = [f"p{self.met + k // per_patient}" for k in range(len(of))]
        self.met += len(labels)
        machines = torch.tensor(devices or [0] * len(labels)).repeat_interleave(per_patient)
        return images(points, of, machines, names)


TURN = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9)))[0]


def images(points: Tensor, labels: Tensor, devices: Tensor | None = None, names: list[str] | None = None) -> GateImages:
    """Two spaces: the points, and some of their directions, squashed."""
    spaces = {"pixels": points, "features": (points @ TURN)[:, :8].tanh()}
    return GateImages(spaces, labels, torch.zeros_like(labels) if devices is None else devices, names or [])


def strangers(toys: Toys, labels: list[int]) -> GateImages:
    """What a generator that knows the distribution, and nobody, makes."""
    return images(toys.people(labels, per_patient=1).spaces["pixels"], torch.tensor(labels))


def copied(of: GateImages, rows: Tensor, noise: float = 0.0) -> GateImages:
    points = of.spaces["pixels"][rows]
    points = points + noise * torch.randn(points.shape, generator=torch.Generator().manual_seed(1))
    return images(points, of.labels[rows], of.devices[rows])


def sides(seed: int, members: int = 80, others: int = 20) -> tuple[Toys, GateImages, GateImages]:
    toys = Toys(seed)
    train = toys.people([k % 2 for k in range(members)])
    return toys, train, toys.people([k % 2 for k in range(others)])


def all_rows(result: GateResult) -> list[dict[str, Any]]:
    return [row for row in result.rows if row["class"] == row["device"] == "all"]


def everything_refused(result: GateResult) -> bool:
    return not bool(result.accepted.any())


# Distances and measures, by hand.


def test_a_patient_is_as_near_as_his_nearest_image() -> None:
    people = ByPatient.of(torch.tensor([[0.0], [10.0], [3.0], [4.0]]), ["b", "b", "a", "c"])
    nearest = two_nearest(torch.tensor([[9.0], [3.4]]), people)
    # 9: b at 1 (his other image at 9 does not count), c at 5. 3.4: a at 0.4, c at 0.6.
    assert nearest.tolist() == [[1.0, 5.0], pytest.approx([0.4, 0.6])]
    # Of image 10 itself, patient b left out: c at 6, a at 7.
    assert two_nearest(torch.tensor([[10.0]]), people, torch.tensor([1])).tolist() == [[6.0, 7.0]]


def test_one_patient_has_no_second() -> None:
    people = ByPatient.of(torch.tensor([[0.0], [1.0]]), ["a", "a"])
    assert two_nearest(torch.tensor([[3.0]]), people).tolist() == [[2.0, torch.inf]]


def test_measures_that_can_be_done_by_hand() -> None:
    """On a line: training patients at 0, 10, 20, 30, held-out ones at 14 and 26; candidates at 1, 11, 21, 25."""
    train = ByPatient.of(torch.tensor([[0.0], [10.0], [20.0], [30.0]]), ["a", "b", "c", "d"])
    holdout = ByPatient.of(torch.tensor([[14.0], [26.0]]), ["e", "f"])
    spots = torch.tensor([[1.0], [11.0], [21.0], [25.0]])
    found = measure(spots, train, holdout, np.random.default_rng(0), gap=0.05, confidence=0.99)
    # Three of four are nearer to training; with twice the patients there, odds of 3 count as 1.5: 0.6.
    assert found.closer == pytest.approx(0.6)
    assert found.closer_low < 0.5 < found.closer_high
    # Nearest over second nearest: 1/9, 1/9, 1/9, 5/5; held out: 4/6, 4/6.
    assert found.nndr == pytest.approx(1 / 9)
    assert found.nndr_holdout == pytest.approx(2 / 3)
    # With held-out patients in their place: 13/25, 3/15, 5/7, 1/11; a twentieth of the way is 0.15 from 1/11 to 3/15.
    assert found.nndr_elsewhere == pytest.approx(1 / 11 + 0.15 * (3 / 15 - 1 / 11))
    # Three of four candidates and neither of two held-out patients below: 1 of the 3! ways ... C(4,3) / C(6,3) = 1/5.
    assert found.nndr_chance == pytest.approx(1 / 5)
    # Distances of members to candidates 1, 1, 1, 5; of others 3, 1: f at 26 is 1 from 25.
    # Pairs: 1 < 3 three times, 1 = 1 three times, 5 > 3, 5 > 1: (3 + 3 / 2) / 8.
    assert found.auc == pytest.approx(4.5 / 8)
    # One of two may be accused (f): nobody is nearer than 3 but those at 1.
    assert (found.tpr, found.fpr) == (0.75, 0.5)
    # At most 1 held out among the 4 nearest of 6 with 2 held out: 1 - C(4,2)/C(6,4) = 1 - 6/15.
    assert found.tpr_chance == pytest.approx(9 / 15)


def test_samples_unlike_any_patient_are_no_copies() -> None:
    """Far off one end of a line, all share one nearest patient on either side: the ratio is low with both."""
    rng = np.random.default_rng(1)
    train = ByPatient.of(torch.from_numpy(rng.normal(size=(60, 2))).float(), [f"t{i}" for i in range(60)])
    holdout = ByPatient.of(torch.from_numpy(rng.normal(size=(60, 2))).float(), [f"h{i}" for i in range(60)])
    lonely = torch.tensor([[4.0, 4.0]]) + 0.01 * torch.from_numpy(rng.normal(size=(80, 2))).float()
    found = measure(lonely, train, holdout, rng, gap=0.05, confidence=0.99)
    apart = replace(found, nndr=0.5, nndr_holdout=0.9, nndr_elsewhere=0.52, nndr_chance=0.0)
    assert not [why for why in failures(apart, GateSettings()) if "second" in why]
    assert [why for why in failures(replace(apart, nndr_elsewhere=0.8), GateSettings()) if "second" in why]


def test_an_image_near_the_mean_of_all_is_no_copy() -> None:
    """In 300 dimensions the mean is nearer to every image (17.3) than two images are (24.5), held out or not."""
    draw = torch.Generator().manual_seed(0)
    train = ByPatient.of(torch.randn(40, 300, generator=draw), [f"t{i}" for i in range(40)])
    holdout = ByPatient.of(torch.randn(40, 300, generator=draw), [f"h{i}" for i in range(40)])
    labels = torch.zeros(40, dtype=torch.int64)
    spots = torch.cat([torch.zeros(1, 300), train.vectors[:1], train.vectors[1:2] + 0.1])
    found = find_copies(spots, labels[:3], train, labels, 0.999, holdout=holdout)
    assert found.tolist() == [False, True, True]
    assert find_copies(spots, labels[:3], train, labels, 0.999).tolist() == [True, True, True]


def test_hubs_are_few_independent_candidates() -> None:
    """A hundred candidates whose nearest is one and the same patient say no more than one candidate does."""
    train = ByPatient.of(torch.arange(20.0)[:, None] * 10, [f"t{i}" for i in range(20)])
    holdout = ByPatient.of(torch.arange(20.0)[:, None] * 10 + 5, [f"h{i}" for i in range(20)])
    rng = np.random.default_rng(0)
    hub = measure(torch.full((100, 1), 1.0), train, holdout, rng, gap=0.05, confidence=0.99)
    assert hub.closer == 1
    assert hub.closer_low < 0.5
    spread = measure(train.vectors.repeat(5, 1) + 1, train, holdout, rng, gap=0.05, confidence=0.99)
    assert spread.closer == 1
    # Five hits for each of 20, none for the others: variance 250 / 39 over a mean of 2.5, so 39 independent candidates.
    assert spread.closer_low == pytest.approx(0.005 ** (1 / 39))


def test_equal_distances_count_half() -> None:
    """Blank images are alike on both sides: nothing is closer to either."""
    blank = torch.ones(8, 3)
    train, holdout = ByPatient.of(blank, list("abcdefgh")), ByPatient.of(blank, list("ijklmnop"))
    found = measure(blank, train, holdout, np.random.default_rng(0), gap=0.05, confidence=0.99)
    assert found.closer == 0.5
    assert found.auc == 0.5
    assert found.dcr_ratio is None
    assert (found.nndr, found.nndr_holdout) == (1, 1)


def test_distance_ratio_of_copies_is_zero_where_sides_are_equal() -> None:
    _, train, holdout = sides(0, 20, 20)
    people = train.side("pixels"), holdout.side("pixels")
    found = measure(train.spaces["pixels"], *people, np.random.default_rng(0), gap=0.05, confidence=0.99)
    assert found.dcr_ratio == pytest.approx(0, abs=1e-2)


def test_copies_are_told_by_what_other_patients_are_apart() -> None:
    """Training patients 1 apart on a line, the first two 0.5: nearer than 0.5 to any is a copy."""
    line = torch.tensor([[0.0], [0.5], *[[1.5 + k] for k in range(20)]])
    people = ByPatient.of(line, [f"{k:02}" for k in range(len(line))])
    labels = torch.zeros(len(line), dtype=torch.int64)
    spots = torch.tensor([[7.5], [7.6], [-0.45], [-0.6], [30.0]])
    found = find_copies(spots, labels[:5], people, labels, 0.999)
    # 7.6 is near as well, -0.45 also; -0.6 is not; 30 is far, but its ratio 8.5 / 9.5 is as between patients.
    assert found.tolist() == [True, True, True, False, False]


def test_a_noisy_copy_of_an_image_far_from_all_is_told_by_its_ratio() -> None:
    """One patient lies 100 from all others, which are 1 apart: at 5 from him is a copy, at 5 from the rest is not."""
    line = torch.cat([torch.arange(30.0), torch.tensor([130.0])])[:, None]
    people = ByPatient.of(line, [f"{k:02}" for k in range(31)])
    labels = torch.zeros(31, dtype=torch.int64)
    assert find_copies(torch.tensor([[135.0], [-5.0]]), labels[:2], people, labels, 0.999).tolist() == [True, False]


# Generators, honest and rigged.


@pytest.mark.parametrize("seed", range(6))
def test_a_generator_that_knows_nobody_passes(seed: int) -> None:
    toys, train, holdout = sides(seed)
    result = judge(strangers(toys, [0, 1] * 60), train, holdout, SETTINGS, seed)
    assert [row["why"] for row in result.rows if row["passed"] is False] == []
    assert set(result.refused) <= {"copy"}
    assert result.accepted.float().mean() > 0.85
    assert all(0.25 < row["closer"] < 0.75 for row in all_rows(result))


def test_a_generator_that_ignores_images_altogether_passes() -> None:
    """Noise resembles nobody."""
    _, train, holdout = sides(0)
    noise = 3 * torch.randn(100, WIDTH, generator=torch.Generator().manual_seed(5)) + 2
    result = judge(images(noise, torch.arange(100) % 2), train, holdout, SETTINGS, 0)
    assert all(row["passed"] for row in result.rows)
    assert result.accepted.float().mean() > 0.85


@pytest.mark.parametrize("noise", [0.0, 1e-6, 0.05, 0.2])
@pytest.mark.parametrize("others", [5, 20])
def test_copies_are_blocked(noise: float, others: int) -> None:
    _, train, holdout = sides(1, others=others)
    result = judge(copied(train, torch.arange(160), noise), train, holdout, SETTINGS, 0)
    assert everything_refused(result)
    assert all(row["closer"] == 1 and row["passed"] is False for row in all_rows(result)[:1])
    if noise < 0.01:
        assert result.refused == {"copy": 160}
        assert all_rows(result)[0]["copies"] == 160


def test_near_copies_that_differ_from_the_image_more_than_from_the_patient() -> None:
    """Noise as large as the difference of a patient's two images: no copy of an image, but of a patient."""
    _, train, holdout = sides(2)
    result = judge(copied(train, torch.arange(160), 0.5), train, holdout, SETTINGS, 0)
    assert everything_refused(result)
    assert all_rows(result)[0]["auc"] > 0.8
    assert "membership AUC" in all_rows(result)[0]["why"]


def test_a_fifth_of_copies_among_strangers() -> None:
    toys, train, holdout = sides(3, 150, 60)
    made, taken = strangers(toys, [0, 1] * 80), copied(train, torch.arange(40) * 7)
    both = images(torch.cat([made.spaces["pixels"], taken.spaces["pixels"]]), torch.cat([made.labels, taken.labels]))
    result = judge(both, train, holdout, SETTINGS, 0)
    assert not result.accepted[160:].any()
    assert result.refused["copy"] >= 40
    assert everything_refused(result)
    assert "second-nearest" in all_rows(result)[0]["why"]


def test_one_copy_is_refused_alone() -> None:
    toys, train, holdout = sides(4)
    made = strangers(toys, [0, 1] * 60)
    made.spaces["pixels"][17] = train.spaces["pixels"][33]
    result = judge(images(made.spaces["pixels"], made.labels), train, holdout, SETTINGS, 0)
    assert not result.accepted[17]
    assert result.accepted.sum() > 100


def test_a_copy_under_another_class_is_a_copy() -> None:
    toys, train, holdout = sides(4)
    points = strangers(toys, [0, 1] * 60).spaces["pixels"]
    points[0] = train.spaces["pixels"][train.labels == 1][5]
    assert not judge(images(points, torch.arange(120) % 2), train, holdout, SETTINGS, 0).accepted[0]


def test_a_rare_class_of_few_patients_is_copied() -> None:
    """Class 2 has six patients, the generator returns the images of one of them with some noise."""
    toys = Toys(5)
    train = toys.people([0] * 40 + [1] * 40 + [2] * 6)
    holdout = toys.people([0] * 12 + [1] * 12 + [2] * 2)
    honest = strangers(toys, [0, 1] * 50)
    stolen = copied(train, torch.full((30,), 160), 0.02)
    both = images(
        torch.cat([honest.spaces["pixels"], stolen.spaces["pixels"]]), torch.cat([honest.labels, stolen.labels])
    )
    result = judge(both, train, holdout, SETTINGS, 0, (["a", "b", "rare"], ["d"]))
    assert not result.accepted[100:].any()
    rare = [row for row in result.rows if row["class"] == "rare"]
    assert [row["passed"] for row in rare] == [None, None]
    assert all("too few training or held-out patients" in row["why"] and row["closer"] is None for row in rare)
    assert rare[0]["copies"] == 30


def test_only_the_class_that_fails_is_refused() -> None:
    """Class 1 is remembered by its patients, not by images; class 0 is honest and in the majority."""
    toys = Toys(6)
    train = toys.people([0] * 150 + [1] * 25)
    holdout = toys.people([0] * 60 + [1] * 12)
    honest, stolen = strangers(toys, [0] * 600), copied(train, torch.arange(300, 350), 0.8)
    both = images(
        torch.cat([honest.spaces["pixels"], stolen.spaces["pixels"]]), torch.cat([honest.labels, stolen.labels])
    )
    result = judge(both, train, holdout, SETTINGS, 0)
    assert all(row["passed"] for row in all_rows(result))
    assert result.refused["class"] > 10
    assert not result.accepted[600:].any()
    assert result.accepted[:600].float().mean() > 0.95


def test_only_the_device_that_fails_is_refused() -> None:
    toys = Toys(7)
    train = toys.people([0] * 150 + [0] * 25, [0] * 150 + [1] * 25)
    holdout = toys.people([0] * 60 + [0] * 12, [0] * 60 + [1] * 12)
    honest, stolen = strangers(toys, [0] * 600), copied(train, torch.arange(300, 350), 0.6)
    both = images(
        torch.cat([honest.spaces["pixels"], stolen.spaces["pixels"]]),
        torch.zeros(650, dtype=torch.int64),
        torch.tensor([0] * 600 + [1] * 50),
    )
    loose = GateSettings(nndr_gap=0.5, membership_auc=0.6, membership_tpr=0.2, closer=0.7, dcr_ratio=0.8)
    result = judge(both, train, holdout, loose, 0, (["a"], ["old", "new"]))
    assert {(row["device"], row["passed"]) for row in result.rows if row["space"] == "pixels"} == {
        ("all", True),
        ("old", True),
        ("new", False),
    }
    assert "device" in result.refused
    assert not result.accepted[600:].any()
    assert result.accepted[:600].float().mean() > 0.95


# Noise: how often chance blocks, and what it takes to be seen.


def test_how_often_chance_blocks_an_honest_generator() -> None:
    """Nominally each of the measures fails a group in one case of 200; with four measures of two spaces 4%."""
    blocked = 0
    for seed in range(60):
        toys, train, holdout = sides(100 + seed, 40, 8)
        result = judge(strangers(toys, [0, 1] * 40), train, holdout, SETTINGS, seed)
        blocked += any(row["passed"] is False for row in all_rows(result))
    assert blocked <= 7  # of 60 at 4%, more than 7 has a chance of 0.3%


# Who is judged.


def test_classes_that_the_site_does_not_own_are_not_judged() -> None:
    _, train, holdout = sides(0)
    stolen = copied(train, torch.arange(10))
    foreign = images(stolen.spaces["pixels"], torch.full((10,), 3))
    other = images(strangers(Toys(7), [0] * 10).spaces["pixels"] + 9, torch.full((10,), 3))
    result = judge(other, train, holdout, SETTINGS, 0)
    assert result.accepted.all()
    assert result.refused == {}
    assert result.rows == []
    copies = judge(foreign, train, holdout, SETTINGS, 0)
    assert not copies.accepted.any(), "a copy of a patient, whatever class it was made for"
    assert copies.refused == {"copy": 10}


def test_no_candidates() -> None:
    _, train, holdout = sides(0)
    result = judge(copied(train, torch.arange(0)), train, holdout, SETTINGS, 0)
    assert result.accepted.shape == (0,)
    assert result.as_json() == {"accepted": 0, "refused": {}, "rows": []}


def test_without_held_out_patients_nothing_goes() -> None:
    toys, train, _ = sides(0)
    foreign = images(torch.zeros(1, WIDTH), torch.tensor([3]))
    made = strangers(toys, [0, 1, 0])
    both = images(
        torch.cat([made.spaces["pixels"], foreign.spaces["pixels"]]), torch.cat([made.labels, foreign.labels])
    )
    for few in (toys.people([]), toys.people([0, 0, 1, 1])):
        result = judge(both, train, few, SETTINGS, 0)
        assert result.accepted.tolist() == [False, False, False, True]
        assert result.refused == {"no hold-out": 3}
        assert {row["passed"] for row in result.rows} == {None}
        assert "5 of each are needed" in result.rows[0]["why"]


def test_with_few_training_patients_nothing_goes() -> None:
    toys = Toys(0)
    result = judge(strangers(toys, [0]), toys.people([0] * 4), toys.people([0] * 9), SETTINGS, 0)
    assert result.refused == {"few patients": 1}


def test_a_patient_on_both_sides_is_refused() -> None:
    toys, train, holdout = sides(0)
    both = GateImages(holdout.spaces, holdout.labels, holdout.devices, [train.patients[0], *holdout.patients[1:]])
    with pytest.raises(DataError, match="^1 patients are both in training and held out; "):
        judge(strangers(toys, [0]), train, both, SETTINGS, 0)


def test_the_same_seed_gives_the_same_verdict_in_any_order() -> None:
    toys, train, holdout = sides(8)
    made = strangers(toys, [0, 1] * 30)
    first, again = (judge(made, train, holdout, SETTINGS, 3) for _ in range(2))
    assert first.rows == again.rows
    assert torch.equal(first.accepted, again.accepted)
    turned = torch.arange(len(train.labels) - 1, -1, -1)
    names = [train.patients[i] for i in turned.tolist()]
    other = GateImages(
        {k: v[turned] for k, v in train.spaces.items()}, train.labels[turned], train.devices[turned], names
    )
    moved = judge(made, other, holdout, SETTINGS, 3)
    assert torch.equal(first.accepted, moved.accepted)
    for one, two in zip(first.rows, moved.rows, strict=True):
        assert one["dcr_ratio"] == pytest.approx(two["dcr_ratio"], rel=1e-4)


def test_rows_are_plain_json() -> None:
    toys, train, holdout = sides(0)
    result = judge(strangers(toys, [0, 1] * 10), train, holdout, SETTINGS, 0, (["a", "b"], ["x"]))
    assert json.loads(json.dumps(result.as_json(), allow_nan=False)) == result.as_json()
    assert all(set(row) == ROW for row in result.rows)
    groups = [(row["space"], row["class"], row["device"]) for row in result.rows]
    assert groups == [(space, c, "all") for c in ("all", "a", "b") for space in ("pixels", "features")]


# At a site.


def vetted(tmp_path: Path, pick: str, **synthesis: Any) -> tuple[GateResult, Samples]:
    site = gated_site(tmp_path, **synthesis)
    own = own_images(site.data, ("bright",), 5)
    rows = own.positions if pick == "train" else site.data.splits[pick]
    rows = rows[site.data.targets[rows] < 2]
    pictures = shrunk_images(site.data, rows, 8)
    labels = site.data.targets[rows]
    samples = Samples(labels, torch.zeros_like(labels), torch.arange(len(rows)), pictures)
    settings = site.study.synthesis
    assert isinstance(settings, SynthesisSettings)
    return vet(site, samples, ("bright",), settings), samples


def test_a_site_blocks_its_own_training_images(tmp_path: Path) -> None:
    result, samples = vetted(tmp_path, "train")
    assert everything_refused(result)
    assert result.refused == {"copy": len(samples)}
    assert {row["class"] for row in result.rows} == {"all", "nevus", "melanoma"}


def test_a_site_lets_images_of_other_patients_go(tmp_path: Path) -> None:
    """Its test patients, whom no generator and no hold-out knows."""
    result, _ = vetted(tmp_path, "test")
    assert [row["why"] for row in result.rows if row["passed"] is False] == []
    assert result.accepted.float().mean() > 0.75


def test_a_site_holds_out_only_cells_that_generators_saw(tmp_path: Path) -> None:
    """Keratosis has too few patients: neither its training nor its validation images are looked at."""
    result, _ = vetted(tmp_path, "train")
    data = gated_site(tmp_path).data
    kept = {part: int((data.labels(part) < 2).sum()) for part in ("train", "val")}
    assert kept["train"] < len(data.splits["train"])
    assert all((row["train"], row["holdout"]) == (kept["train"], kept["val"]) for row in all_rows(result))


def test_a_site_without_enough_held_out_patients_lets_nothing_go(tmp_path: Path) -> None:
    result, samples = vetted(tmp_path, "test", gate={"holdout": 100})
    assert result.refused == {"no hold-out": len(samples)}
