"""Data vectors against closed forms: what sites train alone, and what the server makes of it with sums and numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import deployed, site_data, sites, toy_study, trained, two_layers

from polyclinic.comparison import planned, with_controls
from polyclinic.data.dataset import SiteData
from polyclinic.errors import SiteError, StudyError
from polyclinic.federation.message import Message
from polyclinic.federation.site import Op, Site
from polyclinic.models.normalisation import running_statistics
from polyclinic.results import RunFolder
from polyclinic.runner import Run, Silent
from polyclinic.study import Study

MEAN: dict[str, Any] = {"rule": {"coefficients": "mean"}, "restoration": "none"}
CNN: dict[str, Any] = {
    "model": {"name": "small-cnn", "width": 4},
    "data": {"image": {"size": [8, 8]}},
    "training": {"batch_size": 8},
}
SIZES = {"north": 24, "south": 16, "west": 12}
CHOOSING = {"every": 1, "select": "best", "metric": "loss"}
State = dict[str, Tensor]


def method(recipe: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {"name": "data-vectors", "recipe": {"restoration": "none", **recipe}, **settings}


def images(sizes: Mapping[str, int] = SIZES) -> dict[str, SiteData]:
    """Sites with images that are large enough for convolutions."""
    data = sites(dict(sizes))
    for own in data.values():
        own._blocks = (torch.nn.functional.interpolate(own.images, size=(8, 8)),)
    return data


def flipped(data: SiteData, split: str) -> SiteData:
    """The same images with the wrong labels in one split."""
    targets = data.targets.clone()
    targets[data.splits[split]] = 1 - targets[data.splits[split]]
    return SiteData(data.site, data.cases, data.images, targets, data.splits)


def everywhere_flipped(split: str) -> dict[str, SiteData]:
    return {name: flipped(own, split) for name, own in sites().items()}


def prepared(study: Study, data: dict[str, SiteData], folder: Path) -> Run:
    """A run before its first round."""
    opened = RunFolder(folder)
    opened.create(study)
    return Run(study, data, opened, Silent())


def replace_op(run: Run, site: str, op: str, work: Callable[[Site, Message], Message]) -> None:
    own = run.channel._sites[site]
    own._ops = {**own._ops, op: Op(work, own._ops[op].leaves)}


def fails(site: Site, message: Message) -> Message:
    raise ValueError("no power")


def alone(data: dict[str, SiteData], folder: Path, /, **sections: Any) -> tuple[State, dict[str, State]]:
    """The start weights, and how method local ends with the same images and seed: the change of each site's values."""
    sections.setdefault("model", {"name": "toys:linear"})
    run = trained(toy_study("local", **sections), data, folder)
    start = dict(run.bench.initial)
    ends = {site: deployed(run, site) for site in run.channel.sites}
    return start, {site: {n: (t.double() - start[n].double()) for n, t in own.items()} for site, own in ends.items()}


def expected(start: State, vectors: Mapping[str, State], shares: Mapping[str, float]) -> State:
    """Base plus shares of vectors, in float64."""
    return {
        name: sum((share * vectors[site][name] for site, share in shares.items()), tensor.double())
        for name, tensor in start.items()
    }


def close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], atol: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name].double(), tensor.double(), rtol=0, atol=atol)


