"""The channel to sites of this process: order, bytes, absence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch

from polyclinic.errors import RunError, SiteError, UndeclaredError
from polyclinic.federation.local import LocalChannel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Site


class Echo:
    """A site that answers with its name and round, or with what it is told to do."""

    def __init__(self, name: str, log: list[str], then: Callable[[], Message] | None = None) -> None:
        self.name, self.log, self.then = name, log, then

    def handle(self, op: str, number: int, message: Message) -> Message:
        self.log.append(self.name)
        return self.then() if self.then else Message({"echo/x": message.arrays["model/x"] * 2}, {"round": number})


def fails(error: Exception) -> Callable[[], Message]:
    def then() -> Message:
        raise error

    return then


def channel(log: list[str], then: dict[str, Callable[[], Message]] | None = None, **options: Any) -> LocalChannel:
    sites = {name: Echo(name, log, (then or {}).get(name)) for name in ("west", "east", "north")}
    made = LocalChannel(cast(dict[str, Site], sites), **options)
    made.begin_round(7)
    return made


def asked(*names: str) -> dict[str, Message]:
    return {name: Message.pack({"model": {"x": torch.ones(3)}}) for name in names}


def test_sites_answer_in_the_order_of_their_names() -> None:
    log: list[str] = []
    made = channel(log)
    replies = made.call("train", asked("west", "north", "east"))

    assert made.sites == ("east", "north", "west")
    assert log == list(replies) == ["east", "north", "west"]
    assert replies["west"].scalars == {"round": 7}
    assert torch.equal(replies["west"].arrays["echo/x"], torch.full((3,), 2.0))


def test_only_those_who_are_asked_answer() -> None:
    log: list[str] = []
    assert list(channel(log).call("train", asked("west"))) == log == ["west"]


def test_a_stream_asks_the_next_site_only_when_it_is_wanted() -> None:
    log: list[str] = []
    replies = channel(log).stream("train", asked("west", "north", "east"))
    assert log == []
    next(replies)
    assert log == ["east"]


def test_every_byte_is_counted() -> None:
    made = channel([])
    messages = asked("west", "east")
    replies = [made.call("train", messages)["west"], made.call("train", messages)["west"], made.call("test", messages)]
    down, up = len(messages["west"].to_bytes()), len(cast(Message, replies[0]).to_bytes())

    assert made.traffic.by_op() == {"train": {"up": 4 * up, "down": 4 * down}, "test": {"up": 2 * up, "down": 2 * down}}
    west = made.traffic.of_site("west")
    assert (west["bytes_up"], west["bytes_down"]) == (3 * up, 3 * down)
    assert west["seconds"] > 0
    assert made.traffic.of_site("north") == {"bytes_up": 0, "bytes_down": 0, "seconds": 0}


def test_a_new_round_starts_at_zero() -> None:
    made = channel([], {"west": fails(ValueError("no"))}, tolerant=True)
    made.call("train", asked("west", "east"))
    made.begin_round(8)
    assert (made.round, dict(made.absent), made.traffic.by_op()) == (8, {}, {})


def test_a_failed_site_is_absent_with_its_reason_and_was_sent_its_message() -> None:
    made = channel([], {"north": fails(ValueError("no scanner"))}, tolerant=True)
    messages = asked("north", "west")

    assert list(made.call("train", messages)) == ["west"]
    assert made.absent == {"north": "ValueError: no scanner"}
    assert made.traffic.of_site("north")["bytes_down"] == messages["north"].nbytes
    assert made.traffic.of_site("north")["bytes_up"] == 0


def test_a_failed_site_ends_the_call_unless_absence_is_allowed() -> None:
    log: list[str] = []
    made = channel(log, {"north": fails(ValueError("no scanner"))})
    with pytest.raises(SiteError, match="site 'north' failed in 'train', round 7: no scanner"):
        made.call("train", asked("east", "north", "west"))
    assert log == ["east", "north"]


@pytest.mark.parametrize("error", [UndeclaredError("a leak"), RunError("the disk is full")])
def test_a_leak_or_a_full_disk_is_no_absence(error: Exception) -> None:
    made = channel([], {"north": fails(error)}, tolerant=True)
    with pytest.raises(type(error), match=str(error)):
        made.call("train", asked("north", "west"))
    assert made.absent == {}


def test_hidden_sites_answer_but_are_not_on_the_roster() -> None:
    made = channel([], hidden=cast(dict[str, Site], {"pooled": Echo("pooled", [])}))
    assert "pooled" not in made.sites
    assert list(made.call("train", asked("pooled"))) == ["pooled"]


def test_the_observer_hears_of_each_answer() -> None:
    heard: list[tuple[str, str]] = []
    made = channel([], on_call=lambda op, site, reply: heard.append((op, site)))
    made.call("train", asked("west", "east"))
    assert heard == [("train", "east"), ("train", "west")]
