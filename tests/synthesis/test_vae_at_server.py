"""The generator that is trained at the server: public images, and the Gaussians that sites add up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from painted_sites import CLASSES, DEVICES, SIDE, Fitting, colours, painted, painted_study
from PIL import Image

from polyclinic.errors import DataError, SiteError
from polyclinic.federation.message import Message
from polyclinic.synthesis import public_images
from polyclinic.synthesis.latents import cell_gaussians, latent_sums
from polyclinic.synthesis.vae import start_vae


def public_folder(root: Path, count: int = 40) -> None:
    """Images of both classes on both devices that belong to nobody."""
    draw = torch.Generator().manual_seed(9)
    (root / "public" / "more").mkdir(parents=True)
    for k in range(count):
        image = painted(CLASSES[k % 2], DEVICES[k // 2 % 2], 1, draw)[0]
        folder = root / "public" / ("more" if k % 3 == 0 else "")
        pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{k}.{'png' if k % 2 else 'jpg'}")


@pytest.fixture(scope="module")
def trained_here(tmp_path_factory: pytest.TempPathFactory) -> Fitting:
    root = tmp_path_factory.mktemp("server")
    public_folder(root)
    study = painted_study(root=root, placement="server", public="public", rounds=40, epochs=4, lr=4e-3)
    fitting = Fitting(study, root / "sites")
    fitting.fit()
    return fitting


@pytest.mark.parametrize("label", CLASSES)
@pytest.mark.parametrize("device", DEVICES)
def test_samples_have_the_colours_that_sites_have_and_the_public_folder_does_not_name(
    trained_here: Fitting, label: str, device: str
) -> None:
    red, blue, ground = colours(trained_here.samples(label, device, 64))
    # Also of class b on the dark device, which nobody owns.
    assert (red - blue if label == "a" else blue - red) > 0.4
    assert (ground > 0.6) if device == "bright" else (ground < 0.5)


def test_it_takes_one_round_and_tells_what_it_was_trained_on(trained_here: Fitting) -> None:
    assert trained_here.state.finished == 1
    summary = trained_here.generator.summary(trained_here.state)
    assert (summary["placement"], summary["public_images"], len(summary["loss"])) == ("server", 40, 1)
    assert trained_here.fit().finished == 1  # a restart finds nothing left to do


def test_decoder_has_gaussians_and_no_condition(trained_here: Fitting) -> None:
    decoder = trained_here.state.groups["decoder"]
    assert bool((decoder["cell_deviation"] > 0).all())
    assert not decoder["class_rows"].any()
    assert not any(name.startswith(("encoder", "posterior")) for name in decoder)


def test_a_line_starts_from_the_gaussian_of_its_cell(trained_here: Fitting) -> None:
    decoder = dict(trained_here.state.groups["decoder"])
    line = torch.tensor([1]), torch.tensor([0]), torch.tensor([5])
    image = trained_here.generator.decode(decoder, *line)
    decoder["cell_mean"] = decoder["cell_mean"].clone()
    decoder["cell_mean"][0] += 3
    decoder["cell_mean"][1, 1] += 3
    assert torch.equal(trained_here.generator.decode(decoder, *line), image)
    decoder["cell_mean"][1, 0] += 3
    assert not torch.equal(trained_here.generator.decode(decoder, *line), image)


def test_hidden_sums_give_the_same_gaussians(tmp_path: Path) -> None:
    public_folder(tmp_path, 4)
    plain, hidden = (
        Fitting(painted_study(backend, tmp_path, placement="server", public="public"), tmp_path / backend).fit()
        for backend in ("plain", "masked")
    )
    for name, tensor in plain.groups["decoder"].items():
        assert torch.allclose(tensor, hidden.groups["decoder"][name], atol=1e-5), name


def test_latents_are_sums_over_cells_that_are_large_enough(tmp_path: Path) -> None:
    study = painted_study(root=tmp_path, placement="server", public="public")
    fitting = Fitting(study, tmp_path, {"north": {("a", "bright"): 6, ("b", "dark"): 4}})
    model = start_vae(fitting.generator.settings, 3, (2, 2), 0, plain=True)
    encoder = {n: t for n, t in model.state_dict().items() if n.startswith(("encoder", "posterior"))}
    message = Message.pack({"model": encoder}, devices=json.dumps(DEVICES))
    sums = fitting.sites["north"].handle("latents", 1, message).group("latents")
    with torch.no_grad():
        mean, log_variance = model.encode(fitting.data["north"].images[:12].float() / 255, torch.zeros(12, 16))
    assert sums["count"].tolist() == [[12, 0], [0, 0]]
    assert torch.allclose(sums["mean"][0, 0], mean.double().sum(0), atol=1e-4)
    second = (mean.double().square() + log_variance.double().exp()).sum(0)
    assert torch.allclose(sums["square"][0, 0], second, atol=1e-4)
    assert not sums["square"][1].any()
    none = Fitting(study, tmp_path, {"north": {("a", "bright"): 4}}).sites["north"].handle("latents", 1, message)
    assert not any(array.any() for array in none.arrays.values())


def test_a_cell_nobody_owns_is_composed_of_class_and_device() -> None:
    # Means 0 and 4 by class, plus 0 and 2 by device; 10,000 images make the prior of five images small.
    count = torch.tensor([[10_000, 10_000], [10_000, 0]])
    labels, devices = (
        torch.tensor([0, 0, 1]).repeat_interleave(10_000),
        torch.tensor([0, 1, 0]).repeat_interleave(10_000),
    )
    draw = torch.Generator().manual_seed(0)
    mean = (4 * labels + 2 * devices)[:, None] + torch.tensor([1.0, 3.0])[labels][:, None] * torch.randn(
        30_000, 2, generator=draw
    )
    sums = latent_sums(mean, torch.full((30_000, 2), -20.0), labels, devices, (2, 2))
    assert torch.equal(sums["count"], count.double())
    found = cell_gaussians(sums)
    assert torch.allclose(found["cell_mean"][1, 1], torch.full((2,), 6.0), atol=0.15)
    assert torch.allclose(found["cell_mean"][0, 1], torch.full((2,), 2.0), atol=0.05)
    assert torch.allclose(found["cell_deviation"][1], torch.full((2, 2), 3.0), atol=0.1)
    assert torch.allclose(found["cell_deviation"][0], torch.ones(2, 2), atol=0.05)


def test_variances_are_never_negative() -> None:
    # Equal latents far from zero: E[x^2] - E[x]^2 is rounding alone.
    rows = torch.zeros(7, dtype=torch.int64)
    sums = latent_sums(torch.full((7, 3), 1e3 / 3), torch.full((7, 3), -60.0), rows, rows, (2, 2))
    sums["square"] -= 1e-3
    found = cell_gaussians(sums)
    assert bool((found["cell_deviation"] > 0).all())
    assert all(bool(part.isfinite().all()) for part in found.values())


def test_no_owner_at_all_is_an_error() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(SiteError, match="synthesis.floor"):
        cell_gaussians(latent_sums(torch.zeros(0, 3), torch.zeros(0, 3), none, none, (2, 2)))


def test_public_folder_must_exist_and_hold_images(tmp_path: Path) -> None:
    study = painted_study(root=tmp_path, placement="server", public="public")
    with pytest.raises(DataError, match="public.*is no folder"):
        Fitting(study, tmp_path / "sites").fit()
    (tmp_path / "public").mkdir()
    (tmp_path / "public" / "readme.txt").write_text("none yet", encoding="utf-8")
    with pytest.raises(DataError, match="no PNG or JPEG"):
        Fitting(study, tmp_path / "sites").fit()
    (tmp_path / "public" / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="broken.png"):
        Fitting(study, tmp_path / "sites").fit()


def test_of_many_public_images_so_many_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "public").mkdir()
    for k in range(9):
        Image.fromarray(np.full((20, 20, 3), 10 * k, np.uint8)).save(tmp_path / "public" / f"{k}.PNG")
    monkeypatch.setattr(public_images, "MOST_IMAGES", 4)
    study = painted_study(root=tmp_path, placement="server", public="public")
    lines = public_images.public_lines(study, "public", 16)
    values = lines.images.float().mean(dim=(1, 2, 3)).tolist()
    assert lines.images.shape == (4, 3, SIDE, SIDE)
    assert len(set(values)) == 4
    assert public_images.public_lines(study, "public", 16).images.equal(lines.images)
