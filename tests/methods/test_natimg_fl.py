"""NatIMG-FL: what travels, one step written out, ablations that are other methods, and what a killed run remembers."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_contract import same
from torch import Tensor
from toy_proxies import CLASSES, MIXED, PER_CLASS
from toys import IMAGES, deployed, enlarged, public_images, resumed, sites, toy_study, trained

from polyclinic.comparison import check_sites
from polyclinic.data.proxies import load_proxies
from polyclinic.errors import DataError, SiteError, StudyError
from polyclinic.federation.message import Message
from polyclinic.federation.site import Op, Site
from polyclinic.federation.state import ServerState
from polyclinic.methods.natimg_fl import NatIMGFL
from polyclinic.models.last_layer import last_layer
from polyclinic.models.normalisation import running_statistics
from polyclinic.models.taps import features, tapped
from polyclinic.results import RunFolder
from polyclinic.runner import Run, Silent
from polyclinic.study import Study, validate_study
from polyclinic.transfer.public_batches import PublicBatches
from polyclinic.transfer.site_lessons import SiteLessons
from polyclinic.transfer.teachers import NetworkTeacher, Shape, VectorTeacher, vectors
from polyclinic.transfer.wire import halved

NARROW = {"name": "toy_proxies:narrow"}
ZERO = {"alpha": 0.0, "beta": 0.0, "gamma": 0.0, "eta": 0.0}
CNN = {"name": "small-cnn", "width": 4}
BATCH_NORM: dict[str, Any] = {
    "model": CNN,
    "models": {"north": {"name": "small-cnn", "width": 6}},
    "data": {"image": {"size": [16, 16]}},
}


def study(settings: dict[str, Any] | None = None, **sections: Any) -> Study:
    """Three sites with three networks, unless ``sections`` say otherwise."""
    given = {"name": "natimg-fl", "server_steps": 3, "q": 2, **(settings or {})}
    return toy_study(given, **{"training": {"batch_size": 4}, "model": NARROW, "models": MIXED, **sections})


def watched(wanted: Study, data: dict[str, Any], folder: Path) -> tuple[Run, list[tuple[int, str, Message, Message]]]:
    """A run, and every message of its training op: round, site, down, up."""
    RunFolder(folder).create(wanted)
    run = Run(wanted, data, RunFolder(folder), Silent())
    seen: list[tuple[int, str, Message, Message]] = []
    stream = run.channel.stream

    def listening(op: str, messages: dict[str, Message]) -> Iterator[tuple[str, Message]]:
        for site, reply in stream(op, messages):
            if op == "train":
                seen.append((run.channel.round, site, messages[site], reply))
            yield site, reply

    run.channel.stream = listening  # type: ignore[method-assign]
    run.train()
    return run, seen


@pytest.mark.parametrize("weights", ["uniform", "learned"])
@pytest.mark.parametrize("sections", [{}, BATCH_NORM], ids=["plain", "batch norm"])
def test_without_its_terms_it_is_local_training_bit_for_bit(
    weights: str, sections: dict[str, Any], tmp_path: Path
) -> None:
    data = enlarged(16) if sections else sites()
    common = {"model": NARROW, "models": MIXED, "training": {"batch_size": 4}, **sections}
    alone = trained(toy_study("local", **common), data, tmp_path / "local")
    run = trained(study({**ZERO, "weights": weights, "t_warm": 1}, **sections), data, tmp_path / "ours")
    for site in run.channel.sites:
        assert same(deployed(run, site), deployed(alone, site))
    record, wanted = run.records[-1]["sites"], alone.records[-1]["sites"]
    assert {s: record[s]["loss"] for s in record} == {s: wanted[s]["loss"] for s in wanted}


def test_with_one_term_it_is_not(tmp_path: Path) -> None:
    alone = trained(toy_study("local", model=NARROW, models=MIXED, training={"batch_size": 4}), sites(), tmp_path / "l")
    for number, (name, value) in enumerate({"alpha": 0.5, "beta": 0.5, "gamma": 0.5, "eta": 0.5}.items()):
        run = trained(study({**ZERO, name: value}), sites(), tmp_path / str(number))
        assert not same(deployed(run, "north"), deployed(alone, "north")), name


@pytest.mark.parametrize("sections", [{}, BATCH_NORM], ids=["plain", "batch norm"])
def test_networks_travel_in_sixteen_bits_and_nothing_else(sections: dict[str, Any], tmp_path: Path) -> None:
    data = enlarged(16) if sections else sites()
    run, seen = watched(study({"weights": "learned"}, **sections), data, tmp_path)
    assert {(number, site) for number, site, _, _ in seen} == {(n, s) for n in (1, 2, 3) for s in IMAGES}
    for number, site, down, up in seen:
        tensors = run.channel._sites[site].tensors
        assert {name: (t.shape, torch.float16) for name, t in tensors.items()} == {
            name: (t.shape, t.dtype) for name, t in up.group("network").items()
        }
        assert up.groups() == ["network"]
        assert up.scalars.keys() == {"loss", "weight/network"}
        assert up.scalars["weight/network"] == IMAGES[site]
        assert down.scalars == ({"taught": True} if number >= 2 else {})
        central = run.method.central(run.state)
        assert central is not None
        wanted = {name: (t.shape, torch.float16) for name, t in central[1].items()} if number >= 2 else {}
        assert {name: (t.shape, t.dtype) for name, t in down.group("central").items()} == wanted
        assert down.groups() == (["central"] if wanted else [])
        # No array of one row a patient's image.
        assert all(
            t.ndim == 0 or t.shape[0] != IMAGES[site] or t.shape == tensors[n].shape
            for n, t in up.group("network").items()
        )


def test_statistics_of_patients_images_never_leave(tmp_path: Path) -> None:
    run, seen = watched(study({}, **BATCH_NORM), enlarged(16), tmp_path)
    for site in IMAGES:
        own = deployed(run, site)
        names = [n for n in running_statistics(run.channel._sites[site].model) if not n.endswith("num_batches_tracked")]
        assert names
        sent = next(up for number, s, _, up in seen if s == site and number == 3).group("network")
        for name in names:
            assert not torch.allclose(sent[name].float(), own[name], rtol=1e-2, atol=1e-3)
        parameters = [name for name in own if name not in names]
        assert all(torch.equal(sent[name], own[name].half()) for name in parameters)


@pytest.mark.parametrize("settings", [{"alpha": 0.0, "gamma": 0.0}, {"t_warm": 3}, {"transport": "vectors"}])
def test_statistics_of_natural_images_are_there_before_they_are_needed(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    # In the first rounds nothing may have shown natural images to the site's network.
    run = trained(study({"alpha": 0.0, "gamma": 0.0, **settings}, **BATCH_NORM), enlarged(16), tmp_path)
    site = run.channel._sites["south"]
    kept = site.state.load("pupil")
    assert kept is not None
    means = [t for name, t in kept[0].items() if name.startswith("statistics/") and name.endswith("running_mean")]
    assert means
    assert all(t.abs().sum() > 0 for t in means)


@pytest.mark.parametrize("subset", [None, 10])
def test_with_vectors_no_weight_leaves_a_site(subset: int | None, tmp_path: Path) -> None:
    settings = {"transport": "vectors", "weights": "learned", "subset": subset}
    run, seen = watched(study(settings), sites(), tmp_path)
    proxies = load_proxies(run.study)
    count = subset or len(proxies.parts(run.study.seed)[0])
    channels = {"north": [5, 5], "south": [3], "west": [3]}
    for number, site, down, up in seen:
        sent = {f"network/tap{i}": (count, c) for i, c in enumerate(channels[site])} | {"network/logits": (count, 2)}
        assert {name: tuple(t.shape) for name, t in up.arrays.items()} == sent
        wanted = {"central/tap0": (count, 3), "central/logits": (count, 2)} if number >= 2 else {}
        assert {name: tuple(t.shape) for name, t in down.arrays.items()} == wanted
        assert all(t.dtype == torch.float16 for t in (*up.arrays.values(), *down.arrays.values()))
        assert up.scalars.keys() == {"loss", "weight/network"}
        assert down.scalars == ({"taught": True} if number >= 2 else {})
    if subset:
        rounds = [run.method.drawn(proxies, number).tolist() for number in (1, 2)]  # type: ignore[attr-defined]
        assert rounds[0] != rounds[1]


def test_vectors_are_what_the_network_says(tmp_path: Path) -> None:
    run, seen = watched(study({"transport": "vectors"}), sites(), tmp_path)
    _, site, _, up = seen[-1]
    model, proxies = run.channel._sites[site].model, load_proxies(run.study)
    deployed(run, site)
    images = proxies.inputs(proxies.parts(run.study.seed)[0])
    with torch.no_grad():
        model.eval()
        assert torch.equal(up.arrays["network/logits"], model(images).half())
        torch.testing.assert_close(up.arrays["network/tap0"].float(), features(model, images), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("direction", ["to-central", "to-sites"])
def test_one_way_nothing_travels_the_other(direction: str, tmp_path: Path) -> None:
    run, seen = watched(study({"direction": direction}), sites(), tmp_path)
    for number, _, down, up in seen:
        assert bool(up.arrays) == (direction == "to-central")
        assert bool(down.arrays) == (direction == "to-sites" and number >= 2)
    terms = {name for record in run.method.records(run.state)["rounds"] for name in record}
    assert ("soft" in terms) == (direction == "to-central")
    assert (run.method.central(run.state) is None) == (direction == "to-sites")


def naive_matching(source: list[Tensor], target: list[Tensor], regressors: dict[str, Tensor]) -> Tensor:
    """D with λ = 1 and w = 1/c, pair by pair."""
    pairs = []
    for n, own in enumerate(target):
        start = 0
        for theirs in source:
            columns = theirs.transpose(0, 1).flatten(1)
            scale = columns.std(1, unbiased=False)[:, None, None]
            wanted = (theirs - columns.mean(1)[:, None, None]) / scale
            wanted = F.interpolate(wanted, own.shape[2:], mode="bilinear")
            rows = slice(start, start + theirs.shape[1])
            weight, bias = regressors[f"{n}.weight"][rows], regressors[f"{n}.bias"][rows]
            predicted = torch.einsum("oc,bchw->bohw", weight, own) + bias[:, None, None]
            pairs.append((predicted - wanted).square().mean())
            start += theirs.shape[1]
    return torch.stack(pairs).mean()


def said(model: torch.nn.Module, tensors: dict[str, Tensor] | None, images: Tensor) -> tuple[list[Tensor], Tensor]:
    with tapped(model, model.taps) as seen:  # type: ignore[arg-type]
        logits = model(images) if tensors is None else torch.func.functional_call(model, tensors, (images,))
    return [seen[name][0] for name in model.taps], logits  # type: ignore[union-attr]


def softened(ours: Tensor, theirs: Tensor) -> Tensor:
    return 9 * F.kl_div((ours / 3).log_softmax(1), (theirs / 3).softmax(1), reduction="batchmean")


def noted_draws(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """A list that gets the positions of every batch of natural images from now on."""
    drawn: list[Tensor] = []
    draw = PublicBatches.draw

    def noted(self: PublicBatches, count: int) -> Any:
        batch = draw(self, count)
        drawn.append(batch.positions)
        return batch

    monkeypatch.setattr(PublicBatches, "draw", noted)
    return drawn


def test_one_step_of_a_site_is_its_loss_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Full batches, plain gradient descent: each round is one step.
    given = {"gamma": 0.0, "rounds": 2, "server_steps": 0, "eta_server": 1.0, "alpha": 0.6, "alpha_end": 0.5}
    wanted = study({**given, "server_steps": 1}, training={"batch_size": 1000, "lr": 0.1})
    drawn = noted_draws(monkeypatch)
    folder = tmp_path / "run"
    before: dict[str, Any] = {}

    class Stop(Silent):
        def round_finished(self, record: Any) -> None:
            if record["round"] == 1:
                drawn.clear()
                own = run.channel._sites["north"]
                before["own"], before["central"] = deployed(run, "north"), dict(run.state.groups["central"])
                before["pupil"] = own.state.load("pupil")[0]  # type: ignore[index]

    RunFolder(folder).create(wanted)
    run = Run(wanted, sites(), RunFolder(folder), Stop())
    run.train()
    after, site = deployed(run, "north"), run.channel._sites["north"]
    data, proxies = site.data, load_proxies(wanted)
    model = site.model
    site.load(before["own"])
    public, labels = proxies.inputs(drawn[0]), proxies.labels[drawn[0]]
    teacher = run.method.networks.of(wanted.model, "teacher").model
    with torch.no_grad():
        source, goal = said(teacher, {n: t.half().float() for n, t in before["central"].items()}, public)
    kept = run.channel._sites["north"].state.load("pupil")
    assert kept is not None
    # Regressors are new in the second round: their start values come from where they are now and their own gradient.
    own, logits = said(model, None, public)
    head = {leaf: before["pupil"][f"head/{leaf}"] for leaf in ("weight", "bias")}
    rows = data.splits["train"]
    regressors = _start_of_regressors(kept[0], source, [m.detach() for m in own], lr=0.1, beta=0.5)
    loss = F.cross_entropy(model(data.inputs(rows)), data.targets[rows])
    loss = loss + 0.3 * F.cross_entropy(F.linear(own[-1].mean((2, 3)), head["weight"], head["bias"]), labels)
    loss = loss + 0.5 * naive_matching(source, own, regressors) + 0.5 * softened(logits, goal)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for (name, value), gradient in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(after[name], value.detach() - 0.1 * gradient, rtol=1e-4, atol=1e-6)


def _start_of_regressors(
    kept: dict[str, Tensor], source: list[Tensor], own: list[Tensor], lr: float, beta: float
) -> dict[str, Tensor]:
    """Undo one step of gradient descent on β D by fixed-point iteration: its gradient is linear in the regressors."""
    after = {
        f"{n}.{leaf}": kept[f"of/central/regressors.{n}.{leaf}"] for n in range(len(own)) for leaf in ("weight", "bias")
    }
    current = {name: value.clone() for name, value in after.items()}
    for _ in range(60):
        leaves = {name: value.detach().requires_grad_() for name, value in current.items()}
        slopes = torch.autograd.grad(beta * naive_matching(source, own, leaves), list(leaves.values()))
        current = {name: after[name] + lr * slope for name, slope in zip(after, slopes, strict=True)}
    return current


def test_the_central_model_learns_from_the_weighted_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # With soft outputs alone (no steps on natural classes possible to leave out): the gradient of the last layer.
    wanted = study({"beta_server": 0.0, "rounds": 1, "server_steps": 1}, training={"batch_size": 6, "lr": 0.1})
    drawn = noted_draws(monkeypatch)
    run, seen = watched(wanted, sites(), tmp_path)
    model = run.method.networks.of(wanted.model, "central").model
    central = run.state.groups["central"]
    start = run.bench.initial
    public = load_proxies(wanted).inputs(drawn[-1])
    mixture = torch.zeros(len(public), 2)
    for _, site, _, up in seen:
        network = run.method.networks.of(wanted.model_of(site), "teacher").model
        with torch.no_grad():
            _, logits = said(network, {n: t.float() for n, t in up.group("network").items()}, public)
        mixture += IMAGES[site] / sum(IMAGES.values()) * (logits / 3).softmax(1)
    name, _ = last_layer(model)
    leaf = start[f"{name}.weight"].clone().requires_grad_()
    logits = torch.func.functional_call(model, {**start, f"{name}.weight": leaf}, (public,))
    cross = -(mixture * (logits / 3).log_softmax(1)).sum(1).mean() * 9
    (slope,) = torch.autograd.grad(0.5 * cross, leaf)
    torch.testing.assert_close(central[f"{name}.weight"], leaf.detach() - 0.1 * slope, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "settings",
    [
        {"weights": "learned"},
        {"weights": "learned", "hypergradient": "exact", "alignment": "dann"},
        {"weights": "attention", "transport": "vectors", "subset": 12, "warmup": 1},
    ],
    ids=["jvp", "exact", "vectors"],
)
def test_a_killed_run_goes_on_bit_for_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    sections = {**BATCH_NORM, "training": {"batch_size": 4, "optimizer": "adam", "lr": 1e-3}}
    wanted = study({**settings, "q": 1, "t_warm": 1, "rounds": 2}, **sections)
    whole = trained(wanted, enlarged(16), tmp_path / "whole")
    again = resumed(wanted, enlarged(16), tmp_path / "parts")
    for group, tensors in whole.state.groups.items():
        assert same(tensors, again.state.groups[group]), group
    assert whole.state.scalars == again.state.scalars
    for site in IMAGES:
        assert same(deployed(whole, site), deployed(again, site))
        ours, theirs = (run.channel._sites[site].state.load("pupil") for run in (whole, again))
        assert ours is not None
        assert theirs is not None
        assert same(ours[0], theirs[0])
        assert ours[1] == theirs[1]
    told = [(run.folder.path / "transfer" / "north.json").read_text() for run in (whole, again)]
    assert told[0] == told[1]


def test_a_site_that_is_absent_for_a_round_comes_back(tmp_path: Path) -> None:
    wanted = study({"weights": "learned", "q": 1}, federation={"on_absent": "continue"})
    RunFolder(tmp_path).create(wanted)
    states: dict[int, dict[str, Any]] = {}

    class Watcher(Silent):
        def round_finished(self, record: Any) -> None:
            state: ServerState = run.state
            states[record["round"]] = {
                "memory": dict(state.groups["memory"]),
                "own": deployed(run, "north"),
                "absent": record["absent"],
            }

    run = Run(wanted, sites(), RunFolder(tmp_path), Watcher())
    site = run.channel._sites["north"]
    handler = site._ops["train"]

    def sometimes(own: Any, message: Message) -> Message:
        if own.round == 2:
            raise SiteError("a power cut")
        return handler.run(own, message)

    site._ops = {**site._ops, "train": type(handler)(sometimes, handler.leaves)}
    run.train()
    assert "power cut" in states[2]["absent"]["north"]
    assert same(states[1]["own"], states[2]["own"])
    assert not same(states[2]["own"], states[3]["own"])

    def of(site: str, number: int) -> dict[str, Tensor]:
        return {n: t for n, t in states[number]["memory"].items() if n.startswith(f"of/{site}/")}

    assert of("north", 1)
    assert same(of("north", 1), of("north", 2))
    assert not same(of("south", 1), of("south", 2))
    assert not same(of("north", 2), of("north", 3))


def made(wanted: Study, folder: Path, change: Callable[[Site, Message], Message], size: int = 0) -> Run:
    """A run whose sites' answers to ``train`` pass through ``change``."""
    RunFolder(folder).create(wanted)
    run = Run(wanted, enlarged(size) if size else sites(), RunFolder(folder), Silent())
    for site in run.channel._sites.values():
        op = site._ops["train"]

        def altered(own: Site, message: Message, op: Op = op) -> Message:
            return change(own, op.run(own, message))

        site._ops = {**site._ops, "train": Op(altered, op.leaves)}
    return run


