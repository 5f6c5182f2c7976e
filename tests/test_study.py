"""The study file: what is refused and how, overrides, round trip, schema."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from polyclinic.errors import StudyError
from polyclinic.methods import METHODS
from polyclinic.study import Study, dump_study, load_study, study_schema, validate_study, with_method

REPOSITORY = Path(__file__).resolve().parents[1]
SHIPPED = sorted((REPOSITORY / "examples").glob("*.yaml")) + sorted(
    Path(str(path)) for path in (resources.files("polyclinic") / "studies").iterdir() if path.name.endswith(".yaml")
)
File = Callable[..., Path]
Make = Callable[..., Study]


@pytest.fixture(autouse=True)
def _no_moved_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POLYCLINIC_DATA", raising=False)


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(StudyError) as caught:
        load_study(path, overrides=overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"trainin": {"lr": 1}}, "trainin: there is no such key. Did you mean 'training'?"),
        ({"training": {"batchsize": 3}}, "training.batchsize: there is no such key. Did you mean 'batch_size'?"),
        (
            {"training": {"augment": {"flipp": True}}},
            "training.augment.flipp: there is no such key. Did you mean 'flip'?",
        ),
        (
            {"method": {"name": "ditto", "strenght": 1}},
            "method.strenght: there is no such key. Did you mean 'strength'?",
        ),
        (
            {"method": {"name": "fedavg", "zzz": 1}},
            "method.zzz: there is no such key. Known: name, label, rounds, participation",
        ),
        ({"method": "fedprx"}, "method: there is no method 'fedprx'. Did you mean 'fedprox'?"),
        ({"method": 3}, "method: give a method's name"),
        ({"training": {"lr": "fast"}}, "training.lr: Input should be a valid number, unable to parse string"),
        ({"training": {"lr": -1}}, "training.lr: Input should be greater than or equal to 0. Seen: -1."),
        ({"training": None}, "training: Input should be a valid dictionary"),
        ({"method": {"rounds": 0}}, "method.rounds: Input should be greater than or equal to 1. Seen: 0."),
        ({"device": "gpu"}, "device: Input should be 'cpu' or 'cuda'. Seen: 'gpu'."),
        ({"task": {"kind": "multi-class", "classes": ["a", "a"]}}, "task.classes: classes are listed twice: a."),
        ({"task": {"classes": [False, "a"]}}, "task.classes.0: Input should be a valid string. Seen: False."),
        ({"name": "a b"}, "name: String should match pattern"),
        (
            {"data": {"split": {"fractions": [0.5, 0.2, 0.2]}}},
            "data.split.fractions: fractions must be train, val, test",
        ),
        (
            {"data": {"tables": [{"path": "x.csv"}]}},
            "data: give either tables (real images) or phantom (made-up images).",
        ),
        ({"evaluation": {"metric": "aurok"}}, "evaluation.metric: 'aurok' is not measured on validation images of a"),
    ],
)
def test_what_is_wrong_and_where(tiny_file: File, sections: dict[str, Any], expected: str) -> None:
    path = tiny_file(**sections)
    message = refusal(path)
    assert expected in message
    assert "evaluation.metric" in expected or str(path) in message


def test_a_key_inside_a_list_names_its_place(tiny_file: File) -> None:
    sites = [{"name": "a"}, {"name": "b", "patient": 3}]
    message = refusal(tiny_file(data={"phantom": {"sites": sites}}))
    assert "data.phantom.sites.1.patient: there is no such key. Did you mean 'patients'?" in message


def test_every_fault_has_a_line(tiny_file: File) -> None:
    message = refusal(tiny_file(device="gpu", seed=-1, modell={}))
    assert len(message.splitlines()) == 4


def test_missing_keys(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("task: {kind: multi-label}")
    message = refusal(path)
    assert "task.classes: this key is required." in message
    assert "data: this key is required." in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [", "is not YAML"),
        ("- a", "holds list, not a mapping"),
        ("", "holds NoneType, not a mapping"),
        ("training: {lr: 1}\ntraining: {lr: 2}", "the key 'training' stands twice"),
        ("training: {lr: 1, lr: 2}", "the key 'lr' stands twice"),
        ("a: !!python/object/apply:os.system [true]", "is not YAML"),
    ],
)
def test_what_is_no_study_file(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    assert expected in refusal(path)


def test_other_bytes_and_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    assert "is not YAML" in refusal(tmp_path / "a.yaml")
    assert "there is no study file" in refusal(tmp_path / "b.yaml")


@pytest.mark.parametrize(
    ("override", "where", "value"),
    [
        ("method.rounds=7", "method.rounds", 7),
        ("training.lr=1e-3", "training.lr", 0.001),
        ("training.steps=", "training.steps", None),
        ("training.steps=5", "training.steps", 5),
        ("training.augment.flip=true", "training.augment.flip", True),
        ("data.phantom.sites.1.name=coast", "data.phantom.sites.1.name", "coast"),
        ("data.image.size=[32, 32]", "data.image.size", [32, 32]),
        ("data.image.size.0=40", "data.image.size", [40, 24]),
        ("compare.methods=[local, {name: ditto, strength: 1}]", "compare.methods.1.strength", 1),
        ("method=ditto", "method.name", "ditto"),
        ("method={name: fedprox, mu: 0.5}", "method.mu", 0.5),
        ("description=a = b", "description", "a = b"),
        (" seed =3", "seed", 3),
    ],
)
def test_overrides(tiny_file: File, override: str, where: str, value: Any) -> None:
    found: Any = load_study(tiny_file(), overrides=[override]).model_dump()
    for part in where.split("."):
        found = found[int(part) if isinstance(found, list) else part]
    assert found == value


def test_an_override_turns_a_method_name_into_settings(tiny_file: File) -> None:
    study = load_study(tiny_file(method="ditto"), overrides=["method.strength=0.3", "method.rounds=2"])
    assert (study.method.name, study.method.strength, study.method.rounds) == ("ditto", 0.3, 2)


def test_later_overrides_win(tiny_file: File) -> None:
    assert load_study(tiny_file(), overrides=["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", "write key.path=value"),
        ("=3", "write key.path=value"),
        ("name.x=1", "there is no name.x in the study"),
        ("name.x.y=1", "there is no name.x in the study"),
        ("name.0=1", "there is no name.0 in the study"),
        ("seed.x=1", "seed: Input should be a valid integer. Seen: {'x': 1}."),
        ("data.image.size.5=1", "there is no data.image.size.5 in the study"),
        ("data.image.size.-1=1", "there is no data.image.size.-1 in the study"),
        ("data.phantom.sites.9.name=a", "there is no data.phantom.sites.9 in the study"),
        ("data.phantom.sites.north.name=a", "there is no data.phantom.sites.north in the study"),
        ("seed=[", "is not YAML"),
        ("trainin.lr=1", "trainin: there is no such key. Did you mean 'training'?"),
        ("training.lr.x=1", "there is no training.lr.x in the study"),
        ("training..lr=1", "training.: there is no such key"),
    ],
)
def test_bad_overrides(tiny_file: File, override: str, expected: str) -> None:
    assert expected in refusal(tiny_file(), override)


@pytest.mark.parametrize(
    ("sections", "reason", "remedy"),
    [
        ({"method": "scaffold", "training": {"momentum": 0.9}}, "method scaffold", "use method fedprox"),
        ({"method": "pooled", "model": {"norm": "batch-local"}}, "method pooled", "norm: batch"),
        ({"task": {"kind": "multi-class", "classes": ["a"]}}, "at least two classes", "multi-label"),
        ({"task": {"loss": "dice-ce"}}, "task.loss: dice-ce compares masks", "Use cross-entropy or focal"),
        ({"task": {"kind": "segmentation", "classes": ["a"]}}, "segmentation needs at least two classes", "background"),
        (
            {"task": {"kind": "multi-label"}, "training": {"balanced": True}},
            "training.balanced is for multi-class",
            "Remove it",
        ),
        ({"training": {"patch": [8, 8]}}, "training.patch is for segmentation", "Remove it"),
        ({"task": {"kind": "segmentation"}, "training": {"patch": [99, 8]}}, "training.patch: [99, 8]", "[24, 24]"),
        ({"task": {"kind": "segmentation"}, "evaluation": {"metric": "iou"}}, "evaluation.metric: 'iou'", "auto, dice"),
    ],
)
def test_impossible_combinations(tiny_file: File, sections: dict[str, Any], reason: str, remedy: str) -> None:
    message = refusal(tiny_file(**sections))
    assert reason in message
    assert remedy in message


def test_a_study_without_a_method_is_fedavg(tiny_study: Make) -> None:
    raw = tiny_study().model_dump()
    del raw["method"]
    study = validate_study(raw)
    assert (study.method.name, study.method.rounds) == ("fedavg", 10)


def test_the_name_is_the_files_where_none_is_given(tiny_file: File) -> None:
    path = tiny_file("lungs.yaml")
    raw = yaml.safe_load(path.read_text())
    del raw["name"]
    path.write_text(yaml.safe_dump(raw))
    assert load_study(path).name == "lungs"


def test_where_the_images_are(tiny_file: File, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_file(data={"root": "../images"})
    assert load_study(path).data.root == str((tmp_path.parent / "images").resolve())
    monkeypatch.setenv("POLYCLINIC_DATA", str(tmp_path / "b"))
    assert load_study(path).data.root == str(tmp_path / "b")
    assert load_study(path, data_root=tmp_path / "c").data.root == str(tmp_path / "c")


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_written_study_reads_back_equal(tiny_file: File, tmp_path: Path, method: str) -> None:
    proxies = {"manifest": "public.json", "images": "public"}  # some methods need public images
    study = load_study(
        tiny_file(method=method, proxies=proxies), overrides=["compare.methods=[local, {name: ditto, strength: 2}]"]
    )
    (tmp_path / "again.yaml").write_text(dump_study(study))
    again = load_study(tmp_path / "again.yaml")
    assert again == study
    assert again.method == study.method
    assert type(again.method) is type(study.method)
    assert dump_study(again) == dump_study(study)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_studies_are_valid(path: Path, tmp_path: Path) -> None:
    from polyclinic.comparison import planned

    study = load_study(path)
    planned(study)
    (tmp_path / "again.yaml").write_text(dump_study(study))
    assert load_study(tmp_path / "again.yaml") == study


def test_examples_are_shipped() -> None:
    assert {"demo"} <= {path.stem for path in SHIPPED}
    assert len(SHIPPED) > 1


def test_with_method_carries_rounds_and_refuses_with_reason(tiny_study: Make) -> None:
    study = tiny_study(method={"rounds": 4, "participation": 0.5})
    other = with_method(study, {"name": "ditto", "strength": 2}, seed=5)
    assert (other.method.rounds, other.method.participation, other.method.strength, other.seed) == (4, 0.5, 2, 5)
    assert with_method(study, {"name": "ditto", "rounds": 9}, 0).method.rounds == 9
    for method, expected in [
        ("fedavgg", "compare.methods: there is no method 'fedavgg'. Did you mean 'fedavg'?"),
        ({"rounds": 3}, "has no name"),
        ({"name": "ditto", "strenght": 2}, "Did you mean 'strength'?"),
        ({"name": "ditto", "strength": -2}, "greater than or equal to 0"),
    ]:
        with pytest.raises(StudyError, match="compare.methods") as caught:
            with_method(study, method, 0)
        assert expected in str(caught.value)


def described(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every property of the study and of each definition, with its place."""
    for owner, part in [("study", schema), *schema["$defs"].items()]:
        for name, field in part.get("properties", {}).items():
            yield f"{owner}.{name}", field


def test_every_field_of_the_schema_is_described() -> None:
    schema = study_schema()
    bare = []
    for place, field in described(schema):
        target = schema["$defs"].get(field.get("$ref", "").rpartition("/")[2], {})
        if not (field.get("description") or target.get("description")):
            bare.append(place)
    assert bare == []
    assert all(part.get("description") for part in schema["$defs"].values())


def test_the_schema_knows_every_method() -> None:
    schema = study_schema()
    methods = [part["properties"] for part in schema["$defs"].values() if "participation" in part["properties"]]
    names = {fields["name"]["const"] for fields in methods}
    assert names == set(METHODS)
    assert schema["properties"]["method"]["anyOf"][0]["enum"] == sorted(METHODS)
    references = [word for word in json.dumps(schema).split('"') if word.startswith("#/$defs/")]
    assert {word.rpartition("/")[2] for word in references} <= set(schema["$defs"])


def test_the_published_schema_is_the_programs() -> None:
    published = REPOSITORY / "docs" / "study.schema.json"
    assert json.loads(published.read_text()) == json.loads(json.dumps(study_schema())), "run: make schema"
