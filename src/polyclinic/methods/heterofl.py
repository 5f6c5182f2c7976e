"""HeteroFL: sites train the leading channels of one network; every entry is averaged over the sites that hold it.

Diao, Ding, Tarokh: HeteroFL: computation and communication efficient federated learning for heterogeneous clients. ICLR
2021, Algorithm 1. arXiv 2010.01264. The value of masked logits as in the published code (facts known from that code).

One family only: the network of a site is the leading block of the server's, ``model`` of the study, in every tensor::

    model: {name: small-cnn, width: 16}
    models: {north: {name: small-cnn, width: 8}}

In a round a site gets its block, trains it and answers with what changed; the server adds to each entry the mean change
over the sites of the round that hold it, weighted as the study says, and leaves the others. Logits of classes that a
site lacks are set to 0 in its loss (multi-class), so that they are not trained away there; rows of the last layer are
averaged over the sites that have their class, as in the published code.

Not built: the paper's scaler, which multiplies a convolution's output by one over the width rate in training. Here a
normalisation layer that does not see a common factor follows every convolution, so it would have no effect.

Ours: running statistics never leave, and a site uses those that its own training left (the paper estimates them once,
after training, over the sites' images). Which networks can be cut is a list: those whose channels keep their place from
layer to layer. In a DenseNet channels are joined behind each other, in a ShuffleNet shuffled, so leading channels of a
narrow one are not those of a wide one; ResNet, MobileNet and DenseNet do not fit into each other at all.

With one network at all sites it is fedavg with local running statistics and masked logits, and works with every
aggregation. With several, updates have different shapes and arrive one by one, so it takes plain alone.

What leaves a site: the change of its block and, where logits are masked, which classes it has (the rows of zeros would
tell as much). A hidden sum shows the server the share of the weights that each class has, so of a class that one site
alone has that site's weight and, undiluted, its row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from polyclinic.errors import StudyError
from polyclinic.federation.answers import accepted, check_arrays, checked
from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message
from polyclinic.federation.networks import SITE
from polyclinic.federation.site import Site
from polyclinic.federation.state import ServerState
from polyclinic.methods.base import TRAINED, Leaf, Method, MethodParams, Op, draw_cohort, load_global
from polyclinic.methods.fedavg import UPDATE, add_update, train_from
from polyclinic.methods.lg_fedavg import head_names
from polyclinic.models.last_layer import last_layer
from polyclinic.models.normalisation import shared_names
from polyclinic.models.weights import shared_tensors
from polyclinic.secure.sum import SecureSum, Total
from polyclinic.study import ModelSettings, Study
from polyclinic.transfer.class_means import check_plain

WIDTHS = {"small-cnn": "width", "small-resnet": "width", "mobilenet": "options.alpha"}
"""Networks whose channels keep their place from layer to layer, and the setting that says how many there are."""
RARE = 1e-4
"""A class at sites of so small a share of the weights counts as nowhere: a hidden sum's zero has a rounding error."""


class HeteroFLParams(MethodParams):
    """Settings of heterofl."""

    name: Literal["heterofl"] = "heterofl"
    masked: bool = True
    """Multi-class: the loss of a site does not move the logits of classes that it lacks."""


