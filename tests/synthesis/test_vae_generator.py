"""The generator over sites: who moves which tensor, what comes out, and that it comes out the same everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from painted_sites import CLASSES, DEVICES, OWNED, Fitting, colours, painted_study

from polyclinic.errors import SiteError
from polyclinic.federation.message import Message
from polyclinic.federation.state import ServerState
from polyclinic.secure.sum import Total
from polyclinic.synthesis.rowwise import averaged
from polyclinic.synthesis.vae import start_vae

ONLY_A = {"north": {("a", "bright"): 6}, "south": {("a", "bright"): 7}, "west": {("a", "bright"): 5}}
"""Nobody owns class b or the dark device."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Fitting:
    fitting = Fitting(painted_study(rounds=14, epochs=3, lr=6e-3), tmp_path_factory.mktemp("sites"))
    fitting.fit()
    return fitting


def called(fitting: Fitting, site: str, tensors: dict[str, torch.Tensor] | None = None, number: int = 1) -> Message:
    """A site's answer to one call."""
    tensors = tensors or dict(start_vae(fitting.generator.settings, 3, (2, 2), 0).state_dict())
    message = Message.pack({"model": tensors}, devices=json.dumps(DEVICES), number=number)
    return fitting.sites[site].handle("fit-generator", number, message)


# What comes out.


@pytest.mark.parametrize("label", CLASSES)
@pytest.mark.parametrize("device", DEVICES)
def test_samples_have_the_colours_of_their_class_and_device(trained: Fitting, label: str, device: str) -> None:
    red, blue, ground = colours(trained.samples(label, device))
    # Class b on the dark device is owned by nobody: it is composed, and comes out less pure.
    assert (red - blue if label == "a" else blue - red) > (0.25 if device == "dark" else 0.5)
    assert (ground > 0.6) if device == "bright" else (ground < 0.5)


def test_samples_of_a_cell_differ(trained: Fitting) -> None:
    images = trained.samples("a", "bright").float() / 255
    assert float(images.std(dim=0).max()) > 0.03


@pytest.mark.parametrize("size", [16, 64])
def test_a_line_gives_the_same_bytes_alone_and_among_others(tmp_path: Path, size: int) -> None:
    generator = Fitting(painted_study(size=size), tmp_path).generator
    # Twice the usual contrast at the start, so that images are not all grey.
    decoder = {name: 2 * t for name, t in start_vae(generator.settings, 3, (2, 2), 0).state_dict().items()}
    labels, devices = torch.arange(70) % 2, torch.arange(70) // 2 % 2
    seeds = torch.arange(70) * 2**53
    images = generator.decode(decoder, labels, devices, seeds)
    assert images.shape == (70, 3, size, size)
    assert images.dtype == torch.uint8
    assert float(images.float().std()) > 20
    alone = [generator.decode(decoder, labels[k : k + 1], devices[k : k + 1], seeds[k : k + 1]) for k in range(70)]
    assert torch.equal(torch.cat(alone), images)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0))[:33]
    assert torch.equal(generator.decode(decoder, labels[order], devices[order], seeds[order]), images[order])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(generator.decode(decoder, labels, devices, seeds), images)
    finally:
        torch.set_num_threads(threads)
    assert generator.decode(decoder, labels[:0], devices[:0], seeds[:0]).shape == (0, 3, size, size)


def test_decoder_is_the_decoding_half_alone(trained: Fitting) -> None:
    names = {name.partition(".")[0] for name in trained.state.groups["decoder"]}
    assert names == {"decoder_input", "decoder", "class_rows", "device_rows"}
    assert "vae" not in trained.state.groups


def test_summary_tells_losses_by_round(trained: Fitting) -> None:
    summary = trained.generator.summary(trained.state)
    assert summary["placement"] == "sites"
    assert len(summary["loss"]) == 14
    assert summary["loss"][-1] < 0.5 * summary["loss"][0]
    assert "privacy" not in summary


