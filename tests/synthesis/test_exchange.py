"""The exchange of samples: what is released, what leaves a site, what a site keeps, and what it never touches."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from painted_sites import SIDE
from painter import Painter, painter, painter_study
from toy_hospitals import HELD, OWNED, hospital_study, hospitals, started

from polyclinic.data.dataset import SiteData
from polyclinic.errors import SiteError, StudyError
from polyclinic.federation.message import Message
from polyclinic.runner import Run
from polyclinic.secure.view import Recorder
from polyclinic.study import Study
from polyclinic.synthesis.ledger import read_ledger, verify
from polyclinic.synthesis.pool import Samples
from polyclinic.synthesis.shelf import Shelf

__all__ = ["painter"]
pytestmark = pytest.mark.usefixtures("painter")
Json = dict[str, Any]
RELEASED = 20
"""Samples that at least come through in these tests."""


def exchanged(study: Study, folder: Path, data: Mapping[str, SiteData] | None = None) -> tuple[Run, Recorder, Json]:
    """A run after its exchange, everything that passed, and what the results folder says."""
    run = started(study, folder, data)
    assert run.exchange is not None
    recorder = Recorder(run.exchange._channel)
    run.exchange._channel = recorder
    run.exchange.finish()
    return run, recorder, json.loads((folder / "synthesis.json").read_text())


def shelf(run: Run, site: str) -> Shelf:
    found = run.channel._sites[site].shelf
    assert found is not None
    return found


def released(recorder: Recorder) -> Samples:
    """As the sites got them."""
    return Samples.of(next(s.message for s in recorder.seen if s.op == "receive").group("samples"))


def test_what_is_released_is_planned_examined_and_in_the_ledger(tmp_path: Path) -> None:
    _, recorder, told = exchanged(painter_study(), tmp_path)
    wanted, counts = np.array(told["wanted"]), np.array(told["released"])
    assert told["before"] == {"patients": [[16, 18], [8, 0]], "images": [[16, 18], [8, 0]]}
    assert told["budget"] == wanted.sum() == 42
    assert (counts <= wanted).all()
    assert counts.sum() >= RELEASED
    assert counts[1, 1] > 0, "the cell that nobody owns"
    assert told["quality"]["candidates"] == 2 * 42
    examined = Samples.of(next(s.message for s in recorder.seen if s.op == "examine").group("samples"))
    assert len(examined) == 2 * 42 - sum(told["quality"]["dropped"].values())
    pool = released(recorder)
    assert set(pool.seeds.tolist()) <= set(examined.seeds.tolist())
    assert len(set(examined.seeds.tolist())) == len(examined)
    verify(tmp_path / "samples.csv", pool, told["classes"], told["devices"])
    assert {line.gated_by for line in read_ledger(tmp_path / "samples.csv")} == {("north", "south", "west")}
    shown = np.load(tmp_path / "synthesis" / "examples.npz")
    assert shown["images"].shape[1:] == (3, 16, 16)
    assert 0 < max(np.bincount(shown["labels"])) <= 6
    assert told["taken"].keys() == OWNED.keys()


def test_a_sample_that_any_site_refuses_is_released_nowhere(tmp_path: Path) -> None:
    _, recorder, told = exchanged(painter_study(), tmp_path)
    verdicts = [
        s.message.arrays["verdict/accepted"] for s in recorder.seen if s.op == "examine" and s.sender != "server"
    ]
    assert len(verdicts) == 3
    accepted = torch.stack(verdicts).bool().all(0)
    assert not accepted.all(), "some are near a patient by chance"
    examined = Samples.of(next(s.message for s in recorder.seen if s.op == "examine").group("samples"))
    fine = set(examined.seeds[accepted].tolist())
    assert set(released(recorder).seeds.tolist()) <= fine
    counts = {site: int(v.sum()) for site, v in zip(sorted(OWNED), verdicts, strict=True)}
    assert {site: part["accepted"] for site, part in told["gate"].items()} == counts


def test_no_pictures_are_kept_where_the_study_wants_none(tmp_path: Path) -> None:
    exchanged(painter_study(evaluation={"examples": 0}), tmp_path)
    assert (tmp_path / "samples.csv").is_file()
    assert not (tmp_path / "synthesis").exists()


def test_no_budget_releases_nothing_and_fits_nothing(tmp_path: Path) -> None:
    run, recorder, told = exchanged(painter_study(synthesis={"plan": {"budget": 0.0}}), tmp_path)
    assert {s.op for s in recorder.seen} == {"enter", "count-cells", "receive"}
    assert not np.array(told["released"]).any()
    assert len(shelf(run, "north").images) == 0
    assert len(shelf(run, "north").styles) == 1
    assert not (tmp_path / "samples.csv").exists()


def test_only_what_is_declared_leaves_and_sums_get_one_message(tmp_path: Path) -> None:
    run, recorder, _ = exchanged(painter_study(), tmp_path)
    assert run.exchange is not None
    ops = run.exchange.ops
    for seen in recorder.seen:
        if seen.sender == "server":
            continue
        leaves = ops[seen.op].leaves
        assert set(seen.message.groups()) <= {leaf.name for leaf in leaves if leaf.kind != "scalar"}
        assert all(any(fnmatch(n, leaf.name) for leaf in leaves) for n in seen.message.scalars)
    for op in ("count-cells", "fit-painter", "sum-features"):
        told = {(s.round, s.message.digest()) for s in recorder.seen if s.op == op and s.sender == "server"}
        assert len(told) == len({number for number, _ in told})
    assert not any(s.message.group("samples").keys() & {"images"} for s in recorder.seen if s.op == "examine")


def test_hidden_sums_hide_all_but_names_and_verdicts(tmp_path: Path) -> None:
    plain, _, wanted = exchanged(painter_study(), tmp_path / "plain")
    run, recorder, told = exchanged(painter_study(aggregation="masked"), tmp_path / "masked")
    for name in ("before", "wanted", "released", "quality", "taken"):
        assert told[name] == wanted[name]
    for site in OWNED:
        assert torch.equal(shelf(run, site).images, shelf(plain, site).images)
        torch.testing.assert_close(shelf(run, site).styles, shelf(plain, site).styles, rtol=0, atol=1e-5)
    in_clear = {(s.op, g) for s in recorder.seen if s.sender != "server" for g in s.message.groups()}
    assert ("examine", "verdict") in in_clear
    assert not in_clear & {("count-cells", "cells"), ("fit-painter", "seen"), ("sum-features", "features")}


@pytest.mark.parametrize("backend", ["ring-he", "ring-as-published"])
def test_the_rings_give_the_samples_that_the_plain_sum_gives(backend: str, tmp_path: Path) -> None:
    unfiltered = {"filter": 0.0}  # the published mask rounds too coarsely for the filter's sums
    plain, _, wanted = exchanged(painter_study(synthesis=unfiltered), tmp_path / "plain")
    run, _, told = exchanged(painter_study(synthesis=unfiltered, aggregation=backend), tmp_path / "ring")
    for name in ("before", "wanted", "released", "taken"):
        assert told[name] == wanted[name]
    for site in OWNED:
        assert torch.equal(shelf(run, site).images, shelf(plain, site).images)
        torch.testing.assert_close(shelf(run, site).styles, shelf(plain, site).styles, rtol=0, atol=2e-3)


@pytest.mark.parametrize("generator", [[{"name": "vae", "size": 16}], [{"name": "vae", "size": 16}, "amplitude"]])
def test_cells_below_the_floor_leave_nothing_in_the_whole_exchange(generator: list[Any], tmp_path: Path) -> None:
    """Class b of one patient, class a of four on a device of their own: without them north says the very same."""
    small = {("b", "dark"): 1, ("a", "rare"): 4}
    data = {
        "with": hospitals({**OWNED, "north": {**OWNED["north"], **small}}),
        "without": hospitals({**OWNED, "north": {**OWNED["north"], **small}}),
    }
    north = data["without"]["north"]
    for part in ("train", "val"):
        north.splits[part] = torch.tensor(
            [i for i in north.splits[part].tolist() if (north.cases[i].label, north.cases[i].device) not in small]
        )
    # So that no site's quota, which follows from its number of images, binds.
    share = {"ratio": 10.0, "small_ratio": 10.0}
    said = {}
    for name, sites in data.items():
        study = painter_study(synthesis={"generator": generator, "share": share})
        _, recorder, told = exchanged(study, tmp_path / name, sites)
        said[name] = [(s.op, s.message.digest()) for s in recorder.seen if s.sender == "north"]
        assert sum(map(sum, told["released"])) >= 10
    assert said["with"] == said["without"]


@pytest.mark.parametrize("form", ["images", "decoder"])
def test_a_site_takes_what_it_lacks_of_the_others(form: str, tmp_path: Path) -> None:
    run, recorder, told = exchanged(painter_study(synthesis={"share": {"form": form, "small_ratio": 1.0}}), tmp_path)
    pool = released(recorder)
    assert (pool.images is None) == (form == "decoder")
    if pool.images is None:
        made = Painter(run.study).decode({"seen": torch.ones(2)}, pool.labels, pool.devices, pool.seeds)
        pool = pool.with_images(made)
    assert pool.images is not None
    known = {image.numpy().tobytes(): int(label) for image, label in zip(pool.images, pool.labels, strict=True)}
    for site, images in (("north", 18), ("south", 12), ("west", 12)):
        kept = shelf(run, site)
        assert told["taken"][site]["samples"] == len(kept.images) <= images
        assert kept.images.dtype == torch.uint8
        assert [known[image.numpy().tobytes()] for image in kept.images] == kept.labels.tolist()
    # South has neither class b nor the bright device: these come first.
    assert shelf(run, "south").labels.float().mean() > 0.5


def test_both_forms_give_the_same_shelves_and_the_decoder_fewer_bytes(tmp_path: Path) -> None:
    shelves, down = [], []
    for form in ("images", "decoder"):
        run, _, told = exchanged(painter_study(synthesis={"share": {"form": form}}), tmp_path / form)
        shelves.append([shelf(run, site) for site in sorted(OWNED)])
        down.append(told["bytes"]["receive"]["down"])
    for one, other in zip(*shelves, strict=True):
        assert all(torch.equal(getattr(one, n), getattr(other, n)) for n in ("images", "labels", "styles"))
    assert down[1] < down[0] / 5


def test_a_site_keeps_the_styles_of_others_alone(tmp_path: Path) -> None:
    run, recorder, told = exchanged(painter_study(), tmp_path)
    styles = next(s.message for s in recorder.seen if s.op == "receive").group("plan")["styles"]
    assert told["devices"] == ["bright", "dark"]
    assert torch.equal(shelf(run, "north").styles, styles[1:])
    assert torch.equal(shelf(run, "south").styles, styles[:1])
    assert len(shelf(run, "west").styles) == 0, "it has both devices"


def test_a_device_whose_noisy_count_came_to_nothing_has_no_style(tmp_path: Path) -> None:
    run, recorder, _ = exchanged(painter_study(), tmp_path)
    message = next(s.message for s in recorder.seen if s.op == "receive")
    arrays = {**message.arrays, "plan/patients": torch.tensor([[16, 0], [8, 0]])}
    arrays["plan/styles"] = torch.stack([message.arrays["plan/styles"][0], torch.zeros(3, 3, 3)])
    assert run.exchange is not None
    site = run.exchange._channel._channel._sites["north"]  # type: ignore[attr-defined]
    (site.state.folder / "answered.json").unlink()  # as if it had not received yet
    site._ops["receive"].run(site, Message(arrays, message.scalars))
    kept = Shelf.load(site.state)
    assert kept is not None
    assert len(kept.styles) == 0


def test_cells_that_nobody_owns_are_painted_over_at_home(tmp_path: Path) -> None:
    """North alone has class b, on the bright device: its images go over to the dark one, and never leave."""
    run, recorder, told = exchanged(painter_study(synthesis={"generator": ["amplitude"]}), tmp_path)
    assert {s.op for s in recorder.seen} == {"enter", "count-cells", "receive"}
    assert told["at_sites"] == [[0, 0], [0, told["wanted"][1][1]]]
    assert not np.array(told["released"]).any()
    kept = shelf(run, "north")
    assert kept.labels.tolist() == [1] * 8, "as many as it owns of the class"
    grounds = kept.images[:, :, 0].float().mean() / 255
    assert grounds < 0.5, "0.8 on the bright device, 0.2 on the dark one"
    assert len(shelf(run, "south").images) == len(shelf(run, "west").images) == 0
    assert {part["samples"] for part in told["taken"].values()} == {0}


def test_validation_and_test_images_make_no_sample(tmp_path: Path) -> None:
    """Other held-out images: the server gets the same up to the gate. Other test images: the same to the end."""
    ends = []
    for k, changed in enumerate(((), ("val", "test"), ("test",))):
        data = hospitals()
        for part in data.values():
            for split in changed:
                part.images[part.splits[split]] = 255 - part.images[part.splits[split]]
        _, recorder, _ = exchanged(painter_study(), tmp_path / str(k), data)
        ends.append([(s.op, s.sender, s.message.digest()) for s in recorder.seen])
    before = [[line for line in end if line[0] not in ("examine", "receive")] for end in ends]
    assert before[0] == before[1] == before[2]
    asked = [[line for line in end if line[:2] == ("examine", "server")] for end in ends]
    assert asked[0] == asked[1]
    assert ends[0] == ends[2]
    assert ends[0] != ends[1], "the gate looks at validation images"


def test_samples_enter_no_split_no_result_and_no_weight(tmp_path: Path) -> None:
    data = hospitals()
    before = {s: ({n: i.clone() for n, i in d.splits.items()}, d.images.clone(), len(d)) for s, d in data.items()}
    run, _, told = exchanged(painter_study(training={"lr": 0.05, "batch_size": 8}), tmp_path, data)
    assert all(part["samples"] > 5 for part in told["taken"].values())
    recorder = Recorder(run.channel)
    run.channel = recorder  # type: ignore[assignment]
    run.train()
    weights = {
        s.sender: s.message.scalars["weight/update"] for s in recorder.seen if s.op == "train" and s.sender in data
    }
    assert weights == {"north": 18, "south": 12, "west": 12}
    metrics = run.test()
    for site, own in data.items():
        splits, images, count = before[site]
        assert all(torch.equal(splits[name], own.splits[name]) for name in splits)
        assert torch.equal(images, own.images)
        assert len(own) == count
        assert metrics["sites"][site]["images"]["test"] == len(OWNED[site]) * HELD
    lines = (tmp_path / "predictions" / "north.csv").read_text().splitlines()
    assert len([line for line in lines if "test" in line]) == 2 * HELD


def test_the_gate_stops_a_generator_that_copies_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every class it gives out north's patients, whatever the seed."""
    north = hospitals()["north"]

    def copy(self: Painter, decoder: Any, labels: Any, devices: Any, seeds: torch.Tensor) -> torch.Tensor:
        rows = [north.splits["train"][north.labels("train") == label] for label in (0, 1)]
        chosen = [int(rows[label][seed % len(rows[label])]) for label, seed in zip(labels, seeds, strict=True)]
        return north.images[chosen].clone() if chosen else torch.zeros(0, 3, SIDE, SIDE, dtype=torch.uint8)

    monkeypatch.setattr(Painter, "decode", copy)
    run, _, told = exchanged(painter_study(), tmp_path)
    assert not np.array(told["released"]).any()
    assert told["gate"]["north"]["refused"]["copy"] > 0
    assert told["gate"]["north"]["accepted"] == 0
    run.train()
    assert run.state.finished == 2


