"""FML: a small companion of the same shape travels; at each site it and the site's own network teach each other.

Shen, Zhang, Jia, Zhang, Huang, Zhou, Kuang, Wu, Wu: Federated mutual learning. 2020, Algorithm 1. arXiv 2006.16765.
Both shares at 0.5 as in the published code.

At a site, with w its own network and m the companion (the paper's meme model), both on the same batch::

    w minimises  alpha · loss(w) + (1 − alpha) · KL(m ‖ w)
    m minimises  beta · loss(m)  + (1 − beta)  · KL(w ‖ m)

The server averages m as fedavg does; w never leaves. Networks may be of any architecture, and their features of any
size.

Ours: in each divergence the other network is a constant (the code lets both losses move both networks); both are moved
by the study's optimizer, rate and clipping (the code: clipped at 10). Multi-label: the divergence is that of each
finding's Bernoulli distribution, averaged over findings. The companion of the last round is the central model of the
results.

Cost: the companion's forward and backward passes come on top of local training. What leaves a site: the companion's
update, through the study's sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Site
from polyclinic.federation.state import ServerState
from polyclinic.methods.base import Method, MethodParams, Op, draw_cohort, load_own
from polyclinic.methods.fedavg import UPDATE, add_update
from polyclinic.secure.sum import SecureSum
from polyclinic.study import ModelSettings, Study
from polyclinic.training import Step, StepRule
from polyclinic.transfer.class_means import check_classification
from polyclinic.transfer.companion import Companion, answering, first_companion
from polyclinic.transfer.soft_targets import distillation, soft


class FMLParams(MethodParams):
    """Settings of fml."""

    name: Literal["fml"] = "fml"
    companion: ModelSettings = ModelSettings(width=8)
    """The network that travels, the same at all sites; small-cnn of width 8."""
    alpha: float = Field(0.5, ge=0, le=1)
    """Share of the labels in the loss of a site's own network, the rest is the companion's; 1 is local training."""
    beta: float = Field(0.5, ge=0, le=1)
    """Share of the labels in the companion's loss, the rest is the own network's; 1: fedavg of the companion."""


class FML(Method):
    """Mutual distillation between a site's own network and an averaged companion."""

    Params = FMLParams
    title = "mutual learning with a small averaged companion"
    reference = "Shen et al. 2020, arXiv 2006.16765"
    needs = "classification"
    exchanges = False
    mixed_networks = True
    personal = True
    trained_at_home = True
    starts_global = False

    @classmethod
    def check(cls, study: Study) -> None:
        """Refuse segmentation."""
        check_classification(study)

    def check_networks(self, networks: Mapping[str, nn.Module]) -> None:
        """Refuse a companion that does not fit; sites may have what they like."""
        first_companion(self.networks, self.study.method.companion)

    def shared(self, model: nn.Module) -> list[str]:
        """No tensor of a site's own network leaves."""
        return []

    def server(self, channel: Channel, state: ServerState, sums: SecureSum) -> Iterator[None]:
        """As in fedavg, on the companion."""
        if "companion" not in state.groups:
            state.groups["companion"] = first_companion(self.networks, self.study.method.companion)
        for number in state.rounds(self.study.method.rounds):
            cohort = draw_cohort(self.study, channel.sites, number)
            message = Message.pack({"model": state.groups["companion"]})
            update = sums.sum(channel, "train", dict.fromkeys(cohort, message)).mean("update")
            state.groups["companion"] = add_update(state.groups["companion"], update)
            yield

    def ops(self) -> dict[str, Op]:
        """One op: train both networks."""
        return {"train": Op(self.train, UPDATE)}

    def train(self, site: Site, message: Message) -> Message:
        """Train the site's own network and the received companion; only the companion's change is answered."""
        load_own(site)
        companion = Companion(site, self.study.method.companion, message.group("model"))
        result = site.train(rule=mutual(companion, self.study))
        site.state.save("personal", site.tensors)
        return Message.pack({"update": companion.update()}, loss=result.loss, **{"weight/update": site.weight})

    def central(self, state: ServerState) -> tuple[ModelSettings, dict[str, Tensor]]:
        """The averaged companion."""
        return self.study.method.companion, state.groups["companion"]


def mutual(companion: Companion, study: Study) -> StepRule:
    """The rule of a step on both losses; the companion moves at the same values, before the own network does."""
    alpha, beta, multi_label = study.method.alpha, study.method.beta, study.task.kind == "multi-label"

    def taught(loss: Tensor, share: float, own: Tensor, other: Tensor) -> Tensor:
        if share == 1:
            return loss
        return share * loss + (1 - share) * distillation(own, soft(other, 1.0, multi_label), 1.0, multi_label)

    def rule(step: Step) -> Tensor:
        with answering(step.model) as own:
            loss = step.loss(step.batch)
        with answering(companion.model) as theirs:
            its_loss = companion.loss(step)
        companion.follow(taught(its_loss, beta, theirs[0], own[0]))
        taught(loss, alpha, own[0], theirs[0]).backward()  # type: ignore[no-untyped-call]
        return loss

    return rule
