"""The command line: parse, call the API, print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from polyclinic import api
from polyclinic.cli_vectors import vectors_app
from polyclinic.errors import PolyclinicError
from polyclinic.terminal import (
    DataRoot,
    Device,
    Out,
    Resume,
    Seed,
    Set,
    StudyFile,
    err,
    load,
    out,
    overrides,
    printable,
    progress,
    run_study,
    say,
)

if TYPE_CHECKING:
    from polyclinic.study import TaskSettings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Train medical-image models at several hospitals together, while every image stays where it was taken.\n\n"
    "Start with [bold]polyclinic demo[/bold]; then write a study file (see examples/) and "
    "[bold]polyclinic run[/bold] it.",
)
data_app = typer.Typer(no_args_is_help=True, help="Prepare images: manifests, splits, partitions, made-up images.")
app.add_typer(data_app, name="data")
keys_app = typer.Typer(no_args_is_help=True, help="Keys of a site: make, show, exchange, pin.")
app.add_typer(keys_app, name="keys")
audit_app = typer.Typer(no_args_is_help=True, help="Attack a study's own messages: what could others find out?")
app.add_typer(audit_app, name="audit")
app.add_typer(vectors_app, name="vectors")
Kind = Annotated[
    Literal["multi-class", "multi-label", "segmentation"], typer.Option("--task", help="What the labels are.")
]
Classes = Annotated[str, typer.Option(help="Class names in order, separated by commas.")]


def main() -> None:
    """Entry point: known errors are printed without a traceback and exit with 2."""
    try:
        app(prog_name="polyclinic")
    except PolyclinicError as error:
        err.print(f"[bold red]error:[/bold red] {escape(printable(str(error)))}", soft_wrap=True)
        sys.exit(2)


@app.command()
def demo(set_: Set = None, seed: Seed = None, out: Out = None, resume: Resume = None, device: Device = None) -> None:
    """Run the bundled study: four made-up hospitals, six methods, one report. Under two minutes on two cores."""
    study = api.demo_study(overrides(set_, seed, device))
    run_study(study, out, resume)


@app.command()
def run(
    study: Annotated[Path | None, typer.Argument(metavar="STUDY.yaml", help="The study file.")] = None,
    set_: Set = None,
    seed: Seed = None,
    out: Out = None,
    resume: Resume = None,
    device: Device = None,
    data_root: DataRoot = None,
) -> None:
    """Run a study: its method, beside it those of its compare section, one report."""
    if study is None and resume is not None:
        from polyclinic.results import RunFolder

        RunFolder(resume).study()
        study = resume / "study.yaml"
    run_study(load(study, set_, seed, device, data_root), out, resume)


@app.command()
def compare(
    study: StudyFile,
    methods: Annotated[
        str, typer.Option(help="Methods, separated by commas \\[default: the study's, else the controls].")
    ] = "",
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas \\[default: the study's, else 0,1,2].")] = "",
    set_: Set = None,
    out: Out = None,
    resume: Resume = None,
    device: Device = None,
    data_root: DataRoot = None,
) -> None:
    """Run several methods with several seeds: one table with paired differences and confidence intervals."""
    loaded = api.comparison_study(
        load(study, set_, None, device, data_root), _names(methods), [_whole(text) for text in _names(seeds)]
    )
    run_study(loaded, out, resume)


@app.command()
def check(
    study: StudyFile,
    set_: Set = None,
    data_root: DataRoot = None,
    show: Annotated[
        bool, typer.Option("--show", help="Only print the study with every default written out, as YAML.")
    ] = False,
) -> None:
    """Validate a study and its data without training: every image is read and the network is built."""
    from polyclinic.study import dump_study

    loaded = load(study, set_, None, None, data_root)
    if show:
        print(dump_study(loaded), end="")
        return
    with progress(1) as observer:
        found = api.check(loaded, observer)
    table = Table("site", "devices", "patients", "train", "val", "test", "labels of the training images")
    for name, site in found["sites"].items():
        labels = escape(", ".join(f"{label} {n}" for label, n in site["labels"]["train"].items()))
        images = [str(site["images"][part]) for part in ("train", "val", "test")]
        table.add_row(name, escape(", ".join(site["device"])), str(sum(site["patients"].values())), *images, labels)
    out.print(table)
    for site_name, notes in found["notes"].items():
        for note in notes:
            out.print(f"[yellow]note:[/yellow] {escape(f'{site_name}: {note}' if site_name else note)}")
    networks = {f"network of {name}": model for name, model in found.get("models", {}).items()}
    for what, model in (networks or {"network": found["model"]}).items():
        out.print(f"{escape(what)} {escape(model['name'])}: {model['parameters']:,} parameters")
    if "proxies" in found:
        public = found["proxies"]
        out.print(
            f"public images {escape(public['name'])}: {public['images']:,} of {len(public['classes'])} classes, each "
            "as the manifest says"
        )
    out.print("[green]nothing wrong was found[/green]")


@app.command()
def predict(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder, or a merged model's.")],
    images: Annotated[Path, typer.Argument(help="An image, a folder of images, or a manifest (CSV).")],
    out_: Annotated[Path, typer.Option("--out", help="A CSV file; for segmentation a folder for the masks.")],
    site: Annotated[
        str | None,
        typer.Option(
            help="Whose personal model to use, where sites have their own; and whose threshold, where "
            "task.threshold is validation (without it: the mean of the sites' thresholds)."
        ),
    ] = None,
) -> None:
    """Use a finished run's model on new files: probabilities to CSV, masks as PNG or NIfTI."""
    written = api.predict(run_folder, images, out_, site=site)
    say(f"predictions: {written}")


