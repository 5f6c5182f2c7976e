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

from polyclinic.data.batches import balanced_batches, epoch_batches, proxy_batches
from polyclinic.data.dataset import SiteData
from polyclinic.data.manifest import Case
from polyclinic.errors import DataError
from polyclinic.study import ImageSettings, PhantomSettings, PhantomSite, ScannerSettings, TaskSettings

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
    assert len(files) == (3 if task.kind == "segmentation" else 2)
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


def test_batches_of_public_images_are_passes_or_steps() -> None:
    positions = torch.tensor([3, 5, 7, 9, 11])

    def drawn(**given: int) -> list[list[int]]:
        return [part.tolist() for part in proxy_batches(positions, np.random.default_rng(0), 2, **given)]

    passes = drawn(passes=2)
    assert [len(part) for part in passes] == [2, 3, 2, 3]  # a last batch of one joins the one before
    for half in (passes[:2], passes[2:]):
        assert sorted(i for part in half for i in part) == positions.tolist()
    assert drawn(steps=3) == passes[:3]
    assert drawn(steps=0) == []
    whole = [part.tolist() for part in proxy_batches(4, np.random.default_rng(0), 9)]
    assert sorted(i for part in whole for i in part) == [0, 1, 2, 3]
    with pytest.raises(DataError, match="no public images"):
        next(proxy_batches(0, np.random.default_rng(0), 2))


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


def volumes_of(tmp_path: Path, spacing: float = 2.0) -> list[Case]:
    """Three NIfTI volumes [4, 4, 4] with masks; the last one's file says another spacing."""
    import nibabel

    cases = []
    for k in range(3):
        affine = np.diag([-spacing, -spacing, 1.0 + (k == 2), 1.0])
        volume = np.full((4, 4, 4), k * 100, np.int16)
        nibabel.save(nibabel.Nifti1Image(volume, affine), tmp_path / f"{k}.nii.gz")
        nibabel.save(nibabel.Nifti1Image((volume > 0).astype(np.float32), affine), tmp_path / f"{k}m.nii")
        cases.append(
            Case(
                f"{k}.nii.gz", f"p{k}", "north", mask=f"{k}m.nii", split="train", source=str(tmp_path), where=f"row {k}"
            )
        )
    return cases


@pytest.mark.parametrize("cache", ["memory", "memmap"])
def test_spacings_of_the_grid_are_kept(tmp_path: Path, cache: str) -> None:
    (tmp_path / "v").mkdir()
    image = ImageSettings(size=[2, 8, 8], window={"center": 100, "width": 200}, cache=cache)
    for _ in range(2):  # the second time from the cache
        data = SiteData.load("north", volumes_of(tmp_path / "v"), SEGMENTATION, image, tmp_path / "c")
        assert data.spacings == [(2.0, 1.0, 1.0), (2.0, 1.0, 1.0), (4.0, 1.0, 1.0)]
    assert data.picture(1).shape == (1, 2, 8, 8)
    assert data.picture(1).unique().tolist() == [0.5]
    assert data.picture(1).data_ptr() == data.images[1].data_ptr()
    assert data.targets[2].unique().tolist() == [1]
    both = SiteData.concat([data, data])
    assert both.spacings == 2 * data.spacings
    assert both.picture(4).data_ptr() == data.images[1].data_ptr()


