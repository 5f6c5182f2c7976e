"""A channel to sites that are processes of their own, which tests can kill at any op."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Literal, Protocol

import torch

from polyclinic.errors import RunError, SiteError, UndeclaredError
from polyclinic.federation.channel import Traffic
from polyclinic.federation.message import Message

PATIENCE = 60.0
"""Seconds after which a site that does not answer is stopped, so that a deadlock fails a test and does not hang it."""

Moment = Literal["before", "during", "after"]


class Handles(Protocol):
    """What a site must be able to do."""

    def handle(self, op: str, number: int, message: Message) -> Message:
        """Answer one call."""


class ProcessChannel:
    """Forks one child per site, which keeps the site's state; messages travel through pipes in their binary form.

    Asks one site after another, as ``LocalChannel`` does, so a stream that is given up leaves nothing in a pipe.
    Tolerant: a site that raised, or whose process is gone, is absent. A context manager, which leaves no child behind.

    Args:
        sites: By name, as they are when the channel is made; the parent's own copies never change.
        kill_at: ``{(site, op): moment}``: SIGKILL this site's process when this op is called: ``before`` its message
            is sent, ``during`` its work (the child stops itself on entry), or ``after`` its reply was received.
            May be added to between rounds. A kill that never came fails the test when the channel is left.
    """

    def __init__(self, sites: Mapping[str, Handles], kill_at: Mapping[tuple[str, str], Moment] | None = None) -> None:
        self.round = 0
        self.traffic = Traffic()
        self.absent: dict[str, str] = {}
        self.sites = tuple(sorted(sites))
        self.kill_at = dict(kill_at or {})
        self.processes: dict[str, BaseProcess] = {}
        self._pipes: dict[str, Connection] = {}
        fork = multiprocessing.get_context("fork")
        for name in self.sites:
            self._pipes[name], theirs = fork.Pipe()
            ends = list(self._pipes.values())
            self.processes[name] = fork.Process(target=_serve, args=(sites[name], theirs, ends), name=name, daemon=True)
            self.processes[name].start()
            theirs.close()  # or its end would not be noticed

    def __enter__(self) -> ProcessChannel:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for name in self.sites:
            self.kill(name)
            self._pipes[name].close()
        assert kind or not self.kill_at, f"never called, so never killed: {self.kill_at}"

    def kill(self, name: str) -> None:
        """SIGKILL a site's process, for good, and wait for its end."""
        self.processes[name].kill()
        self.processes[name].join()

    def begin_round(self, number: int) -> None:
        """Start a round: empty ``absent`` and ``traffic``."""
        self.round, self.absent, self.traffic = number, {}, Traffic()

    def stream(self, op: str, messages: Mapping[str, Message]) -> Iterator[tuple[str, Message]]:
        """Let each site answer in turn, in the order of their names."""
        for name in sorted(messages):
            moment = self.kill_at.pop((name, op), None)
            if moment == "before":
                self.kill(name)
            started = time.perf_counter()
            data = messages[name].to_bytes()
            answer = self._ask(name, (op, self.round, data, moment == "during"))
            if moment == "after":
                self.kill(name)
            up = len(answer) if isinstance(answer, bytes) else 0
            self.traffic.add(name, op, down=len(data), up=up, seconds=time.perf_counter() - started)
            if isinstance(answer, Exception):
                raise answer
            if isinstance(answer, bytes):
                yield name, Message.from_bytes(answer)
            else:
                self.absent[name] = answer

    def call(self, op: str, messages: Mapping[str, Message]) -> dict[str, Message]:
        """Gather ``stream``."""
        return dict(self.stream(op, messages))

    def refuse(self, site: str, error: SiteError) -> None:
        """Count a site that answered as absent."""
        self.absent[site] = f"{type(error).__name__}: {error}"

    def _ask(self, name: str, request: tuple[object, ...]) -> Any:
        """The reply in bytes, the reason of the site's absence as text, or an error that is no absence."""
        pipe, process = self._pipes[name], self.processes[name]
        try:
            pipe.send(request)
            if not pipe.poll(PATIENCE):
                raise TimeoutError
            return pipe.recv()
        except (EOFError, OSError) as error:
            process.join(timeout=1)  # a dying process closes its pipe a moment before it is dead
            reason = f"{type(error).__name__}, exit code {process.exitcode}"
            self.kill(name)
            return reason


def _serve(site: Handles, pipe: Connection, ends: list[Connection]) -> None:
    """The child's life: answer until the parent is gone or kills it."""
    for end in ends:
        end.close()  # the parent's, which must be the only holder: its death ends all children
    torch.set_num_threads(1)
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        pipe.send(_answer(site, *request))


def _answer(site: Handles, op: str, number: int, data: bytes, die: bool) -> bytes | str | Exception:
    message = Message.from_bytes(data)
    if die:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        return site.handle(op, number, message).to_bytes()
    except (UndeclaredError, RunError) as error:
        return error  # no absence, here as in LocalChannel
    except Exception as error:
        return f"{type(error).__name__}: {error}"
