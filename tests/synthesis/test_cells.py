"""Cells: who counts where, by hand and for any table of images."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyclinic.data.dataset import SiteData
from polyclinic.data.manifest import Case
from polyclinic.synthesis.cells import OwnImages, count_cells, device_name, own_devices, own_images

DEVICES = ("x", "y")
Row = tuple[int, str, str]
ROWS = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from(["x", "y", ""]), st.sampled_from("pqrstuv")), min_size=1, max_size=30
)


def table(rows: list[Row], held: list[Row] | None = None) -> SiteData:
    """A site of flat images: class, device, patient of each training image, and of each validation image."""
    every = [*(("train", *row) for row in rows), *(("val", *row) for row in held or [])]
    cases = [Case(f"{i}.png", who, "home", device=d, label="abc"[c], split=s) for i, (s, c, d, who) in enumerate(every)]
    splits = {
        part: torch.tensor([i for i, row in enumerate(every) if row[0] == part], dtype=torch.int64)
        for part in ("train", "val", "test")
    }
    images = torch.full((len(every), 1, 4, 4), 0.5)
    return SiteData("home", cases, images, torch.tensor([row[1] for row in every]), splits)


def test_cells_by_hand() -> None:
    """Class a has p (two images), q on x and p on y; class b has r on x."""
    data = table([(0, "x", "p"), (0, "x", "p"), (0, "x", "q"), (0, "y", "p"), (1, "x", "r")])
    own = own_images(data, DEVICES, 1)
    assert own.positions.tolist() == [0, 1, 2, 3, 4]
    assert own.labels.tolist() == [0, 0, 0, 0, 1]
    assert own.devices.tolist() == [0, 0, 0, 1, 0]
    patients, images = count_cells(own, 3, 2)
    assert patients.tolist() == [[2, 0], [1, 0], [0, 0]], "p counts where most of its images are"
    assert images.tolist() == [[3, 1], [1, 0], [0, 0]]


def test_a_cell_below_the_floor_is_not_there() -> None:
    data = table([(0, "x", "p"), (0, "x", "p"), (0, "x", "q"), (0, "y", "p"), (1, "x", "r")])
    own = own_images(data, DEVICES, 2)
    assert own.positions.tolist() == [0, 1, 2], "two patients of class a on x; one elsewhere, however many images"
    assert own.patients == ["p", "p", "q"]
    assert own_devices(data, 2) == ["x"]
    assert own_devices(data, 1) == ["x", "y"]
    assert own_devices(data, 3) == []
    assert own_images(data, DEVICES, 3).positions.tolist() == []


def test_only_training_images_count() -> None:
    """Five held-out patients do not lift a cell over the floor, nor name a device."""
    held = [(0, "y", name) for name in "klmno"]
    data = table([(0, "x", "p"), (0, "y", "q")], held)
    assert own_devices(data, 1) == ["x", "y"]
    assert own_devices(data, 2) == []
    assert own_images(data, DEVICES, 1).positions.tolist() == [0, 1]


def test_images_without_a_device_are_taken_with_the_site_itself() -> None:
    data = table([(0, "", "p"), (0, "", "q"), (0, "x", "r"), (0, "x", "s")])
    assert [device_name(data, i) for i in range(4)] == ["home", "home", "x", "x"]
    assert own_devices(data, 2) == ["home", "x"]


def test_devices_that_the_study_does_not_know_are_left_out() -> None:
    data = table([(0, "x", "p"), (0, "z", "q")])
    assert own_images(data, DEVICES, 1).patients == ["p"]


def test_of_equal_cells_a_patient_counts_in_the_first() -> None:
    own = own_images(table([(1, "x", "p"), (0, "y", "p")]), DEVICES, 1)
    assert count_cells(own, 3, 2)[0].tolist() == [[0, 1], [0, 0], [0, 0]]


def test_nothing_is_counted_as_nothing() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    patients, images = count_cells(OwnImages(none, none, none, []), 2, 3)
    assert patients.tolist() == images.tolist() == [[0, 0, 0], [0, 0, 0]]


@given(ROWS, st.integers(1, 4))
def test_every_image_counts_once_and_every_patient_once(rows: list[Row], floor: int) -> None:
    devices = ("home", "x", "y")
    own = own_images(table(rows), devices, floor)
    patients, images = count_cells(own, 3, 3)
    assert patients.sum() == len(set(own.patients))
    assert images.sum() == len(own.positions)
    assert ((patients > 0) <= (images > 0)).all()
    seen = Counter((c, d or "home") for c, d, _ in {(c, d, who) for c, d, who in rows})
    kept = {(int(c), devices[int(d)]) for c, d in zip(own.labels, own.devices, strict=True)}
    assert kept == {cell for cell, count in seen.items() if count >= floor}
    assert own_devices(table(rows), floor) == sorted({d for _, d in kept})


@given(ROWS, st.sampled_from("pqrstuv"))
def test_one_patient_changes_one_count_by_one(rows: list[Row], who: str) -> None:
    """With a floor of 1, as where noise is added; a floor on true counts would switch whole cells."""
    without = [row for row in rows if row[2] != who]
    if not without:
        return
    devices = ("home", "x", "y")
    counts = [count_cells(own_images(table(part), devices, 1), 3, 3)[0] for part in (rows, without)]
    assert np.abs(counts[0] - counts[1]).sum() == (len(without) < len(rows))
