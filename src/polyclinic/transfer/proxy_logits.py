"""The public images of a round: what networks say of them, and fitting a network to what others said.

So networks of any shape learn from each other. The images do not travel and neither do their positions: all parties
draw the same ones from the study's seed and the number of the round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from polyclinic.data.batches import proxy_batches
from polyclinic.data.proxies import Proxies, agree_on_proxies
from polyclinic.errors import SiteError, StudyError
from polyclinic.federation.answers import nobody
from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Leaf, Site
from polyclinic.federation.state import ServerState
from polyclinic.methods.base import Method, draw_cohort
from polyclinic.models.normalisation import running_statistics_used
from polyclinic.seeds import derive_seed, generator
from polyclinic.settings import Settings
from polyclinic.study import Study, TrainingSettings
from polyclinic.training import fit, learning_rate, trained_parameters

TargetLoss = Callable[[Tensor, Tensor], Tensor]
"""``loss(logits, rows)`` of a batch of a round's images: float32 ``[B, K]`` and their rows in it, int64 ``[B]``."""

ANSWERS = (
    Leaf("answers", "array", "images"),
    Leaf("loss", "scalar", "images"),
    Leaf("digest", "scalar", "images"),
)
"""Leaves of a site that learns from the others, trains, and answers on public images."""


class DigestSettings(Settings):
    """How a network is fitted to what the others say of public images."""

    epochs: int = Field(1, ge=0)
    """Passes over the public images of a round; 0: nothing is learnt from the others."""
    batch_size: int = Field(32, ge=2)
    """Public images per step."""
    lr: float | None = Field(None, ge=0)
    """Learning rate; empty: the training's of that round."""


def check_public(study: Study, sent: str) -> None:
    """Refuse a study whose sites cannot exchange what their networks say of public images.

    Args:
        study: The study.
        sent: What each site sends by itself, for the message.

    Raises:
        StudyError: No public images, a segmentation, volumes, or a sum that hides single sites.
    """
    name = study.method.name
    if study.proxies is None:
        raise StudyError(
            f"method {name}: sites exchange what they learnt through public images, but the study has no proxies. Make "
            "a manifest with polyclinic data proxies and give proxies: {manifest: ..., images: ...}; or use a method "
            "without public images (local, fedavg)."
        )
    if study.task.kind == "segmentation":
        raise StudyError(
            f"method {name} compares one answer an image, but task.kind is segmentation. Use method fedavg."
        )
    if len(study.data.image.size) != 2:
        raise StudyError(f"method {name}: public images are flat, but data.image.size is that of volumes. Use fedavg.")
    if study.aggregation.backend != "plain":
        raise StudyError(
            f"method {name}: the server needs {sent} of each site by itself, which "
            f"aggregation.backend {study.aggregation.backend} hides. Use aggregation.backend: plain, or a method whose "
            "server needs sums alone (fedavg, where all sites have one network)."
        )


@dataclass(frozen=True, eq=False)
class ProxyRound:
    """The public images of one round, in the order in which they were drawn.

    Attributes:
        proxies: The whole set.
        positions: Of this round's images in the set, int64 ``[m]``, all different.
    """

    proxies: Proxies
    positions: Tensor

    @classmethod
    def draw(cls, proxies: Proxies, study: Study, number: int) -> ProxyRound:
        """The images of round ``number``: ``method.proxies`` of them, or all where there are fewer."""
        order = generator(study.seed, "proxies", number).permutation(len(proxies))
        return cls(proxies, torch.from_numpy(order[: study.method.proxies]))

    def __len__(self) -> int:
        return len(self.positions)

    @torch.no_grad()
    def logits(self, model: nn.Module, batch_size: int) -> Tensor:
        """What a network says of each image in evaluation mode, float32 ``[m, K]`` on its device."""
        modes = [module.training for module in model.modules()]
        model.eval()
        device = next(model.parameters()).device
        rows = torch.split(self.positions, batch_size)
        found = torch.cat([model(self.proxies.inputs(part).to(device)).float() for part in rows])
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode
        return found

    def fit(
        self,
        model: nn.Module,
        loss: TargetLoss,
        batches: Iterable[Tensor],
        settings: TrainingSettings,
        *,
        lr: float,
        seed: int,
    ) -> float:
        """Train a network, in the mode that it is in, on batches of rows of this round; returns the mean loss.

        Raises:
            SiteError: The loss is not finite.
        """
        parameters: list[Tensor] = list(trained_parameters(model).values())
        device = parameters[0].device

        def of(rows: Tensor) -> Tensor:
            inputs = self.proxies.inputs(self.positions[rows]).to(device)
            return loss(model(inputs).float(), rows.to(device))

        return fit(parameters, batches, of, settings, lr=lr, seed=seed, device=device)


