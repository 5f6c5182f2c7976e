"""The first phase of the exchange: sums over sites against pooled images, the floor, and noise of the stated size."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_hospitals import OWNED, hospital, hospital_study, hospitals, started

from polyclinic.data.dataset import SiteData
from polyclinic.data.manifest import Case
from polyclinic.errors import SiteError
from polyclinic.federation.message import Message
from polyclinic.runner import Run
from polyclinic.secure.view import Recorder
from polyclinic.synthesis.amplitude import windows
from polyclinic.synthesis.cells import Cells, count_cells, own_images
from polyclinic.synthesis.statistics import gather, noisy, summed_styles

DEVICES = ("bright", "dark")


def exchange_of(tmp_path: Path, data: dict[str, SiteData] | None = None, **sections: Any) -> Run:
    synthesis = {"generator": [], **sections.pop("synthesis", {})}
    return started(hospital_study(synthesis=synthesis, **sections), tmp_path, data)


def gathered(run: Run) -> tuple[Cells, torch.Tensor]:
    assert run.exchange is not None
    channel = run.exchange._channel
    channel.begin_round(1)
    return gather(channel, run.exchange._sums, run.study)


def mean_window(data: dict[str, SiteData], device: str) -> torch.Tensor:
    """Of all training images of a device, pooled; every patient has one."""
    rows = [
        data[site].picture(i).float() / 255
        for site in data
        for i in data[site].splits["train"].tolist()
        if data[site].cases[i].device == device
    ]
    return windows(torch.stack(rows).double(), 1).mean(0).float()


@pytest.mark.parametrize("backend", ["plain", "masked"])
def test_counts_and_styles_are_those_of_all_images_together(backend: str, tmp_path: Path) -> None:
    data = hospitals()
    cells, styles = gathered(exchange_of(tmp_path, data, aggregation=backend))
    assert cells.classes == ("a", "b")
    assert cells.devices == DEVICES
    assert cells.patients.tolist() == cells.images.tolist() == [[16, 18], [8, 0]]
    for k, device in enumerate(DEVICES):
        torch.testing.assert_close(styles[k], mean_window(data, device), rtol=0, atol=1e-5)


def test_a_patient_with_many_images_weighs_as_much_as_one_with_few(tmp_path: Path) -> None:
    """North's patients have three images each, south's one: the style is the mean over patients, counts tell both."""
    data = {
        "north": hospital("north", {("a", "bright"): 6}, images=3),
        "south": hospital("south", {("a", "bright"): 6}),
    }
    cells, styles = gathered(exchange_of(tmp_path, data))
    assert (cells.patients.tolist(), cells.images.tolist()) == ([[12], [0]], [[24], [0]])
    of_patient = []
    for part in data.values():
        who: dict[str, list[int]] = {}
        for i in part.splits["train"].tolist():
            who.setdefault(part.cases[i].patient, []).append(i)
        of_patient += [windows(part.images[rows].double() / 255, 1).mean(0) for rows in who.values()]
    torch.testing.assert_close(styles[0], torch.stack(of_patient).mean(0).float(), rtol=0, atol=1e-5)


def test_cells_below_the_floor_leave_neither_counts_nor_styles_nor_names(tmp_path: Path) -> None:
    """Four patients of class b on a device of their own, and three of class a on one of the others'."""
    small = {("b", "rare"): 4, ("a", "dark"): 3}
    replies = []
    for name, extra in (("with", small), ("without", {})):
        data = hospitals({**OWNED, "north": {**OWNED["north"], **extra}})
        run = exchange_of(tmp_path / name, data)
        assert run.exchange is not None
        recorder = Recorder(run.exchange._channel)
        recorder.begin_round(1)
        gather(recorder, run.exchange._sums, run.study)
        replies.append([(s.op, s.message.digest()) for s in recorder.seen if s.sender == "north"])
    assert replies[0] == replies[1]
    assert [op for op, _ in replies[0]] == ["enter", "count-cells"]


def test_a_site_without_device_labels_is_a_device_of_its_own_name(tmp_path: Path) -> None:
    data = hospitals({**OWNED, "east": {("a", ""): 7}})
    cells, styles = gathered(exchange_of(tmp_path, data))
    assert cells.devices == ("bright", "dark", "east")
    assert cells.patients[:, 2].tolist() == [7, 0]
    assert styles[2].abs().sum() > 0


def test_a_site_with_no_cell_sends_zeros_and_the_sum_goes_on(tmp_path: Path) -> None:
    data = hospitals({**OWNED, "east": {("a", "bright"): 2, ("b", "dark"): 1}})
    run = exchange_of(tmp_path, data, aggregation="masked")
    assert gathered(run)[0].patients.tolist() == [[16, 18], [8, 0]]
    site = exchange_of(tmp_path / "again", data).exchange._channel._sites["east"]  # type: ignore[union-attr]
    assert json.loads(str(site.handle("enter", 1, Message()).scalars["devices"])) == []
    reply = site.handle("count-cells", 1, Message(scalars={"devices": json.dumps(DEVICES)}))
    assert all(not array.any() for array in reply.arrays.values())


