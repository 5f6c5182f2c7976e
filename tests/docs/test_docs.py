"""The documentation is true: its code runs, its commands exist, its tables are those of the schema."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_contract
import torch
import torch.nn.functional as F
import typer
import yaml
from toys import sites, toy_study, trained

from polyclinic.cli import app
from polyclinic.errors import StudyError
from polyclinic.methods import METHODS, method_class
from polyclinic.models.registry import build_model
from polyclinic.study import ImageSettings, ModelSettings, Study, TaskSettings, study_schema, validate_study
from polyclinic.transfer.teachers import Shape

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONTRACT = [
    found
    for name, found in vars(test_contract).items()
    if name.startswith("test_") and set(inspect.signature(found).parameters) == {"method", "tmp_path"}
]
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    """Code blocks of one language."""
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [re.sub(f"^{m[1]}", "", m[3], flags=re.MULTILINE) for m in found if m[2] == language]


def commands() -> Iterator[tuple[Path, str]]:
    """Every line of every shell block."""
    for page in PAGES:
        for block in blocks(page, "sh"):
            yield from ((page, line) for line in block.splitlines() if line and not line.startswith("#"))


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script that makes the tables."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("make_study_file")


def test_tables_of_the_study_file_are_up_to_date(generator: Any) -> None:
    page = (ROOT / "docs" / "study-file.md").read_text(encoding="utf-8")
    assert generator.fill(page, study_schema()) == page, "run: python docs/make_study_file.py"


def test_every_section_of_the_study_file_has_a_table(generator: Any) -> None:
    schema = study_schema()
    paths = generator.paths((ROOT / "docs" / "study-file.md").read_text(encoding="utf-8"))
    assert len(paths) == len(set(paths))
    shown = [generator.settings_at(schema, path)["title"] for path in paths if path != "method"]
    assert set(shown) == {*schema["$defs"], "Study"}


def test_a_table_says_what_the_schema_says(generator: Any) -> None:
    rows = generator.table(study_schema(), "training").splitlines()
    assert "| `lr` | number ≥ 0 | `0.05` | Learning rate of the first round. |" in rows
    assert "| `clip` | number > 0 | none | Largest gradient norm. |" in rows
    assert generator.table(study_schema(), "method").count("\n") == 5
    assert "`epochs`" in generator.table(study_schema(), "method.fedavg-ft.finetune")
    assert "`slices`" in generator.table(study_schema(), "data.scanners[]")
    with pytest.raises(KeyError):
        generator.table(study_schema(), "training.nothing")


@pytest.mark.parametrize(("page", "line"), [*commands()], ids=lambda value: getattr(value, "name", value))
def test_shell_commands_exist(page: Path, line: str) -> None:
    words = shlex.split(line.partition(" > ")[0].partition(" #")[0])
    while re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    elif words[0].removeprefix(".venv/bin/") == "polyclinic":
        _check_command(typer.main.get_command(app), words[1:])
    else:
        assert words[0] in (".venv/bin/python", "python", "python3", ".venv/bin/pip", "git", "cd")


def _spellings(parameter: Any) -> list[str]:
    return [opt for opt in [*parameter.opts, *parameter.secondary_opts] if opt.startswith("--")]


def _check_command(command: Any, words: list[str]) -> None:
    while hasattr(command, "commands"):
        assert words[0] in command.commands, f"there is no command {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    options = {opt: parameter for parameter in command.params for opt in _spellings(parameter)}
    arguments = [parameter for parameter in command.params if not parameter.opts[0].startswith("-")]
    given, positional = set(), 0
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            positional += 1
            continue
        name, _, value = word.partition("=")
        assert name in options, f"there is no option {name!r}"
        given.add(options[name].name)
        if not options[name].is_flag and not value:
            assert words, f"{name} needs a value"
            words.pop(0)
    assert positional <= len(arguments)
    assert positional >= sum(argument.required for argument in arguments)
    assert {parameter.name for parameter in options.values() if parameter.required} <= given


def test_study_files_of_the_pages_are_valid() -> None:
    found = [(page, block) for page in PAGES for block in blocks(page, "yaml")]
    assert found
    for page, block in found:
        study = validate_study({"name": "shown", **yaml.safe_load(block)}, page.name)
        assert isinstance(study, Study)


def test_the_network_of_ones_own_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [source] = blocks(ROOT / "docs" / "study-file.md", "python")
    (tmp_path / "my_networks.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    for norm in ("batch", "batch-local", "group", "instance"):
        settings = ModelSettings(name="my_networks:build", norm=norm, options={"hidden": 8})
        model = build_model(settings, TaskSettings(classes=["a", "b"]), ImageSettings(size=[16, 16]), seed=0)
        assert model(torch.zeros(3, 1, 16, 16)).shape == (3, 2)
        assert Shape.of(model, ImageSettings(size=[16, 16])) == Shape(("1", "2"), [8, 8], "2", 8, 2)
    network = {"name": "my_networks:build", "norm": "group", "options": {"hidden": 8}}
    own = toy_study({"name": "natimg-fl", "server_steps": 1, "rounds": 2}, models={"north": network})
    run = trained(own, sites(), tmp_path / "run")
    assert run.channel._sites["north"].state.load("pupil") is not None


@pytest.fixture
def fedavgm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The example method, registered; its name."""
    [source] = blocks(ROOT / "docs" / "add-a-method.md", "python")
    assert len([line for line in source.splitlines() if line.strip()]) <= 40
    (tmp_path / "fedavgm_of_the_page.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(METHODS, "fedavgm", "fedavgm_of_the_page:FedAvgM")
    monkeypatch.setitem(test_contract.PLAIN, "fedavgm", {"momentum": 0.0})
    yield "fedavgm"
    sys.modules.pop("fedavgm_of_the_page", None)


def test_the_example_method_has_the_momentum_computed_by_hand(fedavgm: str, tmp_path: Path) -> None:
    """One full-batch step a site: the mean update is minus lr times the gradient on all training images."""
    run = trained(toy_study({"name": fedavgm, "momentum": 0.5}), sites(), tmp_path / "run")
    parts = list(sites().values())
    inputs = torch.cat([(own.images[own.splits["train"]] - 0.5) / 0.25 for own in parts]).flatten(1)
    targets = torch.cat([own.labels("train") for own in parts])
    values = [run.bench.initial[name].clone().requires_grad_() for name in ("1.weight", "1.bias")]
    momenta = [torch.zeros_like(value) for value in values]
    for _ in range(3):
        gradients = torch.autograd.grad(F.cross_entropy(inputs @ values[0].T + values[1], targets), values)
        momenta = [0.5 * last - 0.1 * gradient for last, gradient in zip(momenta, gradients, strict=True)]
        values = [(value + last).detach().requires_grad_() for value, last in zip(values, momenta, strict=True)]
    plain = trained(toy_study("fedavg"), sites(), tmp_path / "fedavg")
    for name, wanted in zip(("1.weight", "1.bias"), values, strict=True):
        torch.testing.assert_close(run.state.groups["model"][name], wanted.detach(), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(plain.state.groups["model"][name], wanted.detach(), rtol=1e-3)


@pytest.mark.parametrize("norm", ["batch", "batch-local"])
def test_the_example_method_declares_its_buffers(fedavgm: str, norm: str, tmp_path: Path) -> None:
    test_contract.test_buffers_behave_as_declared(fedavgm, norm, tmp_path)


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_the_example_method_keeps_the_contract(fedavgm: str, check: Callable[..., None], tmp_path: Path) -> None:
    check(method=fedavgm, tmp_path=tmp_path)


def test_pages_name_every_method_and_link_to_files_that_exist() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in METHODS if f"`{name}`" not in table] == []
    for page in PAGES:
        for link in re.findall(r"(?<!!)\[[^\]]+\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_threat_model_says_what_every_method_for_different_networks_shows() -> None:
    """Each has a row, and the row says whether a sum can hide it."""
    page = (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")
    section = page.partition("## Sites with different networks")[2].partition("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| `")]
    told = {name: row[2] for row in rows for name in re.findall(r"`([a-z-]+)`", row[0])}
    assert {name for name in METHODS if method_class(name).mixed_networks} <= told.keys()
    for name, backends in told.items():
        if name in METHODS:
            try:
                toy_study(name, aggregation="masked")
                assert backends.startswith("any"), name
            except StudyError:
                assert backends == "no sum", name
