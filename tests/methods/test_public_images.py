"""What methods with public images have in common: what travels, who is refused, what happens when things fail."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mixed_sites import prepared, shapes
from test_contract import end_state, same
from toy_proxies import MIXED, toy_proxies
from toys import IMAGES, deployed, enlarged, resumed, sites, toy_study, trained

from polyclinic.data.dataset import SiteData
from polyclinic.errors import DataError, RunError, StudyError
from polyclinic.federation.message import Message
from polyclinic.federation.site import Op, Site
from polyclinic.models.normalisation import running_statistics
from polyclinic.results import RunFolder
from polyclinic.runner import Run, Silent
from polyclinic.study import Study
from polyclinic.training import TrainingResult

RIVALS = ("ds-fl", "fccl", "feddf", "fedmd", "kt-pfl")
METHOD = pytest.mark.parametrize("method", RIVALS)
EVERY = pytest.mark.parametrize("method", [*RIVALS, "natimg-fl"])
DRAWN = 10
SMALL: dict[str, Any] = {"proxies": DRAWN}
"""So few public images a round that no site has as many training images."""

SILENT: dict[str, dict[str, Any]] = {
    "fedmd": {"warm_up": 0, "digest": {"epochs": 0}},
    "feddf": {"steps": 0},
    "ds-fl": {"digest": {"epochs": 0}},
    "fccl": {"digest": {"epochs": 0}, "previous": 0.0, "pretrained": 0.0},
    "kt-pfl": {"digest": {"epochs": 0}},
}
"""Settings under which nothing is learnt from others, where no two sites have the same network."""

ALONE = {"loss"}
LEARNT = {"loss", "digest"}
LOGITS: dict[str, tuple[str, str]] = {
    "fedmd": ("targets/scores", "answers/scores"),
    "ds-fl": ("targets/probabilities", "answers/probabilities"),
    "fccl": ("targets/scores", "answers/scores"),
    "kt-pfl": ("target/probabilities", "answers/probabilities"),
}
"""What comes to a site and what leaves it."""

Call = tuple[int, str, str, Message, Message]
"""Round, op, site, what came, what left."""


def recorded(run: Run) -> list[Call]:
    """All that is said from now on."""
    calls: list[Call] = []

    def listening(site: Site, op: str, own: Op) -> Op:
        def handler(at: Site, message: Message) -> Message:
            reply = own.run(at, message)
            calls.append((at.round, op, at.name, message, reply))
            return reply

        return Op(handler, own.leaves)

    for site in run.channel._sites.values():
        site._ops = {op: listening(site, op, own) for op, own in site._ops.items()}
    return calls


def opened(study: Study, folder: Path, data: dict[str, SiteData] | None = None) -> Run:
    """A run before its first round."""
    return prepared(study, sites() if data is None else data, folder)


@METHOD
def test_the_inventory_of_messages(method: str, tmp_path: Path) -> None:
    """Names and shapes of everything in both directions; of public images neither pixels, labels nor positions."""
    run = opened(toy_study({"name": method, **SMALL}, models=MIXED), tmp_path)
    calls = recorded(run)
    run.train()
    assert {op for _, op, *_ in calls} == {"proxies", "train", "evaluate", "keep", *(["receive"] * (method == "feddf"))}
    for number, op, site, came, left in calls:
        assert all(array.dtype == torch.float32 for array in (*came.arrays.values(), *left.arrays.values()))
        if op == "proxies":
            assert (came.arrays, set(came.scalars)) == ({}, {"name", "digest"})
            assert (left.arrays, set(left.scalars)) == ({}, {"digest"})
        elif op == "train" and method == "feddf":
            own = {f"model/{name}": list(t.shape) for name, t in run.method.networks.of_site(site).tensors.items()}
            assert (came.arrays, came.scalars) == ({}, {})
            assert (shapes(left), set(left.scalars)) == (own, {"loss", "weight/model"})
        elif op == "receive":
            own = {f"model/{name}": list(t.shape) for name, t in run.method.networks.of_site(site).tensors.items()}
            assert (shapes(came), came.scalars) == (own, {})
            assert (left.arrays, left.scalars) == ({}, {})
        elif op == "train":
            down, up = LOGITS[method]
            assert shapes(came) == ({down: [DRAWN, 2]} if number > 1 else {})
            assert came.scalars == {}
            assert shapes(left) == {up: [DRAWN, 2]}
            assert set(left.scalars) == (LEARNT if number > 1 else ALONE)


@METHOD
def test_another_subset_each_round_and_the_same_at_all_sites(method: str, tmp_path: Path) -> None:
    from polyclinic.data.proxies import load_proxies
    from polyclinic.transfer.proxy_logits import ProxyRound

    study = toy_study({"name": method, **SMALL})
    proxies = load_proxies(study)
    drawn = [ProxyRound.draw(proxies, study, number).positions for number in (1, 2)]
    assert all(len(set(own.tolist())) == DRAWN for own in drawn)
    assert set(drawn[0].tolist()) != set(drawn[1].tolist())
    again = ProxyRound.draw(proxies, study.model_copy(update={"data": study.data}), 1)
    assert torch.equal(again.positions, drawn[0])
    everything = ProxyRound.draw(proxies, toy_study(method), 1)
    assert sorted(everything.positions.tolist()) == list(range(len(proxies)))


@METHOD
@pytest.mark.parametrize("backend", ["masked", "ring-he"])
def test_sums_that_hide_sites_are_refused(method: str, backend: str) -> None:
    with pytest.raises(StudyError, match=rf"{method}.* by itself.*{backend} hides.*backend: plain.*fedavg"):
        toy_study(method, aggregation=backend)


@METHOD
def test_studies_without_what_it_needs_are_refused(method: str) -> None:
    with pytest.raises(StudyError, match=rf"{method}.*no proxies.*polyclinic data proxies.*local"):
        toy_study(method, proxies=None)
    with pytest.raises(StudyError, match=rf"{method}.*segmentation"):
        toy_study(method, task={"kind": "segmentation"}, model={"name": "unet"}, data={"image": {"size": [16, 16]}})


@METHOD
def test_an_altered_public_image_stops_everything_before_the_first_round(method: str, tmp_path: Path) -> None:
    proxies = toy_proxies(tmp_path)
    altered, other = (Path(proxies["images"]) / f"dog/0{number}.png" for number in (3, 4))
    shutil.copyfile(other, altered)
    study = toy_study(method, proxies=proxies, federation={"on_absent": "continue"})
    run = opened(study, tmp_path / "run")
    calls = recorded(run)
    with pytest.raises(DataError, match=r"dog/03\.png"):
        run.train()
    assert calls == []


@METHOD
def test_a_site_with_other_public_images_stops_everything_before_the_first_round(method: str, tmp_path: Path) -> None:
    run = opened(toy_study(method, federation={"on_absent": "continue"}), tmp_path)
    site = run.channel._sites["south"]
    site.__dict__["own_proxies"] = replace(site.own_proxies, digest="0" * 64)
    calls = recorded(run)
    with pytest.raises(DataError, match=r"'south' has other public images"):
        run.train()
    assert {op for _, op, *_ in calls} == {"proxies"}
    assert run.state.finished == 0


def failing(run: Run, site: str, op: str, when: int) -> None:
    """Let a site fail in one op of one round."""
    own = run.channel._sites[site]._ops[op]

    def handler(at: Site, message: Message) -> Message:
        if at.round == when:
            raise RuntimeError("power cut")
        return own.run(at, message)

    run.channel._sites[site]._ops = {**run.channel._sites[site]._ops, op: Op(handler, own.leaves)}


@METHOD
def test_a_site_that_drops_out_is_left_out_and_comes_back(method: str, tmp_path: Path) -> None:
    study = toy_study({"name": method, **SMALL}, models=MIXED, federation={"on_absent": "continue"})
    run = opened(study, tmp_path / "lost")
    failing(run, "south", "train", 2)
    calls = recorded(run)
    run.train()
    assert [list(record["absent"]) for record in run.records] == [[], ["south"], []]
    there = {number: [site for n, op, site, *_ in calls if n == number and op == "train"] for number in (1, 2, 3)}
    assert there == {1: ["north", "south", "west"], 2: ["north", "west"], 3: ["north", "south", "west"]}
    whole = trained(study, sites(), tmp_path / "whole")
    for site in IMAGES:
        assert not same(deployed(run, site), deployed(whole, site))
    if method == "feddf":
        return
    down, up = LOGITS[method]

    told = {site: came.arrays[down] for n, op, site, came, _ in calls if n == 3 and op == "train"}
    said = {site: left.arrays[up] for n, op, site, _, left in calls if n == 2 and op == "train"}
    assert told["south"].shape == (DRAWN, 2)
    if method in ("fedmd", "fccl"):
        torch.testing.assert_close(told["south"], (said["north"] + said["west"]) / 2)


@EVERY
def test_a_site_learns_from_no_public_images_that_were_not_compared(method: str, tmp_path: Path) -> None:
    """In the first round ``south`` fails when asked which it has; it comes back in the second, with other ones."""
    run = opened(toy_study(method, federation={"on_absent": "continue"}), tmp_path)
    site = run.channel._sites["south"]
    site.__dict__["own_proxies"] = replace(site.own_proxies, digest="0" * 64)
    failing(run, "south", "proxies", 1)
    calls = recorded(run)
    with pytest.raises(DataError, match=r"'south' has other public images"):
        run.train()
    assert [number for number, *_ in calls if number > 1] == [2] * 3
    trained_there = {name for number, op, name, *_ in calls if (number, op) == (1, "train")}
    # The sites of feddf use no public images.
    assert trained_there == ({*IMAGES} if method == "feddf" else {"north", "west"})
    assert run.state.finished == 1


@EVERY
def test_a_site_that_is_late_in_comparing_takes_part_from_then_on(method: str, tmp_path: Path) -> None:
    run = opened(toy_study({"name": method, "rounds": 2}, federation={"on_absent": "continue"}), tmp_path)
    failing(run, "south", "proxies", 1)
    run.train()
    assert [list(record["absent"]) for record in run.records] == [["south"], []]
    losses = [record["sites"]["south"]["loss"] for record in run.records]
    assert [loss is not None for loss in losses] == [method == "feddf", True]


@EVERY
def test_a_resumed_run_with_other_public_images_is_refused(method: str, tmp_path: Path) -> None:
    study = toy_study(method, proxies=toy_proxies(tmp_path / "public"))

    class Swapping(Silent):
        def round_finished(self, record: Any) -> None:
            toy_proxies(tmp_path / "public", seed=record["round"])
            raise KeyboardInterrupt

    folder = RunFolder(tmp_path / "run")
    folder.create(study)
    with pytest.raises(KeyboardInterrupt):
        Run(study, sites(), folder, Swapping()).train()
    again = Run(study, sites(), folder, Silent())
    calls = recorded(again)
    with pytest.raises(RunError, match=r"this run began with other public images.*'toys'.*new results folder"):
        again.train()
    assert (calls, again.state.finished) == ([], 1)


@METHOD
def test_without_an_answer_a_round_fails(method: str, tmp_path: Path) -> None:
    run = opened(toy_study(method, federation={"on_absent": "continue"}), tmp_path)
    for site in IMAGES:
        failing(run, site, "train", 1)
    with pytest.raises(Exception, match=r"no site answered 'train' in round 1 .*power cut"):
        run.train()


CNN: dict[str, Any] = {"name": "small-cnn", "width": 4}
OTHERS: dict[str, Any] = {"north": {"name": "small-cnn", "width": 6}, "south": {"name": "mobilenet"}}
"""With batch normalisation, dropout and three architectures."""


CNNS: dict[str, Any] = {
    "training": {"batch_size": 5, "augment": {"flip": True}},
    "model": CNN,
    "models": {"north": {**CNN, "width": 6}, "south": {**CNN, "width": 5}},
    "data": {"image": {"size": [8, 8]}},
}
"""Three networks with batch normalisation."""


@METHOD
def test_a_resumed_run_ends_the_same_bit_for_bit(method: str, tmp_path: Path) -> None:
    """From the second round on, with what sites keep from the first; the contract suite resumes after the first."""
    study, data = toy_study({"name": method, **SMALL}, **CNNS), enlarged(8)
    whole = trained(study, data, tmp_path / "whole")
    assert same(end_state(whole), end_state(resumed(study, data, tmp_path / "parts", rounds=2)))


@METHOD
def test_who_learns_nothing_from_others_trains_as_local_bit_for_bit(method: str, tmp_path: Path) -> None:
    """All sites have different networks, so that feddf averages nobody with anybody."""
    data = enlarged(8)
    alone = trained(toy_study("local", **CNNS), data, tmp_path / "local")
    run = trained(toy_study({"name": method, **SMALL, **SILENT[method]}, **CNNS), data, tmp_path / "silent")
    for site in IMAGES:
        assert same(deployed(run, site), deployed(alone, site))


@METHOD
def test_networks_of_different_architectures_learn_together(method: str, tmp_path: Path) -> None:
    study = toy_study(
        {"name": method, "rounds": 2, "proxies": 8},
        model=CNN,
        models=OTHERS,
        training={"batch_size": 8},
        data={"image": {"size": [32, 32]}},
    )
    run = trained(study, enlarged(32), tmp_path)
    run.test()
    assert all(tensor.isfinite().all() for tensor in end_state(run).values())
    sizes = {site: sum(t.numel() for t in deployed(run, site).values()) for site in IMAGES}
    assert len(set(sizes.values())) == 3


def findings(data: dict[str, SiteData]) -> dict[str, SiteData]:
    """The same images with two findings that do not exclude each other."""
    for own in data.values():
        second = (own.images.flatten(1).std(1) > own.images.flatten(1).std(1).median()).float()
        own.targets = torch.stack([own.targets.float(), second], 1)
    return data


@METHOD
def test_findings_that_do_not_exclude_each_other(method: str, tmp_path: Path) -> None:
    study = toy_study({"name": method, **SMALL}, task={"kind": "multi-label"}, training={"batch_size": 4})
    run = trained(study, findings(sites()), tmp_path)
    targets = run.state.groups.get("targets", {})
    for name, tensor in targets.items():
        if name != "scores":
            assert ((tensor > 0) & (tensor < 1)).all()
            assert not torch.allclose(tensor.sum(1), torch.ones(DRAWN), atol=1e-3)
    losses = [record["sites"]["north"]["loss"] for record in run.records]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("method", sorted({*RIVALS} - {"feddf"}))
def test_public_images_do_not_move_a_sites_running_statistics(method: str, tmp_path: Path) -> None:
    """After a digest without training they are what they were, while the weights are not."""
    silent = {"warm_up": 0} if method == "fedmd" else {}
    study = toy_study(
        {"name": method, **silent}, model=CNN, data={"image": {"size": [16, 16]}}, training={"batch_size": 8}
    )
    run = trained(study, enlarged(16), tmp_path)
    site = run.channel._sites["north"]
    kept = deployed(run, "north")
    answer = {name: torch.rand_like(tensor) for name, tensor in run.state.groups["targets"].items()}
    targets = {"scores": answer["scores"]} if "scores" in answer else {"probabilities": next(iter(answer.values()))}
    site.train = lambda **_: TrainingResult(0.0, 0, 0)  # type: ignore[method-assign]
    site.round = 4
    run.method.train(site, Message.pack({"target" if method == "kt-pfl" else "targets": targets}))
    moved = running_statistics(site.model)
    for name, tensor in deployed(run, "north").items():
        assert torch.equal(tensor, kept[name]) == (name in moved), name
