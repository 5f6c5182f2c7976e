from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from polyclinic.data.batches import balanced_batches, epoch_batches
from polyclinic.data.dataset import SiteData
from polyclinic.data.manifest import Case
from polyclinic.errors import DataError
from polyclinic.study import ImageSettings, PhantomSettings, PhantomSite, TaskSettings

TASK = TaskSettings(classes=["a", "b"])
SEGMENTATION = TaskSettings(kind="segmentation", classes=["background", "lesion"])
IMAGE = ImageSettings(size=[4, 4])


def folder_of(tmp_path: Path, count: int, deep: tuple[int, ...] = ()) -> list[Case]:
    cases = []
    for k in range(count):
        kind = np.uint16 if k in deep else np.uint8
        Image.fromarray(np.full((4, 4), k * 10, kind)).save(tmp_path / f"{k}.png")
        Image.fromarray(np.tri(4, dtype=np.uint8) * 255).save(tmp_path / f"{k}m.png")
        split = ("train", "train", "val", "test")[k % 4]
        cases.append(
            Case(f"{k}.png", f"p{k}", "north", label="ab"[k % 2], mask=f"{k}m.png", split=split, source=str(tmp_path))
        )
    return cases


def test_load_fills_images_targets_and_splits(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    cases = folder_of(tmp_path, 20)
    data = SiteData.load("north", cases, TASK, IMAGE, on_progress=lambda done, total: seen.append((done, total)))
    assert data.images.dtype == torch.uint8
    assert data.images[:, 0, 0, 0].tolist() == [k * 10 for k in range(20)]
    assert data.targets.tolist() == [0, 1] * 10
    assert data.splits["val"].tolist() == [2, 6, 10, 14, 18]
    assert data.labels("test").tolist() == [1] * 5
    assert data.patients("test") == ["p3", "p7", "p11", "p15", "p19"]
    assert seen == [(k, 20) for k in range(1, 21)]
    assert (tuple(data.images.shape[1:]), len(data)) == ((1, 4, 4), 20)
    assert data.splits["val"].tolist() == [2, 6, 10, 14, 18]


def test_inputs_are_normalized(tmp_path: Path) -> None:
    data = SiteData.load("north", folder_of(tmp_path, 6), TASK, ImageSettings(size=[4, 4], mean=0.2, std=0.5))
    inputs = data.inputs(torch.tensor([5, 0]))
    assert inputs.dtype == torch.float32
    torch.testing.assert_close(inputs[:, 0, 0, 0], torch.tensor([(50 / 255 - 0.2) / 0.5, -0.4]))


def test_one_deep_image_makes_all_float(tmp_path: Path) -> None:
    data = SiteData.load("north", folder_of(tmp_path, 20, deep=(19,)), TASK, IMAGE)
    assert data.images.dtype == torch.float32
    torch.testing.assert_close(data.images[10, 0, 0, 0], torch.tensor(100 / 255))


def test_masks_and_multi_label_targets(tmp_path: Path) -> None:
    cases = folder_of(tmp_path, 4)
    data = SiteData.load("north", cases, SEGMENTATION, IMAGE)
    assert data.targets.dtype == torch.uint8
    assert data.targets.shape == (4, 4, 4)
    assert data.targets[0].tolist() == np.tri(4).tolist()
    findings = [replace(case, label=label) for case, label in zip(cases, ["a|b", "", "b", "a"], strict=True)]
    labels = SiteData.load("north", findings, TaskSettings(kind="multi-label", classes=["a", "b"]), IMAGE)
    assert labels.targets.tolist() == [[1, 1], [0, 0], [0, 1], [1, 0]]


def test_errors_name_site_image_and_row(tmp_path: Path) -> None:
    cases = folder_of(tmp_path, 4)
    (tmp_path / "2.png").write_bytes(b"\x89PNG")
    spoiled = [replace(c, where=f"t.csv row {k + 2}") for k, c in enumerate(cases)]
    with pytest.raises(DataError, match=r"site 'north', image '2.png' \(t.csv row 4\): .*2.png cannot be decoded"):
        SiteData.load("north", spoiled, TASK, IMAGE)
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "0m.png")
    with pytest.raises(DataError, match=r"image '0.png' \(t.csv row 2\): 0m.png has size \(4, 5\), its image \(4, 4\)"):
        SiteData.load("north", spoiled[:1], SEGMENTATION, IMAGE)
    with pytest.raises(DataError, match="label 'c' is not a class"):
        SiteData.load("north", [replace(cases[0], label="c")], TASK, IMAGE)
    with pytest.raises(DataError, match="no images"):
        SiteData.load("north", [], TASK, IMAGE)


