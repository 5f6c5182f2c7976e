"""The Python API: what the command line calls, with the same names."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from polyclinic.errors import RunError, StudyError
from polyclinic.settings import Settings
from polyclinic.study import Study, TaskSettings, load_study
from polyclinic.yaml_settings import explain

if TYPE_CHECKING:
    from polyclinic.data.build import Built
    from polyclinic.data.manifest import Case
    from polyclinic.data.proxy_manifest import ProxyManifest
    from polyclinic.runner import Observer

Group = TypeVar("Group", bound=Settings)


def run(
    study: Study | Path | str | None,
    *,
    out: Path | None = None,
    resume: Path | None = None,
    observer: Observer | None = None,
) -> Path:
    """Run a study: its method, and beside it those of ``compare``.

    Args:
        study: A study or the path of its file; None only with ``resume``, whose folder then tells.
        out: Results folder; by default ``runs/<study>-<time>``.
        resume: Results folder of a run that was stopped; it goes on after its last finished round.
        observer: Told of progress.

    Returns:
        The results folder, with ``report.html`` in it.

    Raises:
        StudyError, DataError: Before any training. RunError: The folder cannot be used. SiteError: A site failed.
    """
    from polyclinic.comparison import planned, run_comparison, with_controls
    from polyclinic.results import RunFolder, new_folder
    from polyclinic.runner import load_sites, run_one

    if resume is not None and out is not None:
        raise RunError(f"give --out for a new run or --resume {resume} to go on with one, not both.")
    if resume is not None:
        folder = RunFolder(Path(resume))
        before = folder.study()
        study = before if study is None else with_controls(_loaded(study))
        folder.open(study)
    else:
        if study is None:
            raise StudyError("give a study file, or --resume with the results folder of a stopped run.")
        study = with_controls(_loaded(study))
        folder = RunFolder(new_folder(study, out))
    several = bool(study.compare.methods or study.compare.seeds)
    if several:
        planned(study)
    if resume is None:
        folder.create(study)
    sites = load_sites(study, folder.path, observer)
    if several:
        run_comparison(study, sites, folder, observer)
    else:
        run_one(study, sites, folder, observer)
    # Memory-mapped images are of no use when all is done, and a results folder may be shared.
    shutil.rmtree(folder.path / "cache", ignore_errors=True)
    return folder.path


def demo(**options: Any) -> Path:
    """Run the bundled study on made-up images; options as for ``run``."""
    return run(demo_study(), **options)


def demo_study(overrides: Sequence[str] = ()) -> Study:
    """The bundled study."""
    with resources.as_file(resources.files("polyclinic") / "studies" / "demo.yaml") as path:
        return load_study(path, overrides=overrides)


def compare(
    study: Study | Path | str,
    methods: Sequence[str | Mapping[str, Any]] = (),
    seeds: Sequence[int] = (),
    **options: Any,
) -> Path:
    """Run several methods with several seeds and write one table with paired differences.

    Args:
        study: The study; its own method is always in the table.
        methods: Further methods; empty: as ``comparison_study`` says.
        seeds: Likewise.
        options: As for ``run``.
    """
    return run(comparison_study(_loaded(study), methods, seeds), **options)


def comparison_study(study: Study, methods: Sequence[str | Mapping[str, Any]], seeds: Sequence[int]) -> Study:
    """The study with ``compare`` filled: by default the study's own, else the controls and seeds 0, 1 and 2.

    The controls are local, fedavg, fedavg-ft and pooled: what every claim is measured against.
    """
    from polyclinic.comparison import CONTROLS

    others = list(methods) or study.compare.methods or list(CONTROLS)
    others = [m for m in others if (m if isinstance(m, str) else m.get("label") or m.get("name")) != study.method.title]
    chosen = {"methods": others, "seeds": list(seeds) or study.compare.seeds or [0, 1, 2]}
    return study.model_copy(update={"compare": study.compare.model_copy(update=chosen)})


def check(study: Study | Path | str, observer: Observer | None = None) -> dict[str, Any]:
    """Validate a study and its data without training: every image is read, the network is built.

    Returns:
        ``sites`` (devices, patients, images and labels of each split), ``notes`` and ``model``; with networks of
        their own at some sites ``models``, by site; with public images ``proxies``.

    Raises:
        StudyError, DataError: Whatever a run would have refused.
    """
    import tempfile

    from polyclinic.comparison import check_sites, planned
    from polyclinic.data.manifest import class_notes
    from polyclinic.evaluation.notes import NO_FOREGROUND
    from polyclinic.federation.networks import site_networks
    from polyclinic.models.registry import describe, untrained_model
    from polyclinic.runner import describe_networks, describe_proxies, describe_site, load_sites

    study = _loaded(study)
    tried = planned(study)
    with tempfile.TemporaryDirectory() as scratch:
        sites = load_sites(study, Path(scratch), observer)
        check_sites(tried, sites)
        model = untrained_model(study)
        networks = site_networks(study, sites) if study.mixed else {}
        notes = class_notes({name: data.cases for name, data in sites.items()}, study.task)
        for name, data in sites.items():
            if study.task.kind == "segmentation" and not data.has_foreground:
                notes.setdefault(name, []).append(NO_FOREGROUND)
        return {
            "sites": {name: describe_site(data) for name, data in sites.items()},
            "notes": notes,
            "model": {"name": study.model.name, **describe(model)},
            **describe_networks(study, networks),
            **describe_proxies(study),
        }


def predict(run_folder: Path, images: Path, out: Path, *, site: str | None = None) -> Path:
    """Use a finished run's model on new files; see ``polyclinic.prediction.predict_files``."""
    from polyclinic.prediction import predict_files

    return predict_files(Path(run_folder), Path(images), Path(out), site=site)


