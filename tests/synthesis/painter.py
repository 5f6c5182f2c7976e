"""A generator that needs no training: it paints what class and device look like, so an exchange takes half a second."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from painted_sites import CLASSES, painted
from torch import Tensor
from toy_hospitals import OPEN, VAE, hospital_study

from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Leaf, Op, Site
from polyclinic.federation.state import ServerState
from polyclinic.secure.sum import SecureSum
from polyclinic.study import Study
from polyclinic.synthesis.cells import Cells, own_images
from polyclinic.synthesis.generators.base import ImageGenerator

ROUNDS = 2


class Painter(ImageGenerator):
    """Two rounds that sum the images of each class, to have been over the sites."""

    def fit(self, channel: Channel, state: ServerState, sums: SecureSum, cells: Cells) -> Iterator[None]:
        start = int(state.scalars.setdefault("fit_from", state.finished))
        message = Message(scalars={"devices": json.dumps(cells.devices)})
        for _ in state.rounds(start + ROUNDS):
            total = sums.sum(channel, "fit-painter", dict.fromkeys(channel.sites, message))
            known = state.groups.get("decoder", {"seen": torch.zeros(len(CLASSES))})
            state.groups["decoder"] = {"seen": known["seen"] + total.sums["seen"]["images"].float()}
            yield

    def ops(self) -> dict[str, Op]:
        leaves = (Leaf("seen", "sum", "images", lanes=64), Leaf("weight/*", "scalar", "counts"))
        return {"fit-painter": Op(self.fit_site, (*leaves, Leaf("loss", "scalar", "images")))}

    def fit_site(self, site: Site, message: Message) -> Message:
        own = own_images(site.data, tuple(json.loads(str(message.scalars["devices"]))), self.synthesis.floor)
        images = torch.bincount(own.labels, minlength=len(CLASSES)).double()
        return Message.pack({"seen": {"images": images}}, loss=1234.5, **{"weight/seen": 1.0})

    def decode(self, decoder: Mapping[str, Tensor], labels: Tensor, devices: Tensor, seeds: Tensor) -> Tensor:
        assert decoder["seen"].sum() > 0
        images = [torch.zeros(0, 3, 16, 16)]
        for label, device, seed in zip(labels.tolist(), devices.tolist(), seeds.tolist(), strict=True):
            draw = torch.Generator().manual_seed(1_000_003 * seed + 7)
            images.append(painted(CLASSES[label], ("bright", "dark")[device % 2], 1, draw))
        return (torch.cat(images) * 255).round().to(torch.uint8)


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> type[Painter]:
    """Stands where the autoencoder would."""

    def made(study: Study) -> Painter | None:
        assert study.synthesis is not None
        return Painter(study) if study.synthesis.of_kind("vae") else None

    monkeypatch.setattr("polyclinic.synthesis.exchange.image_generator", made)
    return Painter


def painter_study(
    method: str | dict[str, Any] = "fedavg", synthesis: dict[str, Any] | None = None, **more: Any
) -> Study:
    """An open gate, and as many samples as there are images."""
    ours = {"generator": [VAE], "gate": OPEN, "plan": {"budget": 1.0}, **(synthesis or {})}
    return hospital_study(method, synthesis=ours, **more)
