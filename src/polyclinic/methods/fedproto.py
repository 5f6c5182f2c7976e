"""FedProto: sites with different networks learn one set of class means, to which each draws its features.

Tan, Long, Liu, Zhou, Lu, Jiang, Zhang: FedProto: federated prototype learning across heterogeneous clients. AAAI 2022,
Algorithm 1. arXiv 2105.00243.

No weights are exchanged. With f the features that enter a site's last layer, a round is::

    p_c ← Σₖ Σ_{i of class c at k} fₖ(x_i) / Σₖ nₖc                    the server, over the sites of the round
    minimise CE + strength · mean over images of ‖f(x) − p_y‖² / F     each site, from its own network

p_c is weighted by images, as the paper says; the published code and HtFLlib give each site the same weight. The means
are summed through the study's sum: under a hidden one the server sees sums over the sites of the round alone. Features
must be of the same size at all sites (``model.embedding``).

Prediction is by the network's own classifier or, as in the paper, by the nearest mean. ‖f − p_c‖² is linear in f but
for a term that is the same for all classes; so it is a last layer with weight 2 p_c and bias −‖p_c‖², whose softmax
gives probabilities from negative squared distances. A class without a mean is never predicted.

Ours: a class that no site of a round sent keeps its last mean (the paper has all sites in each round); means are made
after training, by the trained network in evaluation mode; the floor. Multi-label: a mean for each finding over the
images that have it, and each image is drawn to those of all its findings; by the nearest mean, a finding is present if
the image is nearer to the mean with it than to the mean without it.

What leaves a site: for each class with at least ``floor`` training patients the sum of their features and the number of
images. In clear the server so sees the mean feature of such a class at each site. A hidden sum does not hide a class
that one site alone sends: there sum and number are that site's own, and all sites get its mean as p_c.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from polyclinic.errors import StudyError
from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Site
from polyclinic.federation.state import ServerState
from polyclinic.methods.base import TRAINED, Leaf, Method, MethodParams, Op, draw_cohort, load_own
from polyclinic.models.last_layer import last_layer
from polyclinic.secure.sum import SecureSum
from polyclinic.study import Study
from polyclinic.training import plain_step
from polyclinic.transfer.class_means import (
    FLOOR,
    Means,
    check_classification,
    class_sums,
    drawn_to,
    equal_features,
    means_of,
)

NEVER = -1e30
"""Bias of a class that is not to be predicted."""


class FedProtoParams(MethodParams):
    """Settings of fedproto."""

    name: Literal["fedproto"] = "fedproto"
    strength: float = Field(1.0, ge=0)
    """λ: how strongly features are drawn to the mean of their class; 0 is local training."""
    predict: Literal["classifier", "prototype"] = "classifier"
    """By the network's last layer, or by the nearest mean, as in the paper."""
    floor: int = Field(FLOOR, ge=1)
    """A class counts at a site from so many training patients on; of smaller ones nothing leaves the site."""