def different(found: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return any(not torch.allclose(found[n].double(), other[n].double(), rtol=0, atol=1e-4) for n in other)


def bits(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


# 22, 10 and 10 images as they are told, rounded; at most 1.2 / 3 = 0.4 for one site, the rest in proportion.
SHARES: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "mean": ({"coefficients": "mean"}, {"north": 1 / 3, "south": 1 / 3, "west": 1 / 3}),
    "sum": ({"coefficients": "sum"}, {"north": 1, "south": 1, "west": 1}),
    "half the sum": ({"coefficients": "sum", "scale": 0.5}, {"north": 0.5, "south": 0.5, "west": 0.5}),
    "backwards": ({"coefficients": "mean", "scale": -0.6}, {"north": -0.2, "south": -0.2, "west": -0.2}),
    "nothing": ({"coefficients": "sum", "scale": 0}, {}),
    "weighted": ({"coefficients": "weighted", "cap": 3}, {"north": 22 / 42, "south": 10 / 42, "west": 10 / 42}),
    "capped": ({"coefficients": "weighted", "cap": 1.2}, {"north": 0.4, "south": 0.3, "west": 0.3}),
}


@pytest.mark.parametrize("backend", ["plain", "masked"])
@pytest.mark.parametrize("rule", SHARES)
def test_sums_of_what_sites_trained_alone(rule: str, backend: str, tmp_path: Path) -> None:
    settings, shares = SHARES[rule]
    start, vectors = alone(sites(), tmp_path / "alone")
    study = toy_study(method({"rule": settings}), aggregation=backend)
    run = trained(study, sites(), tmp_path / "run")
    close(run.state.groups["model"], expected(start, vectors, shares), atol=1e-6 if backend == "plain" else 3e-6)
    assert not shares or different(run.state.groups["model"], start)
    assert run.aggregation.backend == backend


@pytest.mark.parametrize("rule", ["mean", "sum", "weighted"])
def test_a_lying_server_does_not_get_one_sites_vector_as_the_sum(
    rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It tells all sites the same, so that masks cancel: north counts for everything, the others for nothing."""
    pack = Message.pack

    def lies(*groups: Any, **scalars: Any) -> Message:
        told = {k: 10**6 if k == "counts/north" else 0 for k in scalars if k.startswith("counts/")}
        told |= {k: float(k == "share/north") for k in scalars if k.startswith("share/")}
        return pack(*groups, **{**scalars, **told})

    monkeypatch.setattr(Message, "pack", lies)
    run = prepared(toy_study(method({"rule": {"coefficients": rule}}), aggregation="masked"), sites(), tmp_path / "run")
    with pytest.raises(SiteError, match="with other shares than the rule's own"):
        run.train()


def test_sites_train_as_in_method_local(tmp_path: Path) -> None:
    """With minibatches and batch normalisation too: the same draws."""
    start, vectors = alone(images(), tmp_path / "alone", **CNN)
    run = trained(toy_study(method(MEAN), **CNN), images(), tmp_path / "run")
    model = run.state.groups["model"]
    third = dict.fromkeys(SIZES, 1 / 3)
    moving = running_statistics(run.bench.model)
    for name, wanted in expected(start, vectors, third).items():
        kept = start[name].double() if name in moving else wanted
        torch.testing.assert_close(model[name].double(), kept, rtol=0, atol=1e-6)


def test_median_by_numpy(tmp_path: Path) -> None:
    start, vectors = alone(sites(), tmp_path / "alone")
    run = trained(toy_study(method({"rule": "median"})), sites(), tmp_path / "run")
    wanted = {
        name: tensor.double() + torch.from_numpy(np.median([v[name].numpy() for v in vectors.values()], axis=0))
        for name, tensor in start.items()
    }
    close(run.state.groups["model"], wanted)


def test_a_filter_is_applied_to_each_vector_before_the_rule(tmp_path: Path) -> None:
    start, vectors = alone(sites(), tmp_path / "alone")
    recipe = {**MEAN, "filters": [{"name": "norm-clip", "factor": 1.0}]}
    run = trained(toy_study(method(recipe)), sites(), tmp_path / "run")
    norms = {site: float(sum(t.square().sum() for t in v.values()) ** 0.5) for site, v in vectors.items()}
    limit = float(np.median(list(norms.values())))
    shares = {site: min(1.0, limit / norm) / 3 for site, norm in norms.items()}
    assert min(shares.values()) < 0.33
    close(run.state.groups["model"], expected(start, vectors, shares))


def test_the_shuffled_control_keeps_the_values_and_loses_their_places(tmp_path: Path) -> None:
    start, vectors = alone(sites(), tmp_path / "alone")
    recipe = method({**MEAN, "filters": ["shuffled"]}, contributors=["south"])
    run = trained(toy_study(recipe), sites(), tmp_path / "run")
    moved = {n: run.state.groups["model"][n].double() - start[n].double() for n in start}
    assert different(moved, vectors["south"])
    for name, tensor in vectors["south"].items():
        torch.testing.assert_close(moved[name].flatten().sort()[0], tensor.flatten().sort()[0], rtol=0, atol=1e-6)


# Who contributes, who restores.


@pytest.mark.parametrize(
    ("wanted", "who"),
    [
        ("largest", ["north"]),
        (["west"], ["west"]),
        (["west", "south", "west"], ["south", "west"]),
    ],
)
@pytest.mark.parametrize("coefficients", ["sum", "mean"])
def test_contributors(wanted: Any, who: list[str], coefficients: str, tmp_path: Path) -> None:
    start, vectors = alone(sites(), tmp_path / "alone")
    study = toy_study(method({"rule": {"coefficients": coefficients}}, contributors=wanted))
    run = trained(study, sites(), tmp_path / "run")
    share = 1.0 if coefficients == "sum" else 1 / len(who)
    close(run.state.groups["model"], expected(start, vectors, dict.fromkeys(who, share)))
    for site in run.channel.sites:
        assert (run.channel._sites[site].state.load("personal") is not None) == (site in who)


def test_the_largest_beside_the_restorer(tmp_path: Path) -> None:
    start, vectors = alone(sites(), tmp_path / "alone")
    run = trained(toy_study(method(MEAN, contributors="largest", restorer="north")), sites(), tmp_path / "run")
    close(run.state.groups["model"], expected(start, vectors, {"south": 1.0}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"contributors": ["nort"]}, "method.contributors: 'nort' cannot contribute. Did you mean 'north'?"),
        ({"contributors": ["north", "west"], "restorer": "west"}, "'west' cannot contribute. Known: north, south."),
        ({"restorer": "suoth"}, "method.restorer: there is no site 'suoth'. Did you mean 'south'?"),
    ],
)
def test_a_wrong_name_is_an_error_that_names_the_nearest(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SiteError) as raised:
        trained(toy_study(method(MEAN, **settings)), sites(), tmp_path)
    assert message in str(raised.value)


def test_nobody_but_the_restorer(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="no site answered beside the restorer 'north'"):
        trained(toy_study(method(MEAN, restorer="north")), sites({"north": 24}), tmp_path)


def recalibrated(network: nn.Module, model: State, data: SiteData) -> State:
    """All training images go through once as one batch; running statistics are then that batch's."""
    network.load_state_dict({**network.state_dict(), **model})
    network.eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.train()
            layer.momentum = 1.0
    with torch.no_grad():
        network(data.inputs(data.splits["train"]))
    return {n: t.clone() for n, t in network.state_dict().items() if n in model}


def test_the_restorer_contributes_nothing_and_restores_once_for_all(tmp_path: Path) -> None:
    settings = {**CNN, "training": {"batch_size": 1000}, "evaluation": {"batch_size": 1000}}
    restored = {"mode": "bn-recal", "augment": False, "balanced": False}
    study = toy_study(method({**MEAN, "restoration": restored}, restorer="west"), **settings)
    run = prepared(study, images(), tmp_path / "run")
    asked: list[tuple[str, str]] = []
    run.channel._on_call = lambda op, site, reply: asked.append((op, site))
    run.train()
    assert [site for op, site in asked if op == "restore"] == ["west"]
    assert {site for op, site in asked if op in ("train", "contribute")} == {"north", "south"}
    assert not run.method.personal
    model = run.state.groups["model"]
    assert all(bits(deployed(run, site), model) for site in SIZES)

    start, vectors = alone(images(), tmp_path / "alone", **settings)
    moving = running_statistics(run.bench.model)
    merged = expected(start, vectors, {"north": 0.5, "south": 0.5})
    before = {n: (start[n] if n in moving else t.float()) for n, t in merged.items()}
    close(model, recalibrated(run.bench.model, before, images()["west"]), atol=1e-5)
    assert any(not torch.equal(model[n], start[n]) for n in moving if n in model)


def test_without_a_restorer_every_site_restores_its_own_copy(tmp_path: Path) -> None:
    study = toy_study(method({**MEAN, "restoration": "auto"}), **CNN)
    run = trained(study, images(), tmp_path)
    assert run.method.personal
    moving = {n for n in running_statistics(run.bench.model) if n in run.state.groups["model"]}
    own = {site: deployed(run, site) for site in SIZES}
    model = run.state.groups["model"]
    assert all(torch.equal(model[n], run.bench.initial[n]) for n in moving), "statistics stay the base's at the server"
    for name in model:
        assert torch.equal(own["north"][name], own["west"][name]) == (name not in moving), name
    run.test()
    assert not (tmp_path / "models" / "global.safetensors").exists()


def test_a_restorer_that_is_gone_is_an_error_with_its_reason(tmp_path: Path) -> None:
    recipe = {**MEAN, "restoration": "bn-recal"}
    study = toy_study(method(recipe, restorer="west"), federation={"on_absent": "continue"}, **CNN)
    run = prepared(study, images(), tmp_path)
    replace_op(run, "west", "restore", fails)
    with pytest.raises(SiteError, match="the restorer 'west' did not answer: ValueError: no power"):
        run.train()


@pytest.mark.parametrize("control", ["random", "shuffled"])
def test_the_controls_stand_beside_vectors_that_nobody_sees(control: str, tmp_path: Path) -> None:
    """They join every comparison by themselves, so a comparison with masked sums must be able to run them."""
    study = toy_study(method(MEAN), aggregation="masked", compare={"methods": ["fedavg"]})
    plans = planned(with_controls(study))
    start, vectors = alone(sites(), tmp_path / "alone")
    run = trained(plans[f"data-vectors.{control}"][0], sites(), tmp_path / "run")
    moved = {n: run.state.groups["model"][n].double() - start[n].double() for n in start}
    mean = expected(start, vectors, dict.fromkeys(sites(), 1 / 3))
    assert different(moved, {n: wanted - start[n].double() for n, wanted in mean.items()})
    assert any(float(tensor.abs().max()) > 0 for tensor in moved.values())
    assert run.aggregation.backend == "masked"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("recipe", [{"rule": "ties"}, {"rule": {"coefficients": "model-stock"}}, {"rule": "fisher"}])
def test_single_vectors_are_merged_where_the_networks_run_on_a_gpu(recipe: dict[str, Any], tmp_path: Path) -> None:
    run = trained(toy_study(method(recipe), device="cuda"), sites(), tmp_path / "run")
    assert all(bool(tensor.isfinite().all()) for tensor in run.state.groups["model"].values())


# What the settings forbid.


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        ({"rule": "median"}, "rule median must see"),
        ({"rule": "ties"}, "rule ties must see"),
        ({"rule": {"coefficients": "norm-keep"}}, "rule data-vector must see"),
        ({"rule": {"coefficients": "search"}}, "rule data-vector must see"),
        ({"rule": {"coefficients": "mean"}, "filters": ["norm-clip"]}, "data-vector with filters must see"),
    ],
)
def test_rules_that_must_see_a_vector_are_refused_where_it_is_hidden(recipe: dict[str, Any], named: str) -> None:
    with pytest.raises(StudyError) as raised:
        toy_study(method(recipe), aggregation="masked")
    assert named in str(raised.value)
    assert "aggregation masked hides it. Use {name: data-vector, coefficients: mean}" in str(raised.value)
    toy_study(method(recipe))


