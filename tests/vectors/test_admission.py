"""Admission: vectors short enough to do by hand, attackers that must be held, honest sites that must not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from polyclinic.errors import ContributionError
from polyclinic.vectors.admission import (
    Admission,
    AdmissionLimits,
    Decision,
    absent_rows,
    admission,
)
from polyclinic.vectors.likeness import agreement, beyond_chance
from polyclinic.vectors.sources import InMemory, Outline, Spec
from polyclinic.vectors.survey import VectorSurvey, survey_vectors

WIDTH = 400
OUTLINE = Outline(
    (
        Spec("body.weight", (WIDTH, 2), torch.float32, False),
        Spec("norm.running_mean", (4,), torch.float32, True),
        Spec("head.weight", (3, 2), torch.float32, False),
        Spec("head.bias", (3,), torch.float32, False),
    ),
    "head",
    ("normal", "covid", "pneumonia"),
)


def source(digest: str, site: str = "", held: tuple[bool, ...] = (True,) * 3, **tensors: Any) -> InMemory:
    named = {name.replace("_", "."): torch.as_tensor(value, dtype=torch.float32) for name, value in tensors.items()}
    return InMemory(digest, site or f"site-{digest}", 100, held, {"vector": named})


def survey(sources: Sequence[InMemory]) -> VectorSurvey:
    """Products of all pairs, pair by pair."""
    ordered = sorted(sources, key=lambda s: s.digest)

    def product(a: InMemory, b: InMemory, name: str) -> float:
        return float((a.read("vector", name).double() * b.read("vector", name).double()).sum())

    names = sorted(ordered[0].names("vector"))
    products = {n: torch.tensor([[product(a, b, n) for a in ordered] for b in ordered]).double() for n in names}
    return VectorSurvey(tuple(s.digest for s in ordered), tuple(s.site for s in ordered), products)


def judged(sources: Sequence[InMemory], decisions: Mapping[str, Decision] | None = None) -> dict[str, Admission]:
    return admission(OUTLINE, sources, survey(sources), decisions or {})


def body(*rows: Sequence[float]) -> list[InMemory]:
    """Contributions named a, b, c, ... that change the body alone, by vectors with these first values."""
    made = []
    for letter, values in zip("abcdefgh", rows, strict=False):
        vector = torch.zeros(WIDTH * 2)
        vector[: len(values)] = torch.tensor(values)
        made.append(source(letter, body_weight=vector.view(WIDTH, 2), head_weight=torch.zeros(3, 2)))
    return made


def alike(count: int, agreement: float = 0.5, seed: int = 0) -> list[InMemory]:
    """Honest sites: a common direction and noise, cosine ``agreement`` between any two, norms within 20%."""
    draw = torch.Generator().manual_seed(seed)

    def noise() -> dict[str, Tensor]:
        return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}

    shapes = {"body_weight": (WIDTH, 2), "head_weight": (3, 2), "head_bias": (3,)}
    common = noise()
    made = []
    for j in range(count):
        own, size = noise(), 0.01 * (1 + 0.2 * j / count)
        mixed = {n: size * (agreement**0.5 * common[n] + (1 - agreement) ** 0.5 * own[n]) for n in shapes}
        made.append(source(f"{j:02d}", **mixed))
    return made


def random_like(other: InMemory, digest: str, seed: int = 9) -> InMemory:
    draw = torch.Generator().manual_seed(seed)
    noise = {n: torch.randn(t.shape, generator=draw) * t.std() for n, t in other.tensors["vector"].items()}
    return InMemory(digest, f"site-{digest}", 100, (True,) * 3, {"vector": noise})


def turned(other: InMemory, digest: str) -> InMemory:
    """The same the other way round."""
    vector = {name: -tensor for name, tensor in other.tensors["vector"].items()}
    return InMemory(digest, f"site-{digest}", 100, (True,) * 3, {"vector": vector})


def test_numbers_by_hand() -> None:
    # a = (3, 4), b = (5, 0), c = (0, 2): norms 5, 5, 2; cosines a.b 0.6, a.c 0.8, b.c 0.
    found = judged(body((3, 4), (5, 0), (0, 2)))
    a, b, c = found["a"], found["b"], found["c"]
    assert (a.norm, b.norm, c.norm) == (5, 5, 2)
    # To the directions of b and c, (1, 1): (0.6 + 0.8) / sqrt(2); to those of a and c, (0.6, 1.8): 0.6 / sqrt(3.6).
    assert a.cosine == pytest.approx(1.4 / math.sqrt(2))
    assert b.cosine == pytest.approx(0.6 / math.sqrt(3.6))
    # Mean (8, 6)/3, without a (2.5, 1): the difference (1/6, 1), relative to a length of 10/3.
    assert a.influence == pytest.approx(math.hypot(1 / 6, 1) / (10 / 3))
    # log 5 against log 5 and log 2: median is their middle, the deviation 1.4826 times half their distance.
    half = math.log(5 / 2) / 2
    assert a.norm_z == pytest.approx(half / (1.4826 * half))
    assert a.norm_ratio == pytest.approx(5 / math.sqrt(10))
    # log 2 against log 5 twice: no deviation, so the floor counts.
    assert c.norm_z == pytest.approx(math.log(2 / 5) / 0.35)
    assert (a.nearest, b.nearest) == ("c", "a")
    assert a.nearest_cosine == pytest.approx(0.8)
    assert (a.worst_layer, a.worst_cosine) == ("body.weight", a.cosine)
    assert list(found) == ["a", "b", "c"]


def test_noise_is_told_by_what_chance_allows() -> None:
    # Two layers of 4 and 100 values, norms 2 and 1 here, 3 and 5 there: noise has a variance of 36/4 + 25/100.
    one, two = torch.tensor([[4.0, 1.0], [1.0, 9.0]]), torch.tensor([[1.0, -2.0], [-2.0, 25.0]])
    deviations = beyond_chance({"one": one, "two": two}, {"one": 4, "two": 100}, 0, 1)
    assert deviations == pytest.approx((1 - 2) / math.sqrt(9 + 0.25))
    assert beyond_chance({"one": torch.zeros(2, 2)}, {"one": 4}, 0, 1) == 0


def test_agreement_is_the_median_over_pairs() -> None:
    # (1, 0), (1, 1), (0, 1): cosines 0.707, 0, 0.707.
    dots = torch.tensor([[1.0, 1.0, 0.0], [1.0, 2.0, 1.0], [0.0, 1.0, 1.0]])
    assert agreement(dots, [0, 1, 2]) == pytest.approx(math.sqrt(0.5))
    assert agreement(dots, [0, 2]) == 0
    assert agreement(dots, [1]) is None


def test_honest_sites_with_opposite_class_mixes_are_accepted() -> None:
    """Measured on made-up X-rays: sites with 5 to 95% of a class have cosines from 0.6 down to -0.8."""
    first, second, third, fourth = alike(4, 0.6)
    apart = [first, second, *(turned(s, s.digest) for s in (third, fourth))]
    found = judged(apart)
    assert {f.verdict for f in found.values()} == {"accept"}
    assert all((f.cosine or 0) < 0 for f in found.values())
    assert all("do not agree among themselves" in f.notes[0] for f in found.values())
    # Noise among them is still noise.
    with_noise = judged([*apart, random_like(first, "ff")])
    assert [digest for digest, f in with_noise.items() if f.verdict == "quarantine"] == ["ff"]


def test_a_change_of_a_few_values_is_not_taken_for_noise() -> None:
    # The bias of three values holds nearly all: by chance two such vectors may well have a cosine of 0.9.
    draw = torch.Generator().manual_seed(1)
    common = torch.tensor([1.0, -0.5, 0.2])
    sites = []
    for name in "abc":
        noise = {"body_weight": 1e-4 * torch.randn(WIDTH, 2, generator=draw), "head_weight": torch.zeros(3, 2)}
        sites.append(source(name, head_bias=common + 0.2 * torch.randn(3, generator=draw), **noise))
    found = judged(sites)
    assert all((f.beyond_chance or 0) < 4 for f in found.values())
    assert all((f.most_alike or 0) > 0.9 for f in found.values())
    assert {f.verdict for f in found.values()} == {"accept"}


def test_one_that_points_against_the_others_is_held() -> None:
    honest = alike(4)
    found = judged([*honest, turned(alike(5)[4], "ff")])
    assert [digest for digest, f in found.items() if f.verdict == "quarantine"] == ["ff"]
    assert "points elsewhere than the others, who agree" in found["ff"].reasons[0]


@pytest.mark.parametrize(("scale", "held"), [(0.2, False), (0.1, True), (3.0, False), (4.5, True)])
def test_short_vectors_are_borne_with_longer_than_long_ones(scale: float, held: bool) -> None:
    *honest, last = alike(5)
    scaled = {name: scale * tensor for name, tensor in last.tensors["vector"].items()}
    found = judged([*honest, InMemory("ff", "s", 100, (True,) * 3, {"vector": scaled})])
    assert (found["ff"].verdict == "quarantine") == held
    assert {f.verdict for digest, f in found.items() if digest != "ff"} == {"accept"}


@pytest.mark.parametrize(("factor", "odd"), [(20, False), (200, True)])
def test_a_small_layer_counts_where_it_is_heavy(factor: float, odd: bool) -> None:
    # Three values, a tenth as large as the other 806: 20 times that is 1.5% of the squared norm, 200 times 60%.
    honest = []
    for j, site in enumerate(alike(4)):
        vector = dict(site.tensors["vector"])
        vector["head.bias"] = vector["head.bias"] * (0.1 * factor if j == 1 else 0.1)
        honest.append(InMemory(site.digest, site.site, 100, (True,) * 3, {"vector": vector}))
    assert [name for name, _ in judged(honest)["01"].odd_layers] == (["head.bias"] if odd else [])


def test_share_of_values_that_changed() -> None:
    still = {"head_weight": torch.zeros(3, 2), "head_bias": torch.zeros(3)}
    one = source("a", body_weight=torch.eye(WIDTH, 2), **still)
    other = source("b", body_weight=torch.ones(WIDTH, 2), **still)
    shares = survey_vectors(OUTLINE, [one, other]).changed
    values = 2 * WIDTH + 9
    assert shares == {"a": 2 / values, "b": 2 * WIDTH / values}
    found = admission(OUTLINE, [one, other], survey([one, other]), {}, changed=shares)
    assert "most of the network was frozen" in found["a"].notes[1]
    assert len(found["b"].notes) == 1


def test_the_survey_of_the_files_gives_the_same_report() -> None:
    honest = alike(4)
    surveyed = admission(OUTLINE, honest, survey_vectors(OUTLINE, honest), {})
    for digest, found in judged(honest).items():
        assert surveyed[digest].cosine == pytest.approx(found.cosine)
        assert surveyed[digest].influence == pytest.approx(found.influence)
        assert surveyed[digest].verdict == found.verdict


def test_honest_sites_are_accepted() -> None:
    for count in (3, 5, 10):
        for seed in range(5):
            found = judged(alike(count, 0.3, seed))
            assert {f.verdict for f in found.values()} == {"accept"}, [f.reasons for f in found.values()]
            assert all(0.25 < (f.nearest_cosine or 0) < 0.45 for f in found.values())


@pytest.mark.parametrize("count", [2, 4, 9])
def test_a_vector_a_million_times_as_long_is_held_and_no_other(count: int) -> None:
    honest = alike(count)
    long = {name: 1e6 * tensor for name, tensor in random_like(honest[0], "ff").tensors["vector"].items()}
    found = judged([*honest, InMemory("ff", "bad", 100, (True,) * 3, {"vector": long})])
    assert [digest for digest, f in found.items() if f.verdict == "quarantine"] == ["ff"]
    assert found["ff"].influence == pytest.approx(1, abs=1e-3)
    assert "times as long as the others' usually are" in found["ff"].reasons[0]


@pytest.mark.parametrize("count", [2, 4, 9])
def test_noise_in_place_of_training_is_found_by_its_direction(count: int) -> None:
    honest = alike(count)
    found = judged([*honest, random_like(honest[0], "ff")])
    assert [digest for digest, f in found.items() if f.verdict == "quarantine"] == ["ff"]
    assert abs(found["ff"].cosine or 1) < 0.05
    assert any("points elsewhere" in reason for reason in found["ff"].reasons)


def test_a_copy_of_another_site_is_held_with_what_it_copies() -> None:
    honest = alike(4)
    copied = {name: 1.5 * tensor for name, tensor in honest[2].tensors["vector"].items()}
    found = judged([*honest, InMemory("ff", "thief", 100, (True,) * 3, {"vector": copied})])
    assert [digest for digest, f in found.items() if f.verdict == "quarantine"] == ["02", "ff"]
    assert found["ff"].nearest == "02"
    assert found["ff"].nearest_cosine == pytest.approx(1)


def test_the_same_site_may_send_nearly_the_same_twice() -> None:
    honest = alike(4)
    again = InMemory("ff", honest[2].site, 100, (True,) * 3, honest[2].tensors)
    assert {f.verdict for f in judged([*honest, again]).values()} == {"accept"}


def test_a_vector_of_zeros_is_held() -> None:
    honest = alike(3)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in honest[0].tensors["vector"].items()}
    found = judged([*honest, InMemory("ff", "idle", 100, (True,) * 3, {"vector": zeros})])
    assert [digest for digest, f in found.items() if f.verdict == "quarantine"] == ["ff"]
    assert found["ff"].reasons == ("the vector is zero: the site's model is the base, so nothing was learned there",)
    assert found["ff"].cosine is None


def test_one_odd_layer_is_named() -> None:
    honest = alike(4)
    tensors = {**honest[1].tensors["vector"], "head.bias": honest[1].tensors["vector"]["head.bias"] * 200}
    found = judged([*honest[:1], InMemory("01", "odd", 100, (True,) * 3, {"vector": tensors}), *honest[2:]])
    assert found["01"].verdict == "quarantine"
    assert [name for name, _ in found["01"].odd_layers] == ["head.bias"]
    assert {f.verdict for digest, f in found.items() if digest != "01"} == {"accept"}


def test_rows_without_images_are_listed_by_class() -> None:
    weight, bias = [[3.0, 0.0], [1.0, 2.0], [0.0, 0.0]], [4.0, 2.0, 0.0]
    one = source("a", held=(True, False, False), head_weight=weight, head_bias=bias)
    rows, largest_held = absent_rows(OUTLINE, one)
    assert [(row.name, row.norm) for row in rows] == [("covid", 3.0)]
    assert largest_held == 5.0
    found = judged([one])["a"]
    assert found.verdict == "accept"
    assert any("covid (3)" in note for note in found.notes)


def test_a_row_without_images_that_changed_most_is_held() -> None:
    one = source("a", held=(False, True, True), head_weight=[[9.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    assert "the head's row of 'normal'" in judged([one])["a"].reasons[0]


def test_with_one_other_nobody_is_the_odd_one() -> None:
    found = judged(body((1, 0), (-1, 0.1)))
    assert {f.verdict for f in found.values()} == {"accept"}
    assert found["a"].norm_z is None
    assert found["a"].cosine == pytest.approx(-1 / math.hypot(1, 0.1))
    assert found["a"].notes[0] == "with 1 other contribution there is nothing to compare it with"


def test_a_persons_decision_counts_and_is_shown() -> None:
    honest = alike(4)
    every = [*honest, random_like(honest[0], "ff")]
    found = judged(every, {"ff": "accept", "00": "hold"})
    assert (found["ff"].verdict, found["ff"].found, found["ff"].decision) == ("accept", "quarantine", "accept")
    assert found["ff"].reasons
    assert (found["00"].verdict, found["00"].found) == ("quarantine", "accept")


def test_what_is_on_hold_is_no_measure_for_the_others() -> None:
    # Two attackers agree, so the one honest site looks odd until they are on hold.
    first, second, third = alike(3)
    bad = [turned(s, f"f{i}") for i, s in enumerate((second, third))]
    assert judged([first, *bad])["00"].verdict == "quarantine"
    held = judged([first, second, third, *bad], {"f0": "hold", "f1": "hold"})
    assert [held[d].verdict for d in ("00", "01", "02")] == ["accept"] * 3
    alone = judged([first, second, third])
    assert held["00"].cosine == alone["00"].cosine
    assert held["00"].norm_z == alone["00"].norm_z


def test_the_order_of_arrival_changes_nothing() -> None:
    honest = alike(5)
    assert judged(honest) == judged(honest[::-1]) == judged([honest[i] for i in (2, 0, 4, 1, 3)])


def test_the_survey_of_another_set_is_refused() -> None:
    honest = alike(3)
    with pytest.raises(ContributionError, match="another set"):
        admission(OUTLINE, honest, survey(honest[:2]), {})


def test_limits_are_settings() -> None:
    honest = alike(4)
    found = admission(OUTLINE, honest, survey(honest), {}, AdmissionLimits(cosine=0.99))
    assert {f.verdict for f in found.values()} == {"quarantine"}
