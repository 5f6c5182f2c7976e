"""LG-FedAvg: each site has its own body, of any architecture; the last layer is averaged.

Liang, Liu, Ziyin, Allen, Auerbach, Brent, Salakhutdinov, Morency: Think locally, act globally: federated learning with
local and global representations. 2020, Algorithm 1. arXiv 2001.01523.

The reverse of fedper. Body and last layer are trained together, as one network; what training changed in the last layer
is averaged as in fedavg. Gradients per local step: 1.

Ours: the first last layer is the start one of the first site by name (with one network for all it is everybody's). The
paper has experiments in which several layers are global; here it is the last one, which is all that different networks
have in common. As many features must enter it at all sites (``model.embedding``).

What leaves a site: the change of the last layer's weight and bias, through the study's sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from torch import Tensor, nn

from polyclinic.errors import StudyError
from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message
from polyclinic.federation.networks import Networks
from polyclinic.federation.site import Site
from polyclinic.federation.state import ServerState
from polyclinic.methods.base import Method, MethodParams, Op, draw_cohort, load_own
from polyclinic.methods.fedavg import UPDATE, add_update
from polyclinic.models.last_layer import last_layer
from polyclinic.secure.sum import SecureSum
from polyclinic.study import Study
from polyclinic.transfer.class_means import check_classification, equal_features

Head = dict[str, Tensor]
"""``weight`` ``[K, F]`` and, where the layer has one, ``bias`` ``[K]``: named alike whatever the network."""


class LGFedAvgParams(MethodParams):
    """Settings of lg-fedavg."""

    name: Literal["lg-fedavg"] = "lg-fedavg"


class LGFedAvg(Method):
    """Of the body nothing ever leaves a site, its normalisation statistics included."""

    Params = LGFedAvgParams
    title = "averaging the last layer alone"
    reference = "Liang et al. 2020, arXiv 2001.01523"
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
        """Refuse last layers that cannot be averaged."""
        equal_heads("lg-fedavg", networks)

    def shared(self, model: nn.Module) -> list[str]:
        """Nothing by a network's own names: those of the last layer differ between networks."""
        return []

    def server(self, channel: Channel, state: ServerState, sums: SecureSum) -> Iterator[None]:
        """Send the last layer, average what changed."""
        if "head" not in state.groups:
            state.groups["head"] = first_head(self.networks, channel.sites)
        for number in state.rounds(self.study.method.rounds):
            cohort = draw_cohort(self.study, channel.sites, number)
            message = Message.pack({"model": state.groups["head"]})
            update = sums.sum(channel, "train", dict.fromkeys(cohort, message)).mean("update")
            state.groups["head"] = add_update(state.groups["head"], update)
            yield

    def ops(self) -> dict[str, Op]:
        """One op: train the site's own body with the received last layer."""
        return {"train": Op(train_below, UPDATE)}

    def deployment(self, state: ServerState) -> Message:
        """The averaged last layer."""
        return Message.pack({"model": state.groups["head"]})

    def deploy(self, site: Site, message: Message) -> None:
        """Load the site's own body and the averaged last layer."""
        load_own(site)
        load_head(site, message.group("model"))


def train_below(site: Site, message: Message) -> Message:
    """Train body and last layer, keep the network, answer with the change of the last layer."""
    received = message.group("model")
    load_own(site)
    load_head(site, received)
    result = site.train()
    site.state.save("personal", site.tensors)
    names = head_names(site.model)
    update = {key: site.tensors[name] - received[key] for key, name in names.items()}
    return Message.pack({"update": update}, loss=result.loss, **{"weight/update": site.weight})


def head_names(model: nn.Module) -> dict[str, str]:
    """Where a network has ``weight`` and ``bias`` of its last layer, as in ``state_dict``."""
    name, layer = last_layer(model)
    return {key: f"{name}.{key}" for key, _ in layer.named_parameters()}


def load_head(site: Site, head: Head) -> None:
    """Copy a last layer into the site's network."""
    site.load({name: head[key] for key, name in head_names(site.model).items()})


def first_head(networks: Networks, sites: tuple[str, ...]) -> Head:
    """The start last layer of the first site."""
    bench = networks.of_site(sites[0])
    return {key: bench.initial[name] for key, name in head_names(bench.model).items()}


def equal_heads(method: str, networks: Mapping[str, nn.Module]) -> None:
    """Refuse last layers of different shapes.

    Raises:
        StudyError: Names the sites and what differs.
    """
    equal_features(method, networks)
    without = [site for site, model in networks.items() if last_layer(model)[1].bias is None]
    if without and len(without) < len(networks):
        raise StudyError(
            f"method {method}: the last layer has no bias at {', '.join(without)}, but one at the other sites. Choose "
            "networks that have or lack it alike."
        )