def digest(site: Site, shown: ProxyRound, loss: TargetLoss, batches: Iterable[Tensor] | None = None) -> float:
    """Fit the site's loaded network to targets on a round's images, as ``method.digest`` says.

    Batch normalisation uses the running statistics of the site's own images, and these do not move: so what is fitted
    is the function that the site deploys.

    Args:
        site: With its network loaded.
        shown: The images that the targets are of.
        loss: Of a batch of them.
        batches: Rows of each step; None: shuffled passes from the site's own stream.

    Returns:
        The mean loss of the steps.

    Raises:
        SiteError: The loss is not finite.
    """
    settings: DigestSettings = site.study.method.digest
    if batches is None:
        rng = generator(site.study.seed, site.name, site.round, "digest order")
        batches = proxy_batches(len(shown), rng, settings.batch_size, passes=settings.epochs)
    rate = learning_rate(site.study.training, site.round, site.study.method.rounds)
    lr, seed = settings.lr, derive_seed(site.study.seed, site.name, site.round, "digest")
    model = site.model.train()
    with running_statistics_used(model):
        return shown.fit(model, loss, batches, site.study.training, lr=rate if lr is None else lr, seed=seed)


def answers(channel: Channel, op: str, messages: Mapping[str, Message]) -> dict[str, dict[str, Tensor]]:
    """Call sites and gather the group ``answers`` of their replies, by site in the order of the roster.

    Raises:
        SiteError: No site answered; or an answer is not finite, or of another shape than that of the sites before it.
    """
    found = {site: reply.group("answers") for site, reply in channel.stream(op, messages)}
    if not found:
        raise nobody(channel, op)
    first, wanted = next((site, {n: t.shape for n, t in own.items()}) for site, own in found.items())
    for site, own in found.items():
        shapes = {name: tensor.shape for name, tensor in own.items()}
        if shapes != wanted:
            raise SiteError(
                f"site {site!r} answered with {_told(shapes)}, site {first!r} with {_told(wanted)}. All sites must "
                "have the same public images and classes."
            )
        if not all(bool(tensor.isfinite().all()) for tensor in own.values()):
            raise SiteError(f"site {site!r} answered with numbers that are not finite. Lower training.lr.")
    return found


def _told(shapes: Mapping[str, torch.Size]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())


def mean_answer(found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean over sites of each array, every site with equal weight; added in float64, given in float32."""
    names = next(iter(found.values()))
    return {name: torch.stack([own[name].double() for own in found.values()]).mean(0).float() for name in names}


def mean_rounds(method: Method, channel: Channel, state: ServerState) -> Iterator[None]:
    """The server's side of methods whose sites get the mean of the last round's answers, as the group ``targets``."""
    for number in state.rounds(method.study.method.rounds):
        agree_on_proxies(channel, method.study, state)
        cohort = draw_cohort(method.study, channel.sites, number)
        message = Message.pack({"targets": state.groups.get("targets", {})})
        state.groups["targets"] = mean_answer(answers(channel, "train", dict.fromkeys(cohort, message)))
        yield