# Averaging by rows.


@pytest.mark.parametrize("backend", ["plain", "masked"])
def test_rows_that_nobody_owns_stay_as_they_were(tmp_path: Path, backend: str) -> None:
    fitting = Fitting(painted_study(backend), tmp_path, ONLY_A)
    start = start_vae(fitting.generator.settings, 3, (2, 2), fitting.study.seed).state_dict()
    decoder = fitting.fit().groups["decoder"]
    for rows in ("class_rows", "device_rows"):
        assert torch.equal(decoder[rows][1], start[rows][1])
        assert not torch.equal(decoder[rows][0], start[rows][0])
    assert not torch.equal(decoder["decoder_input.weight"], start["decoder_input.weight"])


def test_a_row_is_averaged_over_its_owners_alone(tmp_path: Path) -> None:
    fitting = Fitting(painted_study(rounds=1), tmp_path)
    start = start_vae(fitting.generator.settings, 3, (2, 2), fitting.study.seed).state_dict()
    updates = {}
    for site in OWNED:
        reply = called(fitting, site, dict(start))
        rows = reply.group("rows")
        owners = rows["class_rows_weight"][:, None], rows["device_rows_weight"][:, None]
        updates[site] = {
            "class_rows": rows["class_rows"] / owners[0].clamp(min=1),
            "device_rows": rows["device_rows"] / owners[1].clamp(min=1),
            "bias": reply.group("body")["decoder.1.bias"].double(),
        }
    fresh = Fitting(painted_study(rounds=1), tmp_path / "fresh")
    decoder = fresh.fit().groups["decoder"]
    moved = {name: decoder[name].double() - start[name].double() for name in ("class_rows", "device_rows")}
    # Images: north 24 a and 24 b, all bright; south 24 a, dark; west 16 a on each device.
    roots = {"north": 24**0.5, "south": 24**0.5, "west": 32**0.5}
    mean_a = sum(roots[s] * updates[s]["class_rows"][0] for s in roots) / sum(roots.values())
    assert torch.allclose(moved["class_rows"][0], mean_a, atol=1e-7)
    assert torch.allclose(moved["class_rows"][1], updates["north"]["class_rows"][1], atol=1e-7)
    bright = (48 * updates["north"]["device_rows"][0] + 16 * updates["west"]["device_rows"][0]) / 64
    dark = (24 * updates["south"]["device_rows"][1] + 16 * updates["west"]["device_rows"][1]) / 40
    assert torch.allclose(moved["device_rows"], torch.stack([bright, dark]), atol=1e-7)
    body = (48 * updates["north"]["bias"] + 24 * updates["south"]["bias"] + 32 * updates["west"]["bias"]) / 104
    assert torch.allclose(decoder["decoder.1.bias"].double() - start["decoder.1.bias"], body, atol=1e-7)


def test_a_weight_that_is_only_the_noise_of_a_sum_moves_nothing() -> None:
    model = {"class_rows": torch.ones(2, 3), "device_rows": torch.ones(1, 3), "decoder.bias": torch.zeros(2)}
    rows = {
        "class_rows": torch.tensor([[1e-7] * 3, [6.0] * 3], dtype=torch.float64),
        "class_rows_weight": torch.tensor([1e-8, 2.0], dtype=torch.float64),
        "device_rows": torch.full((1, 3), -1e-7, dtype=torch.float64),
        "device_rows_weight": torch.tensor([-1e-8], dtype=torch.float64),
    }
    body = {"decoder.bias": torch.tensor([5.0, 10.0], dtype=torch.float64)}
    found = averaged(model, Total({"body": body, "rows": rows}, {"body": 5.0, "rows": 3.0}, {}))
    assert found["class_rows"].tolist() == [[1, 1, 1], [4, 4, 4]]
    assert found["device_rows"].tolist() == [[1, 1, 1]]
    assert found["decoder.bias"].tolist() == [1, 2]


