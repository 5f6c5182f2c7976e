"""An exchange that is killed, that loses a site, and one from the command line to the report."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from painter import ROUNDS, painter, painter_study
from toy_hospitals import OPEN, OWNED, VAE, hospital_study, hospitals, started

from polyclinic.federation.message import Message
from polyclinic.federation.site import Site
from polyclinic.runner import Run
from polyclinic.study import Study

__all__ = ["painter"]
Json = dict[str, Any]
EAST = {**OWNED, "east": {("a", "dark"): 6, ("b", "bright"): 6}}


class Killed(BaseException):
    """Stands for a kill: no handler of the program catches it."""


def interfere(
    monkeypatch: pytest.MonkeyPatch, op: str, error: Callable[[], BaseException], site: str = "south", nth: int = 1
) -> None:
    """Let the ``nth`` call of an op at a site fail, and for an ordinary error all after it."""
    original, calls = Site.handle, {"n": 0}

    def handle(self: Site, name: str, number: int, message: Message) -> Message:
        if (name, self.name) == (op, site):
            calls["n"] += 1
            if calls["n"] >= nth:
                raise error()
        return original(self, name, number, message)

    monkeypatch.setattr(Site, "handle", handle)


def told(folder: Path) -> Json:
    """``synthesis.json`` without what no two runs share."""
    found: Json = json.loads((folder / "synthesis.json").read_text())
    return {name: value for name, value in found.items() if name not in ("seconds", "wall_seconds")}


def files(folder: Path) -> dict[str, bytes]:
    names = [folder / "samples.csv", folder / "synthesis" / "examples.npz"]
    return {path.name: path.read_bytes() for path in names if path.exists()}


def end(run: Run) -> dict[str, torch.Tensor]:
    return {f"{g}/{n}": t for g, group in run.state.groups.items() for n, t in group.items()}


def assert_same(run: Run, whole: Run) -> None:
    assert told(run.folder.path) == told(whole.folder.path)
    assert files(run.folder.path) == files(whole.folder.path)
    ours, theirs = end(run), end(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def finished(study: Study, folder: Path, data: Mapping[str, Any] | None = None) -> Run:
    run = started(study, folder, data)
    run.train()
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with a painter that nothing interfered with."""
    with pytest.MonkeyPatch.context() as patch:
        from painter import Painter

        patch.setattr("polyclinic.synthesis.exchange.image_generator", Painter)
        return finished(painter_study(), tmp_path_factory.mktemp("whole"))


OPS = ["enter", "count-cells", "fit-painter", "sum-features", "examine", "receive"]


