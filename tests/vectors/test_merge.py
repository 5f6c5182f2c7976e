"""Merging: a function of the set of contributions, exact where it can be, and never a model that cannot compute."""

from __future__ import annotations

import hashlib
import math
import random
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from polyclinic.errors import ContributionError
from polyclinic.models.weights import shared_tensors, snapshot
from polyclinic.vectors import blend, feed
from polyclinic.vectors.feed import BLOCK
from polyclinic.vectors.head import HeadSums, solve_ridge
from polyclinic.vectors.merge import MergeReport, merge
from polyclinic.vectors.recipe import Recipe
from polyclinic.vectors.rules.base import Filter, Layer, Merged, Piece, Rule
from polyclinic.vectors.sources import Filling, InMemory, InMemoryTensors, Kind, Make, Outline, Spec
from polyclinic.vectors.survey import cosines, norms, survey_vectors
from polyclinic.vectors.tensor_file import TensorFile, TensorWriter

pytestmark = pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # rules and filters of these tests

CLASSES = ("a", "b", "c")
SUM = {"rule": {"name": "data-vector", "coefficients": "sum"}}
SET = ["data-vector", "ties", "median", "trimmed-mean", "tsv", "iso-c"]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    with torch.no_grad():
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2)
    return model


OUTLINE = Outline.of(network(), CLASSES)
BASE = snapshot(shared_tensors(network(), [spec.name for spec in OUTLINE.specs]))


def source(
    site: str, vector: Mapping[str, Tensor], *, images: int = 10, held: Sequence[bool] = (True,) * 3, **more: Any
) -> InMemory:
    tensors: dict[Kind, Mapping[str, Tensor]] = {"vector": vector, **more}
    return InMemory(hashlib.sha256(site.encode()).hexdigest(), site, images, tuple(held), tensors)


def sites(count: int, seed: int = 0, size: float = 0.1) -> list[InMemory]:
    draw = torch.Generator().manual_seed(seed)
    return [
        source(f"site{j}", {s.name: size * torch.randn(s.shape, generator=draw) for s in OUTLINE.weights}, images=j + 1)
        for j in range(count)
    ]


def merged(
    sources: Sequence[InMemory],
    recipe: Mapping[str, Any] | Recipe | None = None,
    *,
    outline: Outline = OUTLINE,
    base: Mapping[str, Tensor] = BASE,
    judge: Callable[[Mapping[str, Tensor]], float] | None = None,
) -> tuple[dict[str, Tensor], MergeReport]:
    found: dict[str, Tensor] = {}
    made = recipe if isinstance(recipe, Recipe) else Recipe.model_validate(recipe or {})
    report = merge(outline, InMemoryTensors(base), sources, made, found.__setitem__, judge=judge)
    return found, report


def with_rule(rule: Rule, filters: Sequence[Filter] = ()) -> Recipe:
    """A recipe with a rule of a test."""
    return Recipe.model_construct(rule=rule, filters=list(filters))


def as_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    return b"".join(name.encode() + tensor.numpy().tobytes() for name, tensor in tensors.items())


def mean_rule(scale: float = 1.0) -> dict[str, Any]:
    return {"rule": {"name": "data-vector", "coefficients": "mean", "scale": scale}}


