"""Sites in processes of their own: the same numbers as in one process, and what a killed one leaves behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import process_channel
import pytest
import torch
from process_channel import Moment, ProcessChannel
from toys import IMAGES, sites, toy_study, trained

from polyclinic.errors import UndeclaredError
from polyclinic.federation.message import Message
from polyclinic.results import RunFolder
from polyclinic.runner import Run, Silent
from polyclinic.secure.sum import PlainSum
from polyclinic.study import Study


class Counts:
    """A site that counts its calls, in its memory and in a file, and can be told to misbehave by the op's name."""

    def __init__(self, folder: Path, name: str) -> None:
        self.file, self.calls = folder / name, 0

    def handle(self, op: str, number: int, message: Message) -> Message:
        self.calls += 1
        self.file.write_text(str(self.calls))
        if op == "raise":
            raise ValueError("no scanner")
        if op == "leak":
            raise UndeclaredError("a leak")
        if op == "exit":
            os._exit(3)
        if op == "hang":
            time.sleep(600)
        if op == "close":
            for descriptor in os.listdir("/proc/self/fd"):
                if Path(f"/proc/self/fd/{descriptor}").is_socket():
                    os.close(int(descriptor))
            time.sleep(600)
        scalars = {"calls": self.calls, "round": number, "pid": os.getpid(), "threads": torch.get_num_threads()}
        return Message({"echo/x": message.arrays["model/x"] * 2}, scalars)


NAMES = ("east", "north", "west")


def counting(folder: Path) -> dict[str, Counts]:
    return {name: Counts(folder, name) for name in NAMES[::-1]}


def asked(*names: str) -> dict[str, Message]:
    return {name: Message.pack({"model": {"x": torch.ones(3)}}) for name in names}


def opened(study: Study, folder: Path) -> Run:
    made = RunFolder(folder)
    made.create(study)
    return Run(study, sites(), made, Silent())


def test_each_site_is_a_process_that_keeps_its_state(tmp_path: Path) -> None:
    own = counting(tmp_path)
    with ProcessChannel(own) as channel:
        channel.begin_round(7)
        channel.call("count", asked("west"))
        replies = channel.call("count", asked(*NAMES[::-1]))

        assert channel.sites == tuple(replies) == NAMES
        assert {name: reply.scalars["calls"] for name, reply in replies.items()} == {"east": 1, "north": 1, "west": 2}
        assert {reply.scalars["pid"] for reply in replies.values()} == {p.pid for p in channel.processes.values()}
        assert len({os.getpid(), *(p.pid for p in channel.processes.values())}) == 4
        assert [own[name].calls for name in NAMES] == [0, 0, 0]
        assert replies["west"].scalars["round"] == 7
        assert replies["west"].scalars["threads"] == 1
        assert replies["west"].arrays["echo/x"].tolist() == [2.0, 2.0, 2.0]
        assert channel.traffic.of_site("west")["bytes_down"] == 2 * len(asked("west")["west"].to_bytes())
        assert channel.traffic.of_site("east")["bytes_up"] == len(replies["east"].to_bytes())


@pytest.mark.parametrize("moment", ["before", "during", "after"])
def test_a_killed_site_stays_dead(moment: Moment, tmp_path: Path) -> None:
    with ProcessChannel(counting(tmp_path), {("north", "second"): moment}) as channel:
        channel.begin_round(1)
        assert list(channel.call("first", asked(*NAMES))) == ["east", "north", "west"]
        assert channel.processes["north"].is_alive()

        second = channel.call("second", asked(*NAMES))
        assert channel.processes["north"].exitcode == -signal.SIGKILL
        assert list(second) == [name for name in NAMES if name != "north" or moment == "after"]
        error = {"before": "BrokenPipeError", "during": "EOFError", "after": None}[moment]
        assert channel.absent == ({"north": f"{error}, exit code -9"} if error else {})
        assert (tmp_path / "north").read_text() == ("2" if moment == "after" else "1")

        channel.begin_round(2)
        assert list(channel.call("third", asked(*NAMES))) == ["east", "west"]
        assert channel.absent == {"north": "BrokenPipeError, exit code -9"}