class HeteroFL(Method):
    """The server's model is as wide as the widest; a narrow site knows its first channels."""

    Params = HeteroFLParams
    title = "averaging leading blocks of one network"
    reference = "Diao et al., ICLR 2021, arXiv 2010.01264"
    needs = "one family of networks (small-cnn, small-resnet or mobilenet), aggregation plain where widths differ"
    exchanges = False
    mixed_networks = True
    personal = True

    @classmethod
    def check(cls, study: Study) -> None:
        """Refuse networks of different families, and updates of different shapes that nobody may see."""
        if study.mixed:
            check_plain(study, "updates of different shapes")
            for site, settings in study.models.items():
                _check_family(site, settings, study.model)

    def check_networks(self, networks: Mapping[str, nn.Module]) -> None:
        """Refuse a network that is not a leading block of the server's, or whose last layer has no rows of classes."""
        whole = self.networks.of(self.study.model, SITE).model
        for site, model in networks.items():
            check_block(site, model, whole)
        if self.masks:
            last_layer(whole)

    def shared(self, model: nn.Module) -> list[str]:
        """All but running statistics."""
        return shared_names(model, "batch-local")

    def server(self, channel: Channel, state: ServerState, sums: SecureSum) -> Iterator[None]:
        """Send each site its block, average every entry over its holders."""
        for number in state.rounds(self.study.method.rounds):
            model = state.groups["model"]
            messages = {site: self._block(site, model) for site in draw_cohort(self.study, channel.sites, number)}
            if self.study.mixed:
                mean = self._over_holders(channel, messages, model)
            else:
                mean = self._over_all(sums.sum(channel, "train", messages))
            state.groups["model"] = add_update(model, mean)
            yield

    def ops(self) -> dict[str, Op]:
        """One op: train the received block."""
        update = (Leaf("update", "array", "images"), *TRAINED) if self.study.mixed else UPDATE
        held = Leaf("classes", "array" if self.study.mixed else "sum", "labels", lanes=64)
        return {"train": Op(self.train, (*update, held) if self.masks else update)}

    def train(self, site: Site, message: Message) -> Message:
        """Train the received block with the logits of absent classes masked; their rows do not change."""
        received, absent = load_global(site, message), self.absent(site)
        with masked(site.model, absent):
            reply = train_from(site, received)
        if not self.masks:
            return reply
        held, update = (~absent).float(), reply.group("update")
        # Weight decay moves rows that no loss reaches.
        update |= {name: update[name] * by_row(held, update[name]) for name in head_names(site.model).values()}
        groups = {"update": update, "classes": {"held": held}}
        return Message.pack(groups, **reply.scalars, **{"weight/classes": site.weight})

    @property
    def masks(self) -> bool:
        """Whether sites mask classes that they lack."""
        return self.study.method.masked and self.study.task.kind == "multi-class"

    @property
    def head(self) -> list[str]:
        """Where logits are masked, the tensors whose rows are classes: those of the last layer."""
        return list(head_names(self.networks.of(self.study.model, SITE).model).values()) if self.masks else []

    def absent(self, site: Site) -> Tensor:
        """Classes whose logits are masked at a site, bool ``[K]``."""
        classes = len(site.task.classes)
        if not self.masks:
            return torch.zeros(classes, dtype=torch.bool)
        return torch.bincount(site.data.labels("train").cpu(), minlength=classes) == 0

    def deploy(self, site: Site, message: Message) -> None:
        """Load the site's block of the server's model, with its own running statistics."""
        load_global(site, cut(message.group("model"), site.tensors))

    def central(self, state: ServerState) -> tuple[ModelSettings, dict[str, Tensor]] | None:
        """The whole network, where sites have blocks of it."""
        return (self.study.model, state.groups["model"]) if self.study.mixed else None

    def _block(self, site: str, model: Mapping[str, Tensor]) -> Message:
        return cut(model, self.networks.of_site(site).tensors)

    def _over_all(self, total: Total) -> dict[str, Tensor]:
        """The mean update, of rows over the sites that have their class; zero where there is none."""
        mean = total.mean("update")
        if self.masks:
            share = total.sums["classes"]["held"] / total.weights["classes"]
            share = torch.where(share > RARE, share, torch.inf)
            mean |= {name: mean[name] / by_row(share, mean[name]) for name in self.head}
        return mean

    def _over_holders(
        self, channel: Channel, messages: Mapping[str, Message], model: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The same entry by entry, of blocks of different sizes."""
        head = self.head
        wanted = {"held": torch.empty(len(self.study.task.classes))} if self.masks else {}

        def read(site: str, reply: Message) -> tuple[dict[str, Tensor], float, dict[str, Tensor]]:
            classes = reply.group("classes")
            check_arrays(site, "classes", wanted, classes)
            return *checked(site, "update", messages[site].group("model"), reply), classes

        total = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in model.items()}
        weight = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in model.items()}
        for _, (update, own, classes) in accepted(channel, "train", messages, read):
            for name, change in update.items():
                block = leading(change)
                total[name][block] += own * change
                weight[name][block] += own * by_row(classes["held"] > 0, change) if name in head else own
        return {name: total[name] / torch.where(w > 0, w, 1.0) for name, w in weight.items()}


def leading(tensor: Tensor) -> tuple[slice, ...]:
    """Where a block lies in a tensor that is at least as large in every direction."""
    return tuple(slice(0, size) for size in tensor.shape)


def by_row(values: Tensor, like: Tensor) -> Tensor:
    """Values of rows, ``[K]``, in the shape in which they multiply ``like``, ``[K, ...]``, and where that is."""
    return values.to(like.device).reshape(-1, *[1] * (like.ndim - 1))


def cut(model: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Message:
    """The leading blocks of a model's tensors, in the shapes of ``like``."""
    return Message.pack({"model": {name: tensor[leading(like[name])] for name, tensor in model.items()}})


@contextmanager
def masked(model: nn.Module, absent: Tensor) -> Iterator[None]:
    """Inside, the network answers 0 for the absent classes, whatever their logits are.

    Args:
        model: Returns ``[B, K]``.
        absent: bool ``[K]``.
    """
    if not bool(absent.any()):
        yield
        return
    handle = model.register_forward_hook(lambda _m, _i, logits: logits.masked_fill(absent.to(logits.device), 0.0))
    try:
        yield
    finally:
        handle.remove()


def check_block(site: str, model: nn.Module, whole: nn.Module) -> None:
    """Refuse a network whose tensors are not leading blocks of another's.

    Raises:
        StudyError: Names the site, the tensor and both shapes.
    """
    own, wide = (shared_tensors(m, shared_names(m, "batch")) for m in (model, whole))
    for name in {**own, **wide}:
        ours, theirs = own.get(name), wide.get(name)
        shapes = [None if tensor is None else list(tensor.shape) for tensor in (ours, theirs)]
        if ours is None or theirs is None or ours.ndim != theirs.ndim or ours[leading(theirs)].shape != ours.shape:
            raise StudyError(
                f"method heterofl: the network of site {site!r} is no leading block of the server's: {name} has shape "
                f"{shapes[0]} there and {shapes[1]} in model. Let model be the widest network, models narrower ones."
            )


def _check_family(site: str, settings: ModelSettings, whole: ModelSettings) -> None:
    """Refuse settings that differ in more than the width."""
    name = whole.name
    if name not in WIDTHS or settings.name != name:
        raise StudyError(
            f"method heterofl cuts sites' networks out of one, whose channels must keep their place from layer to "
            f"layer; that holds for {', '.join(WIDTHS)} of different widths. Site {site!r} has {settings.name!r}, "
            f"model is {name!r}. Use fml or fedproto for different networks."
        )
    alike = [_without_width(own) for own in (settings, whole)]
    if alike[0] != alike[1]:
        key = next(key for key in alike[0] if alike[0][key] != alike[1][key])
        raise StudyError(
            f"method heterofl: the network of site {site!r} may differ from model in {WIDTHS[name]} alone, but {key} "
            f"is {alike[0][key]} instead of {alike[1][key]}. Make it alike."
        )


def _without_width(settings: ModelSettings) -> dict[str, object]:
    own = settings.model_dump(mode="json")
    group, _, key = WIDTHS[settings.name].rpartition(".")
    (own[group] if group else own).pop(key, None)
    return own
