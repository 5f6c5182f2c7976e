"""One Fourier amplitude for all sites: known answers, names that stay, and whole runs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from PIL import Image
from tiny import TINY, changed
from torch import nn

from polyclinic import api
from polyclinic.data.dataset import SiteData
from polyclinic.data.manifest import Case
from polyclinic.errors import StudyError
from polyclinic.models.amplitude_norm import AmplitudeNorm, amplitude_norms, harmonise
from polyclinic.models.normalisation import running_statistics_used, shared_names, statistics_kept
from polyclinic.models.registry import build_model, head_name
from polyclinic.models.taps import features
from polyclinic.models.weights import save_tensors
from polyclinic.results import RunFolder
from polyclinic.runner import Run, Silent
from polyclinic.study import ImageSettings, ModelSettings, Study, TaskSettings, validate_study


def before(
    share: float, size: tuple[int, int, int], window: int | None = None, mean: float = 0.0, std: float = 1.0
) -> nn.Module:
    """A network that returns what comes in, so its output is the normalised image."""
    model = nn.Sequential(nn.Identity())
    harmonise(model, AmplitudeNorm(share, window, mean=mean, std=std), list(size))
    return model


def pictures(count: int, size: tuple[int, int, int], seed: int = 0) -> torch.Tensor:
    return torch.rand(count, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("share", "wanted"), [(1.0, 0.25), (0.5, 0.625), (0.2, 0.85)])
def test_a_white_image_takes_the_common_brightness(share: float, wanted: float) -> None:
    model = before(share, (1, 6, 5))
    model(torch.full((2, 1, 6, 5), 0.25))
    found = model.eval()(torch.ones(1, 1, 6, 5))
    torch.testing.assert_close(found, torch.full((1, 1, 6, 5), wanted))


def test_a_wave_keeps_its_place_and_takes_the_common_height() -> None:
    x = torch.arange(8) * 2 * torch.pi / 8
    model = before(1.0, (1, 8, 8))
    model((0.5 + 0.4 * torch.cos(x + 1.0)).expand(1, 1, 8, 8))
    found = model.eval()((0.3 + 0.1 * torch.cos(x - 2.0)).expand(1, 1, 8, 8))
    torch.testing.assert_close(found, (0.5 + 0.4 * torch.cos(x - 2.0)).expand(1, 1, 8, 8), atol=1e-6, rtol=0)


def test_each_colour_has_its_own_amplitude() -> None:
    model = before(1.0, (2, 4, 4))
    model(torch.tensor([0.25, 0.75]).view(1, 2, 1, 1).expand(3, 2, 4, 4))
    found = model.eval()(torch.full((1, 2, 4, 4), 0.5))
    torch.testing.assert_close(found[0, :, 0, 0], torch.tensor([0.25, 0.75]))


def test_brightness_is_that_of_the_image_and_not_of_normalised_inputs() -> None:
    """0.4 and 0.8 lie on two sides of the mean, so as normalised inputs they have opposite signs."""
    model = before(1.0, (1, 4, 4), mean=0.5, std=0.25)
    model((torch.full((1, 1, 4, 4), 0.8) - 0.5) / 0.25)
    found = model.eval()((torch.full((1, 1, 4, 4), 0.4) - 0.5) / 0.25)
    torch.testing.assert_close(found, torch.full((1, 1, 4, 4), (0.8 - 0.5) / 0.25))


@effort(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
def test_phase_stays_and_amplitude_becomes_the_mean_of_the_batch(height: int, width: int, seed: int) -> None:
    images = pictures(3, (2, height, width), seed)
    found = before(1.0, (2, height, width))(images)
    old, new = torch.fft.fft2(images), torch.fft.fft2(found)
    mean = old.abs().mean(0)
    torch.testing.assert_close(new.abs(), mean.expand_as(new.abs()), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(new, mean * torch.exp(1j * old.angle()), atol=2e-4, rtol=1e-3)


def test_a_window_moves_low_frequencies_alone() -> None:
    model = before(1.0, (1, 9, 8), window=2)
    assert model.amplitude.shape == (1, 5, 3)
    reference, image = pictures(1, (1, 9, 8)), pictures(1, (1, 9, 8), seed=1)
    model(reference)
    found = torch.fft.fft2(model.eval()(image)).abs()
    low = (torch.fft.fftfreq(9, 1 / 9).abs()[:, None] <= 2) & (torch.fft.fftfreq(8, 1 / 8).abs() <= 2)
    assert low.sum() == 25
    wanted = torch.where(low, torch.fft.fft2(reference).abs(), torch.fft.fft2(image).abs())
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def test_window_0_is_the_mean_of_each_colour() -> None:
    model = before(1.0, (3, 5, 5), window=0)
    first, image = pictures(2, (3, 5, 5)), pictures(2, (3, 5, 5), seed=1)
    model(first)
    wanted = image - image.mean((2, 3), keepdim=True) + first.mean((0, 2, 3)).view(1, 3, 1, 1)
    torch.testing.assert_close(model.eval()(image), wanted, atol=1e-6, rtol=1e-5)


def test_the_first_training_batch_sets_it_and_then_it_stands() -> None:
    model = before(1.0, (1, 6, 6))
    images = pictures(4, (1, 6, 6))
    torch.testing.assert_close(model.eval()(images), images)
    assert not model.amplitude.any()
    for kept in (statistics_kept, running_statistics_used):
        with kept(model.train()):
            torch.testing.assert_close(model(images), images)
        assert not model.amplitude.any()
    model(images)
    wanted = torch.fft.rfft2(images).abs().mean(0) / 36
    torch.testing.assert_close(model.amplitude, wanted)
    first = model.amplitude.clone()
    model(pictures(4, (1, 6, 6), seed=1))
    assert torch.equal(model.amplitude, first)


def test_gradients_reach_the_image() -> None:
    model = before(0.5, (1, 4, 4))
    images = pictures(2, (1, 4, 4)).requires_grad_()
    model(images).square().sum().backward()
    assert images.grad.isfinite().all()
    assert images.grad.abs().sum() > 0


def network(harmonised: float, window: int | None = None, **image: Any) -> nn.Module:
    own = {"size": [8, 10], "channels": 3, **image}
    settings = ModelSettings(width=2, harmonise=harmonised, harmonise_window=window)
    return build_model(settings, TASK, ImageSettings(**own), 0)


TASK = TaskSettings(classes=["a", "b"])


def test_names_of_the_network_stay() -> None:
    plain, ours = network(0), network(1)
    assert set(ours.state_dict()) - set(plain.state_dict()) == {"amplitude"}
    assert ours.amplitude.shape == (3, 8, 6)
    assert all(torch.equal(t, ours.state_dict()[n]) for n, t in plain.state_dict().items())
    assert head_name(ours) == head_name(plain) == "head"
    assert "amplitude" in shared_names(ours, "batch-local")
    images = torch.randn(2, 3, 8, 10, generator=torch.Generator().manual_seed(0))
    ours(images)
    ours.eval()
    torch.testing.assert_close(ours.head(features(ours, images)), ours(images))
    assert not torch.allclose(features(ours, images), features(plain.eval(), images))


def test_a_copy_has_a_normalisation_of_its_own() -> None:
    model = network(1)
    other = copy.deepcopy(model)
    assert amplitude_norms(other)[0] is not amplitude_norms(model)[0]
    other(torch.randn(2, 3, 8, 10))
    assert other.amplitude.any()
    assert not model.amplitude.any()


def test_weights_of_a_network_without_it_can_be_its_start(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_tensors(path, network(0).state_dict())
    image = ImageSettings(size=[8, 10], channels=3)
    model = build_model(ModelSettings(width=2, harmonise=1), TASK, image, 5, weights_path=path)
    assert torch.equal(model.head.weight, network(0).head.weight)
    save_tensors(path, network(1).state_dict())
    with pytest.raises(StudyError, match="has 'amplitude', which the network does not"):
        build_model(ModelSettings(width=2), TASK, image, 5, weights_path=path)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(StudyError, match=r"defined for flat images.*3 numbers"):
        network(1, size=[8, 8, 8])
    with pytest.raises(StudyError, match=r"\(3, 8, 6\), but images of \(3, 10, 8\) came"):
        network(1)(torch.zeros(2, 3, 10, 8))
    model = nn.Linear(1, 1)
    model.register_buffer("amplitude", torch.zeros(1))
    with pytest.raises(StudyError, match="Linear has its own"):
        harmonise(model, AmplitudeNorm(1.0, None, mean=0.5, std=0.25), [1, 4, 4])
    with pytest.raises(StudyError, match=r"harmonise_window: 4 needs images of 9 pixels.*8 × 10"):
        network(1, window=4)


def per_pixel(in_channels: int, out_channels: int, spatial_dims: int, norm: str) -> nn.Module:
    return nn.Conv2d(in_channels, out_channels, 1)


def test_masks_are_found_in_normalised_images() -> None:
    """On patches too: a window of prediction has the size of the patches that training saw."""
    task = TaskSettings(kind="segmentation", classes=["none", "lesion"])
    own = ModelSettings(name="test_amplitude_norm:per_pixel", harmonise=0.5)
    assert build_model(own, task, ImageSettings(size=[16, 16]), 0).amplitude.shape == (1, 16, 9)
    model = build_model(own, task, ImageSettings(size=[16, 16]), 0, patch=[8, 12])
    assert isinstance(amplitude_norms(model)[0], AmplitudeNorm)
    assert model(torch.randn(2, 1, 8, 12)).shape == (2, 2, 8, 12)


SHORT = {"name": "fedavg", "rounds": 1}
DEVICES = {"north": (1.0, 0.0), "south": (0.5, 0.4)}
"""Gain and offset of two devices that see the same kind of image."""


def two_devices(seed: int = 0) -> dict[str, SiteData]:
    found = {}
    for k, (site, (gain, offset)) in enumerate(DEVICES.items()):
        draw = torch.Generator().manual_seed(seed * 10 + k)
        targets = torch.arange(24) % 2
        scene = torch.rand(24, 1, 8, 8, generator=draw) * 0.4 + 0.2 * targets[:, None, None, None]
        names = ["train"] * 16 + ["val"] * 4 + ["test"] * 4
        cases = [Case(f"{i}.png", f"{site}-{i}", site, label="ab"[i % 2], split=names[i]) for i in range(24)]
        splits = {"train": torch.arange(16), "val": torch.arange(16, 20), "test": torch.arange(20, 24)}
        found[site] = SiteData(site, cases, gain * scene + offset, targets, splits)
    return found


def device_study(method: Any = "fedavg", share: float = 1.0, **sections: Any) -> Study:
    raw: dict[str, Any] = {
        "name": "devices",
        "task": {"classes": ["a", "b"]},
        "data": {"phantom": {"sites": [{"name": "unused"}]}, "image": {"size": [8, 8]}},
        "model": {"name": "small-cnn", "width": 2, "harmonise": share},
        "training": {"lr": 0.05, "batch_size": 8},
        "method": method,
        "evaluation": {"bootstrap": 10},
    }
    return validate_study(changed(raw, sections))


def run_of(study: Study, folder: Path) -> Run:
    RunFolder(folder).create(study)
    run = Run(study, two_devices(), RunFolder(folder), Silent())
    run.train()
    return run


def test_images_of_two_devices_come_nearer(tmp_path: Path) -> None:
    run = run_of(device_study({"name": "fedavg", "rounds": 2}), tmp_path)
    model = run.bench.model
    model.load_state_dict(run.state.groups["model"], strict=False)
    hook = amplitude_norms(model.eval())[0]

    def apart(share: float) -> float:
        """Between devices, as a share of the deviation within them: difference of mean images, root mean square."""
        hook.share = share
        seen = {s: hook(model, (d.inputs(torch.arange(24)),))[0] for s, d in two_devices().items()}
        gap = (seen["north"].mean(0) - seen["south"].mean(0)).square().mean().sqrt()
        return float(gap / torch.cat([x - x.mean(0) for x in seen.values()]).std())

    assert apart(1.0) < 0.6 * apart(0.5) < 0.6 * 0.8 * apart(0.0)


def test_sites_average_what_their_first_batches_set(tmp_path: Path) -> None:
    study = device_study({"name": "fedavg", "rounds": 3}, training={"batch_size": 100})
    run = run_of(study, tmp_path)
    spectra = [torch.fft.rfft2(d.images[:16]).abs().mean(0) / 64 for d in two_devices().values()]
    torch.testing.assert_close(run.state.groups["model"]["amplitude"], sum(spectra) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["fedbn", "ditto", {"name": "per-fedavg", "variant": "hf"}, "scaffold", "fedprox"])
def test_other_methods_share_it_too(method: Any, tmp_path: Path) -> None:
    wanted = {"name": method, "rounds": 2} if isinstance(method, str) else {**method, "rounds": 2}
    run = run_of(device_study(wanted), tmp_path)
    run.test()
    assert run.state.groups["model"]["amplitude"].any()


def test_the_choice_changes_the_model_and_0_is_the_network_without_it(tmp_path: Path) -> None:
    found = [
        run_of(device_study(SHORT, share), tmp_path / str(share)).state.groups["model"] for share in (0.0, 0.5, 1.0)
    ]
    assert "amplitude" not in found[0]
    assert len({float(group["head.weight"].sum()) for group in found}) == 3


def test_a_run_that_was_stopped_ends_the_same(tmp_path: Path) -> None:
    study = device_study({"name": "fedavg", "rounds": 3})
    whole = run_of(study, tmp_path / "whole")
    folder = RunFolder(tmp_path / "parts")
    folder.create(study)

    class EnoughError(Exception):
        pass

    class Stopper(Silent):
        def round_finished(self, record: Any) -> None:
            raise EnoughError

    with pytest.raises(EnoughError):
        Run(study, two_devices(), folder, Stopper()).train()
    resumed = Run(study, two_devices(), folder, Silent())
    assert resumed.state.finished == 1
    resumed.train()
    wanted = whole.state.groups["model"]
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in resumed.state.groups["model"].items())


def test_a_finished_run_predicts(tmp_path: Path) -> None:
    study = validate_study(changed(TINY, {"model": {"harmonise": 0.5}, "method": {"rounds": 1}}))
    folder = api.run(study, out=tmp_path / "run")
    Image.new("L", (40, 30), 128).save(tmp_path / "new.png")
    rows = api.predict(folder, tmp_path / "new.png", tmp_path / "found.csv").read_text().splitlines()
    assert rows[0] == "image,prediction,p_normal,p_pneumonia"
    assert rows[1].startswith("new.png,")
