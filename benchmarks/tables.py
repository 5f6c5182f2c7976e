"""Measured cells and the tables made of them, as every benchmark here writes them: Markdown, and the same as JSON."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Json = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """One table: what it shows, its columns, its rows as text, and what a reader must know to read it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


class Results:
    """The results of one benchmark, kept cell by cell so that a stopped benchmark goes on where it was.

    Args:
        name: Of the benchmark; its files are ``<name>.json`` and ``<name>.md``.
        folder: Where they lie.
        fresh: Measure every cell again.
    """

    def __init__(self, name: str, folder: Path = RESULTS, *, fresh: bool = False) -> None:
        self.name, self.folder = name, folder
        self._fresh = fresh
        self._done: set[str] = set()
        path = self._path("json")
        self._kept: Json = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.cells: Json = dict(self._kept.get("cells", {}))

    def cell(self, key: str, settings: Mapping[str, Any], measure: Callable[[], Json]) -> Json:
        """What ``measure`` returns, or returned before with the same code and settings.

        Args:
            key: Names the cell, as ``speed/resnet18/0``.
            settings: All that the measurement depends on beside the code and the machine.
            measure: Gives numbers and texts.
        """
        made_of = {"code": code(), "settings": json.loads(json.dumps(settings)), "machine": machine()}
        known = self.cells.get(key)
        if known and not self._fresh and {name: known[name] for name in made_of} == made_of:
            print(f"{key}: measured before, {known['date']}", flush=True)
        else:
            print(f"{key}: measuring", flush=True)
            known = {**made_of, "commit": commit(), "date": now(), "measured": measure()}
            self.cells[key] = known
            self._write("json", json.dumps({**self._kept, "cells": self.cells}, indent=1) + "\n")
        self._done.add(key)
        measured: Json = known["measured"]
        return measured

    def write(self, title: str, intro: str, tables: Sequence[Table], *, seeds: Sequence[int]) -> None:
        """Write both files, the Markdown to the screen as well. Cells that were not asked for are dropped."""
        self.cells = {key: cell for key, cell in self.cells.items() if key in self._done}
        about = {
            "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
            "commit": ", ".join(sorted({cell["commit"] for cell in self.cells.values()})),
            "seeds": list(seeds),
            "machine": machine(),
            "date": now(),
        }
        tables_json = [asdict(table) for table in tables]
        everything = {"benchmark": self.name, **about, "tables": tables_json, "cells": self.cells}
        self._write("json", json.dumps(everything, indent=1) + "\n")
        lines = [f"# {title}", "", intro, ""]
        lines += [f"- {name}: {_inline(value)}" for name, value in about.items()]
        text = "\n".join([*lines, *(line for table in tables for line in _markdown(table))]) + "\n"
        self._write("md", text)
        print(text)

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self.name}.{suffix}"

    def _write(self, suffix: str, text: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{self.name}.{suffix}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self._path(suffix))


@cache
def code() -> str:
    """Digest of the package and the benchmarks: cells measured with other code are measured again."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


@cache
def commit() -> str:
    """The commit that the code was checked out from, with ``+`` for local changes; ``unknown`` outside a checkout."""
    try:
        head, changed = (
            subprocess.run(
                ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
            ).stdout.strip()
            for arguments in (
                ["rev-parse", "--short=12", "HEAD"],
                ["status", "--porcelain", "--", "src", "benchmarks/*.py"],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}+" if changed else head


@cache
def machine() -> Json:
    """Size of this machine and the versions that speed depends on."""
    from importlib.metadata import version

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30),
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def now() -> str:
    """Date and time, to the minute."""
    return time.strftime("%Y-%m-%d %H:%M")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else f"`{value}`"


def _markdown(table: Table) -> list[str]:
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    lines = ["", f"## {table.title}", "", *(f"| {' | '.join(row)} |" for row in rows)]
    return [*lines, "", table.note] if table.note else lines
