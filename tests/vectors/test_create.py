"""A site's own side: train, audit, sign; and everything that must not leave."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pydantic import ValidationError
from tiny import TINY, changed

from polyclinic.errors import ContributionError, DataError
from polyclinic.models.weights import read_tensors
from polyclinic.results import RunFolder
from polyclinic.runner import load_sites
from polyclinic.secure.identity import Identity, Roster
from polyclinic.study import Study, dump_study, validate_study
from polyclinic.vectors.base import Base, publish_base
from polyclinic.vectors.contribution import Contribution
from polyclinic.vectors.create import CreateOptions, create_contribution
from polyclinic.vectors.fine_tuning import fine_tune_base
from polyclinic.vectors.head import HeadSums
from polyclinic.vectors.manifest import binned
from polyclinic.vectors.statement import images_of_classes

NORTH = Identity.new("north")
CLASSES = ["normal", "pneumonia"]
Made = tuple[Path, Path]


def study(patients: int = 60, **sections: Any) -> Study:
    own = {
        "data": {
            "phantom": {"kind": "chest-xray", "sites": [{"name": "north", "patients": patients}]},
            "split": {"fractions": [0.5, 0.25, 0.25]},
        },
        "method": {"name": "local", "rounds": 2},
    }
    return validate_study(changed(changed(TINY, own), sections))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A base and a run that started from it."""
    folder = tmp_path_factory.mktemp("north")
    publish_base(study(), None, folder / "base", version="1")
    fine_tune_base(folder / "base", study(), out=folder / "run")
    return folder / "base", folder / "run"


@pytest.fixture
def create(made: Made, tmp_path: Path) -> Callable[..., Contribution]:
    def contribute(run: Path | None = None, base: Path | None = None, **options: Any) -> Contribution:
        out = tmp_path / "contribution"
        return create_contribution(base or made[0], run or made[1], out, NORTH, CreateOptions(**options))

    return contribute


def read_back(folder: Path, base: Path) -> Contribution:
    return Contribution.load(folder, Base.load(base), Roster({"north": NORTH.public}))


def test_a_contribution_is_what_the_coordinator_accepts(
    create: Callable[..., Contribution], made: Made, tmp_path: Path
) -> None:
    create()
    found = read_back(tmp_path / "contribution", made[0])
    trained, _ = read_tensors(made[1] / "models" / "north.safetensors")
    start, _ = read_tensors(made[0] / "base.safetensors")
    for name in found.names("vector"):
        assert torch.equal(found.read("vector", name), trained[name] - start[name]), name
    assert any(float(found.read("vector", name).abs().max()) > 0 for name in found.names("vector"))
    assert not any("running" in name for name in found.names("vector"))


def test_the_manifest_says_what_the_run_did_in_rounded_numbers(create: Callable[..., Contribution], made: Made) -> None:
    manifest = create(sequence=3, licence="CC-BY-4.0", ethics="E-1", modality="X-ray", replaces=["ab" * 32]).manifest
    metrics = json.loads((made[1] / "metrics.json").read_text())
    images = metrics["sites"]["north"]["images"]
    chosen = metrics["chosen_round"]
    record = RunFolder(made[1]).rounds()[chosen - 1]["sites"]["north"]["val"]
    assert (manifest.site, manifest.sequence, manifest.replaces) == ("north", 3, ["ab" * 32])
    assert (manifest.licence, manifest.data.ethics, manifest.data.modality) == ("CC-BY-4.0", "E-1", "X-ray")
    assert manifest.data.images == binned(images["train"])
    assert manifest.data.images_per_class is None
    assert manifest.data.classes_held == CLASSES
    assert manifest.data.patient_split
    assert (manifest.training.lr, manifest.training.batch_size, manifest.training.epochs) == (0.05, 8, chosen)
    assert manifest.metrics["accuracy"].value == round(record["accuracy"], 2)
    assert manifest.metrics["accuracy"].n == binned(images["val"])
    assert "torch 2" in manifest.training.framework


def test_the_audit_is_in_the_manifest_and_stays_in_full_at_the_site(
    create: Callable[..., Contribution], made: Made
) -> None:
    audit = create().manifest.privacy.membership
    assert audit is not None
    kept = json.loads((made[1] / "membership.json").read_text())
    assert audit.auc == round(kept["auc"], 3)
    assert kept["members"] == 30
    assert (audit.members, audit.nonmembers) == (binned(30), binned(30))
    assert audit.fpr == round(kept["false_positives"]["count"] / binned(30), 3)
    assert audit.passed
    assert kept["passed"]