@pytest.mark.usefixtures("painter")
@pytest.mark.parametrize(("op", "nth"), [*((op, 1) for op in OPS), ("fit-painter", ROUNDS), ("train", 1), ("train", 2)])
def test_a_kill_in_any_phase_changes_nothing(
    op: str, nth: int, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = painter_study()
    with monkeypatch.context() as patch:
        interfere(patch, op, Killed, nth=nth)
        with pytest.raises(Killed):
            finished(study, tmp_path)
    assert (tmp_path / "synthesis.json").exists() == (op == "train")
    assert_same(finished(study, tmp_path), whole)


@pytest.mark.usefixtures("painter")
@pytest.mark.parametrize("number", range(1, 12, 2))
def test_a_kill_at_a_write_changes_nothing(
    number: int, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = painter_study()
    run = started(study, tmp_path)
    with monkeypatch.context() as patch:
        original, calls = Path.replace, iter(range(1000))

        def replace(self: Path, target: Any) -> Path:
            if next(calls) == number:
                raise Killed
            return original(self, target)

        patch.setattr(Path, "replace", replace)
        with pytest.raises(Killed):
            run.train()
    assert_same(finished(study, tmp_path), whole)


def test_an_autoencoder_goes_on_in_the_round_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = hospital_study(synthesis={"generator": [VAE, "features"], "gate": OPEN, "plan": {"budget": 1.0}})
    wanted = finished(study, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interfere(patch, "fit-generator", Killed, nth=2)
        with pytest.raises(Killed):
            finished(study, tmp_path / "killed")
    assert_same(finished(study, tmp_path / "killed"), wanted)


def gone() -> BaseException:
    return ValueError("power cut")


WHEN = {
    "enter": "counted",
    "count-cells": "counted",
    "fit-painter": "fitted",
    "sum-features": "made",
    "examine": "examined",
    "receive": "done",
}


@pytest.mark.usefixtures("painter")
@pytest.mark.parametrize("op", OPS)
def test_a_site_that_drops_out_between_phases_is_gone_and_the_run_goes_on(
    op: str, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interfere(monkeypatch, op, gone)
    run = finished(painter_study(federation={"on_absent": "continue"}), tmp_path)
    assert run.state.finished == 2
    found = told(tmp_path)
    assert found["absent"] == {WHEN[op]: {"south": "ValueError: power cut"}}
    count = sum(map(sum, found["released"]))
    assert found["before"]["patients"] == ([[16, 6], [8, 0]] if op == "count-cells" else [[16, 18], [8, 0]])
    if op == "examine":
        assert count == 0
        assert found["notes"] == ["nothing was released: south did not examine the candidates"]
        assert not (tmp_path / "samples.csv").exists()
    else:
        assert count >= 10
        assert found["notes"] == []
    shelves = {site: run.channel._sites[site].shelf for site in OWNED}
    assert (shelves["south"] is None) == (op == "receive")
    assert shelves["north"] is not None
    assert (len(shelves["north"].images) > 0) == (op != "examine")
    assert found["taken"].keys() == OWNED.keys() - ({"south"} if op == "receive" else set())
    if op == "receive":
        assert found["released"] == told(whole.folder.path)["released"]


@pytest.mark.usefixtures("painter")
def test_who_was_missing_when_is_told_of_every_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """South in the first round of the fit, north in the second, both in one phase."""
    with monkeypatch.context() as patch:
        interfere(patch, "fit-painter", gone, site="north", nth=2)
        interfere(patch, "fit-painter", gone, site="south")
        finished(painter_study(federation={"on_absent": "continue"}), tmp_path)
    assert told(tmp_path)["absent"] == {"fitted": dict.fromkeys(("north", "south"), "ValueError: power cut")}


@pytest.mark.usefixtures("painter")
@pytest.mark.parametrize("op", ["count-cells", "fit-painter", "sum-features"])
def test_hidden_sums_go_on_without_one_of_four(op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interfere(monkeypatch, op, gone)
    study = painter_study(aggregation="masked", federation={"on_absent": "continue"})
    finished(study, tmp_path, hospitals(EAST))
    found = told(tmp_path)
    assert list(found["absent"]) == [WHEN[op]]
    assert list(found["absent"][WHEN[op]]) == ["south"]
    assert sum(map(sum, found["released"])) > 0


@pytest.mark.usefixtures("painter")
def test_sites_without_devices_without_cells_and_with_one_patient_of_a_class(tmp_path: Path) -> None:
    """East has no device labels, coast two patients in all, and south one patient of class b."""
    owned = {
        **OWNED,
        "south": {**OWNED["south"], ("b", "dark"): 1},
        "east": {("a", ""): 7},
        "coast": {("a", "bright"): 1, ("b", "bright"): 1},
    }
    run = finished(painter_study(), tmp_path, hospitals(owned))
    found = told(tmp_path)
    assert found["devices"] == ["bright", "dark", "east"]
    assert found["before"]["patients"] == [[16, 18, 7], [8, 0, 0]]
    assert found["gate"]["coast"]["refused"] == {}, "it owns no class that it could judge"
    shelf = run.channel._sites["coast"].shelf
    assert shelf is not None
    assert len(shelf.images) > 0
    assert run.test()["sites"].keys() == owned.keys()


@pytest.mark.usefixtures("painter")
def test_noise_changes_the_plan_and_the_run_goes_on(tmp_path: Path) -> None:
    finished(painter_study(synthesis={"epsilon": 0.5}), tmp_path)
    found = told(tmp_path)
    assert found["epsilon"] == 0.5
    assert found["before"]["images"] == found["before"]["patients"]
    assert sum(map(sum, found["wanted"])) <= found["budget"]


def test_from_the_command_line_to_the_report(
    tiny_file: Callable[..., Path], polyclinic_says: Callable[..., Any], tmp_path: Path
) -> None:
    """Per-FedAvg with images and features by class and device, every sum hidden.

    The autoencoder is trained for seconds, so filter and gate are opened as far as they go.
    """
    study = tiny_file(
        task={"classes": ["nevus", "melanoma", "keratosis"]},
        data={
            "phantom": {
                "kind": "skin-lesion",
                "sites": [
                    {"name": "north", "patients": 40, "device": "derm-warm"},
                    {"name": "south", "patients": 40, "device": "derm-cool"},
                    {"name": "west", "patients": 40, "device": "derm-cool"},
                ],
            },
            "image": {"size": [16, 16], "channels": 3},
        },
        method={"name": "per-fedavg", "rounds": 2},
        aggregation="masked",
        synthesis={
            "generator": [{**VAE, "rounds": 5, "epochs": 4, "batch_size": 8}, "features"],
            "filter": 0.0,
            "gate": {**OPEN, "copy_quantile": 0.999999},
            "plan": {"budget": 1.0},
        },
        evaluation={"bootstrap": 20},
    )
    code, out, err = polyclinic_says("run", study, "--out", tmp_path / "run")
    assert code == 0, out + err
    found = told(tmp_path / "run")
    assert found["generator"] == ["vae", "features"]
    assert sum(map(sum, found["before"]["patients"])) > 40
    count = sum(map(sum, found["released"]))
    assert count > 0
    with (tmp_path / "run" / "samples.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == count
    assert {"examine", "receive", "gaussians", "fit-generator"} <= json.loads(
        (tmp_path / "run" / "metrics.json").read_text()
    )["bytes"].keys()
    privacy = json.loads((tmp_path / "run" / "privacy.json").read_text())
    sums = [leaf["leaf"] for leaves in privacy["leaves"].values() for leaf in leaves if leaf.get("kind") == "sum"]
    assert sums == [], "under a hidden sum nothing leaves as a plain one"
    assert "ynthe" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