class TestSetOfContributions:
    @pytest.mark.parametrize("rule", SET)
    @pytest.mark.parametrize("filters", [[], ["dare", {"name": "norm-clip", "factor": 0.9}]])
    def test_order_of_arrival_does_not_matter(self, rule: str, filters: list[Any]) -> None:
        arrived = sites(5)
        expected, report = merged(arrived, {"rule": rule, "filters": filters})
        for seed in range(3):
            random.Random(seed).shuffle(arrived)
            again, other = merged(arrived, {"rule": rule, "filters": filters})
            assert as_bytes(again) == as_bytes(expected)
            assert other == report
        assert list(report.digests) == sorted(s.digest for s in arrived)
        assert list(report.sites) == [s.site for s in sorted(arrived, key=lambda s: s.digest)]

    @pytest.mark.parametrize("rule", SET)
    def test_join_then_leave_is_never_joined(self, rule: str) -> None:
        arrived = sites(4)
        never = as_bytes(merged(arrived[:3], {"rule": rule})[0])
        joined = as_bytes(merged(arrived, {"rule": rule})[0])
        assert joined != never
        assert as_bytes(merged([s for s in arrived if s.site != "site3"], {"rule": rule})[0]) == never

    @pytest.mark.parametrize("rule", SET)
    def test_the_number_of_threads_does_not_matter(self, rule: str) -> None:
        before = torch.get_num_threads()
        found = []
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                found.append(as_bytes(merged(sites(4), {"rule": rule})[0]))
                assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        assert found[0] == found[1]

    def test_seeds_depend_on_the_set_and_the_layer(self) -> None:
        def seeds(sources: Sequence[InMemory]) -> dict[str, int]:
            Seen.seen.clear()
            merged(sources, with_rule(Seen()))
            return {layer.name: layer.seed for layer in Seen.seen}

        one = seeds(sites(3))
        assert len(set(one.values())) == len(OUTLINE.weights)
        assert seeds(sites(3)[::-1]) == one
        assert not set(seeds(sites(2)).values()) & set(one.values())

    def test_twice_the_same_contribution_and_none_at_all_are_refused(self) -> None:
        arrived = sites(2)
        with pytest.raises(ContributionError, match="is given twice"):
            merged([*arrived, arrived[0]])
        with pytest.raises(ContributionError, match="no contributions"):
            merged([])


class Seen(Rule):
    """Keeps what it was shown; merges nothing."""

    name: str = "seen"
    seen: ClassVar[list[Layer]] = []

    def merge(self, layer: Layer, survey: object) -> Merged:
        self.seen.append(layer)
        return Merged(torch.zeros(layer.base.shape, dtype=torch.float64))


class TestArithmetic:
    def test_the_mean_is_the_average_of_the_models(self) -> None:
        arrived = sites(3)
        found, report = merged(arrived, mean_rule())
        for spec in OUTLINE.weights:
            models = [BASE[spec.name].double() + s.tensors["vector"][spec.name].double() for s in arrived]
            torch.testing.assert_close(found[spec.name], torch.stack(models).mean(0).float(), rtol=0, atol=1e-7)
        assert report.shares == {spec.name: (1 / 3,) * 3 for spec in OUTLINE.weights}

    def test_the_sum_is_the_sum(self) -> None:
        arrived = sites(3)
        found, _ = merged(arrived, SUM)
        for spec in OUTLINE.weights:
            total = BASE[spec.name].double() + sum(s.tensors["vector"][spec.name].double() for s in arrived)
            assert torch.equal(found[spec.name], total.float())

    @settings(max_examples=50, deadline=None)
    @given(st.integers(0, 10_000), st.floats(1e-6, 1e3))
    def test_one_site_gives_its_own_model_to_rounding(self, seed: int, size: float) -> None:
        """The vector was rounded once and the sum once: half a unit in the last place of each."""
        draw = torch.Generator().manual_seed(seed)
        own = {s.name: BASE[s.name] + size * torch.randn(s.shape, generator=draw) for s in OUTLINE.weights}
        vector = {name: own[name] - BASE[name] for name in own}
        found, _ = merged([source("one", vector)], mean_rule())
        for name, model in own.items():
            bound = 2**-24 * (vector[name].abs().double() + model.abs().double()) * (1 + 1e-6)
            assert ((found[name].double() - model.double()).abs() <= bound).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_short_floats_are_summed_in_float64_and_rounded_once(self, dtype: torch.dtype) -> None:
        """One and 4096 vectors of 2^-12: in the base's own type, each addition would be lost."""
        outline = Outline((Spec("w", (3,), dtype, False),), "", CLASSES)
        count = 256
        sources = [source(f"s{j}", {"w": torch.full((3,), 2.0**-8, dtype=torch.bfloat16)}) for j in range(count)]
        found, _ = merged(sources, SUM, outline=outline, base={"w": torch.ones(3, dtype=dtype)})
        assert found["w"].dtype == dtype
        assert found["w"].tolist() == [2.0] * 3
        lost = torch.ones(3, dtype=torch.bfloat16)
        for _ in range(count):
            lost += torch.full((3,), 2.0**-8, dtype=torch.bfloat16)
        assert lost.tolist() == [1.0] * 3

    @pytest.mark.parametrize("values", [BLOCK - 1, BLOCK, 2 * BLOCK + 5])
    @pytest.mark.parametrize("recipe", [SUM, {"rule": "median"}])
    def test_layers_of_several_blocks(self, values: int, recipe: dict[str, Any]) -> None:
        outline = Outline((Spec("w", (values,), torch.float32, False),), "", CLASSES)
        draw = np.random.default_rng(0)
        vectors = [draw.normal(size=values).astype(np.float32) for _ in range(3)]
        sources = [source(f"s{j}", {"w": torch.from_numpy(v)}) for j, v in enumerate(vectors)]
        found, report = merged(sources, recipe, outline=outline, base={"w": torch.ones(values)})
        pile = np.stack(vectors).astype(np.float64)
        added = pile.sum(0) if recipe == SUM else np.median(pile, 0)
        np.testing.assert_allclose(found["w"].numpy(), (1 + added).astype(np.float32), rtol=2e-7, atol=1e-9)
        in_order = sorted(range(3), key=lambda j: sources[j].digest)
        np.testing.assert_allclose(report.norms, [np.linalg.norm(pile[j]) for j in in_order])
        assert report.merged_norm == pytest.approx(np.linalg.norm(added))
        assert report.layer_norms["w"] == pytest.approx((*report.norms, report.merged_norm))

    def test_tensors_come_in_the_order_of_the_outline(self) -> None:
        written: list[str] = []
        seen: list[str] = []
        recipe = Recipe.model_validate({"rule": "ties"})
        write = lambda name, tensor: written.append(name)  # noqa: E731
        merge(OUTLINE, InMemoryTensors(BASE), sites(2), recipe, write, on_layer=seen.append)
        assert written == seen == [spec.name for spec in OUTLINE.specs]

    def test_the_base_alone_needs_no_contribution(self) -> None:
        for arrived in ([], sites(2)):
            found, report = merged(arrived, {"rule": "base"})
            assert as_bytes(found) == as_bytes(BASE)
            assert report.merged_norm == 0