def test_a_site_is_absent_with_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with ProcessChannel(counting(tmp_path)) as channel:
        channel.begin_round(1)
        assert channel.call("raise", asked("west")) == {}
        assert channel.absent == {"west": "ValueError: no scanner"}
        assert channel.call("count", asked("west"))["west"].scalars["calls"] == 2, "it raised, but is alive"

        assert channel.call("exit", asked("west")) == {}
        assert channel.absent["west"] == "EOFError, exit code 3"
        assert channel.call("close", asked("east")) == {}
        assert channel.absent["east"] == "EOFError, exit code None"
        monkeypatch.setattr(process_channel, "PATIENCE", 0.2)
        assert channel.call("hang", asked("north")) == {}
        assert channel.absent["north"] == "TimeoutError, exit code None"
        assert [process.is_alive() for process in channel.processes.values()] == [False] * 3


def test_a_leak_is_no_absence(tmp_path: Path) -> None:
    with ProcessChannel(counting(tmp_path)) as channel:
        with pytest.raises(UndeclaredError, match="a leak"):
            channel.call("leak", asked("west"))
        assert channel.absent == {}


def test_a_kill_that_never_came_fails_the_test(tmp_path: Path) -> None:
    channel = ProcessChannel(counting(tmp_path), {("west", "tarin"): "during"})
    with pytest.raises(AssertionError, match=r"so never killed: {\('west', 'tarin'\): 'during'}"), channel:
        channel.call("train", asked("west"))
    assert not any(process.is_alive() for process in channel.processes.values())


def test_no_child_is_left_behind_by_a_test_that_fails(tmp_path: Path) -> None:
    channel = ProcessChannel(counting(tmp_path), {("west", "train"): "during"})
    assert all(process.is_alive() for process in channel.processes.values())
    with pytest.raises(UndeclaredError, match="a leak"), channel:
        channel.call("leak", asked("west"))
    assert [process.exitcode for process in channel.processes.values()] == [-signal.SIGKILL] * 3


def _make_a_channel_and_die(folder: Path, held: Connection) -> None:
    channel = ProcessChannel(counting(folder))
    channel.call("count", asked(*NAMES))
    held.send([process.pid for process in channel.processes.values()])
    os.kill(os.getpid(), signal.SIGKILL)


def test_no_child_is_left_behind_by_a_parent_that_is_killed(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    watched, held = fork.Pipe(duplex=False)
    parent = fork.Process(target=_make_a_channel_and_die, args=(tmp_path, held))
    parent.start()
    held.close()
    children = watched.recv()
    parent.join()
    # The children inherited the other end: the pipe ends when the last of them does.
    if not watched.poll(20):
        for child in children:
            os.kill(child, signal.SIGKILL)
        pytest.fail("children outlived their parent")
    with pytest.raises(EOFError):
        watched.recv()


def test_fedavg_gives_the_same_model_as_in_one_process(tmp_path: Path) -> None:
    study = toy_study("fedavg", training={"batch_size": 4, "epochs": 2, "momentum": 0.9})
    local = trained(study, sites(), tmp_path / "local")
    run = opened(study, tmp_path / "processes")
    start = run.state.groups["model"]
    with ProcessChannel(run.channel._sites) as channel:
        run.channel = channel  # type: ignore[assignment]
        run.train()

    found, wanted = run.state.groups["model"], local.state.groups["model"]
    assert list(found) == list(wanted)
    for name in wanted:
        assert torch.equal(found[name], wanted[name])
        assert not torch.equal(found[name], start[name])
    assert [record["bytes"] for record in run.records] == [record["bytes"] for record in local.records]


def test_a_round_goes_on_with_the_exact_mean_of_the_survivors(tmp_path: Path) -> None:
    run = opened(toy_study("fedavg"), tmp_path)
    with ProcessChannel(run.channel._sites) as channel:
        rounds = run.method.server(channel, run.state, PlainSum())
        channel.begin_round(1)
        next(rounds)
        run.state.finished = 1
        before = run.state.groups["model"]

        channel.kill_at["south", "train"] = "during"
        channel.begin_round(2)
        next(rounds)
        after = run.state.groups["model"]
        assert channel.absent == {"south": "EOFError, exit code -9"}

        message = Message.pack({"model": before})
        updates = {n: run.channel._sites[n].handle("train", 2, message).group("update") for n in ("north", "west")}
        weights = {"north": IMAGES["north"], "west": IMAGES["west"]}
        for name, tensor in before.items():
            mean = sum(w * updates[site][name].double() for site, w in weights.items()) / sum(weights.values())
            assert torch.equal(after[name], (tensor.double() + mean).float())
            assert not torch.equal(after[name], tensor)

        run.state.finished = 2
        channel.begin_round(3)
        next(rounds)
        assert list(channel.absent) == ["south"]
