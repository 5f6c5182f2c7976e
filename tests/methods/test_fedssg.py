"""FedSSG is averaging with an exchange before it and another loss: without these it is averaging, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toys import deployed, site_data, sites, toy_study, trained

from polyclinic.errors import StudyError
from polyclinic.methods import make_method
from polyclinic.runner import Run
from polyclinic.study import Study, with_method
from polyclinic.synthesis.composed import WithFeatureGaussians
from polyclinic.synthesis.settings import SynthesisSettings

CNN = {"name": "small-cnn", "width": 4}
AT_HOME: dict[str, Any] = {"generator": ["amplitude"], "floor": 2, "style": 0.0}
"""Samples that every site makes of its own images; nothing else is changed."""


def uneven() -> Any:
    """Class a is frequent at north and rare at south, so that a loss that looks at counts is another loss.

    South's site is a device of its own, and nobody has class b on west's: there is something to paint over.
    """
    data = sites()
    keep = {"north": (12, 6), "south": (3, 6), "west": (3, 0)}
    for site, numbers in keep.items():
        own = data[site]
        rows = own.splits["train"]
        own.splits["train"] = torch.cat([rows[own.targets[rows] == k][:n] for k, n in enumerate(numbers)]).sort().values
    return data


def fedssg(synthesis: dict[str, Any], **sections: Any) -> Study:
    return toy_study({"name": "fedssg", "synthesis": synthesis}, **{"training": {"batch_size": 4}, **sections})


def fedavg(**sections: Any) -> Study:
    return toy_study("fedavg", **{"training": {"batch_size": 4}, "task": {"loss": "logit-adjusted"}, **sections})


def same(ours: Run, theirs: Run) -> bool:
    groups = [run.state.groups["model"] for run in (ours, theirs)]
    return groups[0].keys() == groups[1].keys() and all(torch.equal(groups[0][n], groups[1][n]) for n in groups[0])


@pytest.mark.parametrize(
    "synthesis",
    [
        {"generator": [], "style": 0.0},
        {**AT_HOME, "plan": {"budget": 0.0}},
        {**AT_HOME, "training": {"weight": 0.0}},
        {**AT_HOME, "share": {"ratio": 0.0, "small_ratio": 0.0}},
    ],
    ids=["no generator", "no budget", "no weight", "no share"],
)
@pytest.mark.parametrize("network", [{"name": "toys:linear"}, CNN], ids=["linear", "batch norm"])
def test_without_samples_it_is_fedavg_with_the_same_loss(
    synthesis: dict[str, Any], network: dict[str, Any], tmp_path: Path
) -> None:
    ours = trained(fedssg({"floor": 2, **synthesis}, model=network), uneven(), tmp_path / "fedssg")
    theirs = trained(fedavg(model=network), uneven(), tmp_path / "fedavg")
    assert same(ours, theirs)
    for site in ("north", "west"):
        ours_there, theirs_there = deployed(ours, site), deployed(theirs, site)
        assert all(torch.equal(ours_there[name], theirs_there[name]) for name in theirs_there)


def test_an_autoencoder_without_a_budget_is_never_trained(tmp_path: Path) -> None:
    synthesis = {"generator": [{"name": "vae", "size": 16}], "floor": 2, "style": 0.0, "plan": {"budget": 0.0}}
    ours = trained(fedssg(synthesis, model=CNN), uneven(), tmp_path / "fedssg")
    assert same(ours, trained(fedavg(model=CNN), uneven(), tmp_path / "fedavg"))
    assert ours.exchange is not None
    assert set(ours.exchange.bytes) == {"enter", "count-cells", "receive"}


@pytest.mark.parametrize("synthesis", [AT_HOME, {"generator": [], "style": 1.0, "floor": 2}], ids=["samples", "styles"])
def test_with_samples_or_styles_it_is_not(synthesis: dict[str, Any], tmp_path: Path) -> None:
    """Else the tests above would hold for a method that does nothing."""
    ours = trained(fedssg({**synthesis, "plan": {"budget": 5.0}}), uneven(), tmp_path / "fedssg")
    assert not same(ours, trained(fedavg(), uneven(), tmp_path / "fedavg"))


def test_another_loss_is_another_model(tmp_path: Path) -> None:
    ours = trained(fedssg({"generator": [], "style": 0.0, "floor": 2}), uneven(), tmp_path / "fedssg")
    assert not same(ours, trained(fedavg(task={"loss": "cross-entropy"}), uneven(), tmp_path / "fedavg"))


def test_without_passes_of_the_last_layer_the_model_in_use_is_fedavgs(tmp_path: Path) -> None:
    synthesis = {"generator": [{"name": "features", "epochs": 0}], "style": 0.0, "floor": 2}
    ours = trained(fedssg(synthesis), uneven(), tmp_path / "fedssg")
    theirs = trained(fedavg(), uneven(), tmp_path / "fedavg")
    assert isinstance(ours.method, WithFeatureGaussians)
    used = deployed(ours, "south")
    assert all(torch.equal(used[n], t) for n, t in deployed(theirs, "south").items())


def test_it_is_the_same_as_fedavg_with_the_same_two_settings(tmp_path: Path) -> None:
    """Also with samples, styles and a new last layer."""
    synthesis = {"generator": ["amplitude", {"name": "features", "samples": 20, "epochs": 2}], "floor": 2}
    ours = trained(fedssg(synthesis), uneven(), tmp_path / "fedssg")
    theirs = trained(fedavg(synthesis=synthesis), uneven(), tmp_path / "fedavg")
    assert same(ours, theirs)
    calibrated = [run.state.groups["calibrated"] for run in (ours, theirs)]
    assert all(torch.equal(calibrated[0][n], calibrated[1][n]) for n in calibrated[0])


def test_what_it_fills_in() -> None:
    method = make_method(toy_study("fedssg"))
    assert method.study.task.loss == "logit-adjusted"
    assert method.study.synthesis == SynthesisSettings()
    assert [entry.name for entry in SynthesisSettings().generator] == ["features"]
    kept = make_method(toy_study("fedssg", task={"loss": "focal"}, synthesis={"floor": 3}))
    assert kept.study.task.loss == "focal"
    assert kept.study.synthesis is not None
    assert kept.study.synthesis.floor == 3


def test_two_places_that_differ_are_refused() -> None:
    both = {"name": "fedssg", "synthesis": {"floor": 3}}
    with pytest.raises(StudyError, match="both given and differ. Keep one"):
        toy_study(both, synthesis={"floor": 4})
    assert make_method(toy_study(both, synthesis={"floor": 3})).study.synthesis == SynthesisSettings(floor=3)


def test_in_a_comparison_others_go_without() -> None:
    study = toy_study({"name": "fedssg", "synthesis": {"floor": 3}}, compare={"methods": ["fedavg"]})
    other = with_method(study, "fedavg", 0)
    assert make_method(other).study.synthesis is None
    assert make_method(other).study.task.loss == "auto"


def test_the_servers_rate_is_its_own(tmp_path: Path) -> None:
    """At rate 0 the model stays."""
    study = toy_study({"name": "fedssg", "server_lr": 0.0, "synthesis": {"generator": []}})
    run = trained(study, {"north": site_data("north", 24)}, tmp_path)
    assert all(torch.equal(tensor, run.bench.initial[name]) for name, tensor in run.state.groups["model"].items())