def test_no_site_with_any_cell_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    few = {"north": {("a", "bright"): 4}, "south": {("b", "dark"): 4}}
    run = exchange_of(tmp_path, hospitals(few))
    with pytest.raises(SiteError, match=r"5 training patients.*Lower synthesis.floor"):
        gathered(run)
    lower = exchange_of(tmp_path / "lower", hospitals(few), synthesis={"floor": 4})
    assert gathered(lower)[0].patients.tolist() == [[4, 0], [0, 4]]


@pytest.mark.parametrize("answer", ["{}", "[1]", '[""]', "[", json.dumps(["d" * 65]), json.dumps(["d"] * 257)])
def test_devices_that_are_no_names_are_refused(answer: str, tmp_path: Path) -> None:
    run = exchange_of(tmp_path)
    assert run.exchange is not None
    site = run.exchange._channel._sites["south"]
    enter = site._ops["enter"]
    lying = type(enter)(lambda s, m: Message(scalars={"devices": answer}), enter.leaves)
    site._ops = {**site._ops, "enter": lying}
    with pytest.raises(SiteError, match=r"'south' answered with devices that are no list of names"):
        gathered(run)


def test_noise_is_of_the_stated_size_and_has_no_bias() -> None:
    """Laplace of scale 2 / epsilon on counts, 2 * C * side / epsilon on windows: mean magnitude is the scale."""
    patients = np.full((4, 5000), 100, dtype=np.int64)
    styles = torch.full((1500, 3, 3, 3), 0.5, dtype=torch.float64)
    counts, windows_ = noisy(patients, styles, 0.5)
    assert counts.dtype == np.int64
    off = counts - 100
    assert np.abs(off).mean() == pytest.approx(4, rel=0.05)
    assert abs(off.mean()) < 0.25
    changed = (windows_ - 0.5).numpy()
    assert np.abs(changed).mean() == pytest.approx(2 * 3 * 3 / 0.5, rel=0.05)
    assert abs(changed.mean()) < 2
    assert not np.array_equal(counts, noisy(patients, styles, 0.5)[0]), "not drawn from a seed that others know"


def test_noisy_counts_are_no_less_than_nothing_and_tell_no_number_of_images(tmp_path: Path) -> None:
    data = hospitals()
    data["north"] = hospital("north", OWNED["north"], images=4)
    cells, styles = gathered(exchange_of(tmp_path, data, synthesis={"epsilon": 0.2}))
    assert cells.patients.tolist() == cells.images.tolist(), "of images only the noisy patients are known"
    assert (cells.patients >= 0).all()
    assert ((styles >= 0) & (styles <= 1)).all()


def test_noise_does_not_name_a_device_of_few_patients(tmp_path: Path) -> None:
    """Names leave without noise, so that the floor is all that there is for them."""
    data = hospitals({**OWNED, "south": {("a", "dark"): 12, ("a", "faint"): 4}})
    cells, _ = gathered(exchange_of(tmp_path, data, synthesis={"epsilon": 1.0, "floor": 5}))
    assert cells.devices == ("bright", "dark")


def test_with_little_noise_counts_are_nearly_true(tmp_path: Path) -> None:
    """Also in cells that a floor would hide: under noise there is none."""
    data = hospitals({**OWNED, "south": {("a", "dark"): 12, ("b", "dark"): 1}})
    cells, styles = gathered(exchange_of(tmp_path, data, synthesis={"epsilon": 1e6}))
    assert cells.patients.tolist() == [[16, 18], [8, 1]]
    torch.testing.assert_close(styles[0], mean_window(data, "bright"), rtol=0, atol=1e-3)


PATIENTS = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 4), st.integers(0, 99)), min_size=1, max_size=12
)


@given(PATIENTS, st.integers(0, 4), st.integers(0, 2))
def test_one_patient_moves_counts_and_styles_by_no_more_than_the_noise_is_made_for(
    rows: list[tuple[int, int, int, int]], gone: int, half: int
) -> None:
    """Images of black and white noise, as far apart as images can be; patients with images in several cells."""

    def found(part: list[tuple[int, int, int, int]]) -> tuple[np.ndarray, torch.Tensor]:
        data = _speckled(part)
        site: Any = SimpleNamespace(data=data)
        own = own_images(data, DEVICES, 1)
        counts, _ = count_cells(own, 2, 2)
        return counts, summed_styles(site, own, counts.shape, half)

    counts, styles = found(rows)
    fewer, less = found([row for row in rows if row[2] != gone])
    assert np.abs(counts - fewer).sum() <= 1
    assert (styles - less).abs().sum() <= 3 * (2 * half + 1) + 1e-4


def _speckled(rows: list[tuple[int, int, int, int]]) -> SiteData:
    """Training images by class, device, patient and seed, and one of the test split, for no site is without images."""
    images = [torch.zeros(1, 3, 6, 6)]
    cases = [Case("i.png", "test", "home", device="bright", label="a", split="test")]
    for label, device, who, seed in rows:
        draw = torch.Generator().manual_seed(seed)
        share = (0.0, 0.5, 1.0)[seed % 3]
        images.append((torch.rand(1, 3, 6, 6, generator=draw) < share).float())
        cases.append(Case("i.png", str(who), "home", device=DEVICES[device], label="ab"[label], split="train"))
    targets = torch.tensor([0, *(row[0] for row in rows)], dtype=torch.int64)
    every = torch.arange(len(cases))
    return SiteData(
        "home", cases, torch.cat(images), targets, {"train": every[1:], "val": every[:0], "test": every[:1]}
    )