class TestRunningStatistics:
    def statistics(self, mean: float, variance: float) -> dict[str, Tensor]:
        return {"1.running_mean": torch.full((4,), mean), "1.running_var": torch.full((4,), variance)}

    def test_they_are_the_bases_and_never_summed(self) -> None:
        """The sheet's example: base 1.0 and two sites at 0.2 would sum to 1.0 - 0.8 - 0.8 = -0.6."""
        base = {**BASE, "1.running_var": torch.ones(4)}
        arrived = [source(s.site, s.tensors["vector"], statistics=self.statistics(0.0, 0.2)) for s in sites(2)]
        found, _ = merged(arrived, base=base)
        assert found["1.running_var"].tolist() == [1.0] * 4
        found, _ = merged(arrived, {"restoration": "bn-pooled"}, base=base)
        torch.testing.assert_close(found["1.running_var"], torch.full((4,), 0.2))

    def test_pooled_ones_are_the_moments_of_all_images(self) -> None:
        draw = np.random.default_rng(1)
        images = [draw.normal(j, 1 + j, size=(7 + 5 * j, 4)) for j in range(3)]
        arrived = [
            source(
                s.site,
                s.tensors["vector"],
                images=len(x),
                statistics={
                    "1.running_mean": torch.from_numpy(x.mean(0)).float(),
                    "1.running_var": torch.from_numpy(x.var(0)).float(),
                },
            )
            for s, x in zip(sites(3), images, strict=True)
        ]
        found, _ = merged(arrived, {"restoration": "bn-pooled"})
        pooled = np.concatenate(images)
        np.testing.assert_allclose(found["1.running_mean"].numpy(), pooled.mean(0), rtol=1e-6)
        np.testing.assert_allclose(found["1.running_var"].numpy(), pooled.var(0), rtol=1e-6)

    @settings(max_examples=200, deadline=None)
    @given(
        st.lists(
            st.tuples(
                st.floats(-(2.0**50), 2.0**50, width=32), st.floats(2.0**-126, 2.0**50, width=32), st.integers(1, 10**6)
            ),
            min_size=1,
            max_size=6,
        ),
        st.booleans(),
    )
    def test_a_negative_variance_is_impossible(self, given_: list[tuple[float, float, int]], pooled: bool) -> None:
        arrived = [
            source(f"s{j}", s.tensors["vector"], images=n, statistics=self.statistics(mean, variance))
            for j, ((mean, variance, n), s) in enumerate(zip(given_, sites(len(given_)), strict=True))
        ]
        found, _ = merged(arrived, {"restoration": "bn-pooled"} if pooled else {})
        assert (found["1.running_var"] > 0).all()
        assert found["1.running_var"].isfinite().all()
        least = min(variance for _, variance, _ in given_)
        assert not pooled or float(found["1.running_var"].min()) >= least * (1 - 1e-6)

    def test_wrong_or_missing_ones_are_refused(self) -> None:
        arrived = sites(1)
        with pytest.raises(ContributionError, match="lacks statistics of 1.running_mean"):
            merged(arrived, {"restoration": "bn-pooled"})
        for bad in (self.statistics(0.0, -0.1), self.statistics(0.0, 0.0), self.statistics(math.nan, 1.0)):
            odd = [source("s", arrived[0].tensors["vector"], statistics=bad)]
            with pytest.raises(ContributionError, match="no running statistics"):
                merged(odd, {"restoration": "bn-pooled"})
        with pytest.raises(ContributionError, match="1.running_var is not above zero"):
            merged(arrived, base={**BASE, "1.running_var": torch.tensor([1.0, 0.0, 1.0, 1.0])})


