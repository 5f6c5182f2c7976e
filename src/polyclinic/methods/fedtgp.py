"""FedTGP: as fedproto, but the server trains the class means that features are drawn to, so that they stand apart.

Zhang, Liu, Hua, Cao: FedTGP: trainable global prototypes with adaptive-margin-enhanced contrastive learning for data
and model heterogeneity in federated learning. AAAI 2024, Algorithm 1. arXiv 2401.03230. Rates, passes, batches and the
margin as in the published code (facts known from that code).

The server's prototype of class j is p_j = W₂ relu(W₁ e_j + b₁) + b₂ with a trained e_j, all of the size of a feature.
With c a site's mean of class y it minimises, by plain gradient descent, over all means of the sites of the round::

    CE(logits, y)      logits_j = −(‖c − p_j‖ + δ [j = y])
    δ = min(largest over classes of the smallest distance to another class, margin)      between means over sites

and sends p_j. Sites minimise CE + strength · mean over images of ‖f(x) − p_y‖² / F from their own networks, as in
fedproto, and predict with their own last layers.

A sum over sites is not enough: the loss compares every site's own mean with all prototypes. So other aggregations than
plain are refused.

Ours: a class that no site ever sent has a prototype in the softmax, as in the code, but is not sent to anybody; the
floor. Multi-label: a site's mean of a finding is over the images that have it, and its prototype is held apart from
those of other findings; each image is drawn to those of all its findings.

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

from polyclinic.errors import StudyError
from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Site
from polyclinic.federation.state import ServerState
from polyclinic.methods.base import Method, MethodParams, Op, draw_cohort, load_own
from polyclinic.methods.fedgh import BATCH, MEANS
from polyclinic.models.taps import feature_size
from polyclinic.models.weights import load_tensors, snapshot
from polyclinic.secure.sum import SecureSum
from polyclinic.seeds import derive_seed
from polyclinic.study import Study
from polyclinic.training import plain_step
from polyclinic.transfer.class_means import (
    FLOOR,
    Means,
    check_classification,
    check_plain,
    class_sums,
    drawn_to,
    equal_features,
    gathered,
    means_of,
)


class FedTGPParams(MethodParams):
    """Settings of fedtgp."""

    name: Literal["fedtgp"] = "fedtgp"
    strength: float = Field(10.0, ge=0)
    """λ: how strongly features are drawn to the prototype of their class; 0 is local training."""
    margin: float = Field(100.0, ge=0)
    """Largest δ, in units of the features."""
    server_epochs: int = Field(100, ge=0)
    """Passes of the server over the sites' means per round, in batches of 10."""
    server_lr: float = Field(0.01, gt=0)
    """Rate of those passes, plain gradient descent."""
    floor: int = Field(FLOOR, ge=1)
    """A class's mean leaves a site from so many training patients on; of smaller ones nothing does."""