@pytest.mark.parametrize(
    ("settings", "sections", "message"),
    [
        ({"participation": 0.5}, {}, "method.participation must be 1"),
        ({"contributors": []}, {}, "contributors"),
        ({"contributors": "smallest"}, {}, "contributors"),
        ({"recipe": {"rule": "tis"}}, {}, "there is no rule 'tis'. Did you mean 'ties'?"),
        (
            {"recipe": {"head": "ridge"}},
            {"task": {"kind": "segmentation"}, "model": {"name": "unet"}},
            "recipe.head refits the last layer of a classification network",
        ),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], sections: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError) as raised:
        toy_study({"name": "data-vectors", **settings}, **sections)
    assert message in str(raised.value)


def test_features_that_are_not_there_are_missed_before_anybody_trains(tmp_path: Path) -> None:
    study = toy_study(method({**MEAN, "head": "ridge"}), model={"name": "toys:two_layers"})
    with pytest.raises(StudyError, match="does not say where its features are"):
        prepared(study, sites(), tmp_path)


@pytest.mark.parametrize(
    ("mode", "model", "message"),
    [
        ("bn-pooled", {"name": "toys:linear"}, "network 'toys:linear' has none"),
        ("bn-recal", {"name": "toys:linear"}, "network 'toys:linear' has none"),
        ("bn-pooled", {**CNN["model"], "norm": "group"}, "network 'small-cnn' has none"),
        ("bn-pooled", {**CNN["model"], "norm": "batch-local"}, "batch-local keeps at the site"),
    ],
)
def test_statistics_that_are_not_there_are_missed_before_anybody_trains(
    mode: str, model: dict[str, Any], message: str, tmp_path: Path
) -> None:
    own = {} if model["name"] == "toys:linear" else CNN
    study = toy_study(method({**MEAN, "restoration": mode}), **{**own, "model": model})
    with pytest.raises(StudyError, match=message):
        prepared(study, images(), tmp_path)