class TestRefusals:
    def test_a_missing_or_misshapen_tensor(self) -> None:
        vector = dict(sites(1)[0].tensors["vector"])
        with pytest.raises(ContributionError, match="shape \\(2, 3\\), the base has \\(3,\\)"):
            merged([source("s", {**vector, "4.bias": torch.zeros(2, 3)})])
        del vector["4.bias"]
        with pytest.raises(ContributionError, match="site 's' lacks vector of 4.bias"):
            merged([source("s", vector)])

    def test_a_result_that_is_not_finite(self) -> None:
        for bad in (math.nan, math.inf):
            vector = {n: t.clone() for n, t in sites(1)[0].tensors["vector"].items()}
            vector["0.weight"][0, 0, 0, 0] = bad
            with pytest.raises(ContributionError, match="0.weight is not finite"):
                merged([source("s", vector)])

    def test_half_precision_that_overflows(self) -> None:
        outline = Outline((Spec("w", (1,), torch.float16, False),), "", CLASSES)
        with pytest.raises(ContributionError, match="too large for torch.float16"):
            merged([source("s", {"w": torch.tensor([1e5])})], outline=outline, base={"w": torch.ones(1).half()})

    def test_what_a_rule_needs(self) -> None:
        with pytest.raises(ContributionError, match="lacks fisher of 0.bias"):
            merged(sites(2), {"rule": "fisher"})
        with pytest.raises(ContributionError, match="brings no gram, which rule regmean needs"):
            merged(sites(2), {"rule": "regmean"})
        with pytest.raises(ContributionError, match="Give validation images"):
            merged(sites(2), {"rule": "greedy-soup"})

    def test_another_number_of_classes(self) -> None:
        with pytest.raises(ContributionError, match="speaks of 2 classes, the base has 3"):
            merged([source("s", sites(1)[0].tensors["vector"], held=(True, True))])

    def test_a_rule_that_gives_another_shape_or_no_numbers(self) -> None:
        class Wrong(Rule):
            name: str = "wrong"

            def merge(self, layer: Layer, survey: object) -> Merged:
                return Merged(torch.zeros(1, dtype=torch.float64))

        class Endless(Rule):
            name: str = "endless"

            def shares(self, images: Sequence[int], judge: object) -> list[float]:
                return [math.inf] * len(images)

        with pytest.raises(ContributionError, match="rule wrong made shape"):
            merged(sites(2), with_rule(Wrong()))
        with pytest.raises(ContributionError, match="rule endless gave the shares"):
            merged(sites(2), with_rule(Endless()))


