"""Real processes that are killed in the middle of a masked sum: the others finish it exactly."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from parties import Consortium, consortium
from process_channel import Moment, ProcessChannel

from polyclinic.errors import SiteError
from polyclinic.federation.message import Message

PHASES = ("masked-keys", "masked-shares", "masked-vector", "masked-agree", "masked-open")
VICTIM = "c"


@pytest.fixture(autouse=True)
def _no_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)


class Killer(ProcessChannel):
    """Kills the victim in one phase of the sum of one purpose."""

    plan: tuple[str, str, Moment] | None = None

    def stream(self, op: str, messages: Mapping[str, Message]) -> Iterator[tuple[str, Message]]:
        """As ``ProcessChannel``."""
        purpose = next(iter(messages.values())).scalars.get("purpose", "")
        if self.plan is not None and self.plan[:2] == (purpose, op):
            self.kill_at[VICTIM, op] = self.plan[2]
            self.plan = None
        return super().stream(op, messages)


def check(made: Consortium, purpose: str, contributors: str, asked: str) -> None:
    _, opened = made.opened[purpose]
    assert "".join(opened.sites) == contributors
    wanted = made.by_hand(list(contributors), list(asked))
    if purpose == "counts":
        wanted = {64: wanted[64][:1]}
    assert {bits: lanes.tolist() for bits, lanes in opened.lanes.items()} == wanted


@pytest.mark.parametrize("moment", ["before", "during", "after"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("purpose", ["counts", "values"])
def test_a_site_killed_at_any_time_leaves_an_exact_sum(
    tmp_path: Path, purpose: str, phase: str, moment: Moment
) -> None:
    made = consortium(tmp_path, 4)
    with Killer(made.sites) as channel:
        made.channel = channel  # type: ignore[assignment]
        channel.plan = (purpose, phase, moment)
        total = made.sum()

        assert channel.plan is None
        assert channel.processes[VICTIM].exitcode == -signal.SIGKILL
        assert [n for n, process in channel.processes.items() if process.is_alive()] == ["a", "b", "d"]
        arrived = phase in PHASES[3:] or (phase, moment) == ("masked-vector", "after")
        killed_in_counts = purpose == "counts"
        check(made, "counts", "abcd" if arrived or not killed_in_counts else "abd", "abcd")
        left = "abcd" if arrived and not killed_in_counts else "abd"
        check(made, "values", left, "abd" if killed_in_counts and not arrived else "abcd")
        assert total.weights == {"update": sum(made.weights[s] for s in left)}
        assert made.sums.incidents == []


@pytest.mark.parametrize("moment", ["before", "during", "after"])
def test_a_site_killed_in_training_and_the_rounds_after(tmp_path: Path, moment: Moment) -> None:
    made = consortium(tmp_path, 4)
    with Killer(made.sites, {(VICTIM, "train"): moment}) as channel:
        made.channel = channel  # type: ignore[assignment]
        for number in (1, 2):
            made.sum(number)
            check(made, "values", "abd", "abd")
        assert VICTIM in channel.absent


def test_two_killed_of_five_take_a_fresh_attempt(tmp_path: Path) -> None:
    made = consortium(tmp_path, 5, aggregation={"backend": "masked", "fewest": 3})
    with ProcessChannel(made.sites, {("b", "masked-vector"): "during", ("e", "masked-vector"): "before"}) as channel:
        made.channel = channel  # type: ignore[assignment]
        made.sum()
        check(made, "counts", "acd", "acd")
        check(made, "values", "acd", "acd")
        assert len(made.sums.incidents) == 1
        assert "only 3 of at least 4 sites (a, c, d) are left" in made.sums.incidents[0]


def test_two_killed_of_four_end_the_round_with_the_reason(tmp_path: Path) -> None:
    made = consortium(tmp_path, 4)
    with Killer(made.sites) as channel:
        made.channel = channel  # type: ignore[assignment]
        channel.plan = ("values", "masked-vector", "during")
        channel.kill_at["a", "masked-keys"] = "after"
        with pytest.raises(SiteError, match=r"no sum came about: only two sites \(b, d\) are left"):
            made.sum()
        assert "values" not in made.opened
