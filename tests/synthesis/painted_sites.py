"""Sites whose images show class and device in plain colours, and what it takes to fit a generator over them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from toys import toy_study

from polyclinic.data.dataset import SiteData
from polyclinic.data.manifest import Case
from polyclinic.federation.local import LocalChannel
from polyclinic.federation.site import Site
from polyclinic.federation.state import ServerState
from polyclinic.secure.backends import Aggregation
from polyclinic.secure.sum import SecureSum
from polyclinic.study import Study
from polyclinic.synthesis.cells import Cells, count_cells, own_images
from polyclinic.synthesis.generators.vae import VAEGenerator

SIDE = 16
CLASSES, DEVICES = ("a", "b"), ("bright", "dark")
INK = {"a": (0.9, 0.1, 0.1), "b": (0.1, 0.1, 0.9)}
GROUND = {"bright": 0.8, "dark": 0.2}
"""A class is the colour of a square, a device the grey around it."""
Owned = Mapping[tuple[str, str], int]
OWNED: dict[str, Owned] = {
    "north": {("a", "bright"): 12, ("b", "bright"): 12},
    "south": {("a", "dark"): 12},
    "west": {("a", "bright"): 8, ("a", "dark"): 8},
}
"""Patients of each site by class and device: nobody owns class b on the dark device."""


def painted(label: str, device: str, count: int, draw: torch.Generator) -> Tensor:
    """Images float ``[count, 3, SIDE, SIDE]``: a square that is a little elsewhere in each."""
    images = torch.full((count, 3, SIDE, SIDE), GROUND[device])
    for image in images:
        top, left = torch.randint(2, 7, (2,), generator=draw).tolist()
        image[:, top : top + 8, left : left + 8] = torch.tensor(INK[label])[:, None, None]
    return (images + 0.02 * torch.randn(images.shape, generator=draw)).clamp(0, 1)


def painted_data(site: str, owned: Owned, per_patient: int = 2) -> SiteData:
    """uint8 images, all for training."""
    draw = torch.Generator().manual_seed(sum(map(ord, site)))
    cases, images, labels = [], [torch.zeros(0, 3, SIDE, SIDE)], []
    for (label, device), patients in owned.items():
        for k in range(patients * per_patient):
            who = f"{site}-{label}-{device}-{k // per_patient}"
            cases.append(Case(f"{who}-{k}.png", who, site, device=device, label=label, split="train"))
            labels.append(CLASSES.index(label))
        images.append(painted(label, device, patients * per_patient, draw))
    every = torch.arange(len(cases))
    splits = {"train": every, "val": every[:0], "test": every[:0]}
    pixels = (torch.cat(images) * 255).round().to(torch.uint8)
    return SiteData(site, cases, pixels, torch.tensor(labels, dtype=torch.int64), splits)


def painted_study(backend: str = "plain", root: Path | str = "", floor: int = 5, **vae: Any) -> Study:
    """Two classes, and a small generator of 16 pixels; ``vae`` are its settings."""
    small = {"name": "vae", "size": SIDE, "latent": 8, "rounds": 2, "epochs": 1, "batch_size": 16}
    return toy_study(
        "fedavg",
        data={"root": str(root), "image": {"size": [SIDE, SIDE], "channels": 3}},
        aggregation=backend,
        synthesis={"generator": {**small, **vae}, "floor": floor},
    )


class Fitting:
    """Sites, their channel, and the server's state.

    Args:
        study: From ``painted_study``.
        folder: Of the sites' states.
        owned: By site.
    """

    def __init__(self, study: Study, folder: Path, owned: Mapping[str, Owned] | None = None) -> None:
        self.study = study
        self.generator = VAEGenerator(study)
        self.data = {site: painted_data(site, own) for site, own in (owned or OWNED).items()}
        method: Any = SimpleNamespace(simulation_only=False, ops=self.generator.ops)
        side = Aggregation(study, method, sorted(self.data))
        bench: Any = SimpleNamespace(device=torch.device("cpu"))
        task: Any = SimpleNamespace(classes=CLASSES)
        self.sites = {
            name: Site(
                name,
                study,
                data,
                task,
                workbench=bench,
                ops=side.ops,
                folder=folder,
                credentials=side.credentials.get(name),
            )
            for name, data in self.data.items()
        }
        self.channel = LocalChannel(self.sites)
        self.sums: SecureSum = side.sums
        self.state = ServerState({"model": {}})

    @property
    def cells(self) -> Cells:
        """Counts over all sites."""
        assert self.study.synthesis is not None
        counts = [
            count_cells(own_images(data, DEVICES, self.study.synthesis.floor), 2, 2) for data in self.data.values()
        ]
        return Cells(CLASSES, DEVICES, sum(p for p, _ in counts), sum(n for _, n in counts))  # type: ignore[arg-type]

    def fit(self, rounds: int = 1000) -> ServerState:
        """Up to so many rounds more; the state after them."""
        self.channel.begin_round(self.state.finished + 1)
        for _ in self.generator.fit(self.channel, self.state, self.sums, self.cells):
            self.state.finished += 1
            self.channel.begin_round(self.state.finished + 1)
            rounds -= 1
            if rounds == 0:
                break
        return self.state

    def samples(self, label: str, device: str, count: int = 32, seed: int = 0) -> Tensor:
        """Decoded images of one cell, uint8."""
        ones = torch.ones(count, dtype=torch.int64)
        seeds = torch.arange(seed, seed + count)
        labels, devices = CLASSES.index(label) * ones, DEVICES.index(device) * ones
        return self.generator.decode(self.state.groups["decoder"], labels, devices, seeds)


def colours(images: Tensor) -> tuple[float, float, float]:
    """Red and blue in the middle and the grey of the border, in 0..1, means over images."""
    unit = images.float() / 255
    middle = unit[:, :, 6:10, 6:10].mean(dim=(0, 2, 3))
    ground = torch.cat([unit[:, :, :2].flatten(1), unit[:, :, -1:].flatten(1)], dim=1).mean()
    return float(middle[0]), float(middle[2]), float(ground)
