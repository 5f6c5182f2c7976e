"""What a site does in the exchange once counts are told and a generator is fitted: look at candidates, take samples."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from polyclinic.errors import MessageError
from polyclinic.federation.message import Message
from polyclinic.federation.site import Leaf, Op, Site
from polyclinic.seeds import derive_seed, generator
from polyclinic.study import Study
from polyclinic.synthesis.cells import count_cells, device_name, own_images
from polyclinic.synthesis.gate import vet
from polyclinic.synthesis.generators.amplitude import restyled_images
from polyclinic.synthesis.generators.base import ImageGenerator
from polyclinic.synthesis.once import once
from polyclinic.synthesis.plan import split_by_owner
from polyclinic.synthesis.pool import MOST_BYTES, Bounds, unpack
from polyclinic.synthesis.quality import feature_sums
from polyclinic.synthesis.share import choose, quota
from polyclinic.synthesis.shelf import Shelf, sized


class AtSite:
    """The ops of a site beside counting and fitting.

    Args:
        study: With ``synthesis``.
        generator_: Of images, or None where none are made at the server.
    """

    def __init__(self, study: Study, generator_: ImageGenerator | None) -> None:
        assert study.synthesis is not None
        self.study, self.settings, self.generator = study, study.synthesis, generator_

    def ops(self) -> dict[str, Op]:
        """Taking samples; where images are made also the sums for the filter, and the examination."""
        ops = {"receive": Op(self.receive, (Leaf("samples", "scalar", "counts"),))}
        if self.generator is None:
            return ops
        sums = (Leaf("features", "sum", "images", lanes=64), Leaf("weight/*", "scalar", "nothing"))
        if self.settings.filter:
            ops["sum-features"] = Op(self.sum_features, sums)
        ops["examine"] = Op(self.examine, (Leaf("verdict", "array", "images"), Leaf("report", "scalar", "images")))
        return ops

    def sum_features(self, site: Site, message: Message) -> Message:
        """Sums over the features that the start network sees in the site's images."""
        once(site, "sum-features", message)
        own = own_images(site.data, told_devices(message), self.settings.floor)
        return feature_sums(site, own, self.settings.of_kind("vae").size)

    def examine(self, site: Site, message: Message) -> Message:
        """The memorisation gate, on the site's own patients."""
        assert self.generator is not None
        once(site, "examine", message)
        lines = unpack(message, self._bounds(site, message))
        images = self.generator.decode(message.group("decoder"), lines.labels, lines.devices, lines.seeds)
        devices = told_devices(message)
        result = vet(site, lines.with_images(images), devices, self.settings)
        # Where sums are hidden or counts noisy, they must not leave beside it.
        counts = self.study.aggregation.backend == "plain" and not self.settings.epsilon
        report = json.dumps(result.as_json(self.settings.floor, counts=counts))
        return Message.pack({"verdict": {"accepted": result.accepted.to(torch.uint8)}}, report=report)

    def receive(self, site: Site, message: Message) -> Message:
        """Take what the site lacks of the released samples, restyle own images for cells nobody owns, keep both.

        How many of the released it took is all that it answers, and that does not depend on cells below the floor.
        """
        once(site, "receive", message)
        devices = told_devices(message)
        told = self._told_plan(site, message)
        samples = unpack(message, self._bounds(site, message))
        own, _ = count_cells(own_images(site.data, devices, self.settings.floor), len(site.task.classes), len(devices))
        level = float(message.scalars["level"])
        seed = derive_seed(self.study.seed, site.name, "share")
        most = quota(site.images, len(samples) + int(told["wanted"].sum()), self.settings.share)
        taken = samples.only(choose(samples, own, level, most, seed))
        if taken.images is None and len(taken):
            assert self.generator is not None
            drawn = self.generator.decode(message.group("decoder"), taken.labels, taken.devices, taken.seeds)
            taken = taken.with_images(drawn)
        images, labels = self._at_home(site, told, devices, most - len(taken))
        if taken.images is not None and len(taken):
            images = torch.cat([sized(taken.images, (images.shape[-2], images.shape[-1])), images])
            labels = torch.cat([taken.labels, labels])
        mine = {device_name(site.data, i) for i in site.data.splits["train"].tolist()}
        # A device whose noisy count came to nothing has no style either.
        others = torch.tensor([name not in mine for name in devices]) & (told["patients"].sum(0).cpu() > 0)
        Shelf(images, labels, told["styles"].cpu()[others]).save(site.state)
        return Message(scalars={"samples": len(taken)})

    def _at_home(
        self, site: Site, told: dict[str, Tensor], devices: tuple[str, ...], most: int
    ) -> tuple[Tensor, Tensor]:
        """Own images in the style of devices that nobody has their class on, if the study asks for them."""
        settings = self.settings.of_kind("amplitude")
        if settings is None:
            shape = site.data.picture(0).shape
            return torch.zeros((0, *shape), dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)
        _, unowned = split_by_owner(told["wanted"].numpy(), told["patients"].numpy())
        every = own_images(site.data, devices, 1)  # these images stay, and so does their number
        rng = generator(self.study.seed, site.name, "restyle")
        return restyled_images(site.data, every, unowned, told["styles"], settings.strength, most, rng)

    def _told_plan(self, site: Site, message: Message) -> dict[str, Tensor]:
        """The plan as it came, looked at.

        Raises:
            MessageError: An array is missing, of another type or shape, or out of range.
        """
        cells = (len(site.task.classes), len(told_devices(message)))
        side = 2 * self.settings.window + 1
        style = (cells[1], int(site.data.picture(0).shape[0]), side, side)
        told = message.group("plan")
        wanted = {"wanted": (torch.int64, cells), "patients": (torch.int64, cells), "styles": (torch.float32, style)}
        for name, (kind, shape) in wanted.items():
            array = told.get(name)
            if array is None or array.dtype != kind or tuple(array.shape) != shape:
                raise MessageError(f"{name} of the plan is not {kind} of shape {shape}. The message was not used.")
            most = 1 if name == "styles" else MOST_BYTES
            if array.numel() and not bool(((array >= 0) & (array <= most)).all()):
                raise MessageError(f"{name} of the plan is not between 0 and {most}. The message was not used.")
        return told

    def _bounds(self, site: Site, message: Message) -> Bounds:
        return Bounds(len(site.task.classes), len(told_devices(message)), int(site.data.picture(0).shape[0]))


def told_devices(message: Message) -> tuple[str, ...]:
    """The names of all devices, as the server told them."""
    return tuple(json.loads(str(message.scalars["devices"])))
