"""``polyclinic vectors`` as a new user goes through it: four folders play three hospitals and a coordinator."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

Said = tuple[int, str, str]
HOSPITALS = {"north": 48, "south": 40, "west": 40}
PASSPHRASE = "correct horse battery"
STUDY: dict[str, Any] = {
    "task": {"kind": "multi-class", "classes": ["normal", "pneumonia"]},
    "model": {"name": "small-cnn", "width": 4},
    "training": {"lr": 0.02, "batch_size": 8},
    "method": {"name": "local", "rounds": 2},
    "evaluation": {"bootstrap": 20, "examples": 0},
}
PHANTOM = {
    "kind": "chest-xray",
    "sites": [{"name": name, "patients": patients} for name, patients in {**HOSPITALS, "centre": 40}.items()],
}


def polyclinic(*arguments: str | Path) -> Said:
    """The command line in this process: exit code, standard output, standard error."""
    from polyclinic import cli

    said, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["polyclinic", *map(str, arguments)])
        patch.setenv("POLYCLINIC_PASSPHRASE", PASSPHRASE)
        patch.delenv("POLYCLINIC_DATA", raising=False)
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
            try:
                cli.main()
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
    return code, said.getvalue(), errors.getvalue()


vectors = partial(polyclinic, "vectors")


def done(said: Said) -> str:
    """What a command printed, which must have gone well."""
    assert said[0] == 0, said
    return said[1]


def refused(said: Said, *expected: str) -> None:
    code, _, errors = said
    assert code == 2, said
    assert errors.startswith("error: ") or "Usage:" in errors, errors
    assert "Traceback" not in errors
    for text in expected:
        assert text in errors, errors


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    assert match is not None, text
    return match[1]


class World:
    """Where everything lies, and what each command said."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.said = folder, dict[str, str]()

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def key(self, name: str) -> Path:
        return self.folder / f"keys-{name}" / f"{name}.key"

    def study(self, name: str, **sections: Any) -> Path:
        data = {"image": {"size": [24, 24]}, "root": str(self.folder / "images" / name)}
        data |= {"tables": [{"path": "manifest.csv", "site": name}], "split": {"fractions": [0.5, 0.25, 0.25]}}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"name": name, **STUDY, "data": data, **sections}))
        return path

    def copied(self, folder: Path) -> Path:
        """The ledger with three contributions, for a test to change."""
        shutil.copytree(self.folder / "ledger", folder / "ledger")
        return folder / "ledger"

    def digest(self, site: str) -> str:
        return found(r"^digest: (\w{64})$", self.said[f"create {site}"])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Up to the ledger with three contributions, every step a command."""
    made = World(tmp_path_factory.mktemp("world"))
    (made / "phantoms.yaml").write_text(yaml.safe_dump({"name": "chest", **STUDY, "data": {"phantom": PHANTOM}}))
    done(polyclinic("data", "phantom", made / "phantoms.yaml", "--out", made / "images"))
    for name in (*HOSPITALS, "centre"):
        encrypt = ["--encrypt"] if name == "centre" else []
        done(polyclinic("keys", "new", name, "--out", made / f"keys-{name}", *encrypt))
    for name in HOSPITALS:
        public = made.key(name).with_suffix(".pub")
        told = done(polyclinic("keys", "show", public)).partition(": ")[2].strip()
        done(polyclinic("keys", "trust", made / "roster.json", public, "--fingerprint", told))
    made.said["base"] = done(vectors("base", made.study("centre"), "--out", made / "base"))
    for name in HOSPITALS:
        made.said[f"train {name}"] = done(
            vectors("train", made / "base", made.study(name), "--out", made / f"run-{name}", "--seed", 1)
        )
        options = ["--statistics", "--max-auc", "1", "--licence", "CC-BY-4.0"]
        made.said[f"create {name}"] = done(
            vectors(
                "create",
                *(made / "base", made / f"run-{name}", "--key", made.key(name), "--out", made / f"out-{name}"),
                *options,
            )
        )
    key = made.key("centre")
    roster = ["--roster", made / "roster.json"]
    made.said["ledger"] = done(vectors("ledger", made / "base", "--key", key, *roster, "--out", made / "ledger"))
    for name in HOSPITALS:
        made.said[f"add {name}"] = done(vectors("add", made / "ledger", made / f"out-{name}", "--key", key))
    return made


@pytest.fixture(scope="module")
def merged(world: World) -> World:
    """And with a model, which is noted in the ledger."""
    options = ["--data", world / "centre.yaml", "--set", "restoration=bn-recal", "--purpose", "for tests"]
    code, said, errors = vectors(
        "merge", world / "ledger", "--out", world / "merged", "--key", world.key("centre"), *options
    )
    assert code == 0, errors
    world.said["merge"], world.said["merge warnings"] = said, errors
    return world


def test_what_the_commands_say_up_to_the_ledger(world: World) -> None:
    assert "classes: normal, pneumonia" in world.said["base"]
    digest = found(r"^digest: (\w{64}) \(publish it", world.said["base"])
    assert json.loads((world / "ledger" / "ledger.json").read_text())["base"] == digest
    for name in HOSPITALS:
        assert f"report: {world / f'run-{name}' / 'report.html'}" in world.said[f"train {name}"]
        assert f"next: polyclinic vectors create {world / 'base'}" in world.said[f"train {name}"]
        assert "membership audit: AUC " in world.said[f"create {name}"]
        assert "(statistics.safetensors, vector.safetensors)" in world.said[f"create {name}"]
        added = world.said[f"add {name}"]
        assert f"added: {world.digest(name)} of {name}" in added
        assert "admission: accept" in added
    heads = [found(r"^head: (\w{64})$", world.said[step]) for step in ("ledger", *(f"add {n}" for n in HOSPITALS))]
    assert len(set(heads)) == 4


def test_list_verify_and_explain(world: World) -> None:
    listed = done(vectors("list", world / "ledger"))
    for name in HOSPITALS:
        assert re.search(rf"{world.digest(name)[:12]} +{name} +1 +\d+ +statistics, +vector", listed), listed
    first = found(r"^head: (\w{64})$", world.said["ledger"])
    verified = done(vectors("verify", world / "ledger", "--head", first))
    assert verified.rstrip().endswith("nothing wrong was found")
    told = done(vectors("explain", world / "ledger"))
    assert all(f"{world.digest(name)[:12]} of {name}" in told for name in HOSPITALS)
    assert told.count("admission: ") == 3
    one = done(vectors("explain", world / "ledger", world.digest("south")[:8]))
    assert "of south" in one
    assert one.count("admission: ") == 1


def test_merge_prints_the_table_and_where_the_model_is(merged: World) -> None:
    said = merged.said["merge"]
    for row in ("base, restored", "site north", "one site, mean", "ensemble", "random vectors", "shuffled vectors"):
        assert row in said
    assert said.index("base") < said.index("merged, restored")
    assert "AUROC" in said
    assert "Balanced accuracy" in said
    assert f"model: {merged / 'merged' / 'model.safetensors'}" in said
    assert f"card: {merged / 'merged' / 'card.html'}" in said
    assert {path.name for path in (merged / "merged").iterdir()} == {
        *("model.safetensors", "recipe.json", "base.json", "merge.json", "card.html")
    }
    assert json.loads((merged / "merged" / "merge.json").read_text())["purpose"] == "for tests"
    model = found(r'"weights_sha256": "(\w{64})"', (merged / "merged" / "merge.json").read_text())
    assert f"release {model[:12]} of 3 contributions" in done(vectors("list", merged / "ledger"))
    verified = done(vectors("verify", merged / "ledger", "--model", merged / "merged"))
    assert "made of 3 contributions that the ledger holds" in verified


def test_the_default_merge_is_the_mean_and_needs_no_images(world: World, tmp_path: Path) -> None:
    code, said, errors = vectors("merge", world / "ledger", "--out", tmp_path / "out", "--set", "rule=data-vector")
    assert code == 0
    assert errors.startswith("note: its batch normalisation has the base's running statistics")
    assert "Balanced accuracy" not in said
    start, model = load_file(world / "base" / "base.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    sent = [load_file(world / f"out-{name}" / "vector.safetensors") for name in HOSPITALS]
    for name in sent[0]:
        wanted = start[name].double() + sum(one[name].double() for one in sent) / 3
        assert float((model[name].double() - wanted).abs().max()) < 1e-6


def test_evaluate_writes_nothing(world: World, tmp_path: Path) -> None:
    ledger = world.copied(tmp_path)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    (tmp_path / "recipe.yaml").write_text("rule: {name: median}\nrestoration: bn-pooled\n")
    options = ["--data", world / "centre.yaml", "--recipe", tmp_path / "recipe.yaml"]
    said = done(vectors("evaluate", ledger, *options, "--set", "rule=ties"))
    cells = r" +\d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\]" * 2
    for row in ("base", "site west", "shuffled vectors", "merged"):
        assert re.search(rf"^ *{row}{cells}", said, re.MULTILINE), said
    assert sorted(path.name for path in tmp_path.rglob("*") if path.name != "recipe.yaml") == before


def test_leaving_and_deciding(merged: World, tmp_path: Path) -> None:
    ledger, key = merged.copied(tmp_path), merged.key("centre")
    west, north = merged.digest("west"), merged.digest("north")
    assert "accept: noted" in done(vectors("accept", ledger, north[:10], "--key", key, "--note", "looked at it"))
    assert "(a person decided: accept)" in done(vectors("explain", ledger, north))
    assert "hold: noted" in done(vectors("hold", ledger, north[:10], "--key", key, "--note", "wait"))
    said = done(vectors("remove", ledger, west[:8], "--key", key, "--reason", "withdrew"))
    assert found(r"^head: (\w{64})$", said) == found(r"^head: (\w{64})$", done(vectors("list", ledger)))
    listed = done(vectors("list", ledger))
    assert west[:12] not in listed
    assert "withdraw it: it holds a removed contribution" in " ".join(listed.split())
    assert not (ledger / "contributions" / west / "vector.safetensors").exists()
    refused(vectors("verify", ledger, "--model", merged / "merged"), west[:12], "withdraw the model")
    refused(vectors("remove", ledger, west[:8], "--key", key, "--reason", "again"), "error: ")
    code, _, errors = vectors("merge", ledger, "--out", tmp_path / "out")
    assert code == 0
    assert f"warning: {north[:12]} of north was left out: a person holds it" in errors
    assert "holds a contribution that was removed: withdraw it" in errors
    refused(vectors("add", ledger, merged / "out-west", "--key", key), "error: ")


def test_the_next_base_and_a_head_in_closed_form(merged: World, tmp_path: Path) -> None:
    key, base, ledger = merged.key("centre"), tmp_path / "base-2", tmp_path / "ledger-2"
    done(vectors("base", merged / "centre.yaml", "--merged", merged / "merged", "--out", base, "--version", "2"))
    assert len(json.loads((base / "base.json").read_text())["lineage"]) == 2
    done(vectors("ledger", base, "--key", key, "--roster", merged / "roster.json", "--out", ledger))
    for name in HOSPITALS:
        out = tmp_path / f"out-{name}"
        options = ["--key", merged.key(name), "--no-vector", "--head", "--out", out]
        said = done(vectors("create", base, merged / f"{name}.yaml", *options))
        assert "(head.safetensors)" in said
        assert "membership audit" not in said
        added = done(vectors("add", ledger, out, "--key", key))
        assert f"of {name}" in added
        assert "admission: it brings no vector, so nothing of it was compared" in added
    assert "brings no vector" in done(vectors("explain", ledger))
    code, said, errors = vectors(
        "merge", ledger, "--out", tmp_path / "merged-2", "--set", "rule=base", "--set", "head=ridge"
    )
    assert code == 0, errors
    before, after = (
        load_file(path) for path in (base / "base.safetensors", tmp_path / "merged-2" / "model.safetensors")
    )
    changed = {name for name in before if not before[name].equal(after[name])}
    head = json.loads((base / "base.json").read_text())["head"]
    assert changed == {f"{head}.weight", f"{head}.bias"}


def test_training_goes_on_after_a_stop_and_never_over_another(world: World, tmp_path: Path) -> None:
    run = world / "run-north"
    refused(vectors("train", world / "base", world / "north.yaml", "--out", run), "is there already")
    assert "report: " in done(vectors("train", world / "base", world / "north.yaml", "--resume", run, "--seed", 1))


# What is refused, and how.


@pytest.fixture
def ledger(world: World, tmp_path: Path) -> Iterator[Path]:
    """A copy of the ledger, which must be as it was afterwards."""
    copy = world.copied(tmp_path)

    def state() -> dict[str, str]:
        files = sorted(path for path in copy.rglob("*") if path.is_file())
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    before = state()
    yield copy
    assert state() == before


CREATE = "create BASE/base BASE/run-north --key BASE/keys-north/north.key --out OUT"
MERGE = "merge LEDGER --out OUT"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (f"{CREATE} --replaces garbage", ["these options are not valid", "replaces.0", "Seen: 'garbage'"]),
        (f"{CREATE} --replaces ../../x,y", ["replaces.0", "replaces.1"]),
        (f"{CREATE} --no-vector", ["a contribution must bring a vector or sums for a head"]),
        (f"{CREATE} --no-vector --head --fisher", ["send the vector with them"]),
        (f"{CREATE} --max-auc 0.2", ["Invalid value"]),
        (f"{CREATE} --sequence 0", ["Invalid value"]),
        (f"{CREATE} --precision float16", ["Invalid value"]),
        (f"{CREATE} --licence [bold]", ["OUT-is-there"]),
        ("create BASE/base BASE/nowhere --key BASE/keys-north/north.key --out OUT", ["nowhere"]),
        ("create BASE/base BASE/run-north --key BASE/keys-north/north.pub --out OUT", ["north.pub"]),
        ("create BASE/base BASE/run-north --key BASE/nokey --out OUT", ["nokey"]),
        ("create BASE/ledger BASE/run-north --key BASE/keys-north/north.key --out OUT", ["only base.json"]),
        ("train BASE/base BASE/north.yaml --set model.width=8 --out OUT", ["model.width is 8; the base", "has 4"]),
        ("train BASE/base BASE/north.yaml --set task.classes=[normal,measles] --out OUT", ["'measles' is unknown"]),
        ("train BASE/nobase BASE/north.yaml --out OUT", ["nobase"]),
        ("base BASE/centre.yaml --out BASE/base", ["is there already"]),
        ("base BASE/centre.yaml --out OUT --merged BASE/base", ["holds no merged model"]),
        ("base BASE/centre.yaml --out OUT --weights BASE/nothing.safetensors", ["nothing.safetensors"]),
        ("ledger BASE/base --key BASE/keys-north/north.key --roster BASE/none.json --out OUT", ["none.json"]),
        ("add LEDGER BASE/out-north --key BASE/keys-north/north.key", ["signed by 'centre'", "; the key is "]),
        ("add LEDGER BASE/out-north --key BASE/keys-centre/centre.key", ["of site 'north' is a duplicate"]),
        ("add LEDGER BASE/base --key BASE/keys-centre/centre.key", ["only fisher.safetensors"]),
        ("add BASE/base BASE/out-north --key BASE/keys-centre/centre.key", ["ledger.json"]),
        ("remove LEDGER abc --key BASE/keys-centre/centre.key --reason x", ["'abc' is too short: give 6"]),
        (
            "hold LEDGER 000000000000 --key BASE/keys-centre/centre.key --note x",
            ["0 contributions of the ledger begin"],
        ),
        ("accept LEDGER ../../x --key BASE/keys-centre/centre.key --note x", ["begin with '../../x'"]),
        ("remove LEDGER NORTH --key BASE/keys-south/south.key --reason x", ["signed by 'centre'"]),
        ("remove LEDGER NORTH --key BASE/keys-centre/centre.key", ["Missing option"]),
        ("explain LEDGER 000000000000", ["0 contributions of the ledger begin"]),
        ("explain LEDGER [red]zzzzz", ["begin with '[red]zzzzz'"]),
        (f"verify LEDGER --head {'0' * 64}", ["error: "]),
        ("verify LEDGER --head nonsense", ["error: "]),
        ("verify LEDGER --model BASE/base", ["holds no merged model"]),
        ("list BASE/base", ["ledger.json"]),
        (f"{MERGE} --set rule=tis", ["there is no rule 'tis'. Did you mean 'ties'?"]),
        (f"{MERGE} --set rule.coeficients=sum", ["has no setting 'coeficients'. Did you mean 'coefficients'?"]),
        (f"{MERGE} --set filters=[dar]", ["there is no filter 'dar'. Did you mean 'dare'?"]),
        (f"{MERGE} --set restoration=bn-recl", ["restoration"]),
        (f"{MERGE} --set rule", ["write key.path=value"]),
        (f"{MERGE} --set rules=ties", ["rules: there is no such key. Did you mean 'rule'?"]),
        (f"{MERGE} --recipe nowhere.yaml", ["nowhere.yaml"]),
        (f"{MERGE} --set restoration=finetune", ["needs images of the coordinator's", "(--data)"]),
        (f"{MERGE} --set rule=greedy-soup", ["coordinator's own images"]),
        (f"{MERGE} --set rule=fisher", ["lacks fisher of"]),
        (f"{MERGE} --set head=ridge", ["a closed-form head goes with rule base"]),
        (f"{MERGE} --key BASE/keys-north/north.key", ["signed by 'centre', but the key is that of 'north'"]),
        (f"{MERGE} --data nowhere.yaml", ["there is no study file nowhere.yaml"]),
        ("merge LEDGER --out BASE/base", ["is there already"]),
        ("evaluate LEDGER", ["Missing option"]),
        ("evaluate LEDGER --data nowhere.yaml", ["there is no study file"]),
    ],
)
def test_refusals(command: str, expected: list[str], world: World, ledger: Path, tmp_path: Path) -> None:
    if expected == ["OUT-is-there"]:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("mine")
        expected = ["is there already. Give another --out"]
    places = {"BASE": world.folder, "LEDGER": ledger, "OUT": tmp_path / "out", "NORTH": world.digest("north")}
    for name, place in places.items():
        command = command.replace(name, str(place))
    refused(vectors(*command.split(" ")), *expected)
    assert [path.name for path in tmp_path.iterdir() if path.name != "ledger"] in ([], ["out"])
    if (tmp_path / "out").exists():
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_wrong_passphrase(world: World, ledger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.PASSPHRASE", "another long passphrase")
    command = ["hold", ledger, world.digest("north"), "--note", "x", "--key"]
    refused(vectors(*command, world.key("centre")), "passphrase")
    open_key = tmp_path / "open.key"
    shutil.copy(world.key("centre"), open_key)
    open_key.chmod(0o644)
    refused(vectors(*command, open_key), "open.key")
    open_key.unlink()


def test_a_file_that_was_altered_on_the_way(world: World, tmp_path: Path) -> None:
    key, ledger = world.key("centre"), tmp_path / "ledger"
    done(vectors("ledger", world / "base", "--key", key, "--roster", world / "roster.json", "--out", ledger))
    shutil.copytree(world / "out-south", tmp_path / "sent")
    path = tmp_path / "sent" / "vector.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    refused(vectors("add", ledger, tmp_path / "sent", "--key", key), "vector.safetensors")
    assert not list((ledger / "contributions").iterdir())
    assert "no contributions yet" in done(vectors("explain", ledger))
    refused(vectors("merge", ledger, "--out", tmp_path / "out"), "there is nothing to merge: none brings a vector")


def test_a_vectors_help_lists_every_command(polyclinic_says: Callable[..., Said]) -> None:
    code, said, _ = polyclinic_says("vectors")
    commands = ("base", "train", "create", "ledger", "add", "list", "verify", "remove", "accept", "hold", "merge")
    assert code in (0, 2)
    assert all(name in said for name in (*commands, "evaluate", "explain"))
