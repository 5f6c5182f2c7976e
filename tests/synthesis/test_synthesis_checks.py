"""Which methods go with ``synthesis``, which do not and what is offered instead, and its settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_hospitals import NOTHING, OPEN, VAE, hospital_study, hospitals, started
from toys import toy_study

from polyclinic.comparison import planned, run_comparison
from polyclinic.errors import StudyError
from polyclinic.methods import METHODS, make_method, method_class
from polyclinic.results import RunFolder
from polyclinic.runner import Silent
from polyclinic.study import Study, dump_study, load_study, validate_study
from polyclinic.synthesis.composed import WithFeatureGaussians
from polyclinic.synthesis.settings import SynthesisSettings

SMALL: dict[str, Any] = {"name": "features", "samples": 20, "epochs": 2}
IMAGES: dict[str, Any] = {"generator": [VAE, "amplitude"], "gate": OPEN, "plan": {"budget": 1.0}}
FEATURES: dict[str, Any] = {"generator": [SMALL]}
ALONE = {"local", "pooled", "data-vectors"}
"""Methods that exchange nothing beforehand."""
PUBLIC = {"fedmd", "ds-fl", "fccl", "kt-pfl", "feddf"}
DIFFERENT = {*PUBLIC, "fedproto", "fedtgp", "fedgh", "lg-fedavg", "fml", "fedkd", "heterofl"}
"""Rivals for different networks: they exchange no samples either."""
OWN_HEADS = {"ditto", "apfl", "pfedme", "fedper", "fedrep", *ALONE}
"""Methods whose sites deploy a last layer of their own."""


@pytest.mark.parametrize(
    ("method", "synthesis"),
    [
        *((method, IMAGES) for method in ("fedavg", "fedprox", "scaffold", "ditto", "per-fedavg", "fedbn")),
        *((method, FEATURES) for method in ("fedavg", "fedprox", "scaffold", "per-fedavg", "fedavg-ft")),
        ("fedssg", FEATURES),
    ],
)
def test_methods_run_with_an_exchange(method: str, synthesis: dict[str, Any], tmp_path: Path) -> None:
    """They run to the end, and samples, or the new last layer, do change what sites deploy."""
    used = []
    for name, part in (("with", synthesis), ("without", NOTHING)):
        study = hospital_study(
            {"name": method, "rounds": 1},
            synthesis={**part, "training": {"until": 1.0, "ramp": 0.0}},
            training={"lr": 0.05, "batch_size": 5},
        )
        run = started(study, tmp_path / name)
        run.train()
        metrics = run.test()
        assert metrics["sites"].keys() == {"north", "south", "west"}
        site = run.channel._sites["north"]
        site.round = run.state.finished
        run.method.deploy(site, run.method.deployment(run.state))
        used.append({n: t.clone() for n, t in site.tensors.items()})
    assert any(not torch.equal(used[0][name], used[1][name]) for name in used[0])


@pytest.mark.parametrize(
    ("synthesis", "fault"), [(FEATURES, "generator features"), ({**IMAGES, "filter": 0.2}, "filter: 0.2")]
)
def test_the_published_ring_is_too_coarse_for_sums_of_squares(synthesis: dict[str, Any], fault: str) -> None:
    with pytest.raises(StudyError, match=rf"synthesis.{fault} solves .* Use aggregation ring-he or masked"):
        hospital_study("fedavg", synthesis=synthesis, aggregation="ring-as-published")
    hospital_study("fedavg", synthesis={**IMAGES, "filter": 0.0}, aggregation="ring-as-published")


def test_which_methods_there_are() -> None:
    assert {name for name in METHODS if not method_class(name).exchanges} == ALONE | DIFFERENT
    own = {name for name in METHODS if not method_class(name).starts_global}
    assert own | ALONE == OWN_HEADS | DIFFERENT - {"heterofl"} | {"natimg-fl"}


@pytest.mark.parametrize("method", sorted(OWN_HEADS - ALONE))
def test_features_are_refused_where_sites_have_last_layers_of_their_own(method: str) -> None:
    with pytest.raises(StudyError, match=rf"method {method}.*generator vae or amplitude, or method per-fedavg"):
        hospital_study(method, synthesis=FEATURES)
    model = {"name": "toys:two_layers", "width": 16} if method in ("fedper", "fedrep") else {}
    assert hospital_study(method, synthesis=IMAGES, model=model).synthesis is not None


@pytest.mark.parametrize("method", sorted(ALONE | DIFFERENT - PUBLIC))
def test_a_method_that_exchanges_nothing_is_refused_as_the_studys_own(method: str) -> None:
    with pytest.raises(StudyError, match=rf"before method {method}.*--set synthesis=null.*fedavg"):
        hospital_study(method, synthesis=IMAGES)
    with pytest.raises(StudyError, match="nobody would train with samples"):
        hospital_study(method, synthesis=IMAGES, compare={"methods": ["local", "pooled"]})
    assert hospital_study(method).synthesis is None


@pytest.mark.parametrize("own", ["fedavg", "local"])
def test_in_a_comparison_such_methods_go_without(own: str, tmp_path: Path) -> None:
    others = ["pooled", "data-vectors", "fedavg" if own == "local" else "local"]
    plans = planned(hospital_study(own, synthesis=IMAGES, compare={"methods": others}))
    assert {name for name, studies in plans.items() if studies[0].synthesis is None} == ALONE
    assert all(make_method(studies[0]).study.synthesis == studies[0].synthesis for studies in plans.values())
    # Each has a folder of its own, whose study is read again to go on.
    study = plans["local"][0]
    (tmp_path / "study.yaml").write_text(dump_study(study))
    assert load_study(tmp_path / "study.yaml").synthesis is None


def test_a_comparison_with_and_without_an_exchange_runs(tmp_path: Path) -> None:
    study = hospital_study(
        {"name": "fedssg", "rounds": 1, "synthesis": FEATURES},
        compare={"methods": ["fedavg", "local", "pooled", "data-vectors"]},
        evaluation={"bootstrap": 0, "every": 0, "examples": 0},
    )
    folder = RunFolder(tmp_path)
    folder.create(study)
    metrics = run_comparison(study, hospitals(), folder)
    assert set(metrics["table"]) == {"fedssg", "fedavg", "local", "pooled", "data-vectors"}
    made = {path.parent.name for path in tmp_path.glob("runs/*/synthesis.json")}
    assert made == {"fedssg-seed0"}


def test_set_of_a_comparison_leaves_synthesis_out_for_one_method() -> None:
    entry = {"name": "ditto", "set": {"synthesis": None}}
    with pytest.raises(StudyError, match="method ditto"):
        planned(hospital_study("fedavg", synthesis=FEATURES, compare={"methods": ["ditto"]}))
    plans = planned(hospital_study("fedavg", synthesis=FEATURES, compare={"methods": [entry]}))
    assert plans["ditto"][0].synthesis is None
    assert plans["fedavg"][0].synthesis is not None
    with pytest.raises(StudyError, match="set gives local a synthesis that its sites would not use"):
        planned(hospital_study("fedavg", compare={"methods": [{"name": "local", "set": {"synthesis.style": 0.1}}]}))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"task": {"kind": "multi-label", "classes": ["a", "b"]}},
            "with one class each, but task.kind is 'multi-label'",
        ),
        ({"task": {"kind": "segmentation", "classes": ["a", "b"]}}, "task.kind is 'segmentation'"),
        ({"data": {"phantom": {"sites": [{"name": "x"}]}, "image": {"size": [8, 8, 8]}}}, "have 3 dimensions"),
        ({"synthesis": {"window": 2}}, "synthesis.window: 2 needs images of 5 pixels or more"),
    ],
)
def test_what_synthesis_cannot_do(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(StudyError) as caught:
        toy_study("fedavg", **{"synthesis": {"generator": []}, **sections})
    assert words in str(caught.value)


def test_more_sites_than_a_hidden_sum_adds_are_refused_though_few_take_part_in_a_round(tmp_path: Path) -> None:
    """Of 18 sites 5 train in a round, which can be summed; the exchange asks all."""
    data = hospitals({f"s{i:02d}": {("a", "bright"): 5} for i in range(18)})
    method = {"name": "fedavg", "rounds": 1, "participation": 0.3}
    with pytest.raises(StudyError, match=r"masked: an exchange of samples asks all 18 sites.*adds 16 at most"):
        started(hospital_study(method, synthesis=FEATURES, aggregation="masked"), tmp_path, data)
    started(hospital_study(method, aggregation="masked"), tmp_path / "without", data)
    own = hospital_study({**method, "name": "fedssg"}, aggregation="masked", compare={"methods": ["fedavg"]})
    folder = RunFolder(tmp_path / "compared")
    folder.create(own)
    with pytest.raises(StudyError, match="asks all 18 sites"):
        run_comparison(own, data, folder)


@pytest.mark.parametrize("kind", ["multi-label", "segmentation"])
def test_fedssg_on_another_task_is_refused_for_what_it_is(kind: str) -> None:
    with pytest.raises(StudyError) as caught:
        toy_study("fedssg", task={"kind": kind, "classes": ["a", "b"]})
    assert kind in str(caught.value)


@pytest.mark.parametrize(
    ("generator", "names"),
    [
        ("vae", ["vae"]),
        (["vae", {"name": "features", "every": 3}], ["vae", "features"]),
        ([], []),
        (None, []),
        ("none", []),
        ({"name": "amplitude", "strength": 0.5}, ["amplitude"]),
    ],
)
def test_generators_by_name_or_with_settings(generator: Any, names: list[str]) -> None:
    found = SynthesisSettings.model_validate({"generator": generator})
    assert [entry.name for entry in found.generator] == names
    assert [found.of_kind(name) is not None for name in ("vae", "features", "amplitude")] == [
        name in names for name in ("vae", "features", "amplitude")
    ]


@pytest.mark.parametrize(
    ("synthesis", "words"),
    [
        ({"generator": ["vae", "vae"]}, "generator vae is listed twice"),
        ({"generator": "gan"}, "synthesis.generator"),
        ({"generator": {"name": "vae", "sice": 32}}, "sice"),
        ({"generator": {"name": "vae", "placement": "server"}}, "name their folder in public"),
        ({"generator": {"name": "vae", "placement": "server", "public": "x", "dp": {}}}, "no training sees a patient"),
        ({"generator": {"name": "vae", "size": 30}}, "multiple of 8"),
        ({"training": {"ramp": 0.9}}, "ramp 0.9 ends after until 0.8"),
        ({"floor": 0}, "synthesis.floor"),
        ({"epsilon": 0}, "synthesis.epsilon"),
        ({"flor": 3}, "synthesis.flor: there is no such key. Did you mean 'floor'?"),
        ({"gate": {"closer": 0.4}}, "synthesis.gate.closer"),
    ],
)
def test_settings_that_are_wrong(synthesis: dict[str, Any], words: str) -> None:
    with pytest.raises(StudyError) as caught:
        hospital_study(synthesis=synthesis)
    assert words in str(caught.value)


def test_a_study_with_synthesis_reads_back_equal(tmp_path: Path) -> None:
    study = hospital_study(synthesis={"generator": [VAE, SMALL, "amplitude"], "epsilon": 1.0})
    (tmp_path / "study.yaml").write_text(dump_study(study))
    again = load_study(tmp_path / "study.yaml")
    assert again.synthesis == study.synthesis
    assert again.digest == study.digest
    assert hospital_study(synthesis={"generator": [VAE]}).digest != study.digest
    raw = json.loads(study.model_dump_json())
    assert validate_study(raw) == study


def test_the_method_with_features_is_the_method_but_for_the_last_layer() -> None:
    study = hospital_study("per-fedavg", synthesis=FEATURES)
    method = make_method(study)
    assert isinstance(method, WithFeatureGaussians)
    assert method.personal is True
    assert method.simulation_only is False
    assert set(method.ops()) == {"train", "name-devices", "gaussians"}
    assert not isinstance(make_method(hospital_study("per-fedavg", synthesis=IMAGES)), WithFeatureGaussians)


def test_observers_are_told_of_the_exchange(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []

    class Listener(Silent):
        def working(self, what: str, done: int, total: int) -> None:
            told.append((what, done, total))

    study: Study = hospital_study(synthesis={"generator": []})
    run = started(study, tmp_path)
    assert run.exchange is not None
    run.exchange._observer = Listener()
    run.exchange.finish()
    assert told[0] == ("exchange of samples", 0, 5)
    assert told[-1] == ("exchange of samples", 5, 5)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