class TestJudges:
    def test_candidates_are_whole_models_and_the_best_is_taken(self) -> None:
        arrived = sites(3)
        wanted = arrived[1]
        asked: list[set[str]] = []

        def judge(candidate: Mapping[str, Tensor]) -> float:
            asked.append(set(candidate))
            target = BASE["4.weight"] + wanted.tensors["vector"]["4.weight"]
            return -float((candidate["4.weight"] - target).norm())

        found, report = merged(arrived, {"rule": "greedy-soup"}, judge=judge)
        assert all(names == {spec.name for spec in OUTLINE.specs} for names in asked)
        assert as_bytes(found) == as_bytes(merged([wanted], mean_rule())[0])
        assert report.shares["4.weight"] == tuple(float(site == wanted.site) for site in report.sites)

    def test_a_search_finds_the_scale(self) -> None:
        arrived = sites(4)
        best = merged(arrived, mean_rule(1.5))[0]["0.weight"]
        judge = lambda candidate: -float((candidate["0.weight"] - best).norm())  # noqa: E731
        found, _ = merged(arrived, {"rule": {"name": "data-vector", "coefficients": "search"}}, judge=judge)
        torch.testing.assert_close(found["0.weight"], best)


class Doubled(Filter):
    """Doubles a vector; for a test."""

    name: Literal["doubled"] = "doubled"
    needs_norms: ClassVar[bool] = True
    seen: ClassVar[list[Piece]] = []

    def apply(self, piece: Piece) -> Tensor:
        self.seen.append(piece)
        return piece.vector * 2


class TestFilters:
    def test_they_are_applied_in_turn_and_leave_the_files_alone(self) -> None:
        arrived = sites(2)
        before = as_bytes(arrived[0].tensors["vector"])
        found, report = merged(arrived, with_rule(Recipe.model_validate(mean_rule()).rule, [Doubled(), Doubled()]))
        assert as_bytes(found) == as_bytes(merged(arrived, mean_rule(4.0))[0])
        assert as_bytes(arrived[0].tensors["vector"]) == before
        assert report.merged_norm == pytest.approx(merged(arrived, mean_rule(4.0))[1].merged_norm)

    def test_what_they_are_told(self) -> None:
        arrived = [source(s.site, s.tensors["vector"], held=(True, s.site != "site1", True)) for s in sites(3)]
        one = Doubled()
        one.seen.clear()
        merged(arrived, with_rule(Recipe().rule, [one]))
        norm = {
            s.site: math.sqrt(sum(float(t.double().square().sum()) for t in s.tensors["vector"].values()))
            for s in arrived
        }
        assert {round(piece.norm, 9) for piece in one.seen} == {round(value, 9) for value in norm.values()}
        assert all(piece.median_norm == pytest.approx(sorted(norm.values())[1]) for piece in one.seen)
        absent = {(piece.name, round(piece.norm, 9)) for piece in one.seen if piece.absent_rows == (1,)}
        assert absent == {(name, round(norm["site1"], 9)) for name in ("4.weight", "4.bias")}
        assert len({piece.seed for piece in one.seen}) == 3 * len(OUTLINE.weights)

    def test_a_sites_seed_is_its_own(self) -> None:
        def seeds(sources: Sequence[InMemory]) -> set[int]:
            one = Doubled()
            one.seen.clear()
            merged(sources, with_rule(Recipe().rule, [one]))
            return {piece.seed for piece in one.seen}

        assert seeds(sites(2)) < seeds(sites(3))


class Elementwise(Rule):
    """The largest entry, times the Fisher information; for a test."""

    name: str = "elementwise"
    elementwise: ClassVar[bool] = True

    def survey(self, layers: Any) -> object:
        return [[layer.name for layer in layers] for _ in range(2)]

    def merge(self, layer: Layer, survey: object) -> Merged:
        assert survey == [[spec.name for spec in OUTLINE.weights]] * 2
        fisher = layer.extra(0, "fisher")
        assert fisher is not None
        assert fisher.shape == layer.base.shape == layer.vectors[0].shape
        return Merged(torch.stack(layer.vectors).amax(0).double() * fisher, note="the largest")


