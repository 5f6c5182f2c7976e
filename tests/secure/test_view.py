"""The record of what each party sees."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from polyclinic.errors import DataError
from polyclinic.federation.channel import Channel
from polyclinic.federation.local import LocalChannel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Site
from polyclinic.secure.sum import PlainSum
from polyclinic.secure.view import Recorder


class Doubles:
    """A site that answers with twice what it was sent, or fails."""

    def __init__(self, name: str) -> None:
        self.name = name

    def handle(self, op: str, number: int, message: Message) -> Message:
        if op == "fail" and self.name == "north":
            raise ValueError("no scanner")
        return Message({"update/x": message.arrays["model/x"] * 2}, {"weight/update": 1.0})


def recorder(*names: str) -> Recorder:
    channel = LocalChannel({name: cast(Site, Doubles(name)) for name in names}, tolerant=True)
    made = Recorder(channel)
    made.begin_round(4)
    return made


def asked(*names: str) -> dict[str, Message]:
    return {name: Message.pack({"model": {"x": torch.full((2,), float(i))}}) for i, name in enumerate(names, 1)}


def passed(made: Recorder, *parties: str) -> list[tuple[str, int, str, str]]:
    return [(s.op, s.round, s.sender, s.receiver) for s in made.view(*parties)]


def test_everything_that_passes_is_kept_in_order() -> None:
    made = recorder("west", "east")
    messages = asked("west", "east")
    replies = made.call("train", messages)
    made.begin_round(5)
    made.call("test", {"west": messages["west"]})

    assert passed(made, "server") == [
        ("train", 4, "server", "east"),
        ("train", 4, "server", "west"),
        ("train", 4, "east", "server"),
        ("train", 4, "west", "server"),
        ("test", 5, "server", "west"),
        ("test", 5, "west", "server"),
    ]
    assert [s.message for s in made.seen[:4]] == [messages["east"], messages["west"], replies["east"], replies["west"]]
    assert made.seen[3].message.arrays["update/x"].tolist() == [2.0, 2.0]
    assert made.seen[2].message.arrays["update/x"].tolist() == [4.0, 4.0]


def test_a_view_is_what_its_parties_sent_or_received() -> None:
    made = recorder("west", "east", "north")
    made.call("train", asked("west", "east", "north"))

    assert passed(made, "east") == [("train", 4, "server", "east"), ("train", 4, "east", "server")]
    assert {s.sender for s in made.view("east", "north")} == {"server", "east", "north"}
    assert len(made.view("east", "north")) == 4
    assert made.view("server", "east") == made.view("server") == made.seen


def test_a_site_that_fails_was_sent_its_message() -> None:
    made = recorder("north", "west")
    assert list(made.call("fail", asked("north", "west"))) == ["west"]
    assert passed(made, "north") == [("fail", 4, "server", "north")]


def test_a_stream_records_a_reply_when_it_comes() -> None:
    made = recorder("west", "east")
    replies = made.stream("train", asked("west", "east"))
    assert made.seen == []
    assert next(replies)[0] == "east"
    assert [s.sender for s in made.seen] == ["server", "server", "east"]


@pytest.mark.parametrize("parties", [(), ("wset",), ("east", "wset")])
def test_a_party_that_does_not_exist_has_no_view(parties: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"one or more of \['east', 'server', 'west'\]"):
        recorder("west", "east").view(*parties)


def test_a_site_called_server_is_refused() -> None:
    with pytest.raises(DataError, match="cannot be called 'server'"):
        recorder("west", "server")


def test_the_wrapped_channel_does_the_work() -> None:
    inner = LocalChannel({name: cast(Site, Doubles(name)) for name in ("west", "north")}, tolerant=True)
    made: Channel = Recorder(inner)
    made.begin_round(6)
    assert (made.round, inner.round, made.sites) == (6, 6, ("north", "west"))
    made.call("fail", asked("north", "west"))
    assert made.absent == inner.absent == {"north": "ValueError: no scanner"}
    assert made.traffic is inner.traffic
    assert made.traffic.by_op()["fail"]["up"] > 0
    made.round = 9
    assert inner.round == 9


def test_a_sum_is_the_same_with_and_without_a_record() -> None:
    made = recorder("west", "east")
    total = PlainSum().sum(made, "train", asked("west", "east"))
    assert total.mean("update")["x"].tolist() == [3.0, 3.0]
    assert len(made.seen) == 4
