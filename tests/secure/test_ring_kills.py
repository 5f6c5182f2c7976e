"""Sites of the ring as processes that are killed: before, during and after each phase."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from parties import consortium
from process_channel import Moment, ProcessChannel
from rings import RING, exact_sums, opened_sums, purpose

from polyclinic.errors import SiteError
from polyclinic.federation.message import Message

MOMENTS: tuple[Moment, ...] = ("before", "during", "after")
PHASES = ("keys", "key", "prepare", "pass")


class InOneSum(ProcessChannel):
    """Kills in the sum of one purpose only."""

    def __init__(self, sites: Mapping[str, Any], of: str, kill_at: Mapping[tuple[str, str], Moment]) -> None:
        super().__init__(sites)
        self._of, self._waiting = of, dict(kill_at)

    def stream(self, op: str, messages: Mapping[str, Message]) -> Iterator[tuple[str, Message]]:
        """As ever, once that sum has begun."""
        if purpose(next(iter(messages.values()))) == self._of:
            self.kill_at |= self._waiting
            self._waiting = {}
        return super().stream(op, messages)


CASES = [
    *((site, of, op, moment) for of in ("counts", "values") for op in PHASES for site in "bd" for moment in MOMENTS),
    *(("b", of, "open", moment) for of in ("counts", "values") for moment in MOMENTS),
]


@pytest.fixture(autouse=True)
def libraries() -> None:
    pytest.importorskip("seal")
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")


@pytest.mark.parametrize(("site", "of", "op", "moment"), CASES)
def test_the_ring_goes_on_without_a_killed_site(site: str, of: str, op: str, moment: Moment, tmp_path: Path) -> None:
    """In round 1 b is the initiator and a the last of the ring."""
    c = consortium(tmp_path, 4, aggregation=RING)
    with InOneSum(c.sites, of, {(site, f"ring-{op}"): moment}) as channel:
        c.channel = channel  # type: ignore[assignment]
        total = c.sum()
        alive = {name for name, process in channel.processes.items() if process.is_alive()}
    assert alive == set("abcd") - {site}
    # Nothing is missed of a site that has given all it had to give before it died.
    late = (op, moment) == ("pass", "after") and site == "d"
    late = late or (op, moment) == ("open", "after")
    summed = c.opened["values"][0].sites
    assert summed == tuple("abcd" if late and of == "values" else sorted(alive))
    assert opened_sums(c) == exact_sums(c)
    assert total.weights["update"] == sum(c.weights[s] for s in summed)


def test_two_sites_die_and_two_are_too_few(tmp_path: Path) -> None:
    c = consortium(tmp_path, 4, aggregation=RING)
    kills: dict[tuple[str, str], Moment] = {("b", "ring-prepare"): "during", ("d", "ring-pass"): "during"}
    with InOneSum(c.sites, "values", kills) as channel:
        c.channel = channel  # type: ignore[assignment]
        with pytest.raises(SiteError, match="no sum came about"):
            c.sum()


def test_two_of_seven_die_in_turn(tmp_path: Path) -> None:
    c = consortium(tmp_path, 7, aggregation=RING | {"key_holder": "initiator"})
    kills: dict[tuple[str, str], Moment] = {("b", "ring-open"): "during", ("d", "ring-pass"): "after"}
    with InOneSum(c.sites, "values", kills) as channel:
        c.channel = channel  # type: ignore[assignment]
        c.sum()
    assert c.opened["values"][0].sites == ("a", "c", "e", "f", "g")
    assert opened_sums(c) == exact_sums(c)