# The base alone, the head in closed form, pooled statistics.


def test_rule_base_needs_no_training_and_is_the_base(tmp_path: Path) -> None:
    study = toy_study(method({"rule": "base"}))
    run = prepared(study, sites(), tmp_path)
    asked: set[str] = set()
    run.channel._on_call = lambda op, site, reply: asked.add(op)
    run.train()
    assert bits(run.state.groups["model"], dict(run.bench.initial))
    assert asked == {"enter", "evaluate"}
    assert set(run.method.ops()) == {"enter"}, "what is never asked for is not declared either"


def ridge(features: np.ndarray, targets: np.ndarray, gamma: float, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Least squares of 0/1 targets on pooled features, as one tall system: rows of images, then rows that pull."""
    size = features.shape[1]
    scatter = (features - features.mean(0)).T @ (features - features.mean(0))
    pull = np.sqrt(gamma * np.trace(scatter) / size)
    tall = np.block([[features, np.ones((len(features), 1))], [pull * np.eye(size), np.zeros((size, 1))]])
    right = np.vstack([np.eye(2)[targets], np.zeros((size, 2))])
    solution = np.linalg.lstsq(tall, right, rcond=None)[0].T
    return temperature * solution[:, :-1], temperature * solution[:, -1]


def head_inputs(run: Run, state: Mapping[str, Tensor], data: SiteData) -> np.ndarray:
    """What reaches the last layer for the training images, in evaluation mode."""
    network, name = run.bench.model, run.method.outline.head
    network.load_state_dict({**network.state_dict(), **state})
    network.eval()
    seen: list[Tensor] = []
    hook = network.get_submodule(name).register_forward_pre_hook(lambda _, given: seen.append(given[0].double()))
    with torch.no_grad():
        network(data.inputs(data.splits["train"]))
    hook.remove()
    return seen[0].numpy()


def tapped(in_channels: int, out_channels: int, spatial_dims: int, norm: str) -> nn.Module:
    """Two linear layers that say where the features between them are."""
    network = two_layers(in_channels, out_channels, spatial_dims, norm)
    network.feature_tap = "1"
    return network


TWO = {"model": {"name": "test_data_vectors:tapped"}}
POOLED_HEADS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "linear": (MEAN, {}, TWO),
    "masked": (MEAN, {}, {**TWO, "aggregation": "masked"}),
    "batch normalisation": (MEAN, {}, CNN),
    "on pooled statistics": ({**MEAN, "restoration": "bn-pooled"}, {}, CNN),
    "on recalibrated features": ({**MEAN, "restoration": "bn-recal"}, {}, CNN),
    "on the restorer's statistics": ({**MEAN, "restoration": "bn-recal"}, {"restorer": "west"}, CNN),
    "base": ({"rule": "base"}, {}, CNN),
    "base, masked": ({"rule": "base"}, {}, {**TWO, "aggregation": "masked"}),
    "median": ({"rule": "median"}, {}, CNN),
}


@pytest.mark.parametrize("case", POOLED_HEADS)
def test_a_ridge_head_is_the_pooled_solve_on_the_merged_networks_features(case: str, tmp_path: Path) -> None:
    recipe, settings, sections = POOLED_HEADS[case]
    data = images() if sections["model"] == CNN["model"] else sites(SIZES)
    head = {"name": "ridge", "gamma": 0.05, "temperature": 4.0}
    run = trained(toy_study(method({**recipe, "head": head}, **settings), **sections), data, tmp_path)
    used = {name: own for name, own in data.items() if name != settings.get("restorer")}
    features = np.vstack([head_inputs(run, deployed(run, site), own) for site, own in used.items()])
    targets = np.concatenate([own.labels("train").numpy() for own in used.values()])
    weight, bias = ridge(features, targets, 0.05, 4.0)
    name = run.method.outline.head
    model = run.state.groups["model"]
    tolerance = 1e-3 if "masked" in case else 1e-4
    np.testing.assert_allclose(model[f"{name}.weight"], weight, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(model[f"{name}.bias"], bias, rtol=tolerance, atol=tolerance)
    for site in SIZES:
        assert torch.equal(deployed(run, site)[f"{name}.weight"], model[f"{name}.weight"])


@pytest.mark.parametrize("backend", ["plain", "masked"])
def test_pooled_statistics_by_numpy(backend: str, tmp_path: Path) -> None:
    study = toy_study(method({**MEAN, "restoration": "bn-pooled"}), **CNN, aggregation=backend)
    run = trained(study, images(), tmp_path / "run")
    start, vectors = alone(images(), tmp_path / "alone", **CNN)
    weights = np.array(list(SIZES.values()), dtype=float) / sum(SIZES.values())
    layers = {n.removesuffix(".running_mean") for n in start if n.endswith("running_mean")}
    assert layers
    for layer in layers:
        means, variances = (
            np.stack([(start[f"{layer}.{leaf}"].double() + vectors[site][f"{layer}.{leaf}"]).numpy() for site in SIZES])
            for leaf in ("running_mean", "running_var")
        )
        mean = weights @ means
        variance = weights @ (variances + means**2) - mean**2
        model = run.state.groups["model"]
        np.testing.assert_allclose(model[f"{layer}.running_mean"], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(model[f"{layer}.running_var"], variance, rtol=1e-5, atol=1e-6)
        assert not np.allclose(mean, start[f"{layer}.running_mean"], atol=1e-3)


def test_pooled_variances_cannot_be_negative(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Faint variances about large means, where the mean of squares minus the squared mean is below zero in float32."""
    far = {"north": 3000.1, "south": 3000.1, "west": 3000.1}

    def load(site: Site) -> None:
        statistics = {n: t for n, t in site.tensors.items() if n.endswith(("running_mean", "running_var"))}
        filled = {n: torch.full_like(t, far[site.name] if "mean" in n else 1e-6) for n, t in statistics.items()}
        site.load(filled)

    monkeypatch.setattr("polyclinic.methods.data_vectors.load_finished", load)
    study = toy_study(method({"rule": "base", "restoration": "bn-pooled"}), **CNN)
    model = trained(study, images(), tmp_path).state.groups["model"]
    naive = torch.tensor(3000.1).square() + 1e-6 - torch.tensor(3000.1).square()
    assert naive == 0
    for name, tensor in model.items():
        if name.endswith("running_var"):
            torch.testing.assert_close(tensor, torch.full_like(tensor, 1e-6))


# Rules that choose do so on validation images.


def searched(data: dict[str, SiteData], folder: Path, **settings: Any) -> Run:
    """Forwards along the vectors or backwards: whatever validation images say."""
    recipe = {"rule": {"coefficients": "search", "grid": [-1.0, 1.0]}}
    return trained(toy_study(method(recipe, **settings), evaluation={"metric": "loss"}), data, folder)


def test_search_looks_at_validation_images_alone(tmp_path: Path) -> None:
    start, vectors = alone(sites(), tmp_path / "alone")
    third = dict.fromkeys(sites(), 1 / 3)
    forwards = searched(everywhere_flipped("test"), tmp_path / "test").state.groups["model"]
    close(forwards, expected(start, vectors, third))
    assert bits(forwards, searched(sites(), tmp_path / "plain").state.groups["model"])
    backwards = searched(everywhere_flipped("val"), tmp_path / "val").state.groups["model"]
    close(backwards, expected(start, vectors, {site: -share for site, share in third.items()}))


def test_the_restorers_validation_images_choose_for_all(tmp_path: Path) -> None:
    start, vectors = alone(sites(), tmp_path / "alone")
    data = sites() | {"west": flipped(sites()["west"], "val")}
    model = searched(data, tmp_path / "a", restorer="west").state.groups["model"]
    close(model, expected(start, vectors, {"north": -0.5, "south": -0.5}))
    others = {name: flipped(own, "val") for name, own in sites().items() if name != "west"}
    model = searched(sites() | others, tmp_path / "b", restorer="west").state.groups["model"]
    close(model, expected(start, vectors, {"north": 0.5, "south": 0.5}))


def test_a_site_without_validation_images_has_no_say(tmp_path: Path) -> None:
    data = sites()
    south = data["south"]
    bare = SiteData("south", south.cases, south.images, south.targets, {**south.splits, "val": torch.arange(0)})
    model = searched({**data, "south": bare}, tmp_path / "run").state.groups["model"]
    start, vectors = alone(sites(), tmp_path / "alone")
    close(model, expected(start, vectors, dict.fromkeys(sites(), 1 / 3)))


def test_greedy_soup_leaves_out_what_harms_validation_images(tmp_path: Path) -> None:
    """One site was trained on wrong labels; on test images with wrong labels it would look like the best."""
    harmful = {"south": flipped(sites()["south"], "train")}
    good = sites() | harmful
    tricky = everywhere_flipped("test") | {"south": flipped(harmful["south"], "test")}
    ends = []
    for name, data in {"good": good, "tricky": tricky}.items():
        study = toy_study(method({"rule": "greedy-soup"}), evaluation={"metric": "loss"})
        ends.append(trained(study, data, tmp_path / name).state.groups["model"])
    assert bits(*ends)
    start, vectors = alone(good, tmp_path / "alone")
    without_south = [{"north": 1.0}, {"west": 1.0}, {"north": 0.5, "west": 0.5}]
    near = [not different(ends[0], expected(start, vectors, shares)) for shares in without_south]
    assert sum(near) == 1


# Which state a site sends.


def test_a_site_sends_the_round_that_was_best_on_its_own_validation_images(tmp_path: Path) -> None:
    """Where validation labels are wrong, every further round is worse; elsewhere it is better."""
    data = sites() | {"north": flipped(sites()["north"], "val")}
    start, third = alone(data, tmp_path / "3")
    first = trained(toy_study({"name": "local", "rounds": 1}), data, tmp_path / "1")
    run = trained(toy_study(method(MEAN), evaluation=CHOOSING), data, tmp_path / "run")
    after_one = {n: t.double() - start[n].double() for n, t in deployed(first, "north").items()}
    sent = third | {"north": after_one}
    assert different(after_one, third["north"])
    close(run.state.groups["model"], expected(start, sent, dict.fromkeys(data, 1 / 3)))
    last = trained(toy_study(method(MEAN), evaluation={**CHOOSING, "select": "last"}), data, tmp_path / "last")
    close(last.state.groups["model"], expected(start, third, dict.fromkeys(data, 1 / 3)))


def test_the_last_round_is_always_judged(tmp_path: Path) -> None:
    """Every second of three rounds, and the last, as in every method."""
    start, third = alone(sites(), tmp_path / "3")
    run = trained(toy_study(method(MEAN), evaluation={**CHOOSING, "every": 2}), sites(), tmp_path / "run")
    close(run.state.groups["model"], expected(start, third, dict.fromkeys(sites(), 1 / 3)))


def test_nothing_is_judged_before_there_is_a_model(tmp_path: Path) -> None:
    run = prepared(toy_study(method(MEAN), evaluation={"every": 1}), sites(), tmp_path)
    judged: list[int] = []
    run.channel._on_call = lambda op, site, reply: judged.append(run.channel.round) if op == "evaluate" else None
    run.train()
    assert judged == [3, 3, 3]
    assert [any("val" in site for site in record["sites"].values()) for record in run.records] == [False, False, True]
    assert [run.method.ready(number) for number in (1, 2, 3)] == [False, False, True]


# Killed runs, lost sites.


class PowerCutError(Exception):
    pass


def killed(study: Study, data: dict[str, SiteData], folder: RunFolder, patched: Any, number: int) -> None:
    """The record of a round is the first thing written after it: stopped there, the round is lost."""
    add = RunFolder.add_round

    def cut(self: RunFolder, record: Any) -> None:
        if record["round"] == number:
            raise PowerCutError
        add(self, record)

    patched.setattr(RunFolder, "add_round", cut)
    with pytest.raises(PowerCutError):
        Run(study, data, folder, Silent()).train()


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ({**MEAN, "restoration": "bn-pooled", "head": "ridge"}, {}),
        ({"rule": "greedy-soup", "filters": ["dare"], "restoration": "bn-recal"}, {"restorer": "west"}),
    ],
    ids=["sums", "judged"],
)
def test_a_killed_run_ends_with_the_same_bits(
    recipe: dict[str, Any], settings: dict[str, Any], number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = toy_study(method(recipe, **settings), **CNN, evaluation=CHOOSING)
    data = images() | {"north": flipped(images()["north"], "val")}
    whole = trained(study, data, tmp_path / "whole")
    folder = RunFolder(tmp_path / "parts")
    folder.create(study)
    with monkeypatch.context() as patched:
        killed(study, data, folder, patched, number)
    resumed = Run(study, data, folder, Silent())
    assert resumed.state.finished == number - 1
    resumed.train()
    assert bits(whole.state.groups["model"], resumed.state.groups["model"])
    assert all(bits(deployed(whole, site), deployed(resumed, site)) for site in SIZES)


@pytest.mark.parametrize(
    ("recipe", "shares"),
    [
        (MEAN, {"north": 0.5, "south": 0.5}),
        ({"rule": {"coefficients": "sum"}}, {"north": 1.0, "south": 1.0}),
        ({"rule": {"coefficients": "weighted", "cap": 3}}, {"north": 22 / 32, "south": 10 / 32}),
        ({**MEAN, "filters": ["support"]}, {"north": 0.5, "south": 0.5}),
        ({"rule": "median"}, {"north": 0.5, "south": 0.5}),
    ],
    ids=["mean", "sum", "weighted", "mean, one by one", "median"],
)
def test_a_site_that_fails_to_contribute_is_left_out(
    recipe: dict[str, Any], shares: dict[str, float], tmp_path: Path
) -> None:
    start, vectors = alone(sites(), tmp_path / "alone")
    run = prepared(toy_study(method(recipe), federation={"on_absent": "continue"}), sites(), tmp_path / "run")
    replace_op(run, "west", "contribute", fails)
    run.train()
    close(run.state.groups["model"], expected(start, vectors, shares))
    assert run.records[-1]["absent"] == {"west": "ValueError: no power"}


def test_a_lost_site_is_in_no_sum_of_statistics_or_head_either(tmp_path: Path) -> None:
    recipe = {**MEAN, "restoration": "bn-pooled", "head": "ridge"}
    run = prepared(toy_study(method(recipe), **CNN, federation={"on_absent": "continue"}), images(), tmp_path / "run")
    replace_op(run, "west", "contribute", fails)
    asked: dict[str, list[str]] = {}
    run.channel._on_call = lambda op, site, reply: asked.setdefault(op, []).append(site)
    run.train()
    assert asked["means"] == asked["variances"] == asked["head"] == ["north", "south"]
    only = {name: own for name, own in images().items() if name != "west"}
    other = trained(toy_study(method(recipe), **CNN), only, tmp_path / "b")
    close(run.state.groups["model"], other.state.groups["model"], atol=1e-5)


def test_a_lost_site_under_masks(tmp_path: Path) -> None:
    sizes = {"east": 10, "north": 24, "south": 12, "west": 6}
    start, vectors = alone(sites(sizes), tmp_path / "alone")
    study = toy_study(method(MEAN), aggregation="masked", federation={"on_absent": "continue"})
    run = prepared(study, sites(sizes), tmp_path / "run")
    replace_op(run, "west", "contribute", fails)
    run.train()
    close(run.state.groups["model"], expected(start, vectors, dict.fromkeys(["east", "north", "south"], 1 / 3)), 3e-6)


def test_a_site_that_never_trained_does_not_count_as_the_base(tmp_path: Path) -> None:
    start, vectors = alone(sites(), tmp_path / "alone")
    run = prepared(toy_study(method(MEAN), federation={"on_absent": "continue"}), sites(), tmp_path / "run")
    replace_op(run, "west", "train", fails)
    run.train()
    close(run.state.groups["model"], expected(start, vectors, {"north": 0.5, "south": 0.5}))
    assert "has not trained in any round" in run.records[-1]["absent"]["west"]


def test_a_named_contributor_that_is_away_is_no_wrong_name(tmp_path: Path) -> None:
    start, vectors = alone(sites(), tmp_path / "alone")
    recipe = method(MEAN, contributors=["north", "west"])
    run = prepared(toy_study(recipe, federation={"on_absent": "continue"}), sites(), tmp_path / "run")
    replace_op(run, "west", "enter", fails)
    run.train()
    close(run.state.groups["model"], expected(start, vectors, {"north": 1.0}))


# Everything that leaves.


def leaving(recipe: dict[str, Any], folder: Path, **settings: Any) -> tuple[Run, dict[str, Message], list[str]]:
    """By op, what north answered last; and all that it was asked, in order."""
    run = prepared(toy_study(method(recipe, **settings), **CNN), images(), folder)
    replies: dict[str, Message] = {}
    asked: list[str] = []

    def told(op: str, site: str, reply: Message) -> None:
        if site == "north":
            replies[op] = reply
            asked.append(op)

    run.channel._on_call = told
    run.train()
    return run, replies, asked


def shapes(reply: Message) -> dict[str, tuple[int, ...]]:
    return {name: tuple(array.shape) for name, array in reply.arrays.items()}


def test_inventory_of_a_sum(tmp_path: Path) -> None:
    run, replies, asked = leaving({**MEAN, "restoration": "bn-pooled", "head": "ridge"}, tmp_path)
    assert asked == ["enter", "train"] * 3 + ["contribute", "means", "variances", "head", "evaluate"]
    start = run.bench.initial
    moving = running_statistics(run.bench.model)
    weights = {f"vector/{name}": tuple(t.shape) for name, t in start.items() if name not in moving}
    layers = {n.removesuffix(".running_mean"): tuple(t.shape) for n, t in start.items() if n.endswith("running_mean")}
    width = start[f"{run.method.outline.head}.weight"].shape[1] + 1
    assert shapes(replies["contribute"]) == weights
    assert shapes(replies["means"]) == {f"means/{name}": shape for name, shape in layers.items()}
    assert shapes(replies["variances"]) == {f"variances/{name}": shape for name, shape in layers.items()}
    assert shapes(replies["head"]) == {
        "head/count": (2,),
        "head/first": (2, width),
        "head/second": (2, width, width),
    }
    scalars = {op: set(replies[op].scalars) for op in asked if op != "evaluate"}
    assert scalars == {
        "enter": {"images"},
        "train": {"loss"},
        "contribute": {"weight/vector"},
        "means": {"weight/means"},
        "variances": {"weight/variances"},
        "head": {"weight/head"},
    }
    assert replies["enter"].scalars["images"] == 22, "24 images, in rounded numbers"
    assert not shapes(replies["evaluate"])
    assert {name.partition("/")[0] for name in replies["evaluate"].scalars} == {"val"}


def test_inventory_of_vectors_that_are_seen(tmp_path: Path) -> None:
    run, replies, asked = leaving({"rule": "fisher"}, tmp_path)
    assert asked == ["enter", "train"] * 3 + ["contribute", "evaluate"]
    moving = running_statistics(run.bench.model)
    names = {name: tuple(t.shape) for name, t in run.bench.initial.items() if name not in moving}
    wanted = {f"{kind}/{name}": shape for kind in ("vector", "fisher") for name, shape in names.items()}
    assert shapes(replies["contribute"]) == wanted
    assert dict(replies["contribute"].scalars) == {"images": 22, "held": "11"}
    assert set(run.method.ops()) == {"enter", "train", "contribute"}


def test_inventory_of_a_judged_rule_with_a_restorer(tmp_path: Path) -> None:
    recipe = {"rule": {"coefficients": "search", "grid": [0.5, 1.0]}, "restoration": "bn-recal"}
    run, replies, asked = leaving(recipe, tmp_path, restorer="north")
    assert asked == ["enter"] * 3 + ["judge"] * 2 + ["restore", "evaluate"]
    assert not shapes(replies["judge"])
    assert {name.partition("/")[0] for name in replies["judge"].scalars} == {"val"}
    assert shapes(replies["restore"]) == {f"model/{n}": tuple(t.shape) for n, t in run.state.groups["model"].items()}


def test_a_class_that_a_site_lacks_is_told_by_a_mark(tmp_path: Path) -> None:
    south = site_data("south", 12)
    only = SiteData("south", south.cases, south.images, torch.zeros_like(south.targets), south.splits)
    seen = method({**MEAN, "filters": ["support", {"name": "norm-clip", "factor": 1000.0}]})
    run = prepared(toy_study(seen), sites() | {"south": only}, tmp_path / "run")
    said: dict[str, Any] = {}
    run.channel._on_call = lambda op, site, reply: said.update({site: reply}) if op == "contribute" else None
    run.train()
    assert {site: reply.scalars["held"] for site, reply in said.items()} == {"north": "11", "south": "10", "west": "11"}
    start, vectors = alone(sites() | {"south": only}, tmp_path / "alone")
    supported = {name: tensor.clone() for name, tensor in vectors["south"].items()}
    for tensor in supported.values():
        tensor[1] = 0
    wanted = expected(start, vectors | {"south": supported}, dict.fromkeys(sites(), 1 / 3))
    close(run.state.groups["model"], wanted)
    # Where vectors are added up, the site leaves the row out itself, and no mark leaves it.
    for backend in ("plain", "masked"):
        summed = toy_study(method({**MEAN, "filters": ["support"]}), aggregation=backend)
        run = prepared(summed, sites() | {"south": only}, tmp_path / backend)
        said.clear()
        run.channel._on_call = lambda op, site, reply: said.update({site: reply}) if op == "contribute" else None
        run.train()
        assert all("held" not in reply.scalars for reply in said.values())
        close(run.state.groups["model"], wanted, atol=3e-6)