@pytest.mark.parametrize("task", [TASK, SEGMENTATION])
def test_memmap_is_used_again_until_something_changes(tmp_path: Path, task: TaskSettings) -> None:
    (tmp_path / "images").mkdir()
    cases = folder_of(tmp_path / "images", 20, deep=(18,))
    mapped = IMAGE.model_copy(update={"cache": "memmap"})
    decoded: list[int] = []

    def load(image: ImageSettings = mapped) -> SiteData:
        decoded.clear()
        return SiteData.load(
            "north", cases, task, image, tmp_path / "cache", on_progress=lambda k, n: decoded.append(k)
        )

    first = load()
    assert decoded
    again = load()
    assert not decoded
    memory = SiteData.load("north", cases, task, IMAGE)
    for data in (first, again):
        assert torch.equal(data.images, memory.images)
        assert torch.equal(data.targets, memory.targets)
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == (2 if task.kind == "segmentation" else 1)
    assert not [f for f in files if f.name.startswith(".")]
    load(mapped.model_copy(update={"size": [2, 2]}))
    assert decoded
    Image.fromarray(np.full((4, 4), 99, np.uint8)).save(tmp_path / "images" / "0.png")
    assert load().images[0, 0, 0, 0] * 255 == pytest.approx(99)
    assert decoded
    with pytest.raises(DataError, match="no folder"):
        SiteData.load("north", cases, task, mapped)


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    cases = folder_of(tmp_path, 4)
    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    with pytest.raises(DataError, match=r"cache: no room for .* \(No space left on device\)"):
        SiteData.load("north", cases, TASK, IMAGE.model_copy(update={"cache": "memmap"}), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_concat_joins_without_copy(tmp_path: Path) -> None:
    one = SiteData.load("north", folder_of(tmp_path, 4), TASK, IMAGE)
    two = SiteData(
        "south", [replace(c, site="south") for c in one.cases], one.images.float() / 255, one.targets, one.splits
    )
    both = SiteData.concat([one, two])
    assert len(both) == 8
    assert both.splits["train"].tolist() == [0, 1, 4, 5]
    assert both.patients("test") == ["north/p3", "south/p3"]
    torch.testing.assert_close(
        both.inputs(torch.tensor([6, 1, 4])),
        torch.cat([two.inputs(torch.tensor([2])), one.inputs(torch.tensor([1, 0]))]),
    )
    assert both.images.shape == (8, 1, 4, 4)
    assert both.targets.tolist() == [0, 1] * 4


@given(count=st.integers(1, 40), size=st.integers(1, 12), seed=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_an_epoch_is_a_permutation_without_lone_images(count: int, size: int, seed: int) -> None:
    batches = list(epoch_batches(np.arange(count) * 3, np.random.default_rng(seed), size))
    assert sorted(np.concatenate(batches).tolist()) == [k * 3 for k in range(count)]
    assert all(len(batch) in (size, size + 1) for batch in batches[:-1])
    if size > 1 and count > 1:
        assert min(len(batch) for batch in batches) > 1


def test_steps_cross_epochs_and_balanced_draws_evenly(tmp_path: Path) -> None:
    data = SiteData.load("north", folder_of(tmp_path, 12), TASK, IMAGE)
    rng = np.random.default_rng(0)
    assert [len(b) for b in data.train_batches(rng, 4)] == [4, 2]
    assert [len(b) for b in data.train_batches(rng, 4, steps=5)] == [4, 2, 4, 2, 4]
    assert len(list(data.train_batches(rng, 4, steps=5, balanced=True))) == 5
    one = [b.tolist() for b in data.train_batches(np.random.default_rng(1), 4)]
    assert one == [b.tolist() for b in data.train_batches(np.random.default_rng(1), 4)]
    labels = np.array([0] * 900 + [1] * 100)
    drawn = np.concatenate(list(balanced_batches(np.arange(1000), labels, rng, 50)))
    assert 0.45 < labels[drawn].mean() < 0.55
    masks = SiteData.load("north", folder_of(tmp_path, 12), SEGMENTATION, IMAGE)
    with pytest.raises(DataError, match="balanced needs a multi-class task"):
        next(masks.train_batches(rng, 4, balanced=True))


def test_phantoms_load(tmp_path: Path) -> None:
    from polyclinic.data.manifest import collect
    from polyclinic.study import DataSettings

    phantom = PhantomSettings(sites=[PhantomSite(name="north", patients=6), PhantomSite(name="south", patients=5)])
    data = DataSettings(phantom=phantom, image=ImageSettings(size=[16, 16]))
    task = TaskSettings(classes=["normal", "pneumonia"])
    sites = collect(data, task, tmp_path)
    assert sorted(sites) == ["north", "south"]
    loaded = SiteData.load("north", sites["north"], task, data.image, phantom=phantom)
    assert loaded.images.shape == (len(sites["north"]), 1, 16, 16)
    with pytest.raises(DataError, match=r"pass data.phantom"):
        SiteData.load("north", sites["north"], task, data.image)


def test_real_photos_from_a_zip(real_data: Path) -> None:
    source = real_data / "ham10000_4sites" / "dev.zip"
    with zipfile.ZipFile(source) as packed:
        names = [n for n in packed.namelist() if n.startswith("images/")][:64]
    cases = [
        Case(n, n, "s", label="a", mask=n.replace("images", "masks").replace("jpg", "png"), source=str(source))
        for n in names
    ]
    data = SiteData.load("s", cases, SEGMENTATION, ImageSettings(size=[48, 64], channels=3))
    assert data.images.shape == (64, 3, 48, 64)
    assert 0.01 < data.targets.float().mean() < 0.95
    with pytest.raises(DataError, match="colour image in a grey study"):
        SiteData.load("s", cases, TASK, ImageSettings(size=[48, 64]))


def test_kermany_counts_as_grey(real_data: Path) -> None:
    source = real_data / "kermany_cxr224" / "dev.zip"
    with zipfile.ZipFile(source) as packed:
        names = packed.namelist()[::40]
    cases = [Case(n, n, "s", label="a", source=str(source)) for n in names if n.endswith("jpeg")]
    assert SiteData.load("s", cases, TASK, ImageSettings(size=[32, 32])).images.shape[1] == 1
