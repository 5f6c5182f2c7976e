"""Networks from a study: shapes, sizes known from the papers, seeds, refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyclinic.errors import StudyError
from polyclinic.models.catalog import NETWORKS
from polyclinic.models.registry import build_model, describe, head_name
from polyclinic.models.weights import save_tensors
from polyclinic.study import ImageSettings, ModelSettings, TaskSettings

TWO = ["healthy", "ill"]
EVERY = [(n.name, d) for n in NETWORKS.values() for d in n.dims]


def build(name: str = "small-cnn", size: tuple[int, ...] = (16, 16), seed: int = 0, **more: Any) -> nn.Module:
    kind = more.pop("kind", "segmentation" if "unet" in name else "multi-class")
    classes, channels = more.pop("classes", TWO), more.pop("channels", 1)
    extra = {key: more.pop(key) for key in ("weights_path", "patch") if key in more}
    task = TaskSettings(kind=kind, classes=classes)
    return build_model(
        ModelSettings(name=name, **more), task, ImageSettings(size=list(size), channels=channels), seed, **extra
    )


@pytest.mark.parametrize(("name", "dims"), EVERY)
def test_every_network_gives_one_output_a_class(name: str, dims: int) -> None:
    size = (32, 36) if dims == 2 else (32, 33, 32) if "dense" in name else (16, 20, 16)
    width = {"width": 4} if NETWORKS[name].width else {}
    model = build(name, size, channels=3, classes=["a", "b", "c"], **width)
    assert model.training
    with torch.no_grad():
        output = model.eval()(torch.rand(2, 3, *size))
    assert list(output.shape) == ([2, 3, *size] if "unet" in name else [2, 3])
    assert torch.isfinite(output).all()


@pytest.mark.parametrize(
    ("name", "size", "channels", "classes", "options", "parameters"),
    [
        ("resnet18", (64, 64), 3, 1000, {}, 11_689_512),
        ("densenet121", (64, 64), 3, 1000, {}, 7_978_856),
        ("mobilenet", (64, 64), 3, 1000, {"alpha": 1.0}, 3_504_872),
        ("resnet34", (64, 64), 3, 1000, {}, 21_797_672),
        ("resnet50", (64, 64), 3, 1000, {}, 25_557_032),
        ("efficientnet-b0", (64, 64), 3, 1000, {}, 5_288_548),
        ("shufflenet", (64, 64), 3, 1000, {"width": 1.0}, 2_278_604),
        ("shufflenet", (64, 64), 3, 1000, {}, 1_366_792),
        # 9 x (1x16 + 2x16x16 + 16x32 + 32x32 + 32x64 + 64x64) + 16x32 + 32x64 + 2 x (3x16 + 3x32 + 3x64) + 64x2 + 2
        ("small-resnet", (16, 16), 1, 2, {}, 77_234),
        ("densenet3d", (32, 32, 32), 1, 2, {}, 1_845_470),
        ("unet", (16, 16), 3, 2, {}, 1_942_594),
        # 9 x (1x16 + 16x32 + 32x64 + 64x64) + 2 x (16 + 32 + 64 + 64) + 64 x 2 + 2
        ("small-cnn", (16, 16), 1, 2, {}, 60_530),
    ],
)
def test_parameter_counts_are_those_of_the_papers(
    name: str, size: tuple[int, ...], channels: int, classes: int, options: dict[str, Any], parameters: int
) -> None:
    model = build(name, size, channels=channels, classes=[str(i) for i in range(classes)], options=options)
    assert describe(model)["parameters"] == parameters


def test_describe_counts_buffers_and_bytes() -> None:
    counts = describe(build())
    buffers = 2 * (16 + 32 + 64 + 64) + 4
    assert counts == {"parameters": 60_530, "buffers": buffers, "bytes": 4 * (60_530 + buffers - 4) + 8 * 4}


def test_densenet3d_keeps_the_first_axis_in_its_first_layer() -> None:
    model = build("densenet3d", (32, 32, 32))
    first = model.get_submodule("features.conv0")
    assert list(first(torch.zeros(1, 1, 8, 8, 8)).shape) == [1, 32, 8, 4, 4]


def test_the_last_layer_is_found() -> None:
    assert head_name(build()) == "head"
    assert head_name(build("resnet18", (32, 32))) == "fc"
    assert head_name(build("unet", (16, 16), width=2)) == "final_conv"


@pytest.mark.parametrize("name", ["small-cnn", "mobilenet", "densenet3d"])
def test_seed_decides_the_start_and_leaves_torchs_random_state_alone(name: str) -> None:
    size = (32,) * (3 if name == "densenet3d" else 2)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (build(name, size, seed=s).state_dict() for s in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_large_images_are_checked_without_arithmetic() -> None:
    assert describe(build("small-cnn", (4096, 4096)))["parameters"] == 60_530


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "small_cn"}, "no network 'small_cn'. Did you mean 'small-cnn'"),
        ({"name": "qqq"}, "Known: small-cnn, mobilenet"),
        ({"name": "unet", "kind": "multi-class"}, "'unet' does segmentation, but task.kind is 'multi-class'. Choose"),
        ({"name": "resnet18", "kind": "segmentation"}, "Choose one of: unet."),
        ({"name": "densenet3d"}, "'densenet3d' takes 3D images, but data.image.size has 2 numbers"),
        ({"options": {"stride": [1]}}, "small_cnn has no argument 'stride'. Did you mean 'strides'"),
        ({"options": {"norm": "batch"}}, "'norm' is decided by the study itself"),
        ({"name": "resnet18", "options": {"conv1_t_strid": 1}}, "ResNet has no argument 'conv1_t_strid'. Did you mean"),
        ({"name": "resnet18", "options": {"block": "basik"}}, "Unknown block 'basik'"),
        ({"name": "unet", "options": {"features": [1]}}, "'features' is decided by the study"),
        (
            {"name": "mobilenet", "width": 8},
            "model.width is 8, but 'mobilenet' does not use it (only small-cnn, ",
        ),
        ({"name": "unet", "size": (8, 8)}, "cannot process images of 1x8x8"),
        ({"name": "shufflenet", "options": {"width": 2.0}}, "width 0.5 or 1.0, got 2.0"),
        ({"name": "small-resnet", "options": {"blocks": [1, 0, 1]}}, "one block or more each, got blocks=[1, 0, 1]"),
        ({"name": "unet", "embedding": 4}, "model.embedding needs a network for classification"),
        ({"name": "mobilenet", "norm": "instance"}, "more than 1 spatial element"),
        ({"name": "unet", "patch": [32, 32]}, "[32, 32] does not fit into data.image.size [16, 16]"),
        ({"name": "unet", "patch": [16]}, "Give 2 numbers"),
    ],
)
def test_refusals_say_what_to_do(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(StudyError) as caught:
        build(**arguments)
    assert words in str(caught.value)


OWN = '''
import torch
from torch import nn

class Half(nn.Module):
    """Mean of each channel, then a linear layer."""
    def __init__(self, channels, classes):
        super().__init__()
        self.norm, self.out, self.feature_tap = nn.BatchNorm2d(channels), nn.Linear(channels, classes), "norm"
    def forward(self, x):
        return self.out(self.norm(x).mean((2, 3)))

def good(in_channels, out_channels, spatial_dims, norm, bonus=0):
    return Half(in_channels, out_channels + bonus)

def narrow(in_channels, out_channels):
    return Half(in_channels, out_channels)

def number(in_channels, out_channels, spatial_dims, norm):
    return 7

class Pair(Half):
    def forward(self, x):
        return super().forward(x), x

def pair(**settings):
    return Pair(settings["in_channels"], settings["out_channels"])

class Wary(Half):
    def forward(self, x):
        return super().forward(x if x.sum().item() == 0 else 0 * x)

def wary(**settings):
    return Wary(settings["in_channels"], settings["out_channels"])
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_networks.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_networks", raising=False)


@pytest.mark.usefixtures("own")
def test_a_network_of_ones_own() -> None:
    model = build("own_networks:good", channels=3)
    assert describe(model)["parameters"] == 3 + 3 + 3 * 2 + 2
    assert list(model(torch.zeros(2, 3, 16, 16)).shape) == [2, 2]


@pytest.mark.usefixtures("own")
def test_a_large_network_that_looks_at_its_values_is_checked_in_earnest() -> None:
    assert describe(build("own_networks:wary", (400, 400)))["parameters"] == 1 + 1 + 2 + 2


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "own_networks:"}, "not of the form module:function"),
        ({"name": "no_such_module:f"}, "needs the Python module 'no_such_module', which is not found"),
        ({"name": "own_networks:god"}, "no function 'god'. Did you mean 'good'"),
        ({"name": "own_networks:narrow"}, "lacks spatial_dims, norm"),
        ({"name": "own_networks:number"}, "number returned int, not a torch.nn.Module"),
        ({"name": "own_networks:pair"}, "returns tuple; expected one tensor of shape [1, 2]"),
        ({"name": "own_networks:good", "options": {"bonus": 1}}, "returns shape [1, 3]"),
        ({"name": "own_networks:good", "kind": "segmentation"}, "expected [1, 2, 16, 16] for segmentation"),
        ({"name": "own_networks:good", "norm": "group"}, "layer 'norm' of the network is BatchNorm2d"),
        ({"name": "own_networks:good", "width": 4}, "does not use it"),
    ],
)
def test_faults_of_ones_own_networks_are_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(StudyError) as caught:
        build(**arguments)
    assert words in str(caught.value)


def state(**more: Any) -> dict[str, Tensor]:
    return build(seed=9, width=2, **more).state_dict()


def test_weights_are_loaded(tmp_path: Path) -> None:
    path, saved = tmp_path / "start.safetensors", state()
    save_tensors(path, saved)
    loaded = build(width=2, weights_path=path).state_dict()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)


def test_weights_without_the_last_layer_leave_it_random(tmp_path: Path) -> None:
    path, saved = tmp_path / "trunk.safetensors", state()
    save_tensors(path, {n: t for n, t in saved.items() if not n.startswith("head.")})
    loaded, fresh = build(width=2, weights_path=path).state_dict(), build(width=2).state_dict()
    assert torch.equal(loaded["head.weight"], fresh["head.weight"])
    assert torch.equal(loaded["blocks.0.weight"], saved["blocks.0.weight"])


def test_running_statistics_may_be_missing_only_under_batch_local(tmp_path: Path) -> None:
    path = tmp_path / "global.safetensors"
    save_tensors(path, {n: t for n, t in state().items() if "running" not in n and "tracked" not in n})
    build(width=2, weights_path=path, norm="batch-local")
    with pytest.raises(StudyError, match=r"lacks 'blocks.1.running_mean' \(8 missing"):
        build(width=2, weights_path=path)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "start.safetensors"

    def refusal(tensors: dict[str, Tensor] | None) -> str:
        if tensors is not None:
            save_tensors(path, tensors)
        with pytest.raises(StudyError) as caught:
            build(width=2, weights_path=path)
        return str(caught.value)

    assert "model.weights" in refusal(None)
    assert "no such file" in refusal(None)
    five = state(classes=list("abcde"))
    assert "was made for 5 classes, the study has 2 (head.weight, head.bias)" in refusal(five)
    assert "has shape (2, 3, 3, 3) for 'blocks.0.weight', the network has (2, 1, 3, 3)" in refusal(state(channels=3))
    assert "has 'extra', which the network does not" in refusal({**state(), "extra": torch.zeros(1)})
    path.write_bytes(b"not safetensors")
    assert "cannot be read as safetensors" in refusal(None)


def test_the_catalog_imports_neither_torch_nor_monai() -> None:
    code = "import sys, polyclinic.models.catalog; sys.exit(bool({'torch', 'monai'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_small_networks_do_not_import_monai() -> None:
    code = (
        "import sys; from polyclinic.models.registry import build_model; from polyclinic.study import *;"
        "build_model(ModelSettings(), TaskSettings(classes=['a', 'b']), ImageSettings(size=[8, 8]), 0);"
        "sys.exit('monai' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def views(in_channels: int, out_channels: int, spatial_dims: int, norm: str) -> nn.Module:
    """Two views in training mode, one map in evaluation."""

    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(in_channels, out_channels, 1)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.conv(images)
            return found.expand(2, *found.shape) if self.training else found

    return Views()


def test_a_network_may_return_views_in_training_for_segmentation_alone() -> None:
    build("test_model_registry:views", (8, 8), kind="segmentation")
    with pytest.raises(StudyError, match=r"returns shape \[1, 2, 8, 8\]"):
        build("test_model_registry:views", (8, 8), kind="multi-class")
