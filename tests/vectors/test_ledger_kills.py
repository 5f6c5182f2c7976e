"""Writers of a ledger that are killed at every step that they take in the file system."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hospitals import contribute, identity, ledger_with, roster, small_base, tree

from polyclinic.vectors.contribution import Contribution
from polyclinic.vectors.folders import is_digest
from polyclinic.vectors.ledger import Ledger

COORDINATOR = identity("coordinator")
STEPS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "fsync")
MOST = 200


def killed_at(step: int, within: Path, work: Callable[[], object]) -> bool:
    """Do the work in a child that kills itself before its ``step``-th step below a folder.

    Returns:
        Whether it was killed; otherwise it had fewer steps, and finished.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # threads do not outlive a fork
            _arm(step, within)
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def _arm(step: int, within: Path) -> None:
    left = step

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event not in STEPS or (event != "fsync" and not _touches(arguments, within)):
            return
        if event == "open" and not _writes(arguments):
            return
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sync = os.fsync

    def counted(descriptor: int) -> None:
        count("fsync", ())
        sync(descriptor)

    os.fsync = counted
    sys.addaudithook(count)


def _touches(arguments: tuple[Any, ...], within: Path) -> bool:
    # Below a folder that is open, rmtree names things by their last part alone.
    paths = [os.fspath(a) for a in arguments if isinstance(a, (str, os.PathLike))]
    return any(str(p).startswith(str(within)) or "/" not in str(p) for p in paths)


def _writes(arguments: tuple[Any, ...]) -> bool:
    flags = arguments[2]
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


def every_kill(prepared: Path, work: Callable[[Path], object], check: Callable[[Ledger, int], None]) -> int:
    """Kill the work at its first step, its second, ... each time on a fresh copy; check what is left. The steps."""
    for step in range(1, MOST):
        folder = prepared.parent / "tried"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(prepared, folder)
        died = killed_at(step, folder, lambda folder=folder: work(folder))  # type: ignore[misc]
        check(Ledger.open(folder), step)
        if not died:
            return step - 1
    raise AssertionError("the work never ended")


def state(ledger: Ledger) -> tuple[list[str], dict[str, str]]:
    """What a merge would read."""
    ledger.verify()
    return [c.digest for c in ledger.contributions], {c.digest: str(tree(c.folder)) for c in ledger.contributions}


def clean(ledger: Ledger) -> None:
    """Nothing in the folder but what the chain names."""
    left = {p.name for p in (ledger.folder / "contributions").iterdir()}
    assert left == set(ledger.state.known)
    assert all(is_digest(name) for name in left)
    for name in ledger.state.gone:
        found = {p.name for p in (ledger.folder / "contributions" / name).iterdir()}
        assert found == {"manifest.json", "signature.json"}
    assert not [line for line in ledger.verify() if "left over" in line]
    assert len(list(ledger.folder.iterdir())) == 5


def test_a_killed_add_leaves_the_old_state_or_the_new(tmp_path: Path) -> None:
    base = small_base(tmp_path / "base")
    ledger = ledger_with(tmp_path / "ledger", base, ["north", "south"])
    old = next(c.digest for c in ledger.contributions if c.site == "north")
    sent = contribute(tmp_path / "new", base, sequence=2, replaces=[old])
    before = state(ledger)
    after_add = [sent.digest, *(name for name in before[0] if name != old)]
    seen = []

    def check(found: Ledger, step: int) -> None:
        digests, _ = state(found)
        assert digests in (before[0], sorted(after_add)), step
        seen.append(sent.digest in digests)
        # The next one goes well, whatever was left, and cleans up.
        if seen[-1]:
            found.hold(sent.digest, "", COORDINATOR)
        else:
            assert state(found) == before
            found.add(tmp_path / "new", COORDINATOR)
        assert [c.digest for c in found.contributions] == sorted(after_add)
        assert tree(next(c for c in found.contributions if c.digest == sent.digest).folder) == tree(tmp_path / "new")
        clean(found)

    steps = every_kill(ledger.folder, lambda f: Ledger.open(f).add(tmp_path / "new", COORDINATOR), check)
    assert steps >= 12
    # Once it is in, it stays in: the line is the one moment that counts.
    assert seen == sorted(seen)
    assert seen.count(False) >= 8
    assert seen.count(True) >= 3


def test_a_killed_remove_leaves_the_old_state_or_the_new(tmp_path: Path) -> None:
    base = small_base(tmp_path / "base")
    ledger = ledger_with(tmp_path / "ledger", base, ["north", "south"])
    gone, stays = (c.digest for c in ledger.contributions)
    before = state(ledger)
    seen = []

    def check(found: Ledger, step: int) -> None:
        digests, _ = state(found)
        assert digests in (before[0], [stays]), step
        seen.append(digests == [stays])
        if seen[-1]:
            found.hold(stays, "", COORDINATOR)
        else:
            found.remove(gone, "left", COORDINATOR)
        assert [c.digest for c in found.contributions] == [stays]
        clean(found)

    steps = every_kill(ledger.folder, lambda f: Ledger.open(f).remove(gone, "left", COORDINATOR), check)
    assert steps >= 5
    assert seen == sorted(seen)
    assert {True, False} == set(seen)


@pytest.mark.parametrize("what", ["base", "contribution", "ledger"])
def test_a_killed_creation_leaves_a_whole_folder_or_none(what: str, tmp_path: Path) -> None:
    base = small_base(tmp_path / "base")
    makers: dict[str, Callable[[Path], object]] = {
        "base": small_base,
        "contribution": lambda out: contribute(out, base),
        "ledger": lambda out: Ledger.create(out, base.folder, COORDINATOR, roster()),
    }
    loaders: dict[str, Callable[[Path], object]] = {
        "base": type(base).load,
        "contribution": lambda out: Contribution.load(out, base, roster()),
        "ledger": lambda out: Ledger.open(out).verify(),
    }
    made = []
    for step in range(1, MOST):
        place = tmp_path / f"{what}-{step}"
        place.mkdir()
        out = place / "out"
        died = killed_at(step, place, lambda out=out: makers[what](out))  # type: ignore[misc]
        made.append(out.exists())
        if not out.exists():
            makers[what](out)
        loaders[what](out)
        if not died:
            break
    assert made == sorted(made)
    assert made.count(False) >= 5
    assert made[-1]