@pytest.mark.parametrize("direction", ["both", "to-sites"])
def test_a_round_in_which_nobody_answers_ends_the_run(direction: str, tmp_path: Path) -> None:
    def closed(own: Site, reply: Message) -> Message:
        if own.round == 2:
            raise SiteError(f"{own.name} is closed")
        return reply

    run = made(study({"direction": direction}, federation={"on_absent": "continue"}), tmp_path, closed)
    with pytest.raises(SiteError, match="no site answered 'train' in round 2 .*north is closed.*west is closed"):
        run.train()
    assert run.state.finished == 1


def test_soft_outputs_wait_until_the_central_model_was_taught(tmp_path: Path) -> None:
    """Round 1 is over, but no answer weighed anything."""
    told: dict[int, set[Any]] = {}

    def unweighed(own: Site, reply: Message) -> Message:
        found = own.state.load("pupil")
        assert found is not None
        told.setdefault(own.round, set()).add("soft" in json.loads(str(found[1]["history"]))[-1])
        return Message(reply.arrays, {**reply.scalars, "weight/network": 0.0 if own.round == 1 else 1.0})

    run = made(study(), tmp_path, unweighed)
    sent: dict[int, set[Any]] = {}
    stream = run.channel.stream

    def listening(op: str, messages: dict[str, Message]) -> Iterator[tuple[str, Message]]:
        if op == "train":
            sent[run.channel.round] = {message.scalars.get("taught") for message in messages.values()}
            assert (run.method.central(run.state) is None) == (run.channel.round < 3)
        return stream(op, messages)

    run.channel.stream = listening  # type: ignore[method-assign]
    run.train()
    assert sent == {1: {None}, 2: {False}, 3: {True}}
    assert told == {1: {False}, 2: {False}, 3: {True}}
    assert ServerState.load(run.folder.checkpoint).scalars["taught"] is True


