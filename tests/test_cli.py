"""Every command end to end on made-up images, and what a user sees when something is wrong."""

from __future__ import annotations

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import polyclinic
from polyclinic.study import load_study

File = Callable[..., Path]
Said = tuple[int, str, str]
COMMANDS = [
    [],
    *(["demo"], ["run"], ["compare"], ["check"], ["predict"], ["report"], ["methods"], ["schema"], ["data"]),
    *(["data", name] for name in ("build", "split", "partition", "phantom", "proxies", "import")),
    ["audit"],
    ["audit", "collusion"],
    *(["keys"], *(["keys", name] for name in ("new", "show", "trust", "pair"))),
    ["vectors"],
    *(["vectors", name] for name in ("base", "train", "create", "ledger", "add", "list", "verify", "remove")),
    *(["vectors", name] for name in ("accept", "hold", "merge", "evaluate", "explain")),
]


def refused(said: Said, *expected: str) -> None:
    code, _, errors = said
    assert code == 2
    assert errors.startswith("error: ") or "Usage:" in errors
    assert "Traceback" not in errors
    for text in expected:
        assert text in errors


def read(table: Path) -> list[dict[str, str]]:
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help(polyclinic_says: Callable[..., Said], command: list[str]) -> None:
    code, said, _ = polyclinic_says(*command, "--help")
    assert code == 0
    assert "Usage: polyclinic" in said


def test_demo_with_few_rounds(polyclinic_says: Callable[..., Said], tmp_path: Path) -> None:
    small = ["method.rounds=1", "data.image.size=[16,16]", "model.width=4", "evaluation.bootstrap=50"]
    small += [f"data.phantom.sites.{i}.patients=16" for i in range(4)] + ["compare.methods=[local]"]
    folder = tmp_path / "demo"
    code, said, _ = polyclinic_says("demo", "--out", folder, "--seed", 3, *(f"--set={text}" for text in small))
    assert code == 0
    assert said.rstrip().endswith(f"report: {folder / 'report.html'}")
    assert "fedavg, seed 3, round 1/1: loss" in said
    assert "local, seed 3: AUROC" in said
    assert "worst site" in said
    assert "<html" in (folder / "report.html").read_text()
    assert json.loads((folder / "metrics.json").read_text())["methods"] == ["fedavg", "local"]


def test_run_report_resume(polyclinic_says: Callable[..., Said], tiny_file: File, tmp_path: Path) -> None:
    study, folder = tiny_file(), tmp_path / "run"
    code, said, _ = polyclinic_says("run", study, "--out", folder, "--set", "method.rounds=2", "--seed", 5)
    assert code == 0
    lines = said.splitlines()
    assert [line for line in lines if ": loss " in line][1].startswith("fedavg, seed 5, round 2/2: loss ")
    assert [line.split()[0] for line in lines if "images read" in line] == ["north:", "south:", "west:"]
    assert all(len(line) <= 80 for line in lines[:-1])
    for name in ("north", "south", "west", "mean of sites", "worst site"):
        assert f"│ {name}" in said
    assert run_seed(folder) == 5

    (folder / "report.html").unlink()
    assert polyclinic_says("report", folder)[1].strip() == f"report: {folder / 'report.html'}"
    assert (folder / "report.html").is_file()
    assert polyclinic_says("run", "--resume", folder)[0] == 0
    refused(
        polyclinic_says("run", study, "--resume", folder), "other settings", "method.rounds: 2 -> 3", "seed: 5 -> 0"
    )
    refused(polyclinic_says("run", "--resume", folder, "--set", "training.lr=9"), "training.lr: 0.05 -> 9.0")
    refused(polyclinic_says("run", study, "--out", folder), "already holds a run", f"--resume {folder}")


def run_seed(folder: Path) -> int:
    return load_study(folder / "study.yaml").seed