def test_a_model_that_learned_by_heart_does_not_leave(made: Made, tmp_path: Path) -> None:
    long = study(
        method={"name": "local", "rounds": 1},
        training={"lr": 0.01, "optimizer": "adam", "epochs": 150},
        evaluation={"select": "last"},
    )
    fine_tune_base(made[0], of_noise(long, tmp_path), out=tmp_path / "run")
    with pytest.raises(ContributionError, match="the membership audit failed.*AUC 0.*fewer epochs.*--max-auc"):
        create_contribution(made[0], tmp_path / "run", tmp_path / "out", NORTH, CreateOptions())
    assert not (tmp_path / "out").exists()
    assert json.loads((tmp_path / "run" / "membership.json").read_text())["passed"] is False
    sent = create_contribution(made[0], tmp_path / "run", tmp_path / "out", NORTH, CreateOptions(max_auc=1))
    assert sent.manifest.privacy.membership is not None
    assert sent.manifest.privacy.membership.auc > 0.65


def test_other_images_than_were_trained_on_are_not_audited(made: Made, tmp_path: Path) -> None:
    """With another split training patients would stand on both sides, and the attack would find nothing."""
    shutil.copytree(made[1], tmp_path / "run")
    path = tmp_path / "run" / "study.yaml"
    raw = yaml.safe_load(path.read_text())
    raw["data"]["split"]["seed"] = raw["data"]["split"].get("seed", 0) + 1
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(DataError, match="the data are not those that this run was started with"):
        create_contribution(made[0], tmp_path / "run", tmp_path / "out", NORTH, CreateOptions())
    assert not (tmp_path / "out").exists()


def test_steps_do_not_tell_the_exact_number_of_images(made: Made, tmp_path: Path) -> None:
    """Steps times batch over epochs would be that number."""
    own = study(training={"steps": 200, "batch_size": 8}, method={"name": "local", "rounds": 1})
    fine_tune_base(made[0], own, out=tmp_path / "run")
    sent = create_contribution(made[0], tmp_path / "run", tmp_path / "out", NORTH, CreateOptions(max_auc=1))
    images = json.loads((tmp_path / "run" / "metrics.json").read_text())["sites"]["north"]["images"]["train"]
    assert sent.manifest.data.images == 47
    assert sent.manifest.training.epochs == 34  # 1600 / 47
    assert images not in (47, round(200 * 8 / 34))


def of_noise(given: Study, folder: Path) -> Study:
    """The same settings on noise with random labels, which can only be learned by heart."""
    draw = np.random.default_rng(0)
    images = folder / "images"
    images.mkdir()
    rows = ["image,label,patient,site"]
    for i in range(80):
        Image.fromarray(draw.integers(0, 256, (24, 24), dtype=np.uint8)).save(images / f"{i}.png")
        rows.append(f"{i}.png,{CLASSES[draw.integers(2)]},p{i},north")
    (images / "table.csv").write_text("\n".join(rows))
    raw = given.model_dump(mode="json")
    raw["data"] |= {"root": str(images), "phantom": None, "tables": [{"path": "table.csv"}]}
    return validate_study(raw)


def test_too_few_patients_are_not_silently_passed(made: Made, tmp_path: Path) -> None:
    fine_tune_base(made[0], study(patients=16), out=tmp_path / "run")
    with pytest.raises(ContributionError, match="the membership audit says nothing: 8 training patients"):
        create_contribution(made[0], tmp_path / "run", tmp_path / "out", NORTH, CreateOptions())
    sent = create_contribution(made[0], tmp_path / "run", tmp_path / "out", NORTH, CreateOptions(max_auc=1))
    assert sent.manifest.privacy.membership is None


def test_all_kinds_together(create: Callable[..., Contribution], made: Made, tmp_path: Path) -> None:
    create(fisher=True, gram=True, statistics=True, head=True, images_per_class=True, precision="bfloat16")
    found = read_back(tmp_path / "contribution", made[0])
    kinds = {file.name.removesuffix(".safetensors") for file in found.manifest.files}
    assert kinds == {"vector", "fisher", "gram", "statistics", "head"}
    assert {found.read("vector", name).dtype for name in found.names("vector")} == {torch.bfloat16}
    assert found.manifest.data.images_per_class is not None
    assert sorted(found.manifest.data.images_per_class) == CLASSES
    assert found.manifest.statistics.included