class FedTGP(Method):
    """Prototypes come out of a small network at the server."""

    Params = FedTGPParams
    title = "features drawn to prototypes that the server trains"
    reference = "Zhang et al., AAAI 2024, arXiv 2401.03230"
    needs = "two classes or more, as many features at every site (model.embedding), aggregation plain"
    exchanges = False
    mixed_networks = True
    personal = True
    trained_at_home = True
    starts_global = False

    @classmethod
    def check(cls, study: Study) -> None:
        """Refuse segmentation, a single finding, and sums that hide single sites."""
        check_classification(study)
        check_plain(study, "class means")
        if len(study.task.classes) < 2:
            raise StudyError(
                f"method fedtgp trains prototypes of classes to stand apart, but there is one: {study.task.classes}. "
                "Use fedproto."
            )

    def check_networks(self, networks: Mapping[str, nn.Module]) -> None:
        """Refuse features of different sizes."""
        equal_features("fedtgp", networks)

    def shared(self, model: nn.Module) -> list[str]:
        """No tensor of a network leaves."""
        return []

    def server(self, channel: Channel, state: ServerState, sums: SecureSum) -> Iterator[None]:
        """Send prototypes, gather class means, train the prototypes on them."""
        study, classes = self.study, len(self.study.task.classes)
        bench = self.networks.of_site(channel.sites[0])
        features = feature_size(bench.model)
        network = PrototypeNetwork(classes, features, derive_seed(study.seed, "prototypes"))
        network.to(bench.device)
        state.groups.setdefault("network", snapshot(dict(network.named_parameters())))
        for number in state.rounds(study.method.rounds):
            cohort = draw_cohort(study, channel.sites, number)
            last = state.groups.get("prototypes", {})
            messages = dict.fromkeys(cohort, Message.pack({"prototypes": last}))
            found = gathered(channel, "train", messages, classes, features)
            load_tensors(network, state.groups["network"])
            fit_prototypes(network, found, study.method, derive_seed(study.seed, "prototypes", number))
            state.groups["network"] = snapshot(dict(network.named_parameters()))
            held = torch.stack([own["held"] for own in found.values()]).any(0)
            held = held | last["held"] if last else held
            with torch.no_grad():
                state.groups["prototypes"] = {"means": torch.where(held[:, None], network(), 0.0), "held": held}
            yield

    def ops(self) -> dict[str, Op]:
        """One op: train the site's own network, then answer with class means."""
        return {"train": Op(self.train, MEANS)}

    def train(self, site: Site, message: Message) -> Message:
        """Train near the received prototypes, keep the network, answer with the means of its features."""
        load_own(site)
        params, prototypes = self.study.method, message.group("prototypes")
        near = bool(prototypes) and params.strength > 0
        result = site.train(rule=drawn_to(prototypes, params.strength) if near else plain_step)
        site.state.save("personal", site.tensors)
        return Message.pack({"prototypes": means_of(*class_sums(site, params.floor))}, loss=result.loss)


class PrototypeNetwork(nn.Module):
    """p = W₂ relu(W₁ e + b₁) + b₂ for a trained e of each class; ``forward`` takes nothing and returns ``[K, F]``.

    Args:
        classes: K.
        features: F, of a feature of the sites.
        seed: Of the start values.
    """

    def __init__(self, classes: int, features: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.embedding = nn.Parameter(torch.randn(classes, features))
            self.hidden = nn.Linear(features, features)
            self.out = nn.Linear(features, features)

    def forward(self) -> Tensor:
        """The prototypes."""
        prototypes: Tensor = self.out(F.relu(self.hidden(self.embedding)))
        return prototypes


def largest_gap(found: Mapping[str, Means]) -> float:
    """Largest over classes of the smallest distance to another class, between means over the sites that sent them.

    Infinite where fewer than two classes were sent.
    """
    held = torch.stack([own["held"] for own in found.values()])
    means = torch.stack([own["means"] for own in found.values()])
    sent = held.any(0)
    centres = (means * held[:, :, None]).sum(0)[sent] / held.sum(0)[sent][:, None]
    if len(centres) < 2:
        return torch.inf
    apart = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")
    return float(apart.fill_diagonal_(torch.inf).min(1).values.max())


def fit_prototypes(network: PrototypeNetwork, found: Mapping[str, Means], params: FedTGPParams, seed: int) -> None:
    """Train the network in place so that every site's means are nearest to their class's prototype, by a margin.

    Args:
        network: On the device of the means.
        found: Means by site, ``[K, F]``.
        params: Passes, rate and largest margin.
        seed: Of the order of means.
    """
    held = torch.cat([own["held"] for own in found.values()]).nonzero().flatten()
    inputs = torch.cat([own["means"] for own in found.values()])[held]
    labels = held % len(network.embedding)
    margin = min(largest_gap(found), params.margin)
    optimizer = torch.optim.SGD(network.parameters(), lr=params.server_lr)
    draws = torch.Generator().manual_seed(seed)
    for _ in range(params.server_epochs if len(inputs) else 0):
        for part in torch.split(torch.randperm(len(inputs), generator=draws).to(inputs.device), BATCH):
            optimizer.zero_grad()
            margin_loss(inputs[part], labels[part], network(), margin).backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def margin_loss(means: Tensor, labels: Tensor, prototypes: Tensor, margin: float) -> Tensor:
    """Cross-entropy of negative distances, to which the own class's adds ``margin``.

    Args:
        means: ``[N, F]``.
        labels: int64 ``[N]``.
        prototypes: ``[K, F]``.
        margin: δ.
    """
    distances = torch.cdist(means, prototypes, compute_mode="donot_use_mm_for_euclid_dist")
    return F.cross_entropy(-(distances + margin * F.one_hot(labels, len(prototypes))), labels)
