"""The site's side of an op: what handlers get, and the guard at the door."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from polyclinic.data.dataset import SiteData
from polyclinic.data.manifest import Case
from polyclinic.errors import SiteError, UndeclaredError
from polyclinic.federation.local import LocalChannel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Leaf, Op, Site, Workbench
from polyclinic.models.registry import start_model
from polyclinic.models.weights import snapshot
from polyclinic.study import Study
from polyclinic.tasks import make_task

LEAVES = (Leaf("update", "sum", "images"), Leaf("loss", "scalar", "images"), Leaf("weight/*", "scalar", "counts"))
PATIENTS = ["a", "a", "b", "c", "c", "c", "d", "e"]


def data(site: str) -> SiteData:
    """Eight training images of five patients, none else."""
    cases = [Case(f"{i}.png", name, site, label="normal", split="train") for i, name in enumerate(PATIENTS)]
    pixels = torch.rand(8, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    empty = torch.arange(0)
    splits = {"train": torch.arange(8), "val": empty, "test": empty}
    return SiteData(site, cases, pixels, torch.arange(8) % 2, splits)


Make = Callable[..., Site]


@pytest.fixture
def make(tiny_study: Callable[..., Study], tmp_path: Path) -> Make:
    def made(name: str = "north", run: Any = None, leaves: Sequence[Leaf] = LEAVES, **sections: Any) -> Site:
        study = tiny_study(**sections)
        bench = Workbench(lambda: start_model(study), "cpu")
        ops = {"train": Op(run or (lambda site, message: Message()), tuple(leaves))}
        task = make_task(study.task, study.training)
        return Site(name, study, data(name), task, workbench=bench, ops=ops, folder=tmp_path)

    return made


def answers(**parts: Any) -> Callable[[Site, Message], Message]:
    return lambda site, message: Message(**parts)


def test_declared_arrays_and_scalars_pass(make: Make) -> None:
    reply = Message({"update/w": torch.ones(1)}, {"loss": 0.5, "weight/update": 3.0, "weight/other": 1.0})
    assert make(run=lambda site, message: reply).handle("train", 1, Message()) is reply


@pytest.mark.parametrize(
    ("parts", "what"),
    [
        ({"arrays": {"images/0": torch.ones(1)}}, r"arrays 'images'.*declared: update"),
        ({"arrays": {"loss": torch.ones(1)}}, "arrays 'loss'"),
        ({"arrays": {"updates/w": torch.ones(1)}}, "arrays 'updates'"),
        ({"scalars": {"patient": "Müller"}}, r"scalar 'patient'.*declared: loss, weight/\*"),
        ({"scalars": {"update": 1.0}}, "scalar 'update'"),
        ({"scalars": {"weights": 1.0}}, "scalar 'weights'"),
    ],
)
@pytest.mark.parametrize("tolerant", [False, True])
def test_nothing_undeclared_leaves(make: Make, parts: dict[str, Any], what: str, tolerant: bool) -> None:
    channel = LocalChannel({"north": make(run=answers(**parts))}, tolerant=tolerant)
    channel.begin_round(1)
    with pytest.raises(UndeclaredError, match=f"site 'north', op 'train'.*{what}.*not sent"):
        channel.call("train", {"north": Message()})
    assert channel.absent == {}


def test_an_op_without_leaves_sends_nothing(make: Make) -> None:
    with pytest.raises(UndeclaredError, match="declared: nothing"):
        make(run=answers(scalars={"loss": 1.0}), leaves=()).handle("train", 1, Message())


def test_an_unknown_op_names_the_nearest(make: Make) -> None:
    with pytest.raises(SiteError, match="site 'north' has no op 'tran'. Did you mean 'train'?"):
        make().handle("tran", 1, Message())


def test_a_new_round_reaches_state(make: Make) -> None:
    def run(site: Site, message: Message) -> Message:
        site.state.save("personal", {"x": torch.tensor(float(site.round))})
        return Message()

    site = make(run=run)
    for number in (1, 2):
        site.handle("train", number, Message())
    make().handle("train", 2, Message())
    found = site.state.load("personal")
    assert found is not None
    assert found[0]["x"].item() == 1.0, "a second attempt at round 2 sees round 1"


@pytest.mark.parametrize(("kind", "weight"), [("images", 8.0), ("patients", 5.0), ("uniform", 1.0)])
def test_the_weight_of_a_site(make: Make, kind: str, weight: float) -> None:
    site = make(aggregation={"weight": kind})
    assert site.weight == weight
    assert site.images == 8


def test_start_weights_are_the_same_at_every_site_and_survive_training(make: Make) -> None:
    north, west = make("north"), make("west")
    first = snapshot(north.tensors)
    north.train(steps=2)
    assert any(not torch.equal(north.tensors[n], first[n]) for n in first)
    for name, tensor in first.items():
        assert torch.equal(north.initial[name], tensor)
        assert torch.equal(west.initial[name], tensor)


def test_the_update_is_what_training_changed(make: Make) -> None:
    site = make()
    before = snapshot(site.tensors)
    site.train(steps=1, lr=0.1)
    update = site.update(before)
    for name, tensor in before.items():
        assert torch.allclose(tensor + update[name], site.tensors[name], atol=1e-7)
    site.load(before)
    assert all(not u.any() for u in site.update(before).values())


def test_training_draws_by_site_round_and_purpose(make: Make) -> None:
    def after(name: str, number: int, purpose: str) -> torch.Tensor:
        site = make(name, training={"batch_size": 2})
        site.round = number
        site.load(site.initial)
        site.train(purpose=purpose, steps=1)
        return torch.cat([t.flatten().double() for t in site.tensors.values()])

    base = after("north", 1, "train")
    assert torch.equal(base, after("north", 1, "train"))
    draws = [base, after("west", 1, "train"), after("north", 2, "train"), after("north", 1, "finetune")]
    assert len({tuple(d.tolist()) for d in draws}) == 4


def test_the_learning_rate_follows_the_schedule(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    monkeypatch.setattr("polyclinic.federation.site.train", lambda *args, lr, **rest: seen.append(lr))
    site = make(training={"lr": 0.4, "schedule": "cosine"}, method={"rounds": 2})
    for site.round in (1, 2):
        site.train()
    site.train(lr=0.01)
    assert seen == pytest.approx([0.4, 0.2, 0.01])
