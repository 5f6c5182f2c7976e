"""FedGH: the server trains one last layer for all sites on their class means; bodies stay at the sites.

Yi, Wang, Liu, Shi, Yu: FedGH: heterogeneous federated learning with generalized global header. ACM MM 2023, Algorithm
1. arXiv 2303.13137. Rate, passes and batches as in HtFLlib (facts known from that code).

A round: every site trains its whole network with the received last layer in place of its own and answers with the mean
feature of each of its classes; the server minimises, by plain gradient descent from its last layer::

    CE(head(mean), class)      over all means of the sites of the round, head_epochs passes in batches of 10

A site uses its own body with the newest last layer. Features must be of the same size at all sites
(``model.embedding``).

A sum over sites is not enough: the server trains on each site's means, and one mean over all sites would be one point a
class. So other aggregations than plain are refused.

Ours: the first last layer is the start one of the first site by name (HtFLlib: of client 0); the floor. Multi-label: a
site sends for each finding the mean over the images with it and over those without, and the server minimises the binary
cross-entropy of that finding alone.

What leaves a site: the mean feature of each class with at least ``floor`` training patients, in clear, and which
classes these are; no counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Site
from polyclinic.federation.state import ServerState
from polyclinic.methods.base import Leaf, Method, MethodParams, Op, draw_cohort, load_own
from polyclinic.methods.lg_fedavg import Head, equal_heads, first_head, load_head
from polyclinic.models.taps import feature_size
from polyclinic.secure.sum import SecureSum
from polyclinic.seeds import derive_seed
from polyclinic.study import Study
from polyclinic.transfer.class_means import (
    FLOOR,
    Means,
    check_classification,
    check_plain,
    class_sums,
    gathered,
    means_of,
)

BATCH = 10
MEANS = (Leaf("prototypes", "array", "images"), Leaf("loss", "scalar", "images"))


class FedGHParams(MethodParams):
    """Settings of fedgh."""

    name: Literal["fedgh"] = "fedgh"
    head_epochs: int = Field(100, ge=0)
    """Passes of the server over the sites' means per round, in batches of 10; 0: last layers stay at the sites, which
    is local training."""
    head_lr: float = Field(0.01, gt=0)
    """Rate of those passes, plain gradient descent."""
    floor: int = Field(FLOOR, ge=1)
    """A class's mean leaves a site from so many training patients on; of smaller ones nothing does."""


class FedGH(Method):
    """The last layer is trained at the server, on one feature a class and site."""

    Params = FedGHParams
    title = "a last layer that the server trains on class means"
    reference = "Yi et al., ACM MM 2023, arXiv 2303.13137"
    needs = "classification, as many features at every site (model.embedding), aggregation plain"
    exchanges = False
    mixed_networks = True
    personal = True
    starts_global = False

    @classmethod
    def check(cls, study: Study) -> None:
        """Refuse segmentation, and sums that hide single sites."""
        check_classification(study)
        check_plain(study, "class means")

    def check_networks(self, networks: Mapping[str, nn.Module]) -> None:
        """Refuse last layers of different shapes."""
        equal_heads("fedgh", networks)

    def shared(self, model: nn.Module) -> list[str]:
        """No tensor of a network leaves."""
        return []

    def server(self, channel: Channel, state: ServerState, sums: SecureSum) -> Iterator[None]:
        """Send the last layer, gather class means, train the last layer on them."""
        params = self.study.method
        if params.head_epochs and "head" not in state.groups:
            state.groups["head"] = first_head(self.networks, channel.sites)
        classes, features = len(self.study.task.classes), feature_size(self.networks.of_site(channel.sites[0]).model)
        rows = 2 * classes if self.study.task.kind == "multi-label" else classes
        for number in state.rounds(params.rounds):
            cohort = draw_cohort(self.study, channel.sites, number)
            messages = dict.fromkeys(cohort, Message.pack({"head": state.groups.get("head", {})}))
            found = gathered(channel, "train", messages, rows, features)
            if params.head_epochs:
                seed = derive_seed(self.study.seed, "last layer on class means", number)
                state.groups["head"] = fit_on_means(state.groups["head"], found, classes, params, seed)
            yield

    def ops(self) -> dict[str, Op]:
        """One op: train with the received last layer, then answer with class means."""
        return {"train": Op(self.train, MEANS)}

    def train(self, site: Site, message: Message) -> Message:
        """Train body and last layer, keep the network, answer with the means of its features."""
        self.deploy(site, message)
        result = site.train()
        site.state.save("personal", site.tensors)
        sums = class_sums(site, self.study.method.floor, opposites=self.study.task.kind == "multi-label")
        return Message.pack({"prototypes": means_of(*sums)}, loss=result.loss)

    def deployment(self, state: ServerState) -> Message:
        """The server's last layer."""
        return Message.pack({"head": state.groups.get("head", {})})

    def deploy(self, site: Site, message: Message) -> None:
        """Load the site's own body and the server's last layer."""
        load_own(site)
        head = message.group("head")
        if head:
            load_head(site, head)


def fit_on_means(head: Head, found: Mapping[str, Means], classes: int, params: FedGHParams, seed: int) -> Head:
    """The last layer after ``head_epochs`` passes over all sites' means.

    Args:
        head: Where it starts.
        found: Means by site, ``[R, F]``; R is ``classes``, or twice as many with opposites.
        classes: Number of classes or findings.
        params: Passes and rate.
        seed: Of the order of means.

    Returns:
        A layer of the same shape; ``head`` itself where no site sent a mean.
    """
    held = torch.cat([own["held"] for own in found.values()]).nonzero().flatten()
    if not len(held):
        return head
    inputs = torch.cat([own["means"] for own in found.values()])[held]
    rows = held % len(next(iter(found.values()))["held"])
    multi_label = len(next(iter(found.values()))["held"]) > classes
    draws = torch.Generator().manual_seed(seed)
    layer = {key: tensor.clone().requires_grad_() for key, tensor in head.items()}
    for _ in range(params.head_epochs):
        for part in torch.split(torch.randperm(len(inputs), generator=draws).to(inputs.device), BATCH):
            loss = _loss(F.linear(inputs[part], layer["weight"], layer.get("bias")), rows[part], multi_label)
            slopes = torch.autograd.grad(loss, list(layer.values()))
            with torch.no_grad():
                for tensor, slope in zip(layer.values(), slopes, strict=True):
                    tensor -= params.head_lr * slope
    return {key: tensor.detach() for key, tensor in layer.items()}


def _loss(logits: Tensor, rows: Tensor, multi_label: bool) -> Tensor:
    """Cross-entropy; of findings each mean's own alone, present in the first half of the rows, absent in the rest."""
    if not multi_label:
        return F.cross_entropy(logits, rows)
    classes = logits.shape[1]
    own = logits.gather(1, (rows % classes)[:, None]).squeeze(1)
    return F.binary_cross_entropy_with_logits(own, (rows < classes).float())
