"""Answers that are read one by one: what is refused, with which words, and what becomes of the site."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch

from polyclinic.errors import SiteError
from polyclinic.federation.answers import accepted, check_arrays, checked, nobody
from polyclinic.federation.local import LocalChannel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Site
from polyclinic.secure.view import Recorder

LIKE = {"a": torch.empty(2, 3, device="meta"), "b": torch.empty((), device="meta")}


def answer(changes: dict[str, Any] | None = None, weight: Any = 2.0) -> Message:
    arrays = {"a": torch.ones(2, 3, dtype=torch.float16), "b": torch.tensor(1.0), **(changes or {})}
    scalars = {} if weight is None else {"weight/model": weight}
    return Message.pack({"model": {name: a for name, a in arrays.items() if a is not None}}, **scalars)


class Answers:
    def __init__(self, reply: Message) -> None:
        self.reply = reply

    def handle(self, op: str, number: int, message: Message) -> Message:
        return self.reply


def channel(tolerant: bool, **replies: Message) -> LocalChannel:
    made = LocalChannel(cast(dict[str, Site], {s: Answers(reply) for s, reply in replies.items()}), tolerant=tolerant)
    made.begin_round(7)
    return made


def read(site: str, reply: Message) -> tuple[dict[str, torch.Tensor], float]:
    return checked(site, "model", LIKE, reply)


def test_a_whole_answer_gives_its_arrays_and_weight() -> None:
    reply = answer(weight=3)
    arrays, weight = checked("north", "model", LIKE, reply)
    assert weight == 3.0
    assert {name: id(array) for name, array in arrays.items()} == {n: id(a) for n, a in reply.group("model").items()}
    assert checked("north", "model", LIKE, answer(weight=0))[1] == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"a": None}, "model/a not at all; it was to be sent with shape (2, 3)."),
        ({"c": torch.ones(1)}, "model/c with shape (1,); it was to be sent not at all."),
        ({"a": torch.ones(3, 2)}, "model/a with shape (3, 2); it was to be sent with shape (2, 3)."),
        ({"b": torch.tensor(float("nan"))}, "model/b with numbers that are not finite. Lower training.lr"),
        ({"a": torch.full((2, 3), float("-inf"))}, "model/a with numbers that are not finite."),
    ],
    ids=["missing", "more", "shape", "nan", "infinity"],
)
def test_arrays_that_cannot_be_used_are_refused(changes: dict[str, Any], words: str) -> None:
    for look in (
        lambda r: checked("north", "model", LIKE, r),
        lambda r: check_arrays("north", "model", LIKE, r.group("model")),
    ):
        with pytest.raises(SiteError, match=re.escape(f"site 'north' sent {words}")):
            look(answer(changes))


@pytest.mark.parametrize("weight", [None, -1.0, float("nan"), float("inf"), "2"])
def test_weights_that_cannot_be_used_are_refused(weight: Any) -> None:
    with pytest.raises(SiteError, match=re.escape(f"site 'north' gave 'model' the weight {weight!r}")):
        checked("north", "model", LIKE, answer(weight=weight))


@pytest.mark.parametrize("wrap", [lambda made: made, Recorder], ids=["local", "recorded"])
def test_a_refused_site_is_absent_where_the_channel_is_tolerant(wrap: Callable[[LocalChannel], Any]) -> None:
    replies = {"east": answer(), "north": answer(weight=-1.0), "west": answer(weight=5)}
    made = channel(True, **replies)
    found = {
        site: weight for site, (_, weight) in accepted(wrap(made), "train", dict.fromkeys(replies, Message()), read)
    }
    assert found == {"east": 2, "west": 5}
    assert list(made.absent) == ["north"]
    assert made.absent["north"].startswith("SiteError: site 'north' gave 'model' the weight -1.0")

    made = channel(False, **replies)
    with pytest.raises(SiteError, match="site 'north' gave 'model' the weight -1.0"):
        list(accepted(wrap(made), "train", dict.fromkeys(replies, Message()), read))
    assert not made.absent


def test_a_round_without_any_answer_is_an_error() -> None:
    made = channel(True, north=answer({"a": None}))
    with pytest.raises(
        SiteError, match=r"no site answered 'train' in round 7 \(north: SiteError: .*model/a not at all"
    ):
        list(accepted(made, "train", {"north": Message()}, read))
    assert str(nobody(channel(True), "ask")) == "no site answered 'ask' in round 7 (none was asked)."
