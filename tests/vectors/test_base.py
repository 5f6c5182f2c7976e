"""A base in its folder: published, read again, refused; and a site's study and head against it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hospitals import CLASSES, small_base, small_study
from safetensors.torch import load_file, save_file
from tiny import changed

from polyclinic.errors import ContributionError
from polyclinic.models.registry import start_model
from polyclinic.study import Study, validate_study
from polyclinic.vectors.base import Base, publish_base
from polyclinic.vectors.folders import whole_folder
from polyclinic.vectors.sources import Outline


def test_a_base_is_the_studys_network_with_its_start_weights(tmp_path: Path) -> None:
    study = small_study()
    base = small_base(tmp_path / "base")
    model = start_model(study)
    state = {n: t for n, t in model.state_dict().items() if not n.endswith("num_batches_tracked")}
    assert sorted(p.name for p in (tmp_path / "base").iterdir()) == ["base.json", "base.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
    assert base.outline == Outline.of(model, CLASSES)
    assert base.classes == CLASSES
    assert list(base.tensors()) == list(state)
    file = load_file(tmp_path / "base" / "base.safetensors")
    for name, tensor in state.items():
        assert torch.equal(base.read(name), tensor)
        assert torch.equal(file[name], tensor)
    assert torch.equal(base.network()(torch.ones(2, 1, 16, 16)), model(torch.ones(2, 1, 16, 16)))
    again = Base.load(tmp_path / "base")
    assert (again.digest, again.spec) == (base.digest, base.spec)


def test_the_digests_are_those_that_anyone_can_compute(tmp_path: Path) -> None:
    base = small_base(tmp_path / "base")
    weights = hashlib.sha256(b"polyclinic weights 1\0")
    for name, tensor in sorted(load_file(tmp_path / "base" / "base.safetensors").items()):
        head = json.dumps([name, "F32", list(tensor.shape)], separators=(",", ":")).encode()
        weights.update(len(head).to_bytes(8, "little") + head + tensor.numpy().tobytes())
    spec = json.loads((tmp_path / "base" / "base.json").read_text())
    assert spec["weights_sha256"] == weights.hexdigest()
    assert set(spec) == {
        *("schema", "id", "version", "created", "task", "image", "model", "head", "tensors"),
        *("weights_sha256", "lineage"),
    }
    assert not {"cache", "cache_folder"} & set(spec["image"])
    assert "weights" not in spec["model"]
    own = {name: value for name, value in spec.items() if name not in ("id", "version", "created")}
    text = json.dumps(own, sort_keys=True, separators=(",", ":"))
    assert base.digest == hashlib.sha256(text.encode()).hexdigest()


def test_the_digest_is_of_values_classes_and_preprocessing_not_of_names(tmp_path: Path) -> None:
    base = small_base(tmp_path / "base")
    renamed = publish_base(small_study(name="other"), None, tmp_path / "renamed", version="2")
    moved = small_base(tmp_path / "moved", data={"image": {"size": [16, 16], "cache": "memmap", "cache_folder": "x"}})
    assert base.digest == renamed.digest == moved.digest
    others = [
        small_base(tmp_path / "seed", seed=1),
        small_base(tmp_path / "order", CLASSES[::-1]),
        small_base(tmp_path / "mean", data={"image": {"size": [16, 16], "mean": 0.4}}),
        publish_base(small_study(), None, tmp_path / "lineage", version="1", lineage=[base.digest]),
    ]
    assert len({base.digest, *(other.digest for other in others)}) == 5
    assert base.spec.preprocessing != others[2].spec.preprocessing
    assert base.spec.preprocessing == others[0].spec.preprocessing


def test_a_merged_models_values_are_published(tmp_path: Path) -> None:
    study = small_study()
    values = {n: t + 0.5 for n, t in start_model(study).state_dict().items() if n != "blocks.1.num_batches_tracked"}
    base = publish_base(study, values, tmp_path / "base", version="2", lineage=["0" * 64])
    for name in base.tensors():
        assert torch.equal(base.read(name), values[name])
    without = {name: values[name] for name in values if "running" not in name}
    half = publish_base(study, without, tmp_path / "half", version="2")
    assert torch.equal(half.read("blocks.1.running_var"), torch.ones(2))
    assert torch.equal(half.read("head.bias"), values["head.bias"])
    assert base.spec.lineage == ["0" * 64]


def test_values_that_do_not_fit_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    study = small_study()
    good = {n: t for n, t in start_model(study).state_dict().items() if not n.endswith("tracked")}
    cases: list[tuple[dict[str, Any], str]] = [
        ({**good, "extra": torch.ones(1)}, "has no tensor 'extra'"),
        ({n: t for n, t in good.items() if n != "head.bias"}, "tensor 'head.bias' is missing"),
        ({**good, "head.bias": torch.ones(4)}, r"'head.bias' has shape \(4,\); the network has \(3,\)"),
        ({**good, "head.bias": torch.tensor([1, float("nan"), 0])}, "'head.bias' holds NaN or infinite"),
        ({**good, "head.bias": torch.tensor([1, float("-inf"), 0])}, "'head.bias' holds NaN or infinite"),
        ({**good, "blocks.1.running_var": torch.tensor([1, -0.6])}, "holds the variance -0.6"),
    ]
    for values, message in cases:
        with pytest.raises(ContributionError, match=message):
            publish_base(study, values, tmp_path / "base", version="1")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "base").mkdir()
    with pytest.raises(ContributionError, match="is there already"):
        publish_base(study, None, tmp_path / "base", version="1")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ContributionError, match=r"base can't be written: (Not a directory|File exists)"):
        small_base(tmp_path / "file" / "base")
    with pytest.raises(FileNotFoundError, match="elsewhere"), whole_folder(tmp_path / "out"):
        (tmp_path / "elsewhere").read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def edit(folder: Path, change: Any) -> None:
    spec = json.loads((folder / "base.json").read_text())
    change(spec)
    (folder / "base.json").write_text(json.dumps(spec))


def rewrite(folder: Path, **tensors: torch.Tensor) -> None:
    path = folder / "base.safetensors"
    save_file({**load_file(path), **tensors}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "base.json").unlink(), "lacks base.json"),
        (lambda f: (f / "base.safetensors").unlink(), "lacks base.safetensors"),
        (lambda f: (f / "more").touch(), "holds 'more'; only base.json, base.safetensors"),
        (lambda f: edit(f, lambda s: s.update(schema="polyclinic-base/2")), "schema: Input should be"),
        (lambda f: edit(f, lambda s: s.update(more=1)), "there is no field more"),
        (lambda f: edit(f, lambda s: s["tensors"].append(s["tensors"][0])), "a tensor is listed twice"),
        (lambda f: edit(f, lambda s: s["tensors"][0].update(shape=[1, 2])), "is not as base.json says"),
        (lambda f: edit(f, lambda s: s["tensors"].pop()), "is not as base.json says"),
        (lambda f: edit(f, lambda s: s.update(weights_sha256="0" * 64)), "the values are not those of base.json"),
        (lambda f: (f / "base.json").write_text('{"schema": 1, "schema": 2}'), "'schema' is there twice"),
        (lambda f: (f / "base.json").write_text("[" * 10**5), "no JSON of ours"),
        (lambda f: (f / "base.json").write_bytes(b" " * 2**25), "at most 16777216 are read"),
        (lambda f: rewrite(f, **{"head.bias": torch.ones(3)}), "the values are not those of base.json"),
        (lambda f: rewrite(f, **{"head.bias": torch.full((3,), float("inf"))}), "NaN or infinite"),
        (lambda f: rewrite(f, **{"blocks.1.running_var": torch.zeros(2)}), "holds the variance 0"),
        (lambda f: rewrite(f, more=torch.ones(1)), "tensor 'more' is not as base.json says"),
        (lambda f: (f / "base.safetensors").write_bytes(b"\x80\x04" + bytes(50)), "Python pickle"),
        (lambda f: (f / "base.safetensors").write_bytes(bytes(2**23)), "can be right"),
    ],
)
def test_a_damaged_base_is_refused(damage: Any, message: str, tmp_path: Path) -> None:
    small_base(tmp_path / "base")
    damage(tmp_path / "base")
    with pytest.raises(ContributionError, match=message):
        Base.load(tmp_path / "base")


def test_a_link_is_no_base(tmp_path: Path) -> None:
    small_base(tmp_path / "base")
    (tmp_path / "link").symlink_to(tmp_path / "base")
    with pytest.raises(ContributionError, match="is a link"):
        Base.load(tmp_path / "link")
    (tmp_path / "base" / "base.json").rename(tmp_path / "base.json")
    (tmp_path / "base" / "base.json").symlink_to(tmp_path / "base.json")
    with pytest.raises(ContributionError, match="is a link"):
        Base.load(tmp_path / "base")


def test_a_sites_study_is_checked_field_by_field(tmp_path: Path) -> None:
    base = small_base(tmp_path / "base")
    own = small_study(name="site", training={"lr": 0.001}, model={"weights": "start.safetensors"}, seed=7)
    found = base.site_study(own)
    assert found.model.weights == ""
    assert (found.training.lr, found.seed, found.name) == (0.001, 7, "site")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": {"width": 4}}, "model.width is 4; the base 'tiny' has 2"),
        ({"model": {"norm": "group"}}, "model.norm is 'group'; the base 'tiny' has 'batch'"),
        ({"model": {"options": {"strides": [1, 2, 2, 2]}}}, "model.options is"),
        ({"data": {"image": {"size": [24, 24]}}}, r"data.image.size is \[24, 24\]; the base 'tiny' has \[16, 16\]"),
        ({"data": {"image": {"size": [16, 16], "channels": 3}}}, "data.image.channels is 3"),
        ({"data": {"image": {"size": [16, 16], "mean": 0.4}}}, "data.image.mean is 0.4"),
        ({"data": {"image": {"size": [16, 16], "std": 0.4}}}, "data.image.std is 0.4"),
        ({"data": {"image": {"size": [16, 16], "fit": "crop"}}}, "data.image.fit is 'crop'"),
        ({"data": {"image": {"size": [16, 16], "spacing": [1, 1]}}}, "data.image.spacing is"),
        ({"data": {"image": {"size": [16, 16], "window": {"center": 0, "width": 9}}}}, "data.image.window is"),
        ({"data": {"image": {"size": [16, 16], "lungs": "crop"}}}, "data.image.lungs is 'crop'"),
        ({"task": {"kind": "multi-label"}}, "task.kind is 'multi-label'"),
        ({"task": {"classes": ["normal", "pneumonie"]}}, "class 'pneumonie' is unknown to the base.*mean 'pneumonia'"),
    ]
    for sections, message in cases:
        with pytest.raises(ContributionError, match=message):
            base.site_study(small_study(**sections))
    for classes in (CLASSES[::-1], CLASSES[1:]):
        assert base.site_study(small_study(classes)).task.classes == list(classes)


def test_heads_are_matched_by_the_names_of_the_classes(tmp_path: Path) -> None:
    base = small_base(tmp_path / "base")  # normal, pneumonia, covid
    weight = base.read("head.weight")
    start = base.start_tensors(["covid", "normal"])
    assert torch.equal(start["head.weight"], weight[[2, 0]])
    assert torch.equal(start["blocks.0.weight"], base.read("blocks.0.weight"))
    assert "blocks.1.running_mean" in start
    trained = {name: tensor + 0.25 for name, tensor in start.items()}
    trained["head.weight"][0] += 1  # the site's covid, the base's last row
    change = base.site_vector(trained, ["covid", "normal"])
    assert list(change) == [spec.name for spec in base.outline.weights]
    assert all(t.dtype == torch.float32 for t in change.values())
    rows = change["head.weight"].mean(1)
    torch.testing.assert_close(rows, torch.tensor([0.25, 0, 1.25]))
    torch.testing.assert_close(change["head.bias"], torch.tensor([0.25, 0, 0.25]))
    torch.testing.assert_close(change["blocks.0.weight"], torch.full_like(change["blocks.0.weight"], 0.25))
    same = base.site_vector(base.tensors(), CLASSES)
    assert all(not t.any() for t in same.values())


def test_a_trained_network_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    base = small_base(tmp_path / "base")
    good = base.start_tensors(["covid", "normal"])
    for values, classes, message in (
        ({n: t for n, t in good.items() if n != "head.bias"}, ["covid", "normal"], "has no tensor 'head.bias'"),
        (good, CLASSES, r"'head.weight' has shape \(2, 8\); \(3, 8\) is right"),
        ({**good, "head.bias": torch.full((2,), float("nan"))}, ["covid", "normal"], "NaN or infinite"),
        (good, ["covid", "covid"], "name each class once"),
        (good, [], "name each class once"),
        (good, ["covid", "flu"], "class 'flu' is unknown to the base"),
    ):
        with pytest.raises(ContributionError, match=message):
            base.site_vector(values, classes)


def test_segmentation_wants_the_bases_own_list(tmp_path: Path) -> None:
    base = publish_base(segmentation(["background", "lung", "opacity"]), None, tmp_path / "base", version="1")
    assert base.start_tensors(base.classes).keys() == base.tensors().keys()
    with pytest.raises(ContributionError, match="the base's own list of classes"):
        base.site_study(segmentation(["background", "opacity", "lung"]))


def segmentation(classes: list[str]) -> Study:
    raw = changed(
        small_study().model_dump(mode="json"),
        {
            "task": {"kind": "segmentation", "classes": classes},
            "model": {"name": "unet", "width": 2},
            "data": {"image": {"size": [32, 32]}},
        },
    )
    return validate_study(raw)


def test_a_network_that_this_version_builds_otherwise_is_refused(tmp_path: Path) -> None:
    small_base(tmp_path / "base")
    edit(tmp_path / "base", lambda spec: spec["model"].update(width=4))
    with pytest.raises(ContributionError, match="has other tensors here than when the base was published"):
        Base.load(tmp_path / "base").network()
    base = small_base(tmp_path / "good")
    bias = torch.tensor([1.0, 2, 3])
    assert torch.equal(base.network({"head.bias": bias}).state_dict()["head.bias"], bias)
    with pytest.raises(ContributionError, match="has no tensor 'x'"):
        base.network({"x": bias})
    assert set(base.study_parts()) == {"task", "image", "model"}
