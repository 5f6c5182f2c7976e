"""The weighted sum over sites, and its plain backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyclinic.errors import SiteError
from polyclinic.federation.local import LocalChannel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Site
from polyclinic.secure.sum import PlainSum, Total


class Answers:
    """A site with a ready answer."""

    def __init__(self, reply: Callable[[], Message]) -> None:
        self.reply = reply

    def handle(self, op: str, number: int, message: Message) -> Message:
        return self.reply()


def update(weight: float, **arrays: list[float]) -> Message:
    return Message.pack({"update": {n: torch.tensor(a) for n, a in arrays.items()}}, **{"weight/update": weight})


def total(replies: Mapping[str, Callable[[], Message]], tolerant: bool = False) -> Total:
    sites = {name: cast(Site, Answers(reply)) for name, reply in replies.items()}
    channel = LocalChannel(sites, tolerant=tolerant)
    channel.begin_round(3)
    return PlainSum().sum(channel, "train", dict.fromkeys(replies, Message()))


def test_known_numbers_with_uneven_weights() -> None:
    found = total(
        {
            "a": lambda: update(1, w=[1.0, 10.0], b=[2.0]),
            "b": lambda: update(3, w=[5.0, -10.0], b=[0.0]),
            "c": lambda: update(0, w=[100.0, 100.0], b=[100.0]),
        }
    )
    assert found.weights == {"update": 4.0}
    assert found.sums["update"]["w"].tolist() == [16.0, -20.0]
    assert found.sums["update"]["w"].dtype == torch.float64
    assert {n: a.tolist() for n, a in found.mean("update").items()} == {"w": [4.0, -5.0], "b": [0.5]}


def test_groups_have_weights_of_their_own() -> None:
    def reply(weight: float, value: float) -> Callable[[], Message]:
        groups = {"update": {"w": torch.tensor(value)}, "control": {"w": torch.tensor(value * 10)}}
        return lambda: Message.pack(groups, loss=value, **{"weight/update": weight, "weight/control": 1.0})

    found = total({"a": reply(3, 1.0), "b": reply(1, 5.0)})
    assert float(found.mean("update")["w"]) == 2.0
    assert float(found.mean("control")["w"]) == 30.0
    assert found.scalars["b"]["loss"] == 5.0


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=8), data=st.data())
def test_the_order_of_sites_does_not_matter(values: list[float], data: st.DataObject) -> None:
    replies = {f"s{i}": (lambda i=i, v=v: update(i + 1, w=[v])) for i, v in enumerate(values)}
    names = data.draw(st.permutations(list(replies)))
    straight = total(replies).mean("update")["w"]
    shuffled = total({name: replies[name] for name in names}).mean("update")["w"]

    assert straight.tolist() == shuffled.tolist()
    weights = np.arange(1, len(values) + 1)
    assert straight.item() == pytest.approx(np.average(np.float64(values), weights=weights), abs=1e-6)


def test_one_reply_is_in_memory_at_a_time() -> None:
    alive: list[Callable[[], bool]] = []

    def reply() -> Message:
        import weakref

        assert sum(is_there() for is_there in alive) <= 1, "older replies must be gone"
        message = update(1, w=[1.0] * 1000)
        reference = weakref.ref(message.arrays["update/w"])
        alive.append(lambda: reference() is not None)
        return message

    total({f"s{i}": reply for i in range(6)})
    assert len(alive) == 6


def fail() -> Message:
    raise ValueError("no power")


def test_absent_sites_are_left_out_of_the_weights() -> None:
    found = total({"a": lambda: update(1, w=[4.0]), "b": fail}, tolerant=True)
    assert found.mean("update")["w"].tolist() == [4.0]


def test_when_no_site_answers() -> None:
    with pytest.raises(SiteError, match=r"no site answered 'train' in round 3 \(a: ValueError: no power; b: "):
        total({"a": fail, "b": fail}, tolerant=True)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    with pytest.raises(SiteError, match="site 'a' gave 'update' the weight"):
        total({"a": lambda: update(weight, w=[1.0])})
    with pytest.raises(SiteError, match="the weight nan"):
        total({"a": lambda: Message.pack({"update": {"w": torch.ones(1)}})})


@pytest.mark.parametrize("other", [{"w": [1.0]}, {"w": [1.0, 2.0], "v": [1.0]}, {"v": [1.0, 2.0]}])
def test_sites_with_other_arrays_are_refused(other: dict[str, list[float]]) -> None:
    with pytest.raises(SiteError, match=r"site 'b' answered update/[wv] with shape"):
        total({"a": lambda: update(1, w=[1.0, 2.0]), "b": lambda: update(1, **other)})


def test_weights_that_are_all_zero_have_no_mean() -> None:
    with pytest.raises(SiteError, match="add up to zero"):
        total({"a": lambda: update(0, w=[1.0])}).mean("update")
