"""Sites with networks of their own: training, testing, prediction, the report, and the server's own model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_contract import same
from toy_proxies import MIXED, toy_proxies
from toys import deployed, enlarged, resumed, site_data, toy_study, trained

from polyclinic.data.dataset import SiteData
from polyclinic.errors import DataError, RunError, SiteError, StudyError
from polyclinic.evaluation.central import OP
from polyclinic.federation.message import Message
from polyclinic.federation.state import ServerState
from polyclinic.methods import METHODS
from polyclinic.methods.local import Local
from polyclinic.models.registry import start_model
from polyclinic.prediction import load_model, predict_files
from polyclinic.report import write_report
from polyclinic.results import RunFolder
from polyclinic.runner import run_one
from polyclinic.study import ModelSettings, Study

GROUP = {"name": "small-cnn", "width": 4, "norm": "group"}
BATCH = {"name": "small-cnn", "width": 4}


def study(method: Any = "local", **sections: Any) -> Study:
    usual = {"models": MIXED, "training": {"batch_size": 4}, "data": {"image": {"size": [8, 8]}}, "model": GROUP}
    return toy_study(method, **{**usual, **sections})


def test_each_site_trains_as_if_all_had_its_network(tmp_path: Path) -> None:
    mixed = trained(study(), enlarged(8), tmp_path / "mixed")
    for name in ("north", "south", "west"):
        settings = study().model_of(name)
        alike = trained(study(model=settings.model_dump(), models={}), enlarged(8), tmp_path / name)
        assert same(deployed(mixed, name), deployed(alike, name))
        assert not same(deployed(mixed, name), dict(mixed.method.networks.of_site(name).initial))


@pytest.mark.parametrize("method", ["local", "fedavg", "ditto"])
def test_models_that_are_all_the_studys_change_nothing(method: str, tmp_path: Path) -> None:
    plain = trained(study(method, models={}), enlarged(8), tmp_path / "plain")
    named = trained(study(method, models={"north": GROUP, "west": GROUP}), enlarged(8), tmp_path / "named")
    for name in plain.channel.sites:
        assert same(deployed(plain, name), deployed(named, name))
    assert named.method.networks.of_site("north") is named.bench


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    whole = trained(study(), enlarged(8), tmp_path / "whole")
    again = resumed(study(), enlarged(8), tmp_path / "parts")
    assert again.state.finished == 3
    assert all(same(deployed(whole, name), deployed(again, name)) for name in whole.channel.sites)


def test_a_site_that_is_not_there_is_refused_before_training(tmp_path: Path) -> None:
    wrong = study(models={**MIXED, "nort": MIXED["north"]})
    with pytest.raises(DataError, match=r"models\.nort: .* Did you mean 'north'"):
        trained(wrong, enlarged(8), tmp_path)


class Picky(Local):
    """Refuses networks by what it is shown of them."""

    def check_networks(self, networks: Any) -> None:
        raise StudyError(f"saw {', '.join(f'{site} {type(model).__name__}' for site, model in networks.items())}")


def test_a_method_is_shown_every_sites_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "local", "test_mixed_networks:Picky")
    with pytest.raises(StudyError, match="saw north Tapped, south Tapped, west SmallCNN"):
        trained(study(), enlarged(8), tmp_path)


def finished(run_study: Study, folder: Path) -> tuple[dict[str, Any], Path]:
    opened = RunFolder(folder)
    opened.create(run_study)
    return run_one(run_study, enlarged(8), opened), folder


def test_results_name_each_sites_network(tmp_path: Path) -> None:
    metrics, folder = finished(study(proxies={**toy_proxies(tmp_path), "pretrain": 1}), tmp_path / "run")
    assert {name: part["name"] for name, part in metrics["models"].items()} == {
        "north": "toy_proxies:wide",
        "south": "toy_proxies:narrow",
        "west": "small-cnn",
    }
    assert metrics["models"]["south"]["parameters"] == 3 * 9 + 3 + 3 * 2 + 2
    assert metrics["model"]["name"] == "small-cnn"
    assert (metrics["proxies"]["name"], metrics["proxies"]["images"]) == ("toys", 42)
    page = write_report(folder).read_text()
    assert "north: toy_proxies:wide, batch normalisation; south: toy_proxies:narrow" in page
    assert "otherwise small-cnn, group normalisation" in page
    assert "toys, 42 of 3 classes" in page
    assert "central" not in metrics


def test_results_of_equal_networks_are_as_before(tmp_path: Path) -> None:
    metrics, folder = finished(study(models={}), tmp_path / "run")
    assert not {"models", "proxies", "central", "central_mean", "central_model"} & metrics.keys()
    assert "server's own model" not in write_report(folder).read_text()


def test_predictions_use_the_sites_own_network(tmp_path: Path) -> None:
    _, folder = finished(study(), tmp_path / "run")
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
    Image.fromarray(pixels).save(tmp_path / "image.png")
    inputs = torch.from_numpy((pixels / 255 - 0.5) / 0.25).float()[None, None]
    for site, kind in (("north", "Tapped"), ("west", "SmallCNN")):
        model = load_model(folder, RunFolder(folder).study(), site)
        assert type(model).__name__ == kind
        with torch.no_grad():
            wanted = model(inputs).softmax(1)[0].tolist()
        table = predict_files(folder, tmp_path / "image.png", tmp_path / f"{site}.csv", site=site).read_text()
        assert [float(value) for value in table.splitlines()[1].split(",")[2:]] == pytest.approx(wanted, abs=1e-6)


class WithCentral(Local):
    """Local, with a server that has a network of its own: the sign of pixel means decides."""

    def central(self, state: ServerState) -> tuple[ModelSettings, dict[str, torch.Tensor]] | None:
        settings = self.study.model
        tensors = dict(start_model(self.study, settings).named_parameters())
        return settings, {name: tensor.detach() for name, tensor in tensors.items()}


class WithForeign(WithCentral):
    """Its model is none of the study's."""

    def central(self, state: ServerState) -> tuple[ModelSettings, dict[str, torch.Tensor]] | None:
        found = super().central(state)
        assert found is not None
        return found[0].model_copy(update={"name": "os:system"}), found[1]