class FedProto(Method):
    """The server knows sums over sites of features by class."""

    Params = FedProtoParams
    title = "features drawn to common class means"
    reference = "Tan et al., AAAI 2022, arXiv 2105.00243"
    needs = "classification, and as many features at every site (model.embedding)"
    exchanges = False
    mixed_networks = True
    personal = True
    starts_global = False

    @classmethod
    def check(cls, study: Study) -> None:
        """Refuse segmentation."""
        check_classification(study)

    def check_networks(self, networks: Mapping[str, nn.Module]) -> None:
        """Refuse features of different sizes, and where the nearest mean predicts a last layer without a bias."""
        equal_features("fedproto", networks)
        for site, model in networks.items():
            name, layer = last_layer(model)
            if self.study.method.predict == "prototype" and layer.bias is None:
                raise StudyError(
                    f"method fedproto, predict: prototype: the last layer {name!r} of site {site!r} has no bias, which "
                    "distances need. Use predict: classifier."
                )

    def shared(self, model: nn.Module) -> list[str]:
        """No tensor of a network leaves."""
        return []

    @property
    def opposites(self) -> bool:
        """Whether there are means of the images without a finding as well."""
        return self.study.task.kind == "multi-label" and self.study.method.predict == "prototype"

    def server(self, channel: Channel, state: ServerState, sums: SecureSum) -> Iterator[None]:
        """Send the means, sum features and images by class, divide."""
        for number in state.rounds(self.study.method.rounds):
            cohort = draw_cohort(self.study, channel.sites, number)
            last = state.groups.get("prototypes", {})
            message = Message.pack({"prototypes": last})
            found = sums.sum(channel, "train", dict.fromkeys(cohort, message)).sums["classes"]
            # A hidden sum comes back with a rounding error; images are whole.
            new = means_of(found["features"], found["images"].round())
            state.groups["prototypes"] = kept_where_missing(new, last)
            yield

    def ops(self) -> dict[str, Op]:
        """One op: train the site's own network, then sum its features by class."""
        # 64 bits: sums over images, which no bound that suits weights holds.
        return {"train": Op(self.train, (Leaf("classes", "sum", "images", lanes=64), *TRAINED))}

    def train(self, site: Site, message: Message) -> Message:
        """Train near the received means, keep the network, answer with sums over the site's images."""
        load_own(site)
        params, means = self.study.method, message.group("prototypes")
        near = bool(means) and params.strength > 0
        result = site.train(rule=drawn_to(_of_classes(means, site), params.strength) if near else plain_step)
        site.state.save("personal", site.tensors)
        features, images = class_sums(site, params.floor, self.opposites)
        classes = {"features": features, "images": images}
        return Message.pack({"classes": classes}, loss=result.loss, **{"weight/classes": 1.0})

    def deployment(self, state: ServerState) -> Message:
        """The means, where they predict; else nothing, for sites have their own networks."""
        means = state.groups.get("prototypes", {}) if self.study.method.predict == "prototype" else {}
        return Message.pack({"prototypes": means})

    def deploy(self, site: Site, message: Message) -> None:
        """Load the site's own network and, where they predict, the means as its last layer."""
        load_own(site)
        means = message.group("prototypes")
        if means:
            name, _ = last_layer(site.model)
            head = nearest_mean(means, len(site.task.classes))
            site.load({f"{name}.{key}": tensor for key, tensor in head.items()})


def kept_where_missing(new: Means, last: Mapping[str, Tensor]) -> Means:
    """New means, and the last ones of classes that nobody sent."""
    if not last:
        return new
    # A hidden sum's means lie on the CPU, those of a loaded state where the network is.
    kept = {name: tensor.to(new["held"].device) for name, tensor in last.items()}
    means = torch.where(new["held"][:, None], new["means"], kept["means"])
    return {"means": means, "held": new["held"] | kept["held"]}


def nearest_mean(means: Mapping[str, Tensor], classes: int) -> dict[str, Tensor]:
    """The last layer whose probabilities are those of negative squared distances to means.

    Args:
        means: ``means`` ``[R, F]`` and ``held`` ``[R]``; R is ``classes``, or twice as many with opposites.
        classes: Number of classes or findings.

    Returns:
        ``weight`` ``[classes, F]`` and ``bias`` ``[classes]``. A class without a mean, or a finding that lacks one of
        its two, has probability 0.
    """
    centres, held = means["means"].double(), means["held"]
    weight, bias = 2 * centres, -centres.square().sum(1)
    if len(centres) > classes:  # softmax over with and without is the sigmoid of their difference
        weight, bias = weight[:classes] - weight[classes:], bias[:classes] - bias[classes:]
        held = held[:classes] & held[classes:]
    return {
        "weight": torch.where(held[:, None], weight, 0.0).float(),
        "bias": torch.where(held, bias, NEVER).float(),
    }


def _of_classes(means: Mapping[str, Tensor], site: Site) -> Means:
    """Without opposites: images are drawn to the findings that they have."""
    return {name: tensor[: len(site.task.classes)] for name, tensor in means.items()}