def test_hidden_sums_give_the_same_network(tmp_path: Path) -> None:
    plain = Fitting(painted_study("plain"), tmp_path / "plain").fit().groups["decoder"]
    hidden = Fitting(painted_study("masked"), tmp_path / "masked").fit().groups["decoder"]
    # Two rounds: the second trains from networks that differ by the first one's rounding.
    assert all(torch.allclose(plain[name], hidden[name], atol=2e-4) for name in plain)


# Who does not take part.


def test_site_without_usable_images_answers_zeros_of_no_weight(tmp_path: Path) -> None:
    owned = {**OWNED, "east": {("a", "bright"): 4, ("b", "dark"): 3}}
    fitting = Fitting(painted_study(), tmp_path, owned)
    reply = called(fitting, "east")
    assert reply.scalars == {"weight/body": 0.0, "weight/rows": 1.0}
    assert not any(array.any() for array in reply.arrays.values())
    assert list(reply.arrays) == list(called(fitting, "north").arrays)
    with_east = fitting.fit().groups["decoder"]
    without = Fitting(painted_study(), tmp_path / "without").fit().groups["decoder"]
    assert all(torch.equal(with_east[name], without[name]) for name in without)


def test_cells_below_the_floor_do_not_show(tmp_path: Path) -> None:
    owned = {"north": {("a", "bright"): 6, ("b", "dark"): 4}}
    first, second = (Fitting(painted_study(), tmp_path / str(k), owned) for k in range(2))
    second.data["north"].images[12:] = 0
    one, other = called(first, "north"), called(second, "north")
    assert one.scalars == other.scalars
    assert all(torch.equal(one.arrays[name], other.arrays[name]) for name in one.arrays)
    assert one.group("rows")["class_rows_weight"].tolist() == [pytest.approx(12**0.5), 0]


def test_validation_and_test_images_are_not_touched(tmp_path: Path) -> None:
    first, second = (Fitting(painted_study(), tmp_path / str(k), {"north": {("a", "bright"): 12}}) for k in range(2))
    for fitting in (first, second):
        data = fitting.data["north"]
        data.splits = {"train": torch.arange(12), "val": torch.arange(12, 18), "test": torch.arange(18, 24)}
    second.data["north"].images[12:] = 0
    one, other = called(first, "north"), called(second, "north")
    assert all(torch.equal(one.arrays[name], other.arrays[name]) for name in one.arrays)


def test_nothing_to_train_on_is_an_error(tmp_path: Path) -> None:
    fitting = Fitting(painted_study(), tmp_path, {"north": {("a", "bright"): 4}, "south": {("b", "dark"): 4}})
    with pytest.raises(SiteError, match="nothing to train on.*synthesis.floor"):
        fitting.fit()


# Going on after a restart.


@pytest.mark.parametrize("done", [1, 3])
def test_a_killed_fit_goes_on_to_the_same_bits(tmp_path: Path, done: int) -> None:
    study = painted_study(rounds=3)
    whole = Fitting(study, tmp_path / "whole").fit()
    killed = Fitting(study, tmp_path / "killed")
    killed.fit(rounds=done)
    killed.state.save(tmp_path / "state")
    resumed = Fitting(study, tmp_path / "killed")
    resumed.state = ServerState.load(tmp_path / "state")
    state = resumed.fit()
    assert state.finished == whole.finished == 3
    assert state.scalars == whole.scalars
    assert set(state.groups["decoder"]) == set(whole.groups["decoder"])
    assert all(torch.equal(state.groups["decoder"][name], t) for name, t in whole.groups["decoder"].items())


def test_rounds_count_from_where_the_fit_began(tmp_path: Path) -> None:
    fitting = Fitting(painted_study(rounds=2), tmp_path)
    fitting.state.finished = 5
    state = fitting.fit()
    assert (state.finished, state.scalars["fit_from"]) == (7, 5)
