"""Start weights that have seen the public images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from toy_proxies import toy_proxies
from toys import enlarged, site_data, toy_study, trained

import polyclinic.models.pretraining as pretraining
from polyclinic.data.proxies import load_proxies
from polyclinic.errors import StudyError
from polyclinic.models.registry import start_model, untrained_model
from polyclinic.models.taps import features
from polyclinic.results import RunFolder
from polyclinic.runner import Run, Silent
from polyclinic.seeds import derive_seed
from polyclinic.study import ModelSettings, Study

CNN = {"name": "small-cnn", "width": 4, "norm": "group"}


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining, "_kept", type(pretraining._kept)())


def study(folder: Path, passes: int = 8, **sections: Any) -> Study:
    proxies = {**toy_proxies(folder), "pretrain": passes}
    usual = {"data": {"image": {"size": [8, 8]}}, "training": {"lr": 0.1, "batch_size": 8}, "model": CNN}
    return toy_study("local", **{"proxies": proxies, **usual, **sections})


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_all_but_the_last_layer_is_trained(tmp_path: Path) -> None:
    before, after = (tensors(f(study(tmp_path))) for f in (untrained_model, start_model))
    for name in before:
        assert torch.equal(before[name], after[name]) == name.startswith("head.")
    without = study(tmp_path, passes=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in start_model(without).state_dict().items())


def test_features_tell_the_public_classes_apart(tmp_path: Path) -> None:
    """Classes differ in brightness alone; a linear fit on features does better after pre-training than before."""
    own = study(tmp_path, passes=30, model={"name": "toy_proxies:wide"})
    proxies = load_proxies(own)
    train, _ = proxies.parts(own.seed)

    def loss(model: torch.nn.Module) -> float:
        with torch.no_grad():
            found = features(model.eval(), proxies.inputs(train)).double()
        found = torch.cat([found, torch.ones(len(found), 1)], 1)
        targets = F.one_hot(proxies.labels[train], 3).double()
        answer = torch.linalg.lstsq(found, targets, driver="gelsd").solution
        return float((found @ answer - targets).square().mean())

    assert loss(start_model(own)) < loss(untrained_model(own))


def test_one_pass_of_full_batches_is_the_step_by_hand(tmp_path: Path) -> None:
    own = study(tmp_path, passes=1, training={"lr": 0.1, "batch_size": 100}, model={"name": "toy_proxies:narrow"})
    proxies = load_proxies(own)
    train, _ = proxies.parts(own.seed)
    model = untrained_model(own)
    conv = model.get_submodule("0")
    after = start_model(own).get_submodule("0")
    found = features(model, proxies.inputs(train))
    change = (conv.weight - after.weight).detach() / 0.1
    assert change.abs().sum() > 0

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(derive_seed(own.seed, "pretraining"), "second head"))
        second = torch.nn.Linear(3, 3)
    entropy = F.cross_entropy(second(found), proxies.labels[train])
    torch.testing.assert_close(change, torch.autograd.grad(entropy, conv.weight)[0], rtol=1e-4, atol=1e-6)


def test_a_process_trains_each_network_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fit = pretraining.fit
    monkeypatch.setattr(pretraining, "fit", lambda *a, **k: (calls.append(1), fit(*a, **k))[1])
    own = study(tmp_path, passes=1)
    first, again = start_model(own), start_model(own)
    assert len(calls) == 1
    assert all(torch.equal(tensor, first.state_dict()[name]) for name, tensor in again.state_dict().items())
    start_model(own, ModelSettings(**{**CNN, "width": 8}))
    start_model(own.model_copy(update={"seed": 3}))
    assert len(calls) == 3


def test_torchs_random_state_is_left_alone_and_the_same_study_gives_the_same(tmp_path: Path) -> None:
    own = study(
        tmp_path,
        passes=2,
        model={"name": "mobilenet", "options": {"stem_stride": 1}},
        data={"image": {"size": [16, 16]}},
    )
    torch.manual_seed(4)
    before = torch.get_rng_state()
    first = tensors(start_model(own))
    assert torch.equal(before, torch.get_rng_state())
    pretraining._kept.clear()
    torch.manual_seed(5)
    assert all(torch.equal(tensor, first[name]) for name, tensor in tensors(start_model(own)).items())


def test_sites_begin_where_pre_training_ended(tmp_path: Path) -> None:
    own = study(tmp_path, training={"lr": 0.1, "batch_size": 8})
    data = {"north": site_data("north", 24)}
    data["north"]._blocks = (F.interpolate(data["north"].images, size=(8, 8)),)
    run = trained(own, data, tmp_path / "run")
    wanted = start_model(own).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in run.bench.initial.items())


def test_an_embedding_is_pre_trained_too(tmp_path: Path) -> None:
    own = study(tmp_path, model={**CNN, "embedding": 6})
    before, after = tensors(untrained_model(own)), tensors(start_model(own))
    assert not torch.equal(before["head.0.weight"], after["head.0.weight"])
    assert torch.equal(before["head.1.weight"], after["head.1.weight"])


def test_the_common_amplitude_stays_unset(tmp_path: Path) -> None:
    model = start_model(study(tmp_path, model={**CNN, "harmonise": 0.5}))
    assert model.get_buffer("amplitude").abs().sum() == 0


def test_networks_without_known_features_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="does not say where its features are"):
        start_model(study(tmp_path, model={"name": "toys:linear"}, data={"image": {"size": [4, 4]}}))


def test_a_run_tells_of_pre_training_and_does_it_once_for_each_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int, int]] = []
    monkeypatch.setattr(Silent, "working", lambda _self, *said: told.append(said))
    models = {"north": {"name": "toy_proxies:narrow"}, "south": CNN}
    own = study(tmp_path, passes=2, models=models)
    count = len(load_proxies(own).parts(own.seed)[0])
    RunFolder(tmp_path / "run").create(own)
    Run(own, enlarged(8), RunFolder(tmp_path / "run"), Silent())
    names = [f"pre-training of {name}" for name in ("small-cnn", "toy_proxies:narrow")]
    assert list(dict.fromkeys(name for name, _, _ in told)) == names
    for name in names:
        done = [d for n, d, _ in told if n == name]
        assert done == sorted(set(done)), "trained twice"
        assert done[-1] == 2 * count
        assert {total for n, _, total in told if n == name} == {2 * count}
