"""What a person sees while a study runs: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from polyclinic.study import Study


class TerminalObserver:
    """Shows one bar for the runs of a comparison, one for rounds and one for the sites of the round.

    Args:
        console: Where to print.
        runs: Number of runs (methods times seeds).
    """

    def __init__(self, console: Console, runs: int = 1) -> None:
        self._console = console
        self._live = console.is_terminal
        self._bars = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            disable=not self._live,
        )
        self._runs, self._done_runs = runs, 0
        self._tasks: dict[str, TaskID] = {}
        self._seconds: list[float] = []
        self._rounds_left = 0
        self._sites = 0

    def __enter__(self) -> TerminalObserver:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def loading(self, site: str, done: int, total: int) -> None:
        """So many of a site's images are decoded."""
        self._show(f"images of {site}", done, total, "")
        if done == total:
            self._drop(f"images of {site}")
            if not self._live:
                self._console.print(f"{site}: {total} images read")

    def working(self, what: str, done: int, total: int) -> None:
        """So many parts of a long piece of work that is no training are done; its bar goes with the last."""
        self._show(what, done, total, "")
        if done == total:
            self._drop(what)
            if not self._live:
                self._console.print(f"{what}: finished")

    def run_started(self, study: Study, sites: list[str], finished: int) -> None:
        """Training begins, or goes on after ``finished`` rounds."""
        self._label = f"{study.method.title}, seed {study.seed}"
        self._rounds, self._sites = study.method.rounds, len(sites)
        self._rounds_left = self._rounds - finished
        if finished:
            self._console.print(f"{self._label}: going on after round {finished}")
        if self._runs > 1:
            self._show("runs", self._done_runs, self._runs, "")
        self._show("rounds", finished, self._rounds, f"{self._label}{self._left()}")
        self._show("sites", 0, self._sites, "")
        self._answered: set[str] = set()

    def called(self, op: str, site: str, number: int, loss: float | None) -> None:
        """A site has answered."""
        if op != "train":
            summing = op.startswith(("masked-", "ring-"))
            self._show(
                "sites", self._sites, self._sites, "summing" if summing else {"test": "testing"}.get(op, "judging")
            )
            return
        self._answered.add(site)
        heard = "" if loss is None else f"{site}: loss {loss:.3f}"
        self._show("sites", min(len(self._answered), self._sites), self._sites, heard)

    def round_finished(self, record: Mapping[str, Any]) -> None:
        """A round is finished and safe on disk."""
        self._seconds.append(float(record["seconds"]))
        self._rounds_left -= 1
        self._show("rounds", int(record["round"]), self._rounds, f"{self._label}{self._left()}")
        self._show("sites", 0, self._sites, _losses(record))
        self._answered.clear()
        if not self._live:
            done = f"{self._label}, round {record['round']}/{self._rounds}"
            self._console.print(f"{done}: {_losses(record)}{self._left()}", soft_wrap=True, highlight=False)
        for site, reason in record["absent"].items():
            self._console.print(f"[yellow]round {record['round']}: {site} is absent: {escape(reason)}")
        for incident in record["incidents"]:
            self._console.print(f"[yellow]round {record['round']}: the sum was begun again: {escape(incident)}")

    def run_finished(self, folder: Path, metrics: Mapping[str, Any]) -> None:
        """Results are written, now or before this run was resumed."""
        from polyclinic.evaluation.names import HEADLINE, metric_label

        self._done_runs += 1
        for name in ("rounds", "sites"):
            self._drop(name)
        if self._runs > 1:
            self._show("runs", self._done_runs, self._runs, "")
            metric = HEADLINE[metrics["task"]]
            value = metrics["mean"][metric]["value"]
            shown = "undefined" if value is None else f"{value:.3f}"
            who = f"{metrics['method']}, seed {metrics['seed']}"
            self._console.print(f"{who}: {metric_label(metric)} {shown} (test images, mean of sites)")

    def _left(self) -> str:
        """The time that the rounds to come need if they take as long as those so far."""
        if not self._seconds:
            return ""
        pending = self._rounds_left + (self._runs - self._done_runs - 1) * self._rounds
        return f", {_duration(pending * sum(self._seconds) / len(self._seconds))} left"

    def _show(self, name: str, done: int, total: int, note: str) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=total, note=note)
        self._bars.update(self._tasks[name], completed=done, total=total, note=note)

    def _drop(self, name: str) -> None:
        if name in self._tasks:
            self._bars.remove_task(self._tasks.pop(name))


def _losses(record: Mapping[str, Any]) -> str:
    heard = [entry["loss"] for entry in record["sites"].values() if entry["loss"] is not None]
    judged = [entry["val"]["loss"] for entry in record["sites"].values() if "loss" in entry.get("val", {})]
    parts = [f"loss {sum(heard) / len(heard):.3f}"] if heard else []
    parts += [f"validation {sum(judged) / len(judged):.3f}"] if judged else []
    return ", ".join(parts) or "no loss"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return time.strftime("%M min %S s" if seconds < 3600 else "%H h %M min", time.gmtime(seconds))