def test_pieces_of_a_layer_bring_their_own_fisher_information_and_a_survey_can_be_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feed, "BLOCK", 5)
    monkeypatch.setattr(blend, "BLOCK", 5)
    arrived = [source(s.site, s.tensors["vector"], fisher=sites(1, seed=9)[0].tensors["vector"]) for s in sites(3)]
    found, report = merged(arrived, with_rule(Elementwise()))
    for spec in OUTLINE.weights:
        largest = torch.stack([s.tensors["vector"][spec.name] for s in arrived]).amax(0).double()
        added = largest * arrived[0].tensors["fisher"][spec.name]
        torch.testing.assert_close(found[spec.name], (BASE[spec.name].double() + added).float(), rtol=0, atol=1e-7)
    assert report.notes == (f"the largest ({', '.join(spec.name for spec in OUTLINE.weights)})",)


class TestHead:
    def arrived(self, rows: int = 3) -> tuple[list[InMemory], np.ndarray, np.ndarray]:
        draw = np.random.default_rng(2)
        x, labels = draw.normal(size=(90, 16)), np.arange(90) % 3
        x[:, :3] += 2 * np.eye(3)[labels]
        parts = []
        for j, index in enumerate(np.split(np.arange(90), [10, 50])):
            sums = HeadSums.of(torch.from_numpy(x[index]), torch.from_numpy(labels[index]), rows)
            parts.append(source(f"s{j}", {}, head=sums.tensors()))
        return parts, x, labels

    def test_it_is_the_pooled_solution_on_the_base(self) -> None:
        arrived, x, labels = self.arrived()
        found, _ = merged(arrived, {"rule": "base", "head": {"name": "ridge", "gamma": 0.1}})
        weight, bias = solve_ridge(HeadSums.of(torch.from_numpy(x), torch.from_numpy(labels), 3), 0.1)
        torch.testing.assert_close(found["4.weight"], weight.float(), rtol=0, atol=1e-6)
        torch.testing.assert_close(found["4.bias"], bias.float(), rtol=0, atol=1e-6)
        rest = {n: t for n, t in found.items() if not n.startswith("4.")}
        assert as_bytes(rest) == as_bytes({n: BASE[n] for n in rest})
        again, _ = merged(arrived[::-1], {"rule": "base", "head": {"name": "ridge", "gamma": 0.1}})
        assert as_bytes(again) == as_bytes(found)

    def test_it_goes_with_the_base_only(self) -> None:
        with pytest.raises(ContributionError, match="publish the merged model as a base"):
            merged(sites(2), {"rule": "ties", "head": "ridge"})

    def test_sums_of_another_network_or_none(self) -> None:
        recipe = {"rule": "base", "head": "ridge"}
        with pytest.raises(ContributionError, match="lacks head of count"):
            merged(sites(1), recipe)
        with pytest.raises(ContributionError, match="no contributions"):
            merged([], recipe)
        narrow = HeadSums.of(torch.rand(9, 5), torch.arange(9) % 3, 3)
        with pytest.raises(ContributionError, match="taken on another network"):
            merged([source("s", {}, head=narrow.tensors())], recipe)
        with pytest.raises(ContributionError, match="head sums have shapes"):
            merged(self.arrived(rows=5)[0], recipe)


