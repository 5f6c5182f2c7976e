"""``polyclinic vectors``: hospitals that are never online together still build one model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from polyclinic.terminal import DataRoot, Device, Out, Resume, Seed, Set, StudyFile, err, load, out, progress, say

if TYPE_CHECKING:
    from polyclinic.secure.identity import Identity
    from polyclinic.vectors.recipe import Recipe

vectors_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Build one model from hospitals that are never online together.\n\n"
    "The coordinator publishes a [bold]base[/bold] and starts a [bold]ledger[/bold]. A hospital runs "
    "[bold]train[/bold] and [bold]create[/bold], and sends one signed folder. The coordinator runs [bold]add[/bold], "
    "whenever one arrives, and [bold]merge[/bold], whenever there are enough: docs/how-to/never-online-together.md.",
)

BaseFolder = Annotated[Path, typer.Argument(metavar="BASE", help="Folder of a published base.")]
LedgerFolder = Annotated[Path, typer.Argument(metavar="LEDGER", help="Folder of a ledger.")]
Digest = Annotated[str, typer.Argument(metavar="DIGEST", help="Digest of a contribution, or its first digits.")]
Key = Annotated[Path, typer.Option("--key", metavar="NAME.key", help="Your private key (polyclinic keys new).")]
Coordinator = Annotated[
    Path | None,
    typer.Option(
        "--data", metavar="STUDY.yaml", help="Study of the coordinator's own images, to restore and judge on."
    ),
]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", metavar="RECIPE.yaml", help="How to merge.")]
RecipeSet = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe: --set rule=ties"),
]


@vectors_app.command("base")
def vectors_base(
    study: StudyFile,
    out_: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The new base.")],
    version: Annotated[str, typer.Option(help="Of the base, for people.")] = "1",
    weights: Annotated[
        Path | None, typer.Option(help="Values to publish, as safetensors \\[default: the study's start weights].")
    ] = None,
    merged: Annotated[Path | None, typer.Option(help="A merged model to publish as the next base.")] = None,
    set_: Set = None,
    seed: Seed = None,
    data_root: DataRoot = None,
) -> None:
    """Publish a base: weights, network, preprocessing, ordered classes, initialised head, digest."""
    from polyclinic.vectors.publishing import publish

    made = publish(load(study, set_, seed, None, data_root), out_, version=version, weights=weights, merged=merged)
    say(f"base: {made.folder}")
    say(f"classes: {', '.join(made.classes)}")
    say(f"digest: {made.digest} (publish it where nobody can change it)")


@vectors_app.command("train")
def vectors_train(
    base: BaseFolder,
    study: StudyFile,
    set_: Set = None,
    seed: Seed = None,
    out_: Out = None,
    resume: Resume = None,
    device: Device = None,
    data_root: DataRoot = None,
) -> None:
    """At a site: fine-tune the base on your own images, as any study is trained. Nothing leaves."""
    from polyclinic.errors import SiteError
    from polyclinic.results import new_folder
    from polyclinic.vectors.base import Base
    from polyclinic.vectors.fine_tuning import fine_tune_base

    say(f"base: {Base.load(base).digest} (is that the digest that the coordinator published?)")
    loaded = load(study, set_, seed, device, data_root)
    given = resume or new_folder(loaded, out_)
    again = f"Finished rounds are safe: go on with polyclinic vectors train {base} {study} --resume {given}"
    try:
        with progress(1) as shown:
            folder = fine_tune_base(base, loaded, out=None if resume else given, resume=resume, observer=shown)
    except KeyboardInterrupt:
        err.print(f"stopped. {escape(again)}", soft_wrap=True)
        raise typer.Exit(130) from None
    except SiteError:
        err.print(escape(again), soft_wrap=True)
        raise
    say(f"report: {folder / 'report.html'}")
    say(f"next: polyclinic vectors create {base} {folder} --key NAME.key --out FOLDER")


@vectors_app.command("create")
def vectors_create(
    base: BaseFolder,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Results folder of vectors train.")],
    key: Key,
    out_: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The new contribution.")],
    sequence: Annotated[int, typer.Option(min=1, help="Counts your contributions; never use one twice.")] = 1,
    replaces: Annotated[str, typer.Option(help="Digests of your earlier contributions to revoke, by commas.")] = "",
    vector: Annotated[bool, typer.Option(help="What training changed.")] = True,
    fisher: Annotated[bool, typer.Option("--fisher", help="Diagonal Fisher information, for rule fisher.")] = False,
    gram: Annotated[bool, typer.Option("--gram", help="Gram matrices of layer inputs, for rule regmean.")] = False,
    statistics: Annotated[
        bool, typer.Option("--statistics", help="Batch-norm statistics, for restoration bn-pooled.")
    ] = False,
    head: Annotated[bool, typer.Option("--head", help="Sums over features, for a ridge or LDA head.")] = False,
    precision: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the vector.")] = "float32",
    counts: Annotated[bool, typer.Option("--counts", help="State rounded numbers of images per class.")] = False,
    fewest: Annotated[int, typer.Option(min=1, help="Classes with fewer patients are left out of --head.")] = 5,
    max_auc: Annotated[
        float, typer.Option(min=0.5, max=1.0, help="Pass mark of the membership audit: its area under the curve.")
    ] = 0.65,
    licence: Annotated[str, typer.Option(help="Terms under which you give it.")] = "",
    ethics: Annotated[str, typer.Option(help="Reference of your ethics vote.")] = "",
    modality: Annotated[str, typer.Option(help="Kind of images, for people.")] = "",
) -> None:
    """At a site: audit what would leave, then write one signed contribution."""
    from pydantic import ValidationError

    from polyclinic.errors import StudyError
    from polyclinic.vectors.create import CreateOptions, create_contribution
    from polyclinic.yaml_settings import explain

    given = {
        "sequence": sequence,
        "replaces": [part.strip() for part in replaces.split(",") if part.strip()],
        "vector": vector,
        "fisher": fisher,
        "gram": gram,
        "statistics": statistics,
        "head": head,
        "precision": precision,
        "images_per_class": counts,
        "fewest": fewest,
        "max_auc": max_auc,
        "licence": licence,
        "ethics": ethics,
        "modality": modality,
    }
    try:
        options = CreateOptions.model_validate(given)
    except ValidationError as error:
        raise StudyError(explain(error, CreateOptions, "these options are not valid:")) from None
    with progress(1) as shown:
        made = create_contribution(base, run, out_, _identity(key), options, shown)
    audit = made.manifest.privacy.membership
    if audit is not None:
        say(f"membership audit: AUC {audit.auc:.3f} [{audit.low:.3f}, {audit.high:.3f}], pass mark {audit.limit:g}")
    elif vector:
        say("membership audit: undefined, and waived by --max-auc 1; RUN/membership.json says why")
    say(f"contribution: {out_} ({', '.join(file.name for file in made.manifest.files)})")
    say(f"digest: {made.digest}")


@vectors_app.command("ledger")
def vectors_ledger(
    base: BaseFolder,
    key: Key,
    roster: Annotated[Path, typer.Option(metavar="ROSTER.json", help="The sites' pinned keys.")],
    out_: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The new ledger.")],
) -> None:
    """Start a ledger of contributions to one base."""
    from polyclinic.secure.identity import Roster
    from polyclinic.vectors.ledger import Ledger

    ledger = Ledger.create(out_, base, _identity(key), Roster.load(roster))
    say(f"ledger: {out_}")
    say(f"head: {ledger.head}")


@vectors_app.command("add")
def vectors_add(
    ledger: LedgerFolder,
    contribution: Annotated[Path, typer.Argument(metavar="CONTRIBUTION", help="Folder that a site sent.")],
    key: Key,
) -> None:
    """Check a contribution and add it; a refused one leaves the ledger as it was."""
    from polyclinic.vectors.explaining import explain_ledger
    from polyclinic.vectors.ledger import Ledger

    opened = Ledger.open(ledger)
    added = opened.add(contribution, _identity(key))
    say(f"added: {added.digest} of {added.site}")
    # Sums for a head alone have no vector that could be compared.
    if added.names("vector"):
        _verdict(explain_ledger(ledger)[added.digest])
    else:
        say("admission: it brings no vector, so nothing of it was compared; polyclinic vectors hold keeps it out")
    say(f"head: {opened.head}")


@vectors_app.command("list")
def vectors_list(ledger: LedgerFolder) -> None:
    """List the contributions and releases of a ledger."""
    from polyclinic.vectors.ledger import Ledger

    opened = Ledger.open(ledger)
    table = Table("digest", "site", "sequence", "images", "brings", "decision", box=SIMPLE)
    for one in opened.contributions:
        brings = ", ".join(file.name.removesuffix(".safetensors") for file in one.manifest.files)
        decision = opened.decisions.get(one.digest, "")
        table.add_row(one.digest[:12], one.site, str(one.manifest.sequence), str(one.images), brings, decision)
    out.print(table)
    for release in opened.releases:
        state = " [yellow]withdraw it: it holds a removed contribution[/yellow]" if release.stale else ""
        out.print(f"release {release.model[:12]} of {len(release.contributions)} contributions{state}")
    say(f"head: {opened.head}")


@vectors_app.command("verify")
def vectors_verify(
    ledger: LedgerFolder,
    head: Annotated[str, typer.Option(help="A head noted earlier: the chain must still contain it.")] = "",
    model: Annotated[Path | None, typer.Option(help="A merged model: was it made of this ledger?")] = None,
) -> None:
    """Check every signature, every digest and the whole chain."""
    from polyclinic.vectors.ledger import Ledger

    opened = Ledger.open(ledger)
    for line in opened.verify(head=head or None):
        say(line)
    if model is not None:
        from polyclinic.vectors.merging import verify_model

        for line in verify_model(opened, model):
            say(line)
    out.print("[green]nothing wrong was found[/green]")


@vectors_app.command("remove")
def vectors_remove(
    ledger: LedgerFolder,
    digest: Digest,
    key: Key,
    reason: Annotated[str, typer.Option(help="Why, for the record.")],
) -> None:
    """Take a contribution out: its tensors are deleted, and what is merged from now on never knew it."""
    _decide(ledger, "remove", digest, reason, key)


@vectors_app.command("accept")
def vectors_accept(
    ledger: LedgerFolder,
    digest: Digest,
    key: Key,
    note: Annotated[str, typer.Option(help="Why, for the record.")],
) -> None:
    """After a person looked: merge a contribution that the admission report would hold back."""
    _decide(ledger, "accept", digest, note, key)


@vectors_app.command("hold")
def vectors_hold(
    ledger: LedgerFolder,
    digest: Digest,
    key: Key,
    note: Annotated[str, typer.Option(help="Why, for the record.")],
) -> None:
    """Keep a contribution out of merges without removing it."""
    _decide(ledger, "hold", digest, note, key)


@vectors_app.command("merge")
def vectors_merge(
    ledger: LedgerFolder,
    out_: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The merged model.")],
    recipe: RecipeFile = None,
    set_: RecipeSet = None,
    data: Coordinator = None,
    data_root: DataRoot = None,
    key: Annotated[Path | None, typer.Option(metavar="NAME.key", help="To note the model in the ledger.")] = None,
    purpose: Annotated[str, typer.Option(help="What the model is for, for its card.")] = "",
) -> None:
    """Merge what the ledger holds: model, recipe, record and model card."""
    from polyclinic.vectors.merging import merge_ledger

    study = None if data is None else load(data, None, None, None, data_root)
    with progress(1) as shown:
        made = merge_ledger(
            ledger,
            out_,
            _recipe(recipe, set_),
            study=study,
            identity=None if key is None else _identity(key),
            purpose=purpose,
            observer=shown,
        )
    _stages(made["metrics"])
    for warning in made["warnings"]:
        err.print(f"[yellow]warning:[/yellow] {escape(warning)}", soft_wrap=True)
    for note in made["notes"]:
        err.print(f"note: {escape(note)}", soft_wrap=True)
    say(f"model: {out_ / 'model.safetensors'}")
    say(f"card: {out_ / 'card.html'}")


@vectors_app.command("evaluate")
def vectors_evaluate(
    ledger: LedgerFolder,
    data: Annotated[Path, typer.Option("--data", metavar="STUDY.yaml", help="Study of the coordinator's own images.")],
    recipe: RecipeFile = None,
    set_: RecipeSet = None,
    data_root: DataRoot = None,
) -> None:
    """Judge a recipe beside the base, single sites, noise, shuffled vectors and the ensemble; writes no model."""
    from polyclinic.vectors.merging import evaluate_ledger

    with progress(1) as shown:
        rows = evaluate_ledger(ledger, _recipe(recipe, set_), load(data, None, None, None, data_root), shown)
    _stages(rows)


@vectors_app.command("explain")
def vectors_explain(
    ledger: LedgerFolder,
    digest: Annotated[str, typer.Argument(metavar="[DIGEST]", help="One contribution \\[default: all].")] = "",
) -> None:
    """Say of each contribution how it compares with the others, and why it is merged or held back."""
    from polyclinic.vectors.explaining import explain_ledger
    from polyclinic.vectors.ledger import Ledger

    opened = Ledger.open(ledger)
    reports = explain_ledger(opened)
    wanted = [opened.find(digest)] if digest else [one.digest for one in opened.contributions]
    for found in wanted:
        if found in reports:
            out.print(f"[bold]{found[:12]}[/bold] of {escape(reports[found].site)}")
            _verdict(reports[found])
        else:
            say(f"{found[:12]} brings no vector: there is nothing to compare")
    if not wanted:
        say("no contributions yet")


def _verdict(report: Any) -> None:
    from polyclinic.vectors.verdicts import figures_of

    color = "green" if report.verdict == "accept" else "yellow"
    decided = f" (a person decided: {report.decision})" if report.decision else ""
    out.print(f"admission: [{color}]{report.verdict}[/{color}]{decided}")
    say(f"  {figures_of(report)}")
    for line in [*report.reasons, *report.notes]:
        out.print(f"  {escape(line)}", soft_wrap=True)


def _decide(ledger: Path, event: Literal["remove", "accept", "hold"], digest: str, why: str, key: Path) -> None:
    from polyclinic.vectors.ledger import Ledger

    opened = Ledger.open(ledger)
    getattr(opened, event)(digest, why, _identity(key))
    say(f"{event}: noted in {ledger}")
    say(f"head: {opened.head}")


def _stages(rows: list[dict[str, Any]]) -> None:
    """Models down, the metrics that people look at first across."""
    if not rows:
        return
    from polyclinic.evaluation.names import metric_label

    wanted = [name for name in ("balanced_accuracy", "auroc", "dice") if name in rows[0]["metrics"]]
    table = Table("model", box=SIMPLE)
    for name in wanted:
        table.add_column(metric_label(name), no_wrap=True)
    for row in rows:
        table.add_row(escape(row["name"]), *(_shown(row["metrics"][name]) for name in wanted))
    out.print(table)


def _shown(cell: dict[str, Any]) -> str:
    if cell["value"] is None:
        return "undefined"
    interval = "" if cell.get("low") is None else f" [{cell['low']:.3f}, {cell['high']:.3f}]"
    return f"{cell['value']:.3f}{escape(interval)}"


def _identity(path: Path) -> Identity:
    from polyclinic.secure.identity import Identity, ask_passphrase

    return Identity.load(path, passphrase=ask_passphrase(path))


def _recipe(path: Path | None, set_: list[str] | None) -> Recipe:
    from polyclinic.vectors.recipe import load_recipe

    return load_recipe(path, set_ or [])