def report(run_folder: Path) -> Path:
    """Write ``report.html`` of a finished run or comparison again, from its files alone."""
    from polyclinic.report import write_report

    folder = Path(run_folder)
    if not (folder / "metrics.json").is_file():
        raise RunError(f"{folder} has no metrics.json: the run is not finished. Go on with --resume {folder}.")
    return write_report(folder)


def methods() -> list[dict[str, str]]:
    """Every method: name, what it is, paper, where its model lives, what it needs."""
    from polyclinic.methods import METHODS, method_class

    rows = []
    for name in METHODS:
        found = method_class(name)
        rows.append(
            {
                "name": name,
                "title": found.title,
                "reference": found.reference,
                "model": "personal" if found.personal else "global",
                "where": "simulation only" if found.simulation_only else "anywhere",
                "needs": found.needs,
            }
        )
    return rows


def networks() -> list[dict[str, str]]:
    """Every network of the registry: name, what it is, dimensions, tasks."""
    from polyclinic.models.catalog import NETWORKS

    return [
        {
            "name": network.name,
            "title": network.description,
            "dimensions": ", ".join(f"{d}D" for d in network.dims),
            "tasks": ", ".join(network.tasks),
        }
        for network in NETWORKS.values()
    ]


def headline(run_folder: Path) -> tuple[list[dict[str, str]], str]:
    """The main metric on test images as text, and a title.

    A run has a row a site and one each for their mean and the worst; a comparison has a row a method with these two.
    """
    from polyclinic.evaluation.names import HEADLINE, metric_label
    from polyclinic.results import RunFolder

    found = json.loads((run_folder / "metrics.json").read_text(encoding="utf-8"))
    settings = RunFolder(run_folder).study().evaluation
    metric = HEADLINE[found["task"]]
    label = metric_label(metric)
    title = f"{label} on test images"
    if settings.bootstrap:
        title += f", with {100 * settings.confidence:g}% intervals"
    if "table" in found:
        rows = [
            {"method": name, "mean of sites": _shown(part["mean"][metric]), "worst site": _shown(part["worst"][metric])}
            for name, part in found["table"].items()
        ]
        return rows, title
    cells = {name: entry["test"][metric] for name, entry in found["sites"].items()}
    cells |= {"mean of sites": found["mean"][metric], "worst site": found["worst"][metric]}
    return [{"site": name, label: _shown(cell)} for name, cell in cells.items()], title


def _shown(cell: Mapping[str, Any]) -> str:
    if cell["value"] is None:
        return "undefined"
    interval = "" if cell["low"] is None else f" [{cell['low']:.3f}, {cell['high']:.3f}]"
    place = f" {cell['site']}" if cell.get("site") else ""
    return f"{cell['value']:.3f}{interval}{place}"


def audit_collusion(
    study: Study | Path | str | None,
    *,
    out: Path | None = None,
    observer: Observer | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Path, dict[str, Any]]:
    """Attack one site's update with what coalitions of parties hold; see ``polyclinic.audit.collusion``.

    Args:
        study: None: the bundled study.
        out: Results folder; by default ``runs/<study>-collusion-<time>``.
        observer: Told of the reading of images.
        say: Told in a line of each backend that is done.

    Returns:
        ``collusion.html`` and what ``collusion.json`` beside it holds.
    """
    from polyclinic.audit import collusion
    from polyclinic.results import new_folder

    study = demo_study() if study is None else _loaded(study)
    folder = new_folder(study.model_copy(update={"name": f"{study.name}-collusion"}), out)
    found = collusion.audit_collusion(study, Path(folder), observer, say)
    return folder / "collusion.html", found


def build(folder: Path, labels: Path | None, out: Path, *, site: str = "") -> Built:
    """Make a manifest from a folder of images and a table of labels; see ``polyclinic.data.build``."""
    from polyclinic.data.build import build_manifest

    return build_manifest(Path(folder), None if labels is None else Path(labels), Path(out), site=site)


def split(manifest: Path, task: TaskSettings, out: Path, **settings: Any) -> Path:
    """Divide a manifest's patients into train, val and test and write it with the column filled.

    Args:
        manifest: With the usual columns.
        task: Kind and classes of its labels.
        out: The new manifest.
        settings: Fields of ``data.split`` of the study file.
    """
    from polyclinic.data.split import check_split, split_cases
    from polyclinic.study import SplitSettings

    wanted = _settings(SplitSettings, settings)
    cases = split_cases(_cases(manifest, task), wanted)
    check_split(cases, wanted)
    return _written(cases, out)