def test_a_site_that_answers_for_other_candidates_is_refused(tmp_path: Path) -> None:
    run = started(painter_study(), tmp_path)
    assert run.exchange is not None
    site = run.exchange._channel._sites["south"]  # type: ignore[attr-defined]
    examine = site._ops["examine"]
    lie = Message.pack({"verdict": {"accepted": torch.ones(3, dtype=torch.uint8)}}, report="{}")
    site._ops = {**site._ops, "examine": type(examine)(lambda s, m: lie, examine.leaves)}
    with pytest.raises(SiteError, match=r"'south' answered for \(3,\) candidates"):
        run.exchange.finish()


def test_the_order_of_sites_does_not_matter(tmp_path: Path) -> None:
    ends = []
    for name, order in (("a", sorted(OWNED)), ("b", sorted(OWNED, reverse=True))):
        data = hospitals()
        _, recorder, _ = exchanged(painter_study(), tmp_path / name, {site: data[site] for site in order})
        ends.append([(s.op, s.sender, s.receiver, s.message.digest()) for s in recorder.seen])
    assert ends[0] == ends[1]


def test_another_seed_makes_other_samples(tmp_path: Path) -> None:
    pools = []
    for seed in (0, 0, 1):
        study = painter_study().model_copy(update={"seed": seed})
        _, recorder, _ = exchanged(study, tmp_path / str(len(pools)))
        pools.append(released(recorder).seeds.tolist())
    assert pools[0] == pools[1] != pools[2]


def test_the_records_of_rounds_hold_losses_of_the_method_alone(tmp_path: Path) -> None:
    """One of three sites trains in the only round; the painter said 1234.5 at all of them."""
    run = started(painter_study({"name": "fedavg", "rounds": 1, "participation": 0.34}), tmp_path)
    run.train()
    losses = [part["loss"] for part in run.records[0]["sites"].values()]
    assert sum(loss is None for loss in losses) == 2
    assert all(loss is None or loss < 10 for loss in losses)


def test_a_network_that_cannot_look_at_samples_is_refused_before_anything(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="feature_tap"):
        started(painter_study(model={"name": "test_exchange:convolutions", "width": 16}), tmp_path)
    with pytest.raises(StudyError, match="linear last layer"):
        started(
            hospital_study(
                model={"name": "test_exchange:convolutions", "width": 16}, synthesis={"generator": "features"}
            ),
            tmp_path / "head",
        )


def convolutions(in_channels: int, out_channels: int, spatial_dims: int, norm: str) -> torch.nn.Module:
    """A network without a linear layer."""
    layer = torch.nn.Conv2d(in_channels, out_channels, 3)
    return torch.nn.Sequential(layer, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