class TestSurvey:
    def test_dot_products(self, monkeypatch: pytest.MonkeyPatch) -> None:
        arrived = sites(4)
        found = survey_vectors(OUTLINE, arrived[::-1])
        ordered = sorted(arrived, key=lambda s: s.digest)
        assert found.sites == tuple(s.site for s in ordered)
        flat = np.stack(
            [np.concatenate([t.double().numpy().ravel() for t in s.tensors["vector"].values()]) for s in ordered]
        )
        np.testing.assert_allclose(found.total.numpy(), flat @ flat.T, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(norms(found.total).numpy(), np.linalg.norm(flat, axis=1))
        unit = flat / np.linalg.norm(flat, axis=1)[:, None]
        np.testing.assert_allclose(cosines(found.total).numpy(), unit @ unit.T, atol=1e-12)
        weights = np.stack([s.tensors["vector"]["4.weight"].double().numpy().ravel() for s in ordered])
        np.testing.assert_allclose(found.products["4.weight"].numpy(), weights @ weights.T, atol=1e-12)

    def test_a_vector_of_zeros_has_no_direction(self) -> None:
        nothing = source("zero", {s.name: torch.zeros(s.shape) for s in OUTLINE.weights})
        found = cosines(survey_vectors(OUTLINE, [*sites(1), nothing]).total)
        assert found.isfinite().all()
        assert found[0, 1] == 0


class TestMemory:
    def test_two_layers_at_a_time(self) -> None:
        """However deep the network, no more tensors of contributions are alive than those of two layers."""
        layers, count = 12, 3
        outline = Outline(tuple(Spec(f"w{k}", (64,), torch.float32, False) for k in range(layers)), "", CLASSES)
        alive: dict[str, int] = {"now": 0, "most": 0}

        def gone() -> None:
            alive["now"] -= 1

        class Reading(InMemory):
            def names(self, kind: Kind) -> frozenset[str]:
                return frozenset(spec.name for spec in outline.specs) if kind == "vector" else frozenset()

            def read(self, kind: Kind, name: str) -> Tensor:
                alive["now"] += 1
                alive["most"] = max(alive["most"], alive["now"])
                memory = np.ones(64, np.float32)
                weakref.finalize(memory, gone)  # the tensor and its views keep it
                return torch.from_numpy(memory)

        arrived = [Reading(f"{j}", f"s{j}", 1, (True,) * 3, {}) for j in range(count)]
        recipe = Recipe()
        base = InMemoryTensors({spec.name: torch.zeros(64) for spec in outline.specs})
        merge(outline, base, arrived, recipe, lambda name, tensor: None)
        assert alive["now"] == 0
        assert count <= alive["most"] <= 2 * count  # how far reading runs ahead is the scheduler's choice


def test_memory_is_used_again_only_when_nobody_holds_it() -> None:
    small = feed.SMALL
    memory = feed._Memory(8 * small)
    first = memory.take((small,), torch.float32)
    place = first.data_ptr()
    view = first.view(-1)[5:]
    del first
    held = memory.take((2, small), torch.float32)
    assert held.data_ptr() != place, "a view still shows the first"
    del view
    assert memory.take((small // 2, 2), torch.float32).data_ptr() == place
    assert memory.take((8,), torch.float32).data_ptr() not in (place, held.data_ptr()), "small ones are by themselves"
    assert memory.take((3 * small,), torch.float32).shape == (3 * small,), "larger than any: by itself"


@pytest.mark.parametrize("rule", ["data-vector", "ties", "median"])
def test_reading_into_used_memory_changes_nothing(rule: str, tmp_path: Path) -> None:
    shapes = {f"layer{k}": (300, 200 - 7 * k) for k in range(6)}
    outline = Outline(tuple(Spec(n, s, torch.float32, False) for n, s in shapes.items()), "layer0", ("a",))

    @dataclass(frozen=True)
    class InFile(InMemory):
        file: TensorFile | None = None

        def read_into(self, kind: Kind, name: str, make: Make) -> torch.Tensor:
            spec = self.file.spec(name)
            return self.file.read_into(name, make(spec.shape, spec.dtype))

    plain, filled = [], []
    for j in range(3):
        tensors = {n: torch.randn(s, generator=torch.Generator().manual_seed(j)) for n, s in shapes.items()}
        with TensorWriter(tmp_path / f"{j}", [(n, torch.float32, s) for n, s in shapes.items()]) as out:
            for name, tensor in tensors.items():
                out.write(name, tensor)
        plain.append(InMemory(f"{j:064x}", f"s{j}", 1, (True,), {"vector": tensors}))
        file = TensorFile(tmp_path / f"{j}", max_bytes=10**9)
        filled.append(InFile(f"{j:064x}", f"s{j}", 1, (True,), {"vector": tensors}, file))
    assert isinstance(filled[0], Filling)
    assert not isinstance(plain[0], Filling)
    base = InMemoryTensors({n: torch.ones(s) for n, s in shapes.items()})
    recipe = Recipe.model_validate({"rule": rule, "restoration": "none"})
    found: list[dict[str, torch.Tensor]] = [{}, {}]
    reports = [
        merge(outline, base, sources, recipe, into.__setitem__)
        for sources, into in zip((plain, filled), found, strict=True)
    ]
    assert reports[0] == reports[1]
    assert all(torch.equal(found[0][name], found[1][name]) for name in shapes)