def test_a_head_needs_no_training(made: Made, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(dump_study(study()))
    options = CreateOptions(vector=False, head=True)
    found = create_contribution(made[0], tmp_path / "study.yaml", tmp_path / "out", NORTH, options)
    assert [file.name for file in found.manifest.files] == ["head.safetensors"]
    assert found.manifest.privacy.membership is None
    assert found.manifest.training.epochs == 0
    tensors, _ = read_tensors(tmp_path / "out" / "head.safetensors")
    data = load_sites(study(), tmp_path)["north"]
    assert tensors["count"].tolist() == torch.bincount(data.labels("train")).tolist()
    assert HeadSums.from_tensors(**tensors, classes=2).classes == 2


def test_sums_of_findings_have_a_row_of_all_images(made: Made, tmp_path: Path) -> None:
    findings = study(task={"kind": "multi-label", "classes": ["pneumonia", "effusion"]})
    publish_base(findings, None, tmp_path / "base", version="1")
    (tmp_path / "study.yaml").write_text(dump_study(findings))
    options = CreateOptions(vector=False, head=True)
    create_contribution(tmp_path / "base", tmp_path / "study.yaml", tmp_path / "out", NORTH, options)
    found = read_back(tmp_path / "out", tmp_path / "base")
    labels = load_sites(findings, tmp_path)["north"].labels("train")
    assert found.read("head", "count").tolist() == [*labels.sum(0).tolist(), len(labels)]


def test_a_site_with_its_own_order_of_classes_is_mapped(made: Made, tmp_path: Path) -> None:
    turned = study(task={"classes": CLASSES[::-1]})
    fine_tune_base(made[0], turned, out=tmp_path / "run")
    options = CreateOptions(fisher=True, head=True, max_auc=1)
    found = create_contribution(made[0], tmp_path / "run", tmp_path / "out", NORTH, options)
    assert found.manifest.classes == CLASSES
    assert found.manifest.data.classes_held == CLASSES
    trained, _ = read_tensors(tmp_path / "run" / "models" / "north.safetensors")
    start, _ = read_tensors(made[0] / "base.safetensors")
    head = next(name for name in found.names("vector") if name.endswith(".bias") and trained[name].shape == (2,))
    assert torch.equal(found.read("vector", head), trained[head].flip(0) - start[head])
    counts, _ = read_tensors(tmp_path / "out" / "head.safetensors")
    labels = load_sites(turned, tmp_path)["north"].labels("train")
    assert counts["count"].tolist() == torch.bincount(1 - labels).tolist()


def test_a_run_from_another_base_is_refused(made: Made, tmp_path: Path) -> None:
    publish_base(study(seed=5), None, tmp_path / "other", version="1")
    with pytest.raises(ContributionError, match="did not start from the base"):
        create_contribution(tmp_path / "other", made[1], tmp_path / "out", NORTH, CreateOptions())


def test_a_run_that_started_from_nothing_is_refused(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made[1], tmp_path / "run")
    (tmp_path / "run" / "start.safetensors").unlink()
    with pytest.raises(ContributionError, match=r"has no start.safetensors: it was not trained from a base"):
        create_contribution(made[0], tmp_path / "run", tmp_path / "out", NORTH, CreateOptions())


def test_a_model_that_others_are_in_is_refused(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made[1], tmp_path / "run")
    joint = study(method={"name": "fedavg", "rounds": 2})
    (tmp_path / "run" / "study.yaml").write_text(dump_study(joint))
    with pytest.raises(ContributionError, match="trained with method 'fedavg'"):
        create_contribution(made[0], tmp_path / "run", tmp_path / "out", NORTH, CreateOptions())


def test_a_folder_that_is_there_is_left_alone(create: Callable[..., Contribution], tmp_path: Path) -> None:
    (tmp_path / "contribution").mkdir()
    (tmp_path / "contribution" / "mine.txt").write_text("mine")
    with pytest.raises(ContributionError, match="is there already"):
        create()
    assert [path.name for path in (tmp_path / "contribution").iterdir()] == ["mine.txt"]


def test_images_of_each_class_by_task(tmp_path: Path) -> None:
    data = load_sites(study(), tmp_path)["north"]
    data.splits["train"] = torch.arange(3)
    data.targets = torch.zeros(len(data), dtype=torch.int64)
    data.targets[1] = 1
    assert images_of_classes(study(), data) == {"normal": 2, "pneumonia": 1}
    data.targets = torch.zeros(len(data), 2)
    data.targets[:2, 1] = 1
    assert images_of_classes(study(task={"kind": "multi-label"}), data) == {"normal": 0, "pneumonia": 2}
    data.targets = torch.zeros(len(data), 4, 4, dtype=torch.uint8)
    data.targets[2, 0] = 1
    segmented = study(task={"kind": "segmentation"}, model={"name": "unet"})
    assert images_of_classes(segmented, data) == {"normal": 3, "pneumonia": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vector": False}, "must bring a vector or sums"),
        ({"vector": False, "head": True, "fisher": True}, "send the vector with them"),
        ({"max_auc": 0.4}, "greater than or equal to 0.5"),
        ({"replaces": ["../x"]}, "pattern"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CreateOptions(**options)