def spoilt(reply: Message, how: str, name: str) -> Message:
    """An answer with one thing wrong."""
    arrays, scalars = dict(reply.arrays), dict(reply.scalars)
    if how == "missing":
        del arrays[name]
    elif how == "more":
        arrays["network/stranger"] = torch.zeros(1)
    elif how == "shape":
        arrays[name] = arrays[name].flatten()[:2]
    elif how == "not finite":
        arrays[name] = arrays[name].clone()
        arrays[name].view(-1)[0] = float("nan")
    else:
        scalars["weight/network"] = float(how)
    return Message(arrays, scalars)


@pytest.mark.parametrize("on_absent", ["stop", "continue"])
@pytest.mark.parametrize(
    ("transport", "how", "words"),
    [
        ("weights", "missing", "sent network/0.bias not at all; it was to be sent with shape \\(3,\\)"),
        ("weights", "more", "sent network/stranger with shape \\(1,\\); it was to be sent not at all"),
        ("weights", "shape", "sent network/0.bias with shape \\(2,\\)"),
        ("weights", "not finite", "sent network/0.bias with numbers that are not finite"),
        ("weights", "-1", "gave 'network' the weight -1.0"),
        ("weights", "inf", "gave 'network' the weight inf"),
        ("vectors", "missing", "sent network/logits not at all"),
        ("vectors", "shape", "sent network/logits with shape"),
        ("vectors", "not finite", "sent network/logits with numbers that are not finite"),
    ],
)
def test_an_answer_that_cannot_be_used_is_none(
    transport: str, how: str, words: str, on_absent: str, tmp_path: Path
) -> None:
    name = "network/logits" if transport == "vectors" else "network/0.bias"

    def bad(own: Site, reply: Message) -> Message:
        return spoilt(reply, how, name) if (own.name, own.round) == ("south", 1) else reply

    wanted = study({"transport": transport, "rounds": 2}, federation={"on_absent": on_absent})
    run = made(wanted, tmp_path, bad)
    if on_absent == "stop":
        with pytest.raises(SiteError, match=f"site 'south' {words}"):
            run.train()
        return
    run.train()
    assert re.search(f"site 'south' {words}", run.records[0]["absent"]["south"])
    first, second = run.method.records(run.state)["rounds"]
    assert first["matching"] > 0
    assert all(bool(tensor.isfinite().all()) for tensor in run.state.groups["central"].values())
    assert not run.records[1]["absent"]
    assert second["matching"] > 0