def test_compare(polyclinic_says: Callable[..., Said], tiny_file: File, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    few = ["--set", "method.rounds=1"]
    code, said, _ = polyclinic_says("compare", tiny_file(), "--methods=local", "--seeds=1,2", "--out", folder, *few)
    assert code == 0
    runs = {path.name for path in (folder / "runs").iterdir()}
    assert runs == {"fedavg-seed1", "fedavg-seed2", "local-seed1", "local-seed2"}
    assert "│ local " in said
    found = json.loads((folder / "metrics.json").read_text())
    assert found["seeds"] == [1, 2]
    assert {row["method"] for row in found["differences"]} == {"local"}
    assert polyclinic_says("report", folder)[0] == 0
    refused(polyclinic_says("compare", tiny_file(), "--seeds", "1,x"), "--seeds: 'x' is not a whole number")
    refused(polyclinic_says("compare", tiny_file(), "--methods", "locl"), "no method 'locl'. Did you mean 'local'?")
    refused(polyclinic_says("predict", folder, tmp_path, "--out", tmp_path / "p.csv"), "It is a comparison")


def test_check(polyclinic_says: Callable[..., Said], tiny_file: File) -> None:
    code, said, _ = polyclinic_says("check", tiny_file())
    assert code == 0
    assert "nothing wrong was found" in said
    assert "network small-cnn: " in said


def test_what_check_shows_can_be_loaded(polyclinic_says: Callable[..., Said], tiny_file: File, tmp_path: Path) -> None:
    study = tiny_file(compare={"methods": ["local"]})
    code, said, _ = polyclinic_says("check", "--show", study, "--set", "training.momentum=0.9")
    assert code == 0
    (tmp_path / "shown.yaml").write_text(said)
    assert load_study(tmp_path / "shown.yaml") == load_study(study, overrides=["training.momentum=0.9"])


def test_methods(polyclinic_says: Callable[..., Said]) -> None:
    code, said, _ = polyclinic_says("methods")
    assert code == 0
    for name in ("fedavg-ft", "scaffold", "ditto", "small-cnn", "unet"):
        assert name in said


def test_schema(polyclinic_says: Callable[..., Said]) -> None:
    from polyclinic.study import study_schema

    assert json.loads(polyclinic_says("schema")[1]) == json.loads(json.dumps(study_schema()))


def test_from_files_to_predictions(polyclinic_says: Callable[..., Said], tiny_file: File, tmp_path: Path) -> None:
    study, images = tiny_file(), tmp_path / "images"
    assert polyclinic_says("data", "phantom", study, "--out", images)[0] == 0
    assert polyclinic_says("data", "phantom", "--list")[1].startswith("chest-xray: ")
    tables = [images / site / "manifest.csv" for site in ("north", "south", "west")]
    assert all(table.is_file() for table in tables)

    rows = [{**row, "image": f"{table.parent.name}/{row['image']}"} for table in tables for row in read(table)]
    labels = tmp_path / "labels.csv"
    with labels.open("w", newline="") as file:
        names = ["image", "label", "patient", "site", "device"]
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    for path in images.rglob("masks/*.png"):
        path.unlink()
    code, said, errors = polyclinic_says("data", "build", images, "--labels", labels, "--out", images / "all.csv")
    assert (code, errors) == (0, "")
    assert f"({len(rows)} images, 3 other files ignored" in said

    classes = ["--classes", "normal,pneumonia"]
    parted = images / "parted.csv"
    how = ["--kind", "iid", "--sites", 2]
    assert polyclinic_says("data", "partition", images / "all.csv", "--out", parted, *classes, *how)[0] == 0
    divided = images / "split.csv"
    shares = ["--fractions", "0.5,0.25,0.25"]
    assert polyclinic_says("data", "split", parted, "--out", divided, *classes, *shares)[0] == 0
    table = read(divided)
    assert {row["site"] for row in table} == {"site-1", "site-2"}
    assert {row["split"] for row in table} == {"train", "val", "test"}

    raw = yaml.safe_load(study.read_text())
    raw["data"] = {**raw["data"], "phantom": None, "tables": [{"path": "split.csv"}]}
    study.write_text(yaml.safe_dump(raw))
    run, few = tmp_path / "run", ["--set", "method.rounds=1"]
    assert polyclinic_says("check", study, "--data-root", images)[0] == 0
    assert polyclinic_says("run", study, "--data-root", images, "--out", run, *few)[0] == 0
    out = tmp_path / "p.csv"
    assert polyclinic_says("predict", run, divided, "--out", out)[1].strip() == f"predictions: {out}"
    assert len(read(out)) == len(rows)


def test_public_images_and_networks_of_their_own(
    polyclinic_says: Callable[..., Said], tiny_file: File, tmp_path: Path
) -> None:
    folder = tmp_path / "public"
    for index, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (24, 24), (40 * index, 60 * number, 9)).save(folder / name / f"{number}.png")
    code, said, _ = polyclinic_says("data", "proxies", folder, "--out", tmp_path / "p.json", "--per-class", 2)
    assert code == 0
    assert said.startswith(f"manifest: {tmp_path / 'p.json'} (4 images of 2 classes, SHA-256 ")
    proxies = {"manifest": "p.json", "images": "public"}
    own = {"method": {"name": "local"}, "models": {"north": {"name": "small-resnet", "width": 4}}, "proxies": proxies}
    study = tiny_file(**own)
    code, said, _ = polyclinic_says("check", study, "--data-root", tmp_path)
    assert code == 0
    assert "network of north small-resnet: " in said
    assert "network of west small-cnn: " in said
    assert "public images public: 4 of 2 classes, each as the manifest says" in said
    refused(polyclinic_says("check", tiny_file(**{**own, "method": "fedavg"})), "the same network at every site")
    nowhere = tiny_file(**{**own, "models": {"nort": {"name": "small-resnet"}}})
    refused(polyclinic_says("check", nowhere, "--data-root", tmp_path), "models.nort: there is no site 'nort'")
    kept = [one["path"] for one in json.loads((tmp_path / "p.json").read_text())["images"]]
    (folder / kept[0]).write_bytes(b"other")
    altered = polyclinic_says("check", tiny_file(**own), "--data-root", tmp_path)
    refused(altered, f"{kept[0]!r} of 'public' is not the manifest's")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("run nothing.yaml", "there is no study file nothing.yaml"),
        ("run", "give a study file, or --resume"),
        ("run STUDY --set training.lrr=1", "training.lrr: there is no such key. Did you mean 'lr'?"),
        ("run STUDY --set training.lr", "write key.path=value"),
        ("run STUDY --set name.x=1", "there is no name.x in the study"),
        ("run STUDY --seed -1", "Invalid value"),
        ("run STUDY --out STUDY/run", "cannot be written: Not a directory. Give another --out"),
        ("run STUDY --resume nowhere", "nowhere is no results folder"),
        ("run STUDY --resume a --out b", "not both"),
        ("run --resume nowhere", "nowhere is no results folder"),
        ("report nowhere", "nowhere has no metrics.json"),
        ("predict nowhere x.png --out x.csv", "nowhere is no results folder"),
        ("check STUDY --set data.phantom= --set 'data.tables=[{path: a.csv}]'", "a.csv"),
        ("check STUDY --set 'task.classes=[normal, pneumonia, unicorn]'", "unicorn"),
        ("check STUDY --set 'data.split.fractions=[0.7, 0, 0.3]'", "no site has validation images"),
        ("data split no.csv --out x.csv --classes a,b", "no.csv"),
        ("data split no.csv --out x.csv --classes a,a", "classes are listed twice"),
        ("data split no.csv --out x.csv --classes a,b --fractions 1,0", "give three numbers"),
        ("data split no.csv --out x.csv --classes a,b --fractions 1,1,1", "sum to 1"),
        ("data split no.csv --out x.csv --classes a,b --fractions 1,a,1", "'a' is not a number"),
        (
            "data partition no.csv --out x.csv --classes a,b --kind dirichlet --alpha 0",
            "alpha: Input should be greater",
        ),
        ("data partition no.csv --out x.csv --classes a,b --kind iid --gap 1", "gap: 1 needs kind: consecutive"),
        ("data split no.csv --out x.csv --classes a,b --gap 1", "gap: 1 needs kind: consecutive"),
        ("data build nowhere --out x.csv", "nowhere is not a folder"),
        ("data phantom", "give --out FOLDER"),
        ("data proxies nowhere --out x.json", "nowhere is neither a folder nor a zip of images"),
        ("data proxies nowhere --out x.json --columns image", "give two names"),
        ("data import", "give a data set"),
        ("fly", "No such command 'fly'"),
    ],
)
def test_errors_of_users(
    polyclinic_says: Callable[..., Said],
    tiny_file: File,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    expected: str,
) -> None:
    study = str(tiny_file())
    monkeypatch.chdir(tmp_path)
    refused(polyclinic_says(*(word.replace("STUDY", study) for word in shlex.split(command))), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda(polyclinic_says: Callable[..., Said], tiny_file: File, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    refused(polyclinic_says("run", tiny_file(), "--device", "cuda", "--out", folder), "no CUDA device", "--device cpu")
    assert polyclinic_says("run", tiny_file(), "--set", "method.rounds=1", "--out", folder)[0] == 0


def test_a_failing_site_says_how_to_go_on(
    polyclinic_says: Callable[..., Said], tiny_file: File, tmp_path: Path
) -> None:
    said = polyclinic_says("run", tiny_file(), "--set", "training.lr=1e30", "--out", tmp_path / "run")
    code, _, errors = said
    assert code == 2
    assert "site 'north' failed in 'train', round " in errors
    assert f"polyclinic run --resume {tmp_path / 'run'}" in errors.replace("\n", "")


def test_a_word_in_brackets_is_printed_as_it_is(polyclinic_says: Callable[..., Said], tmp_path: Path) -> None:
    assert "[bold]no[/bold].yaml" in polyclinic_says("run", tmp_path / "[bold]no[/bold].yaml")[2]


def test_interrupted(tiny_file: File, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    source = str(Path(polyclinic.__file__).resolve().parents[1])
    many = ["--set", "method.rounds=1000"]
    with subprocess.Popen(
        [sys.executable, "-m", "polyclinic.cli", "run", str(tiny_file()), "--out", str(folder), *many],
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has them ignore interrupts, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        end = time.monotonic() + 200
        while not (folder / "rounds.jsonl").exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=200)
    assert process.returncode == 130, errors
    assert errors.strip().endswith(f"Finished rounds are safe: go on with polyclinic run --resume {folder}")
    assert "Traceback" not in errors


def test_an_importers_options(polyclinic_says: Callable[..., Said], tmp_path: Path) -> None:
    code, said, _ = polyclinic_says("data", "import", "--list")
    assert code == 0
    assert "pad-ufes-20" in said
    code, said, _ = polyclinic_says("data", "import", "rad-chestct", "--list")
    assert code == 0
    assert "--set paper_split=3 --set ratios=ratios.csv" in said
    assert "columns NoteAcc_DEID and ratio" in said
    unknown = polyclinic_says("data", "import", "fed-isic2019", tmp_path, "--out", tmp_path, "--set", "x=1")
    refused(unknown, "has no option 'x'. It has: folds, partial")
