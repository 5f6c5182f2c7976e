"""A network with a closed form, and sites made of random numbers."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from toy_proxies import toy_proxies

from polyclinic.data.dataset import SiteData
from polyclinic.data.manifest import Case
from polyclinic.results import RunFolder
from polyclinic.runner import Run, Silent
from polyclinic.study import Study, validate_study

SIZE = 4
IMAGES = {"north": 24, "south": 12, "west": 6}


def linear(in_channels: int, out_channels: int, spatial_dims: int, norm: str) -> nn.Module:
    """Softmax regression on the pixels."""
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * SIZE**spatial_dims, out_channels))


def two_layers(in_channels: int, out_channels: int, spatial_dims: int, norm: str) -> nn.Module:
    """Two linear layers with nothing between them: a body with three features and a head."""
    body = nn.Linear(in_channels * SIZE**spatial_dims, 3)
    return nn.Sequential(nn.Flatten(), body, nn.Linear(3, out_channels))


def site_data(site: str, images: int, seed: int = 0) -> SiteData:
    """Random grey images of ``SIZE`` pixels a side; the class shows in the mean."""
    draw = torch.Generator().manual_seed(seed * 1000 + sum(map(ord, site)))
    train, held = images, max(4, images // 3)
    count = train + 2 * held
    targets = torch.arange(count) % 2
    pixels = torch.rand(count, 1, SIZE, SIZE, generator=draw) * 0.5 + 0.5 * targets[:, None, None, None] * 0.5
    names = ["train"] * train + ["val"] * held + ["test"] * held
    cases = [Case(f"{i}.png", f"{site}-{i}", site, label="ab"[int(targets[i])], split=names[i]) for i in range(count)]
    bounds = {"train": (0, train), "val": (train, train + held), "test": (train + held, count)}
    splits = {name: torch.arange(*ends) for name, ends in bounds.items()}
    return SiteData(site, cases, pixels, targets, splits)


def sites(sizes: dict[str, int] | None = None) -> dict[str, SiteData]:
    """Three sites of unequal size."""
    return {name: site_data(name, n) for name, n in (sizes or IMAGES).items()}


def enlarged(size: int = 32) -> dict[str, SiteData]:
    """The same with images of ``size`` pixels a side."""
    data = sites()
    for own in data.values():
        own._blocks = (F.interpolate(own.images, size=(size, size)),)
    return data


EVERYTHING = 1000
SMALL_BATCH = {"per-fedavg": 3}
"""Methods that cannot take all images of a site at once."""

NETWORKS = dict.fromkeys(("fedper", "fedrep", "fediic", "fedproto", "fedtgp", "fedgh", "lg-fedavg"), "toys:two_layers")
NETWORKS["natimg-fl"] = "toy_proxies:narrow"
"""Methods that leave nothing to share, or to contrast, of a network with one layer."""


PUBLIC = {"fedmd", "feddf", "ds-fl", "fccl", "kt-pfl", "natimg-fl"}
"""Methods that need public images."""


QUICK: dict[str, dict[str, Any]] = {"feddf": {"steps": 10, "every": 5}, "natimg-fl": {"server_steps": 4}}
"""Fewer steps at the server than by default."""


@cache
def public_images() -> dict[str, Any]:
    """The study's ``proxies`` of such methods, one set for all tests of a process."""
    folder = Path(tempfile.mkdtemp(prefix="toy-proxies-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return toy_proxies(folder)


def toy_study(method: str | dict[str, Any], **sections: Any) -> Study:
    """Full-batch plain gradient descent on the linear network, three rounds, unless ``sections`` say otherwise."""
    given = {"name": method} if isinstance(method, str) else method
    raw: dict[str, Any] = {
        "name": "toy",
        "task": {"kind": "multi-class", "classes": ["a", "b"]},
        "data": {"phantom": {"sites": [{"name": "unused"}]}, "image": {"size": [SIZE, SIZE]}},
        "model": {"name": NETWORKS.get(given["name"], "toys:linear")},
        "training": {"lr": 0.1, "batch_size": EVERYTHING},
        "evaluation": {"every": 0, "bootstrap": 20, "select": "last"},
    }
    if given["name"] in PUBLIC:
        raw["proxies"] = public_images()
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section} if isinstance(section, dict) else section
    if raw["training"]["batch_size"] == EVERYTHING and given["name"] in SMALL_BATCH and given.get("alpha") != 0:
        raw["training"] = {**raw["training"], "batch_size": SMALL_BATCH[given["name"]]}
    return validate_study({**raw, "method": {"rounds": 3, **QUICK.get(given["name"], {}), **given}})


def trained(study: Study, data: dict[str, SiteData], folder: Path) -> Run:
    """The run after its last round."""
    opened = RunFolder(folder)
    if not (folder / "study.yaml").exists():
        opened.create(study)
    run = Run(study, data, opened, Silent())
    run.train()
    return run


def resumed(study: Study, data: dict[str, SiteData], folder: Path, rounds: int = 1) -> Run:
    """The run after its last round, killed after ``rounds`` of them and gone on in what might be another process."""

    class EnoughError(Exception):
        pass

    class Stopper(Silent):
        def round_finished(self, record: Any) -> None:
            if record["round"] == rounds:
                raise EnoughError

    opened = RunFolder(folder)
    opened.create(study)
    with suppress(EnoughError):
        Run(study, data, opened, Stopper()).train()
    run = Run(study, data, opened, Silent())
    assert run.state.finished == rounds
    run.train()
    return run


def deployed(run: Run, site: str) -> dict[str, torch.Tensor]:
    """What the site would use now."""
    own = run.channel._sites[site]
    own.round = run.state.finished
    run.method.deploy(own, run.method.deployment(run.state))
    return {name: tensor.clone() for name, tensor in own.tensors.items()}