def test_a_site_that_fails_after_training_keeps_nothing_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a network without its statistics, nor the other way round."""
    catch_up, failing = SiteLessons.catch_up, {"north": 1}

    def fails(self: SiteLessons) -> None:
        if failing.get(self.site.name) == self.site.round:
            raise OSError("no memory")
        catch_up(self)

    monkeypatch.setattr(SiteLessons, "catch_up", fails)
    wanted = study({"rounds": 1}, federation={"on_absent": "continue"}, **BATCH_NORM)
    run = made(wanted, tmp_path, lambda own, reply: reply, size=16)
    run.train()
    assert "no memory" in run.records[0]["absent"]["north"]
    for name, kept in {"north": False, "south": True}.items():
        state = run.channel._sites[name].state
        assert [state.load(key) is not None for key in ("personal", "pupil")] == [kept, kept]


def test_natural_statistics_begin_without_those_of_patients(tmp_path: Path) -> None:
    run = trained(study({"rounds": 1}, **BATCH_NORM), enlarged(16), tmp_path)
    site = run.channel._sites["south"]
    deployed(run, "south")
    (tmp_path / "state" / "south" / "pupil.000001.safetensors").unlink()
    method = run.method
    assert isinstance(method, NatIMGFL)
    shape, drawn = Shape.of(site.model, run.study.data.image), method.drawn(site.own_proxies, 1)
    lessons = SiteLessons(site, run.study.method, shape, drawn, None)
    assert lessons.statistics
    for name, tensor in lessons.statistics.items():
        assert torch.equal(tensor, site.initial[name])
        assert not torch.equal(tensor, site.tensors[name])
        assert tensor is not site.initial[name]


@pytest.mark.parametrize("transport", ["weights", "vectors"])
def test_networks_of_a_round_are_gone_before_the_next(transport: str, tmp_path: Path) -> None:
    alive: dict[int, list[weakref.ref[Tensor]]] = {1: [], 2: [], 3: []}

    def listens(own: Site, reply: Message) -> Message:
        assert not [ref for number in range(1, own.round) for ref in alive[number] if ref() is not None]
        alive[own.round] += [weakref.ref(tensor) for tensor in reply.arrays.values()]
        return reply

    made(study({"transport": transport}), tmp_path, listens).train()
    assert all(alive.values())


def test_who_is_not_asked_stays_in_sixteen_bits(tmp_path: Path) -> None:
    run = trained(study({"rounds": 1}), sites(), tmp_path)
    model, proxies = run.channel._sites["south"].model, load_proxies(run.study)
    sent = halved(deployed(run, "south"))
    shape, positions = Shape.of(model, run.study.data.image), torch.arange(4)
    images = proxies.inputs(positions)
    teacher = NetworkTeacher(model, sent, shape)
    assert all(tensor is sent[name.removeprefix("model.")] for name, tensor in teacher._tensors.items())
    looked_up = VectorTeacher(vectors(model, shape, {}, proxies, positions, 4), positions, torch.device("cpu"))
    assert {looked_up._logits.dtype, *(part.dtype for part in looked_up._maps)} == {torch.float16}
    for said_by in (teacher.say(positions, images), looked_up.say(positions, images)):
        assert {said_by.logits.dtype, *(part.dtype for part in said_by.maps)} == {torch.float32}
    maps, logits = said(model, {name: tensor.float() for name, tensor in sent.items()}, images)
    assert torch.equal(teacher.say(positions, images).logits, logits)
    assert torch.equal(teacher.say(positions, images).maps[0], maps[0])


def test_more_sites_than_teachers_in_a_step(tmp_path: Path) -> None:
    run = trained(study({"teachers": 1, "weights": "learned", "server_steps": 12}), sites(), tmp_path)
    assert set(run.method.records(run.state)["rounds"][-1]["sites"]) == set(IMAGES)


def test_patients_kept_apart_are_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from polyclinic.data.dataset import SiteData

    shown: dict[str, set[int]] = {}
    inputs = SiteData.inputs

    def noted(self: SiteData, indices: Tensor) -> Tensor:
        shown.setdefault(self.site, set()).update(indices.tolist())
        return inputs(self, indices)

    run = Run(
        study({"weights": "learned", "direction": "both"}),
        sites(),
        _created(tmp_path / "a", study({"weights": "learned"})),
        Silent(),
    )
    for data in run.data.values():
        stay, apart = run.method.parts(data)  # type: ignore[attr-defined]
        assert sorted([*stay.tolist(), *apart.tolist()]) == data.splits["train"].tolist()
        of = {name: {data.cases[i].patient for i in part.tolist()} for name, part in data.splits.items()}
        held = {data.cases[i].patient for i in apart.tolist()}
        assert not held & {data.cases[i].patient for i in stay.tolist()}
        assert not held & (of["val"] | of["test"])
    # Before sites learn from the central model nothing is judged, so what is kept apart is never looked at.
    monkeypatch.setattr(SiteData, "inputs", noted)
    wanted = study({"weights": "learned", "t_warm": 3, "rounds": 2}, evaluation={"every": 0})
    late = Run(wanted, sites(), _created(tmp_path / "b", wanted), Silent())
    late.train()
    for site, data in late.data.items():
        stay, _ = late.method.parts(data)  # type: ignore[attr-defined]
        trained_on = shown[site] & set(data.splits["train"].tolist())
        assert trained_on == set(stay.tolist())


def _created(path: Path, wanted: Study) -> RunFolder:
    folder = RunFolder(path)
    folder.create(wanted)
    return folder


def test_patients_are_divided_once_for_all_rounds() -> None:
    method, north, south = NatIMGFL(study({"weights": "learned"})), sites()["north"], sites()["south"]
    (first, again), other = (method.parts(north), method.parts(north)), method.parts(south)
    assert first is not None
    assert other is not None
    assert first is again
    assert not torch.equal(first[1], other[1])


def test_everything_is_trained_on_where_weights_are_not_learned(tmp_path: Path) -> None:
    for number, settings in enumerate(
        ({}, {"weights": "learned", "beta": 0.0}, {"weights": "learned", "direction": "to-central"})
    ):
        wanted = study(settings)
        run = Run(wanted, sites(), _created(tmp_path / str(number), wanted), Silent())
        assert all(run.method.parts(data) is None for data in run.data.values())  # type: ignore[attr-defined]


@pytest.mark.parametrize("weights", ["uniform", "learned", "attention"])
def test_the_folder_says_what_the_weights_look_like(weights: str, tmp_path: Path) -> None:
    run = trained(study({"weights": weights}), sites(), tmp_path)
    run.test()
    central = json.loads((tmp_path / "transfer.json").read_text())
    assert [record["round"] for record in central["rounds"]] == [1, 2, 3]
    assert central["levels"] == ["1"]
    for record in central["rounds"]:
        assert 0 <= record["natural_accuracy"] <= 1
        assert {"loss", "natural", "matching", "soft"} <= record.keys()
        assert set(record["sites"]) == (set() if weights == "uniform" else set(IMAGES))
    north = json.loads((tmp_path / "transfer" / "north.json").read_text())
    assert north["levels"] == ["1", "3"]
    first, last = north["rounds"][0], north["rounds"][-1]
    assert "where" not in first
    assert "matching" not in first
    if weights != "uniform":
        assert torch.tensor(last["where"]).shape == torch.tensor(last["entropy"]).shape == (1, 2)
        assert torch.tensor(central["rounds"][-1]["sites"]["north"]["where"]).shape == (2, 1)
        assert 0 <= last["floor"] <= 1
    assert set(last.get("meta_steps", {})) == ({"jvp"} if weights == "learned" else set())


def test_several_findings_in_an_image(tmp_path: Path) -> None:
    data = sites()
    for own in data.values():
        own.targets = F.one_hot(own.targets, 2).float()
    task = {"kind": "multi-label"}
    run = trained(study({"weights": "learned", "q": 1}, task=task), data, tmp_path / "ours")
    assert "soft" in run.method.records(run.state)["rounds"][-1]
    common = {"model": NARROW, "models": MIXED, "training": {"batch_size": 4}, "task": task}
    alone = trained(toy_study("local", **common), data, tmp_path / "local")
    zero = trained(study(ZERO, task=task), data, tmp_path / "zero")
    assert same(deployed(zero, "north"), deployed(alone, "north"))
    assert not same(deployed(run, "north"), deployed(alone, "north"))


def test_samples_go_beside_a_sites_own_images(tmp_path: Path) -> None:
    sections = {
        "model": CNN,
        "models": {},
        "data": {"image": {"size": [16, 16]}},
        "synthesis": {"generator": ["amplitude"], "floor": 2, "style": 0.0},
    }
    data = enlarged(16)
    rows = data["south"].splits["train"]
    data["south"].splits["train"] = rows[data["south"].targets[rows] == 0]
    runs = [
        trained(study({"weights": "learned", **settings}, **{**sections, **more}), data, tmp_path / name)
        for name, settings, more in (
            ("with", {}, {}),
            ("again", {}, {}),
            ("without", {}, {"synthesis": None}),
        )
    ]
    assert runs[0].exchange is not None
    ends = [{site: deployed(run, site) for site in IMAGES} for run in runs]
    assert all(same(ends[0][site], ends[1][site]) for site in IMAGES)
    assert any(not same(ends[0][site], ends[2][site]) for site in IMAGES)


def test_warming_up_moves_every_network_on_natural_classes(tmp_path: Path) -> None:
    cold, warm = (
        trained(study({**ZERO, "warmup": passes, "server_steps": 0, "rounds": 1}), sites(), tmp_path / str(passes))
        for passes in (0, 2)
    )
    assert not same(cold.state.groups["central"], warm.state.groups["central"])
    assert same(cold.state.groups["central"], dict(cold.bench.initial))
    assert not same(deployed(cold, "north"), deployed(warm, "north"))


@pytest.mark.parametrize(
    ("settings", "sections", "words"),
    [
        ({}, {"aggregation": "masked"}, r"the network of each site.*aggregation\.backend: plain"),
        ({"transport": "vectors"}, {"aggregation": "masked"}, "what the network says"),
        ({}, {"model": {**CNN, "harmonise": 0.5}}, "harmonise: 0"),
        ({"alignment": "supcon"}, {"task": {"kind": "multi-label"}}, "alignment: mmd"),
        ({"weights": "learnt"}, {}, "learned"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(
    settings: dict[str, Any], sections: dict[str, Any], words: str
) -> None:
    with pytest.raises(StudyError, match=words):
        study(settings, **sections)


def test_a_study_without_natural_images_is_refused() -> None:
    raw = {**study().model_dump(mode="json"), "proxies": None}
    with pytest.raises(StudyError, match="no proxies"):
        validate_study(raw)


@pytest.mark.parametrize("part", ["site", "central"])
def test_a_network_without_taps_is_refused_before_anybody_trains(part: str, tmp_path: Path) -> None:
    own = {"name": "toys:linear"}
    wanted = study({"central": own}) if part == "central" else study({}, models={"north": own})
    with pytest.raises(StudyError, match="taps"):
        Run(wanted, sites(), _created(tmp_path, wanted), Silent())


def test_an_altered_natural_image_stops_the_run_before_round_one(tmp_path: Path) -> None:
    from toy_proxies import toy_proxies

    given = toy_proxies(tmp_path / "set")
    wanted = study({}, proxies=given)
    # ``toy_study`` sets its own public images.
    wanted = wanted.model_copy(update={"proxies": type(wanted.proxies)(**given)})  # type: ignore[misc]
    assert (len(CLASSES), PER_CLASS) == (3, 14)
    run = Run(wanted, sites(), _created(tmp_path / "run", wanted), Silent())
    image = Path(given["images"]) / "dog" / "03.png"
    image.write_bytes((Path(given["images"]) / "cat" / "03.png").read_bytes())
    with pytest.raises(DataError, match=r"dog/03\.png"):
        run.train()
    assert not run.records
    assert public_images() != given


def test_checking_a_study_pre_trains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("pre-trained while the study was checked")

    monkeypatch.setattr("polyclinic.models.pretraining.pretrain", never)
    check_sites({"natimg-fl": [study(proxies={**public_images(), "pretrain": 1})]}, sites())
