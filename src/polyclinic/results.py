"""The results folder: what a run leaves behind, written so that a kill or a full disk loses no finished round."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from polyclinic.errors import RunError
from polyclinic.files import whole_file
from polyclinic.study import Study, dump_study, load_study

Json = dict[str, Any]
Result = TypeVar("Result")


class RunFolder:
    """One run's folder.

    ``study.yaml``, ``environment.json``, ``splits.csv``, ``rounds.jsonl``, ``state/`` (what a resumed run starts
    from; gone at the end), and at the end ``models/``, ``predictions/``, ``metrics.json``,
    ``replicates.safetensors``, ``privacy.json``, ``report.html``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.path / "metrics.json").is_file()

    @property
    def started(self) -> bool:
        """Whether a round was finished, or a run of a comparison begun."""
        return self.finished or any((self.path / name).exists() for name in ("rounds.jsonl", "runs"))

    @property
    def checkpoint(self) -> Path:
        """The server's state after the last finished round."""
        return self.path / "state" / "server.safetensors"

    def create(self, study: Study) -> None:
        """Make the folder and write the resolved study and the environment.

        A folder whose run ended before its first round (wrong data, say) can be used again.

        Raises:
            RunError: It exists and holds another run, or cannot be written.
        """
        if self.started:
            raise RunError(
                f"{self.path} already holds a run. Give another --out, or --resume {self.path} to go on with it."
            )
        self.guard(lambda: self.path.mkdir(parents=True, exist_ok=True))
        self.write("study.yaml", dump_study(study))
        self.write("environment.json", json.dumps(environment(), indent=2))

    def open(self, study: Study) -> None:
        """Go on with a folder that holds a run of the same study.

        Raises:
            RunError: It holds no run, or one of a study with other settings; names what differs.
        """
        before = self.study()
        changed = _changes(before.model_dump(mode="json"), study.model_dump(mode="json"))
        changed = [line for line in changed if not line.startswith(("device:", "data.root:"))]
        if changed:
            raise RunError(
                f"{self.path} was started with other settings, so its rounds cannot be continued:\n  "
                + "\n  ".join(changed)
                + "\nRestore them to resume, or start anew with another --out."
            )

    def study(self) -> Study:
        """The resolved study of this run."""
        path = self.path / "study.yaml"
        if not path.is_file():
            raise RunError(f"{self.path} is no results folder: it has no study.yaml.")
        return load_study(path)

    def rounds(self, upto: int | None = None) -> list[Json]:
        """Records of the finished rounds; with ``upto`` only so many are kept, in the file as well."""
        path = self.path / "rounds.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        if upto is not None and len(lines) > upto:
            lines = lines[:upto]
            self.write("rounds.jsonl", "".join(line + "\n" for line in lines))
        try:
            return [json.loads(line) for line in lines]
        except ValueError as error:
            raise RunError(f"{path} is damaged: {error}. Its rounds cannot be continued: start anew.") from None

    def add_round(self, record: Json) -> None:
        """Append one finished round."""

        def append() -> None:
            with (self.path / "rounds.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(plain_json(record)) + "\n")
                file.flush()
                os.fsync(file.fileno())

        self.guard(append)

    def write(self, name: str, text: str) -> None:
        """Write a text file as a whole or not at all."""
        path = self.path / name

        def write() -> None:
            with whole_file(path) as file:
                file.write(text.encode())

        self.guard(write)

    def guard(self, write: Callable[[], Result]) -> Result:
        """Call ``write`` and turn a full disk or a read-only folder into an error that says what is safe."""
        try:
            return write()
        except (OSError, RunError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
                raise RunError(
                    f"no space left on the disk of {self.path}. Finished rounds are safe: free some space and go on "
                    f"with --resume {self.path}."
                ) from cause
            if isinstance(error, RunError):
                raise
            raise RunError(f"{self.path} cannot be written: {error.strerror or error}. Give another --out.") from error


def new_folder(study: Study, out: Path | None) -> Path:
    """``out``, or ``runs/<study>-<time>`` below the current folder."""
    if out is not None:
        return out
    base = Path("runs") / f"{study.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = base, 2
    while path.exists():
        path, number = base.with_name(f"{base.name}-{number}"), number + 1
    return path


def environment() -> Json:
    """Versions and machine, for ``environment.json``."""
    import numpy
    import torch

    from polyclinic import __version__

    return {
        "polyclinic": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def plain_json(value: Any) -> Any:
    """The value with NaN and infinities as None, so that any JSON reader takes it."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _commit() -> str | None:
    """The commit that this code was checked out from, with ``+`` for local changes; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        head, status = (
            subprocess.run(
                ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for arguments in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--", str(here)])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}+" if status else head


def _changes(before: Any, after: Any, path: str = "") -> list[str]:
    """``a.b: old -> new`` for every leaf that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = list(dict.fromkeys([*before, *after]))
        inner = f"{path}." if path else ""
        return [line for key in keys for line in _changes(before.get(key), after.get(key), f"{inner}{key}")]
    return [] if before == after else [f"{path}: {before!r} -> {after!r}"]
