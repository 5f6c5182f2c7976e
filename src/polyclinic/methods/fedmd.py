"""FedMD: sites fit the mean of all sites' scores on public images, then train on their own.

Li, Wang: FedMD: heterogenous federated learning via model distillation. NeurIPS workshop 2019, Algorithm 1. arXiv
1910.03581. Weights and loss as in the published code (facts known from that code)::

    once, site k   warm-up: trained on the labelled public images; then on its own images
    each round     site k   z_k(x), scores before the softmax, for x in P_t, sent
                   server   zbar(x) = mean over sites of z_k(x), equal weights
                   site k   digest: mean absolute error between z_k and zbar on P_t
                            revisit: trained on its own images

The scores are those of the study's classes (the diagnosis head), also on images that show none of them. In the paper
one output layer covers public and private classes; ours is the warm-up through a **second** last layer over the public
classes, which is then thrown away: so training on a site's own images stays that of every other method.
``proxies.pretrain`` of the study does the same before the first round for all methods alike; with it ``warm_up: 0`` is
enough.

Ours: a round is digest and revisit with the scores of the round before, and then new scores, so that a site is called
once; the first round has no digest. In batch normalisation a site's running statistics stand still in the digest.
Findings that do not exclude each other change nothing, for scores are compared before softmax or sigmoid.

Leaves a site: its scores of the round's images, ``m x classes`` values, and losses. Comes to a site: their mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from polyclinic.data.batches import proxy_batches
from polyclinic.data.proxies import PROXY_OPS
from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Site
from polyclinic.federation.state import ServerState
from polyclinic.methods.base import Method, MethodParams, Op, load_own
from polyclinic.models.amplitude_norm import BUFFER
from polyclinic.models.last_layer import entering, last_layer
from polyclinic.models.weights import snapshot
from polyclinic.secure.sum import SecureSum
from polyclinic.seeds import derive_seed, generator
from polyclinic.study import Study
from polyclinic.training import fit, learning_rate, trained_parameters
from polyclinic.transfer.proxy_logits import ANSWERS, DigestSettings, ProxyRound, check_public, digest, mean_rounds


class FedMDParams(MethodParams):
    """Settings of fedmd."""

    name: Literal["fedmd"] = "fedmd"
    proxies: int = Field(500, ge=2)
    """Public images of a round, drawn anew in each; all where there are fewer."""
    warm_up: int = Field(2, ge=0)
    """Passes over all public images, with their labels, before a site's first training."""
    digest: DigestSettings = DigestSettings()
    """How a site fits the mean scores."""


class FedMD(Method):
    """Digest |zₖ − meanⱼ zⱼ| on public images, then local training."""

    Params = FedMDParams
    title = "mean scores of public images"
    reference = "Li & Wang 2019, arXiv 1910.03581"
    needs = "proxies: public images, with labels for the warm-up"
    exchanges = False
    mixed_networks = True
    personal = True
    trained_at_home = True
    starts_global = False

    @classmethod
    def check(cls, study: Study) -> None:
        """One answer an image, from each site by itself."""
        check_public(study, "the scores")

    def check_networks(self, networks: Mapping[str, nn.Module]) -> None:
        """The warm-up puts another layer in the place of a linear last one."""
        if self.study.method.warm_up:
            for model in networks.values():
                last_layer(model)

    def server(self, channel: Channel, state: ServerState, sums: SecureSum) -> Iterator[None]:
        """Gather scores; their mean is the next round's target."""
        return mean_rounds(self, channel, state)

    def shared(self, model: nn.Module) -> list[str]:
        """No tensor of a network leaves."""
        return []

    def ops(self) -> dict[str, Op]:
        """Agree on the public images; digest, revisit, answer."""
        return {**PROXY_OPS, "train": Op(self.train, ANSWERS)}

    def train(self, site: Site, message: Message) -> Message:
        """The last round's mean scores first, then the site's own images; answer with scores."""
        params = self.study.method
        load_own(site)
        said: dict[str, float] = {}
        targets = message.group("targets")
        if params.warm_up and site.state.load("personal") is None:
            warm_up(site, params.warm_up)
        if targets and params.digest.epochs:
            mean, last = targets["scores"], ProxyRound.draw(site.proxies, self.study, site.round - 1)
            said["digest"] = digest(site, last, lambda z, rows: F.l1_loss(z, mean[rows]))
        result = site.train()
        site.state.save("personal", site.tensors)
        now = ProxyRound.draw(site.proxies, self.study, site.round)
        own = {"scores": now.logits(site.model, self.study.evaluation.batch_size)}
        return Message.pack({"answers": own}, loss=result.loss, **said)


def warm_up(site: Site, passes: int) -> None:
    """Train the loaded network on the labelled public images, through a last layer that is then forgotten.

    Raises:
        SiteError: The loss is not finite.
    """
    study, proxies, model = site.study, site.proxies, site.model.train()
    layer, device = last_layer(model)[1], next(model.parameters()).device
    seed = derive_seed(study.seed, site.name, site.round, "warm-up")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        head = nn.Linear(layer.in_features, len(proxies.classes)).to(device)
    parameters: list[Tensor] = [*trained_parameters(model).values(), *head.parameters()]
    # The amplitude of model.harmonise is that of patients' images: their first batch sets it.
    amplitude = snapshot({name: tensor for name, tensor in site.tensors.items() if name == BUFFER})
    order = generator(study.seed, site.name, site.round, "warm-up order")
    batches = proxy_batches(len(proxies), order, study.method.digest.batch_size, passes=passes)
    rate = learning_rate(study.training, site.round, study.method.rounds)
    with entering(layer) as seen:

        def loss(rows: Tensor) -> Tensor:
            model(proxies.inputs(rows).to(device))
            return F.cross_entropy(head(seen.pop()), proxies.labels[rows].to(device))

        fit(parameters, batches, loss, study.training, lr=rate, seed=seed, device=device)
    site.load(amplitude)