def partition(manifest: Path, task: TaskSettings, out: Path, **settings: Any) -> Path:
    """Divide a manifest's patients over sites and write it with the site column filled.

    Args:
        manifest: With the usual columns; its site column is replaced.
        task: Kind and classes of its labels.
        out: The new manifest.
        settings: Fields of ``data.partition`` of the study file.
    """
    from polyclinic.data.partition import partition_cases
    from polyclinic.study import PartitionSettings

    wanted = _settings(PartitionSettings, settings)
    return _written(partition_cases(_cases(manifest, task), wanted), out)


def phantom(study: Study | Path | str, out: Path) -> Path:
    """Write the made-up images of a study as files, with masks and a manifest per site."""
    from polyclinic.data.phantoms import write_phantoms

    study = _loaded(study)
    if study.data.phantom is None:
        raise StudyError("this study has tables of real images; give one with data.phantom.")
    return write_phantoms(study.data.phantom, study.task, Path(out), study.data.image.size)


def phantom_kinds() -> list[str]:
    """Lines that tell the kinds of made-up images with their classes, and the devices."""
    from polyclinic.data.phantoms import CLASSES, DEVICES

    return [f"{kind}: {', '.join(classes)}" for kind, classes in CLASSES.items()] + [f"devices: {', '.join(DEVICES)}"]


def proxies(images: Path, out: Path, *, labels: Path | None = None, **options: Any) -> ProxyManifest:
    """Hash public images and write their manifest; see ``polyclinic.data.proxy_manifest.make_manifest``."""
    from polyclinic.data.proxy_manifest import make_manifest

    return make_manifest(Path(images), Path(out), labels=None if labels is None else Path(labels), **options)


def importers() -> dict[str, str]:
    """The public data sets that ``import_data`` knows: the first line of their documentation, and their options."""
    from polyclinic.data.importers import IMPORTERS, find_importer, importer_options

    found = {}
    for name in IMPORTERS:
        document = sys.modules[find_importer(name).__module__].__doc__ or ""
        options = ", ".join(importer_options(name))
        found[name] = document.strip().splitlines()[0] + (f" Options: {options}." if options else "")
    return found


def importer_help(name: str) -> str:
    """What one importer says of itself: source, licence, expected files, what site and patient are, options."""
    from polyclinic.data.importers import find_importer

    importer = find_importer(name)
    module = sys.modules[importer.__module__]
    return "\n\n".join(inspect.cleandoc(text.__doc__ or "") for text in (module, importer))


def import_data(name: str, folder: Path, out: Path, **options: Any) -> list[Path]:
    """Make manifests for a public data set; images stay where they are."""
    from polyclinic.data.importers import run_importer

    return run_importer(name, Path(folder), Path(out), **options)


def new_key(site: str, folder: Path, *, passphrase: str | None = None) -> tuple[list[Path], str]:
    """Make a site's signing key; see ``polyclinic.secure.keyring.new_key``.

    Returns:
        The private and the public file, and the key's fingerprint.
    """
    from polyclinic.secure import identity, keyring

    folder = Path(folder)
    made = keyring.new_key(site, folder, passphrase)
    return [identity.key_path(folder, site), identity.public_path(folder, site)], made.fingerprint


def show_keys(path: Path) -> list[dict[str, str]]:
    """What a key file, a roster or a folder of keys holds; see ``polyclinic.secure.keyring.describe_keys``."""
    from polyclinic.secure.keyring import describe_keys

    return describe_keys(Path(path))


def trust_key(roster: Path, public: Path, fingerprint: str) -> str:
    """Pin a site's public key whose fingerprint was compared; see ``polyclinic.secure.keyring.trust_file``."""
    from polyclinic.secure.keyring import trust_file

    return trust_file(Path(roster), Path(public), fingerprint)


def new_pair_secret(site: str, peer: str, folder: Path) -> Path:
    """Make a secret for two sites; see ``polyclinic.secure.pair_secrets.new_pair_secret``."""
    from polyclinic.secure import pair_secrets

    return pair_secrets.new_pair_secret(Path(folder), site, peer)


def _loaded(study: Study | Path | str) -> Study:
    return study if isinstance(study, Study) else load_study(study)


def _settings(kind: type[Group], given: Mapping[str, Any]) -> Group:
    try:
        return kind(**given)
    except ValidationError as error:
        raise StudyError(explain(error, kind, "these settings are not valid:")) from None


def _cases(manifest: Path, task: TaskSettings) -> list[Case]:
    from polyclinic.data.manifest import read_table
    from polyclinic.study import TableSettings

    return read_table(TableSettings(path=Path(manifest).name), Path(manifest).parent, task, need_site=False)


def _written(cases: Sequence[Case], out: Path) -> Path:
    from polyclinic.data.manifest import write_manifest

    write_manifest(cases, Path(out))
    return Path(out)
