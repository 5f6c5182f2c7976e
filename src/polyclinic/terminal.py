"""What all commands share: the two consoles, options, reading a study, running it with progress shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from polyclinic import api

if TYPE_CHECKING:
    from polyclinic.progress import TerminalObserver
    from polyclinic.study import Study

out = Console()
err = Console(stderr=True)

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study file.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting: --set method.rounds=5")
]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of training; the data split does not change.")]
Out = Annotated[Path | None, typer.Option("--out", help="Results folder \\[default: runs/<study>-<time>].")]
Resume = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Go on with a stopped run after its last finished round.")
]
Device = Annotated[Literal["cpu", "cuda"] | None, typer.Option(help="Where the networks run.")]
DataRoot = Annotated[
    Path | None, typer.Option(envvar="POLYCLINIC_DATA", help="Folder of the images, instead of the study's data.root.")
]


def say(line: str) -> None:
    """Print one line as it is: paths are neither wrapped nor read as markup."""
    out.print(printable(line), soft_wrap=True, markup=False, highlight=False)


def printable(text: str) -> str:
    """Text whose control characters are shown and not obeyed: it may quote a file that somebody sent."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def overrides(set_: list[str] | None, seed: int | None, device: str | None) -> list[str]:
    given = list(set_ or [])
    if seed is not None:
        given.append(f"seed={seed}")
    if device is not None:
        given.append(f"device={device}")
    return given


def load(
    path: Path | None, set_: list[str] | None, seed: int | None, device: str | None, data_root: Path | None
) -> Study:
    from polyclinic.errors import StudyError
    from polyclinic.study import load_study

    if path is None:
        raise StudyError("give a study file, or --resume with the results folder of a stopped run.")
    return load_study(path, overrides=overrides(set_, seed, device), data_root=data_root)


def run_study(study: Study, folder: Path | None, resume: Path | None) -> None:
    from polyclinic.comparison import with_controls
    from polyclinic.errors import SiteError
    from polyclinic.results import new_folder

    study = with_controls(study)
    seeds = len(study.compare.seeds) or 1
    given = folder if resume else new_folder(study, folder)
    again = f"Finished rounds are safe: go on with polyclinic run --resume {resume or given}"
    try:
        with progress((1 + len(study.compare.methods)) * seeds) as observer:
            path = api.run(study, out=given, resume=resume, observer=observer)
    except KeyboardInterrupt:
        err.print(f"stopped. {escape(again)}", soft_wrap=True)
        raise typer.Exit(130) from None
    except SiteError:
        err.print(escape(again), soft_wrap=True)
        raise
    print_table(path)
    say(f"report: {path / 'report.html'}")


@contextmanager
def progress(runs: int) -> Iterator[TerminalObserver]:
    from polyclinic.progress import TerminalObserver

    with TerminalObserver(out, runs) as observer:
        yield observer


def print_table(folder: Path) -> None:
    rows, title = api.headline(folder)
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*map(escape, row.values()))
    out.print(table)