@pytest.mark.parametrize("model", [GROUP, BATCH], ids=["group", "batch"])
def test_the_servers_model_is_saved_and_tested_at_every_site(
    model: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "local", "test_mixed_networks:WithCentral")
    run_study = study(model=model)
    metrics, folder = finished(run_study, tmp_path / "run")
    assert metrics["central_model"]["name"] == "small-cnn"
    for name, data in enlarged(8).items():
        network = start_model(run_study)
        if model is BATCH:
            _statistics_by_hand(network, data)
        with torch.no_grad():
            scores = network.eval()(data.inputs(data.splits["test"])).softmax(1)[:, 1]
        truth = data.labels("test")
        pairs = scores[truth == 1][:, None] - scores[truth == 0][None]
        auroc = float((pairs > 0).double().mean() + 0.5 * (pairs == 0).double().mean())
        assert metrics["central"][name]["auroc"]["value"] == pytest.approx(auroc, abs=1e-9)
    values = [entry["auroc"]["value"] for entry in metrics["central"].values()]
    assert metrics["central_mean"]["auroc"]["value"] == pytest.approx(np.mean(values))
    leaves = json.loads((folder / "privacy.json").read_text())["leaves"][OP]
    assert {leaf["name"] for leaf in leaves} == {"test/*", "notes", "images", "patients", "replicates"}
    assert "The server's own model" in write_report(folder).read_text()
    assert (folder / "models" / "central.safetensors").is_file()
    if model is GROUP:
        load_model(folder, RunFolder(folder).study(), "central")
    else:
        with pytest.raises(RunError, match="statistics of public images"):
            load_model(folder, RunFolder(folder).study(), "central")


def _statistics_by_hand(network: torch.nn.Module, data: SiteData) -> None:
    """All training images in one batch: each layer's mean and unbiased variance, from the first on."""
    inputs = data.inputs(data.splits["train"])
    blocks = network.get_submodule("blocks")
    with torch.no_grad():
        for layer in blocks:
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.running_mean.copy_(inputs.mean((0, 2, 3)))
                layer.running_var.copy_(inputs.transpose(0, 1).flatten(1).var(1))
                scale = (inputs.transpose(0, 1).flatten(1).var(1, unbiased=False) + layer.eps).sqrt()
                shown = (inputs - inputs.mean((0, 2, 3))[:, None, None]) / scale[:, None, None]
                inputs = shown * layer.weight[:, None, None] + layer.bias[:, None, None]
            else:
                inputs = layer(inputs)


def test_a_site_builds_no_network_that_its_study_does_not_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "local", "test_mixed_networks:WithForeign")
    with pytest.raises(SiteError, match="none of the study's networks"):
        finished(study(), tmp_path / "run")


class Exchanging(Local):
    """Local, whose sites may exchange samples."""

    exchanges = True
    starts_global = True


def test_samples_of_features_need_one_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "local", "test_mixed_networks:Exchanging")
    samples = {"generator": {"name": "features"}, "window": 1}
    study(models={}, synthesis=samples)
    with pytest.raises(StudyError, match="features of one network, but models gives sites different ones"):
        study(synthesis=samples)


@pytest.mark.parametrize("kind", ["amplitude", "vae"])
def test_samples_as_images_are_exchanged_between_sites_with_different_networks(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "local", "test_mixed_networks:Exchanging")
    quick = {"name": "vae", "size": 16, "rounds": 1, "epochs": 1} if kind == "vae" else {"name": "amplitude"}
    data = {"image": {"size": [16, 16]}}
    exchanging = study(synthesis={"generator": quick, "window": 1, "floor": 1}, data=data)
    hospitals = {name: site_data(name, 24) for name in ("north", "south", "west")}
    for index, own in enumerate(hospitals.values()):
        own._blocks = (torch.nn.functional.interpolate(own.images, size=(16, 16)),)
        own.cases = [type(case)(**{**_fields(case), "device": "ab"[index % 2]}) for case in own.cases]
    run = trained(exchanging, hospitals, tmp_path)
    assert run.state.finished == 3
    assert run.exchange is not None
    assert {name: type(run.channel._sites[name].model).__name__ for name in run.channel.sites} == {
        "north": "Tapped",
        "south": "Tapped",
        "west": "SmallCNN",
    }
    assert all(site.model is run.bench.model for site in run.exchange._channel._sites.values())


def _fields(case: Any) -> dict[str, Any]:
    return {name: getattr(case, name) for name in type(case).__dataclass_fields__}


def test_a_message_of_the_central_test_names_its_network_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "local", "test_mixed_networks:WithCentral")
    run = trained(study(), enlarged(8), tmp_path)
    seen: list[Message] = []
    handler = run.channel._sites["north"]._ops[OP]
    spied = type(handler)(lambda site, message: (seen.append(message), handler.run(site, message))[1], handler.leaves)
    run.channel._sites["north"]._ops = {**run.channel._sites["north"]._ops, OP: spied}
    run.test()
    assert set(seen[0].groups()) == {"central"}
    assert json.loads(str(seen[0].scalars["model"])) == ModelSettings(**GROUP).model_dump(mode="json")
    assert set(seen[0].scalars) == {"model"}
