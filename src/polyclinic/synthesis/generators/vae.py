"""Images from the class- and device-conditional autoencoder of ``synthesis/vae.py``; reconstruction of FedSSG.

``placement: sites``: trained over the sites in rounds. Convolutions and linear layers are averaged with the number of a
site's images; a class's or device's own vector only over the sites that own it, with the root of its images for a class
and the number of images for a device. A plain average would dilute the vector of a rare class by sites that never moved
it; one that nobody owns stays as it is, bit for bit.

``placement: server``: trained at the server on public images, whose class and device vectors are zero. Sites get the
encoder once and send sums by cell, of which ``latents.py`` makes Gaussians that the decoder starts from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message, Scalar
from polyclinic.federation.site import Leaf, Op, Site
from polyclinic.federation.state import ServerState
from polyclinic.secure.sum import SecureSum, Total
from polyclinic.seeds import derive_seed
from polyclinic.study import Study
from polyclinic.synthesis.accounting import Budget, check_installed
from polyclinic.synthesis.cells import Cells, own_images
from polyclinic.synthesis.generators.base import ImageGenerator
from polyclinic.synthesis.latents import DEVIATION, MEAN, cell_gaussians, latent_sums
from polyclinic.synthesis.once import once
from polyclinic.synthesis.private import secret_stream, train_private
from polyclinic.synthesis.public_images import public_lines
from polyclinic.synthesis.rowwise import LEAVES, averaged, equal_weights, own_weights, weighed
from polyclinic.synthesis.settings import VAESettings
from polyclinic.synthesis.vae import (
    DEVICE_ROWS,
    ROWS,
    Lines,
    as_bytes,
    loaded_vae,
    shrunk_images,
    standard_normals,
    start_vae,
)
from polyclinic.synthesis.vae_training import Flips, cosine, train_vae

FIT, LATENTS = "fit-generator", "latents"
_PRIVATE = tuple(Leaf(name, "scalar", "counts") for name in ("epsilon", "noise", "sampling", "steps"))
_ENCODER, _DECODER = ("encoder.", "posterior."), ("decoder.", "decoder_input.", *ROWS)
_AT_ONCE = 64


class VAEGenerator(ImageGenerator):
    """Both placements, both sides.

    Args:
        study: With a generator ``vae`` in its ``synthesis``.

    Raises:
        StudyError: ``dp`` without its package.
    """

    def __init__(self, study: Study) -> None:
        super().__init__(study)
        settings = self.synthesis.of_kind("vae")
        assert isinstance(settings, VAESettings)
        self.settings = settings
        self.private = settings.dp
        if self.private is not None:
            check_installed()
        augment = study.training.augment
        self.flips = Flips(across=augment.flip, down=augment.flip_vertical)
        self._known: dict[tuple[str, str], tuple[Lines, list[str]]] = {}

    # The server's side.

    def fit(self, channel: Channel, state: ServerState, sums: SecureSum, cells: Cells) -> Iterator[None]:
        """Train in ``rounds`` rounds, or at the server and then one round; see the module."""
        start = int(state.scalars.setdefault("fit_from", state.finished))
        devices = json.dumps(cells.devices)
        if self.settings.placement == "server":
            for _ in state.rounds(start + 1):
                self._fit_here(channel, state, sums, devices)
                yield
            return
        if "vae" not in state.groups and "decoder" not in state.groups:
            network = start_vae(self.settings, self._channels, self._shape(devices), self.study.seed)
            state.groups["vae"] = dict(network.state_dict())
        for number in state.rounds(start + self.settings.rounds):
            message = Message.pack({"model": state.groups["vae"]}, devices=devices, number=number - start)
            total = sums.sum(channel, FIT, dict.fromkeys(channel.sites, message))
            state.groups["vae"] = averaged(state.groups["vae"], total)
            self._note(state, total)
            if number == start + self.settings.rounds:
                state.groups["decoder"] = _decoder_part(state.groups.pop("vae"))
            yield

    def _fit_here(self, channel: Channel, state: ServerState, sums: SecureSum, devices: str) -> None:
        settings, seed = self.settings, derive_seed(self.study.seed, "vae", "public")
        lines = public_lines(self.study, settings.public, settings.size)
        shape, device = self._shape(devices), self.study.device
        model = start_vae(settings, self._channels, shape, self.study.seed, plain=True).to(device)
        rates = [cosine(settings.lr, number, settings.rounds) for number in range(1, settings.rounds + 1)]
        loss = train_vae(model, lines.to(device), settings, self.flips, rates=rates, seed=seed)
        tensors = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        encoder = {name: tensor for name, tensor in tensors.items() if name.startswith(_ENCODER)}
        message = Message.pack({"model": encoder}, devices=devices)
        total = sums.sum(channel, LATENTS, dict.fromkeys(channel.sites, message))
        state.groups["decoder"] = _decoder_part(tensors) | cell_gaussians(total.sums["latents"])
        state.scalars["fit_loss"] = json.dumps([loss])
        state.scalars["fit_public"] = len(lines)

    def _note(self, state: ServerState, total: Total) -> None:
        """Keep what sites said beside their arrays: the mean loss of the round, and the most that any has spent."""
        losses = [float(said["loss"]) for said in total.scalars.values() if "loss" in said]
        told = json.loads(str(state.scalars.get("fit_loss", "[]")))
        state.scalars["fit_loss"] = json.dumps([*told, *([sum(losses) / len(losses)] if losses else [])])
        private = [said for said in total.scalars.values() if "epsilon" in said]
        if private:
            most = {leaf.name: max(float(said[leaf.name]) for said in private) for leaf in _PRIVATE}
            before = json.loads(str(state.scalars.get("fit_private", "{}")))
            state.scalars["fit_private"] = json.dumps({k: max(v, before.get(k, 0.0)) for k, v in most.items()})

    def summary(self, state: ServerState) -> dict[str, Any]:
        """Placement, sizes, mean loss by round (not with ``dp``), and the largest of each number of privacy at a site.

        ``steps`` are those of all rounds so far; ``sampling`` and ``noise`` may come from different sites.
        """
        settings = self.settings
        found: dict[str, Any] = {
            "name": "vae",
            "placement": settings.placement,
            "size": settings.size,
            "loss": json.loads(str(state.scalars.get("fit_loss", "[]"))),
        }
        if "fit_public" in state.scalars:
            found["public_images"] = state.scalars["fit_public"]
        if self.private is not None:
            told = json.loads(str(state.scalars.get("fit_private", "{}")))
            found["privacy"] = {**told, "delta": self.private.delta, "unit": "patient", "clip": self.private.clip}
        return found

    # The sites' side.

    def ops(self) -> dict[str, Op]:
        """One op: train, or sum latents."""
        if self.settings.placement == "server":
            sums = (Leaf("latents", "sum", "images", lanes=64), Leaf("weight/*", "scalar", "nothing"))
            return {LATENTS: Op(self.sum_latents, sums)}
        # The loss is a statistic of images that no noise protects: private training keeps it.
        more = _PRIVATE if self.private is not None else (Leaf("loss", "scalar", "images"),)
        return {FIT: Op(self.fit_site, (*LEAVES, *more))}

    def fit_site(self, site: Site, message: Message) -> Message:
        """Train the received network on the site's images; answer with what changed, zeros where it has none."""
        received = {name: tensor.cpu() for name, tensor in message.group("model").items()}
        number, shape = int(message.scalars["number"]), self._shape(str(message.scalars["devices"]))
        lines, patients = self._lines(site, message)
        model = loaded_vae(self.settings, self._channels, shape, received, self.study.device)
        said: dict[str, Scalar] = {}
        if len(lines):
            lr = cosine(self.settings.lr, number, self.settings.rounds)
            if self.private is None:
                seed = derive_seed(self.study.seed, site.name, site.round, "generator")
                said["loss"] = train_vae(model, lines, self.settings, self.flips, rates=[lr], seed=seed)
            else:
                budget = Budget.plan(len(set(patients)), self.settings, self.private)
                rng = secret_stream(site.state.folder, message.digest(), self.settings.rounds)
                train_private(model, lines, patients, self.settings, self.flips, budget, lr=lr, rng=rng)
                said = {
                    "epsilon": budget.spent(number),
                    "noise": budget.noise,
                    "sampling": budget.sampling,
                    "steps": budget.steps * number,
                }
        trained = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        update = {name: trained[name] - tensor for name, tensor in received.items()}
        return weighed(update, (own_weights if self.private is None else equal_weights)(lines, shape), said)

    @torch.no_grad()
    def sum_latents(self, site: Site, message: Message) -> Message:
        """One pass of the received encoder over the site's images; answer with sums by cell."""
        # Not the encoder's bits: a killed server trains it anew, and may get others.
        once(site, LATENTS, Message(scalars={"devices": message.scalars["devices"]}))
        shape = self._shape(str(message.scalars["devices"]))
        lines, _ = self._lines(site, message)
        model = loaded_vae(self.settings, self._channels, shape, message.group("model"), self.study.device)
        nothing = torch.zeros(_AT_ONCE, self.settings.embedding, device=self.study.device)
        parts = [
            model.encode(images.float() / 255, nothing[: len(images)])
            for images in torch.split(lines.images, _AT_ONCE)
            if len(images)
        ]
        empty = torch.empty(0, self.settings.latent)
        mean, log_variance = (torch.cat([empty, *(part[k].cpu() for part in parts)]) for k in range(2))
        sums = latent_sums(mean, log_variance, lines.labels.cpu(), lines.devices.cpu(), shape)
        return Message.pack({"latents": sums}, **{"weight/latents": 1.0})

    def _lines(self, site: Site, message: Message) -> tuple[Lines, list[str]]:
        """The site's images in cells that are large enough, and whose they are; shrunk once and kept in memory."""
        told = str(message.scalars["devices"])
        where = site.name, told
        if where not in self._known:
            # See ``private.py``: there a threshold would let one patient decide about others.
            floor = self.synthesis.floor if self.private is None else 1
            own = own_images(site.data, tuple(json.loads(told)), floor)
            images = shrunk_images(site.data, own.positions, self.settings.size)
            lines = Lines(images, own.labels, own.devices).to(self.study.device)
            self._known[where] = lines, own.patients
        return self._known[where]

    # Everywhere.

    @torch.no_grad()
    def decode(self, decoder: Mapping[str, Tensor], labels: Tensor, devices: Tensor, seeds: Tensor) -> Tensor:
        """As the interface says, in float64 on the CPU.

        What batches, threads and machines differ by in its last bits is gone after rounding to 8 bits; of float32 it
        is not.
        """
        shape = len(self.study.task.classes), len(decoder[DEVICE_ROWS])
        wide = {name: tensor.double() for name, tensor in decoder.items()}
        gaussians = wide.pop(MEAN, None), wide.pop(DEVIATION, None)
        model = loaded_vae(self.settings, self._channels, shape, wide)
        labels, devices = labels.cpu(), devices.cpu()
        latent = standard_normals(seeds, self.settings.latent)
        if gaussians[0] is not None and gaussians[1] is not None:
            mean, deviation = (part.cpu()[labels, devices] for part in gaussians if part is not None)
            latent = mean + deviation * latent
        images = torch.empty(len(seeds), self._channels, self.settings.size, self.settings.size, dtype=torch.uint8)
        for start in range(0, len(seeds), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            images[part] = as_bytes(model.decode(latent[part], model.condition(labels[part], devices[part])) * 255)
        return images

    @property
    def _channels(self) -> int:
        return self.study.data.image.channels

    def _shape(self, devices: str) -> tuple[int, int]:
        return len(self.study.task.classes), len(json.loads(devices))


def _decoder_part(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(_DECODER)}