def test_pictures_without_a_spacing_have_none(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    mapped = IMAGE.model_copy(update={"cache": "memmap"})
    for _ in range(2):
        data = SiteData.load("north", folder_of(tmp_path / "v", 4), TASK, mapped, tmp_path / "c")
        assert data.spacings == [None] * 4
    with pytest.raises(DataError, match=r"image '0.png': 0.png does not say how many millimetres a pixel has"):
        SiteData.load("north", folder_of(tmp_path, 4), TASK, ImageSettings(size=[4, 4], spacing=[1, 1]))


def test_a_mask_on_another_grid_is_refused(tmp_path: Path) -> None:
    import nibabel

    cases = volumes_of(tmp_path)
    image = ImageSettings(size=[4, 4, 4])
    stored = np.zeros((4, 4, 4), np.uint8)

    def refused(affine: np.ndarray, match: str) -> None:
        nibabel.save(nibabel.Nifti1Image(stored, affine), tmp_path / "1m.nii")
        with pytest.raises(DataError, match=match):
            SiteData.load("north", cases, SEGMENTATION, image)

    apart = r"image '1.nii.gz' \(row 1\): 1m.nii and 1.nii.gz lie on different grids: .* up to {} mm apart"
    refused(np.diag([-1.0, -2.0, 1.0, 1.0]), apart.format("3.0"))  # 3 pixels of 1 instead of 2 mm
    refused(np.diag([2.0, -2.0, 1.0, 1.0]), apart.format("6.0"))  # mirrored about the first pixel
    moved = np.diag([-2.0, -2.0, 1.0, 1.0])
    moved[2, 3] = 5
    refused(moved, apart.format("5.0"))
    moved[2, 3] = 0.4
    nibabel.save(nibabel.Nifti1Image(stored, moved), tmp_path / "1m.nii")
    assert len(SiteData.load("north", cases, SEGMENTATION, image)) == 3
    turned = np.array([[0, -2.0, 0, 0], [-2.0, 0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(stored, turned), tmp_path / "1m.nii")  # other order of axes, same place
    assert len(SiteData.load("north", cases, SEGMENTATION, image)) == 3


def test_a_nifti_mask_of_a_series_must_lie_where_the_series_lies(tmp_path: Path, write_series: object) -> None:
    import nibabel

    root = write_series("s", np.zeros((3, 4, 5), np.int16), [0.0, 5.0, 10.0])  # type: ignore[operator]
    cases = [Case("s", "p", "north", mask="m.nii", split="train", source=str(root))]
    image = ImageSettings(size=[3, 4, 5])
    stored = np.zeros((5, 4, 3), np.uint8)
    lying = np.diag([-3.0, -2.0, 5.02, 1.0])
    lying[:2, 3] = 10, 20
    nibabel.save(nibabel.Nifti1Image(stored, lying), tmp_path / "m.nii")
    assert SiteData.load("north", cases, SEGMENTATION, image).spacings == [(5.0, 2.0, 3.0)]
    said = r"m.nii and s lie on different grids: .* up to {} mm apart \(spacing {} x 2 x 3 mm and 5 x 2 x 3 mm\)"
    lying[2, 2] = 2.5
    nibabel.save(nibabel.Nifti1Image(stored, lying), tmp_path / "m.nii")
    with pytest.raises(DataError, match=said.format("5.0", "2.5")):
        SiteData.load("north", cases, SEGMENTATION, image)
    lying[2, 2] = 5
    nibabel.save(nibabel.Nifti1Image(stored, lying), tmp_path / "m.nii")
    assert len(SiteData.load("north", cases, SEGMENTATION, image)) == 1
    # A patient on the front: the mask is turned when it is read, the series is not.
    write_series("s", np.zeros((3, 4, 5), np.int16), [0.0, 5.0, 10.0], ImageOrientationPatient=[-1, 0, 0, 0, -1, 0])  # type: ignore[operator]
    with pytest.raises(DataError, match=said.format(".*", "5") + r"\. Their axes .* Convert the series to NIfTI\."):
        SiteData.load("north", cases, SEGMENTATION, image)
    nibabel.save(nibabel.Nifti1Image(stored[:4], np.diag([-3.0, -2.0, 5.0, 1.0])), tmp_path / "m.nii")
    with pytest.raises(DataError, match=r"m.nii has size \(3, 4, 4\), its image \(3, 4, 5\)"):
        SiteData.load("north", cases, SEGMENTATION, image)


def test_a_scanner_takes_every_image_and_has_its_own_cache(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    cases = folder_of(tmp_path / "v", 4)
    mapped = IMAGE.model_copy(update={"cache": "memmap"})
    plain = SiteData.load("north", cases, TASK, mapped, tmp_path / "c")
    dim = SiteData.load("north", cases, TASK, mapped, tmp_path / "c", scanner=ScannerSettings(gain=0.5))
    assert plain.images[:, 0, 0, 0].tolist() == [0, 10, 20, 30]
    assert dim.images[:, 0, 0, 0].tolist() == [64, 69, 74, 79]  # 127.5 + (x - 127.5) / 2
    assert len(list((tmp_path / "c").iterdir())) == 4


def test_phantom_ct_has_a_spacing(tmp_path: Path) -> None:
    from polyclinic.data.manifest import collect
    from polyclinic.study import DataSettings

    task = TaskSettings(classes=["normal", "consolidation"])
    for kind, size, wanted in (
        ("chest-ct", [20, 36], (18.0, 18.0)),
        ("chest-ct-volume", [4, 18, 36], (60.0, 20.0, 20.0)),
        ("chest-xray", [20, 36], None),
    ):
        phantom = PhantomSettings(kind=kind, sites=[PhantomSite(name="north", patients=4)])
        data = DataSettings(phantom=phantom, image=ImageSettings(size=size))
        names = task if kind != "chest-xray" else TaskSettings(classes=["normal", "pneumonia"])
        cases = collect(data, names, tmp_path)["north"]
        loaded = SiteData.load("north", cases, names, data.image, phantom=phantom)
        assert set(loaded.spacings) == {wanted}


def test_large_files_are_decoded_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading
    import time

    from polyclinic.data import decode

    inside, most = [0], [0]
    lock = threading.Lock()
    read = decode.read_picture

    def slow(source: str, reference: str) -> object:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        time.sleep(0.03)
        with lock:
            inside[0] -= 1
        return read(source, reference)

    monkeypatch.setattr(decode, "read_picture", slow)
    cases = volumes_of(tmp_path)
    image = ImageSettings(size=[4, 4, 4])
    SiteData.load("north", cases, SEGMENTATION, image)
    assert most[0] > 1
    most[0] = 0
    monkeypatch.setattr(decode, "stored_bytes", lambda place: decode.LARGE_FILE + 1)
    SiteData.load("north", cases, SEGMENTATION, image)
    assert most[0] == 1