@app.command()
def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Results folder of a finished run or comparison.")],
) -> None:
    """Write report.html again from the results folder."""
    say(f"report: {api.report(run_folder)}")


@app.command()
def methods() -> None:
    """List the methods and what can be combined with what."""
    table = Table("method", "what it is", "model", "paper", box=SIMPLE)
    for row in api.methods():
        limits = [f"needs {row['needs']}"] if row["needs"] else []
        limits += [row["where"]] if row["where"] != "anywhere" else []
        table.add_row(row["name"], "; ".join([row["title"], *limits]), row["model"], row["reference"])
    out.print(table)
    networks = Table("network", "what it is", "images", "tasks", box=SIMPLE)
    for row in api.networks():
        networks.add_row(row["name"], row["title"], row["dimensions"], row["tasks"])
    out.print(networks)
    out.print("Aggregation (aggregation): plain, masked, ring-he, ring-as-published; all but plain need three sites.")
    out.print("Normalisation (model.norm): batch, batch-local (not pooled), group, instance.")


@app.command(hidden=True)
def schema() -> None:
    """Print the JSON schema of the study file."""
    import json

    from polyclinic.study import study_schema

    print(json.dumps(study_schema(), indent=2))


@data_app.command("build")
def data_build(
    folder: Annotated[Path, typer.Argument(help="Folder of DICOM, NIfTI, PNG, JPEG, TIFF or NPZ files.")],
    out_: Annotated[Path, typer.Option("--out", help="The manifest: CSV or Parquet.")],
    labels: Annotated[Path | None, typer.Option(help="Table with an image column and labels, patients, ...")] = None,
    site: Annotated[str, typer.Option(help="Owner of all images, where the table has no site column.")] = "",
) -> None:
    """Make a manifest from a folder of images and a table of labels."""
    built = api.build(folder, labels, out_, site=site)
    parts = [f"{len(built.cases)} images", f"{built.masks} masks" if built.masks else ""]
    parts.append(f"{len(built.ignored)} other files ignored (first: {built.ignored[0]})" if built.ignored else "")
    say(f"manifest: {out_} ({', '.join(part for part in parts if part)})")


@data_app.command("split")
def data_split(
    manifest: Annotated[Path, typer.Argument(help="A manifest.")],
    out_: Annotated[Path, typer.Option("--out", help="The new manifest.")],
    classes: Classes,
    task: Kind = "multi-class",
    fractions: Annotated[str, typer.Option(help="Train, validation and test shares.")] = "0.6,0.15,0.25",
    kind: Annotated[
        Literal["random", "consecutive"], typer.Option(help="Drawn, or as stretches of the manifest's order.")
    ] = "random",
    gap: Annotated[int, typer.Option(min=0, help="consecutive: patients left out between two parts.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
) -> None:
    """Divide the patients of a manifest into train, val and test."""
    from polyclinic.errors import StudyError

    shares = [_number(text) for text in _names(fractions)]
    if len(shares) != 3:
        raise StudyError(f"--fractions {fractions!r}: give three numbers, as in 0.6,0.15,0.25.")
    written = api.split(manifest, _task(task, classes), out_, kind=kind, gap=gap, fractions=shares, seed=seed)
    say(f"manifest: {written}")


@data_app.command("partition")
def data_partition(
    manifest: Annotated[Path, typer.Argument(help="A manifest; its site column is replaced.")],
    out_: Annotated[Path, typer.Option("--out", help="The new manifest.")],
    classes: Classes,
    kind: Annotated[
        Literal["device", "iid", "dirichlet", "quantity", "consecutive"], typer.Option(help="How sites are made.")
    ],
    task: Kind = "multi-class",
    sites: Annotated[int, typer.Option(min=1, help="Number of sites (not for device).")] = 4,
    alpha: Annotated[float, typer.Option(help="Concentration of the Dirichlet draw: small is uneven.")] = 0.5,
    gap: Annotated[int, typer.Option(min=0, help="consecutive: patients left out between two sites.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
) -> None:
    """Divide a manifest's patients over sites: by device, drawn, or as stretches of the manifest's order."""
    wanted: dict[str, Any] = {"kind": kind, "sites": sites, "alpha": alpha, "gap": gap, "seed": seed}
    written = api.partition(manifest, _task(task, classes), out_, **wanted)
    say(f"manifest: {written}")


@data_app.command("phantom")
def data_phantom(
    out_: Annotated[Path | None, typer.Option("--out", help="Folder for images, masks and manifests.")] = None,
    study: Annotated[
        Path | None, typer.Argument(metavar="[STUDY.yaml]", help="A study with data.phantom \\[default: the demo].")
    ] = None,
    set_: Set = None,
    list_: Annotated[bool, typer.Option("--list", help="List kinds, classes and devices.")] = False,
) -> None:
    """Write made-up images as files: chest radiographs, CT slices and volumes, skin lesions."""
    from polyclinic.errors import StudyError

    if list_:
        for row in api.phantom_kinds():
            say(row)
        return
    if out_ is None:
        raise StudyError("give --out FOLDER, or --list.")
    loaded = api.demo_study(set_ or []) if study is None else load(study, set_, None, None, None)
    say(f"manifest: {api.phantom(loaded, out_)}")


@data_app.command("proxies")
def data_proxies(
    images: Annotated[Path, typer.Argument(help="Folder or zip of public images; a folder inside for each class.")],
    out_: Annotated[Path, typer.Option("--out", help="The manifest: JSON.")],
    labels: Annotated[
        Path | None, typer.Option(help="Table with a path and a class for every image, instead of folders.")
    ] = None,
    columns: Annotated[str, typer.Option(help="--labels: its columns for path and class.")] = "image,label",
    classes: Annotated[str, typer.Option(help="Classes to keep, in order \\[default: all].")] = "",
    per_class: Annotated[int | None, typer.Option(min=2, help="At most so many images of each class, drawn.")] = None,
    name: Annotated[str, typer.Option(help="Name of the set \\[default: that of the folder or zip].")] = "",
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
) -> None:
    """Make the manifest of public images (the study's proxies): classes, labels and the SHA-256 of every image."""
    from polyclinic.errors import StudyError

    named = _names(columns)
    if len(named) != 2:
        raise StudyError(f"--columns {columns!r}: give two names, as in image,label.")
    options: dict[str, Any] = {"columns": (named[0], named[1]), "classes": _names(classes), "per_class": per_class}
    made = api.proxies(images, out_, labels=labels, name=name, seed=seed, **options)
    say(f"manifest: {out_} ({len(made.images)} images of {len(made.classes)} classes, SHA-256 {made.digest})")


@data_app.command("import")
def data_import(
    name: Annotated[str, typer.Argument(help="A public data set; --list names them.")] = "",
    folder: Annotated[Path | None, typer.Argument(help="Where its files lie.")] = None,
    out_: Annotated[Path | None, typer.Option("--out", help="Folder for the manifests.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of the importer: --set partial=true"),
    ] = None,
    list_: Annotated[
        bool, typer.Option("--list", help="List the data sets; after a name: its expected files and its options.")
    ] = False,
) -> None:
    """Make manifests for a public data set that you have downloaded."""
    from polyclinic.errors import StudyError
    from polyclinic.yaml_settings import override

    if list_ and name:
        say(api.importer_help(name))
        return
    if list_:
        for known, what in api.importers().items():
            out.print(f"[bold]{known}[/bold]  {escape(what)}", soft_wrap=True)
        return
    if not name or folder is None or out_ is None:
        raise StudyError(
            "give a data set, its folder and --out FOLDER; --list names the data sets, NAME --list explains one."
        )
    options: dict[str, Any] = {}
    for text in set_ or []:
        override(options, text)
    for path in api.import_data(name, folder, out_, **options):
        say(f"manifest: {path}")


@keys_app.command("new")
def keys_new(
    site: Annotated[str, typer.Argument(help="Name of the site, as in the study.")],
    out_: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Folder for the two files.")] = Path("keys"),
    encrypt: Annotated[
        bool, typer.Option("--encrypt", help="Ask for a passphrase, or take it from POLYCLINIC_PASSPHRASE.")
    ] = False,
) -> None:
    """Make a site's signing key: SITE.key, which never leaves the site, and SITE.pub for the others."""
    (private, public), fingerprint = api.new_key(site, out_, passphrase=_new_passphrase() if encrypt else None)
    say(f"private key: {private} (keep it here; readable by you alone)")
    say(f"public key: {public} (send it to the others)")
    say(f"fingerprint: {fingerprint} (tell it to them by telephone or on paper)")


@keys_app.command("show")
def keys_show(path: Annotated[Path, typer.Argument(help="A key file, a roster, or a folder of keys.")]) -> None:
    """Print the fingerprints of keys; never a secret."""
    for row in api.show_keys(path):
        say(f"{row['file']}  {row['what']} of {row['site']}: {row['fingerprint']}")


@keys_app.command("trust")
def keys_trust(
    roster: Annotated[Path, typer.Argument(metavar="ROSTER.json", help="The pinned keys; made if need be.")],
    public: Annotated[Path, typer.Argument(metavar="SITE.pub", help="The public key of a site.")],
    fingerprint: Annotated[
        str, typer.Option(help="What the site told you, by telephone or on paper; without it you are asked.")
    ] = "",
) -> None:
    """Pin the public key of a site, after its fingerprint was compared outside the system."""
    if not fingerprint:
        from polyclinic.secure import identity

        site, key = identity.read_public(public)
        fingerprint = identity.fingerprint(site, key)
        say(f"public key of {site}: {fingerprint}")
        if not typer.confirm("Call the site. Is this the fingerprint that it reads out?"):
            say("nothing was changed")
            raise typer.Exit(1)
    say(f"{roster} trusts this key of {api.trust_key(roster, public, fingerprint)}")


@keys_app.command("pair")
def keys_pair(
    site: Annotated[str, typer.Argument(help="Name of one site.")],
    peer: Annotated[str, typer.Argument(help="Name of the other.")],
    out_: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Folder for the file.")] = Path("keys"),
) -> None:
    """Make a secret for two sites, to be carried to both outside the system."""
    say(
        f"pair secret: {api.new_pair_secret(site, peer, out_)} (carry it to both sites by hand, into their key folders)"
    )


@audit_app.command("collusion")
def audit_collusion(
    study: Annotated[
        Path | None, typer.Argument(metavar="[STUDY.yaml]", help="The study file \\[default: the demo].")
    ] = None,
    set_: Set = None,
    seed: Seed = None,
    out_: Annotated[
        Path | None, typer.Option("--out", help="Results folder \\[default: runs/<study>-collusion-<time>].")
    ] = None,
    device: Device = None,
    data_root: DataRoot = None,
) -> None:
    """One round over every backend; then the server, sites and neighbours together attack one site's update.

    Exits with 1 if they find something that masked or ring-he should hide.
    """
    loaded = (
        api.demo_study(overrides(set_, seed, device)) if study is None else load(study, set_, seed, device, data_root)
    )
    with progress(1) as observer:
        page, found = api.audit_collusion(loaded, out=out_, observer=observer, say=say)
    out.print(_collusion_table(found))
    for alarm in found["alarms"]:
        err.print(f"[bold red]{alarm['verdict']}:[/bold red] {alarm['backend']}, {escape(', '.join(alarm['parties']))}")
    say(f"page: {page}")
    if found["alarms"]:
        raise typer.Exit(1)


def _collusion_table(found: dict[str, Any]) -> Table:
    from polyclinic.audit.collusion import COALITIONS, HIDING
    from polyclinic.audit.page import short, worst

    words = {
        "reconstructed": ("red", "found"),
        "something shows": ("yellow", "shows"),
        "nothing found": ("green", "nothing"),
        "nothing to attack": ("dim", "unseen"),
    }
    title = f"What they find out about {found['victim']} (beside it: {' and '.join(found['neighbours'])})"
    caption = (
        "found: with this relative error; nothing: p of a chi-square test against noise; unseen: nothing to attack"
    )
    table = Table(title=title, caption=caption, box=SIMPLE)
    table.add_column("backend", min_width=len("published"), overflow="fold")
    for heading in COALITIONS.values():
        table.add_column(heading.replace("the ", "").replace("neighbours", "beside it"), overflow="fold")
    for entry in found["backends"]:
        cells = []
        for kind in () if entry["missing"] else COALITIONS:
            row = worst(entry, kind)
            color, word = words[row["verdict"]]
            color = "default" if kind == "everyone" and entry["backend"] in HIDING else color
            number = f"p {short(row['p'])}" if row.get("modular") else ""
            number = short(row["relative"]) if word == "found" else number
            cells.append(f"[{color}]{word}[/]\n[dim]{number}[/dim]" if number else f"[{color}]{word}[/]")
        table.add_row(entry["name"].replace("-as-", " as "), *(cells or ["no library"]))
    return table


def _new_passphrase() -> str:
    import os

    from polyclinic.errors import SiteError
    from polyclinic.secure.identity import PASSPHRASE, type_passphrase

    if given := os.environ.get(PASSPHRASE):
        return given
    first = type_passphrase("Passphrase: ")
    if type_passphrase("Again: ") != first:
        raise SiteError("the two passphrases differ; no key was made.")
    return first


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _whole(text: str) -> int:
    from polyclinic.errors import StudyError

    if not text.isdigit():
        raise StudyError(f"--seeds: {text!r} is not a whole number. Write --seeds 0,1,2.")
    return int(text)


def _number(text: str) -> float:
    from polyclinic.errors import StudyError

    try:
        return float(text)
    except ValueError:
        raise StudyError(f"{text!r} is not a number.") from None


def _task(kind: str, classes: str) -> TaskSettings:
    from pydantic import ValidationError

    from polyclinic.errors import StudyError
    from polyclinic.study import TaskSettings
    from polyclinic.yaml_settings import explain

    settings: dict[str, Any] = {"kind": kind, "classes": _names(classes)}
    try:
        return TaskSettings(**settings)
    except ValidationError as error:
        raise StudyError(explain(error, TaskSettings, "--classes or --task cannot be so:")) from None


if __name__ == "__main__":
    main()
