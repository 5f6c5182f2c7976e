"""FedKD: a companion as in fml, taught the more the better both networks are; its update travels as truncated factors.

Wu, Wu, Lyu, Huang, Xie: Communication-efficient federated learning via knowledge distillation. Nature Communications
13, 2032 (2022). arXiv 2108.13323. The map of hidden states and the energies as in the published code.

At a site, with w its own network (the paper's mentor), m the companion (the mentee), f their features before the last
layer, S a map that stays at the site, all on the same batch::

    w minimises  loss(w) + (KL(m ‖ w) + mean squared difference of f_w and S f_m) · strength / (loss(w) + loss(m))
    m minimises  loss(m) + (KL(w ‖ m) + the same)                                 · strength / (loss(w) + loss(m))

and S the latter. Each matrix of m's update, a convolution as [out, in · kernel], is sent as U diag(s) and Vᵀ of its
singular value decomposition, cut to the fewest singular values that hold a share of the sum of their squares; the share
rises from energy_first in the first round to energy_last in the last. A matrix whose factors would not be smaller goes
as it is. The server multiplies, averages as fedavg does and adds.

Ours: in each term the other network, and the divisor, is a constant (the code lets the losses move all they depend on,
so that the divisor rewards a larger loss); S has one row for each feature of w and one column for each of m, so sizes
may differ; attention maps are left out, for these networks have none; the server sends m whole, so that a site that
missed rounds can go on (the paper cuts this way too); sites weigh as the study says. Multi-label: Bernoulli
divergences. The companion of the last round is the central model of the results.

A sum that hides single sites cannot add factors, so other aggregations than plain are refused.

Cost: the companion's passes on top of local training, and a singular value decomposition of each of its layers a round.
What leaves a site, in clear: factors of the companion's update, its vectors whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from polyclinic.errors import SiteError
from polyclinic.federation.answers import accepted, checked
from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Site
from polyclinic.federation.state import ServerState
from polyclinic.methods.base import TRAINED, Leaf, Method, MethodParams, Op, draw_cohort, load_own
from polyclinic.methods.fedavg import add_update
from polyclinic.models.last_layer import entering, last_layer
from polyclinic.secure.sum import SecureSum, Total
from polyclinic.seeds import derive_seed
from polyclinic.study import ModelSettings, Study
from polyclinic.training import Step, StepRule
from polyclinic.transfer.class_means import check_classification, check_plain
from polyclinic.transfer.companion import Companion, answering, first_companion
from polyclinic.transfer.soft_targets import distillation, soft

Factors = dict[str, dict[str, Tensor]]
"""``left`` ``[out, r]`` and ``right`` ``[r, in · kernel]`` by tensor, and ``whole`` for what is not cut."""
_PARTS = ("left", "right", "whole")


class FedKDParams(MethodParams):
    """Settings of fedkd."""

    name: Literal["fedkd"] = "fedkd"
    companion: ModelSettings = ModelSettings(width=8)
    """The network that travels, the same at all sites; small-cnn of width 8."""
    strength: float = Field(1.0, ge=0)
    """Of what both networks learn from each other; 0: local training, and fedavg of the companion."""
    energy_first: float = Field(0.95, gt=0, le=1)
    """Share of the squared singular values that travels in the first round."""
    energy_last: float = Field(0.98, gt=0, le=1)
    """The same in the last round."""

    def energy(self, number: int) -> float:
        """Share in round ``number``, from 1."""
        return self.energy_first + (self.energy_last - self.energy_first) * (number - 1) / max(1, self.rounds - 1)


class FedKD(Method):
    """Adaptive mutual distillation, and a companion whose update is cut to few singular values."""

    Params = FedKDParams
    title = "adaptive mutual distillation with a compressed companion"
    reference = "Wu et al., Nature Communications 2022, arXiv 2108.13323"
    needs = "classification, linear last layers, aggregation plain"
    exchanges = False
    mixed_networks = True
    personal = True
    trained_at_home = True
    starts_global = False

    @classmethod
    def check(cls, study: Study) -> None:
        """Refuse segmentation, and sums that hide single sites."""
        check_classification(study)
        check_plain(study, "factors of an update")

    def check_networks(self, networks: Mapping[str, nn.Module]) -> None:
        """Refuse a companion that does not fit, and networks whose features cannot be told."""
        first_companion(self.networks, self.study.method.companion)
        for model in networks.values():
            last_layer(model)

    def shared(self, model: nn.Module) -> list[str]:
        """No tensor of a site's own network leaves."""
        return []

    def server(self, channel: Channel, state: ServerState, sums: SecureSum) -> Iterator[None]:
        """Send the companion, multiply the factors, average."""
        if "companion" not in state.groups:
            state.groups["companion"] = first_companion(self.networks, self.study.method.companion)
        for number in state.rounds(self.study.method.rounds):
            cohort = draw_cohort(self.study, channel.sites, number)
            companion = state.groups["companion"]
            messages = dict.fromkeys(cohort, Message.pack({"model": companion}))
            total, weight = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in companion.items()}, 0.0
            for _, (update, own) in accepted(channel, "train", messages, partial(received, like=companion)):
                total = {name: total[name] + own * update[name] for name in total}
                weight += own
            mean = Total({"update": total}, {"update": weight}, {}).mean("update")
            state.groups["companion"] = add_update(companion, mean)
            yield

    def ops(self) -> dict[str, Op]:
        """One op: train both networks, and cut the companion's update."""
        return {"train": Op(self.train, (*(Leaf(part, "array", "images") for part in _PARTS), *TRAINED))}

    def train(self, site: Site, message: Message) -> Message:
        """Train the site's own network, the received companion and the map between their features."""
        params = self.study.method
        load_own(site)
        own, its = last_layer(site.model)[1], last_layer(site.networks.of(params.companion, "companion").model)[1]
        kept = site.state.load("map")
        seed = derive_seed(self.study.seed, "map of features")
        between = kept[0]["weight"] if kept else first_map(own, its, seed)
        between.requires_grad_()
        companion = Companion(site, params.companion, message.group("model"), beside=[between])
        result = site.train(rule=adaptive(companion, between, self.study))
        update = companion.update()
        site.state.save("map", {"weight": between.detach()})
        site.state.save("personal", site.tensors)
        factors = factorised(update, params.energy(site.round))
        return Message.pack(factors, loss=result.loss, **{"weight/update": site.weight})

    def central(self, state: ServerState) -> tuple[ModelSettings, dict[str, Tensor]]:
        """The averaged companion."""
        return self.study.method.companion, state.groups["companion"]


def first_map(own: nn.Linear, its: nn.Linear, seed: int) -> Tensor:
    """Start values of S, ``[features of the own network, those of the companion]``, as torch starts a linear layer."""
    draws = torch.Generator().manual_seed(seed)
    bound = its.in_features**-0.5
    values = torch.empty(own.in_features, its.in_features).uniform_(-bound, bound, generator=draws)
    return values.to(own.weight.device)


def adaptive(companion: Companion, between: Tensor, study: Study) -> StepRule:
    """The rule of a step; the companion and the map move at the same values, before the own network does.

    Args:
        companion: With ``between`` among what it trains.
        between: S.
        study: Gives the strength and the kind of divergence.
    """
    strength, multi_label = study.method.strength, study.task.kind == "multi-label"

    def rule(step: Step) -> Tensor:
        with entering(last_layer(step.model)[1]) as feature, answering(step.model) as answer:
            loss = total = step.loss(step.batch)
        with entering(last_layer(companion.model)[1]) as its_feature, answering(companion.model) as its_answer:
            its_loss = companion.loss(step)
        if strength:
            f, mapped = feature[0].float(), its_feature[0].float() @ between.T
            share = strength / (loss + its_loss).detach()
            targets, its_targets = (soft(a[0], 1.0, multi_label) for a in (answer, its_answer))
            its_apart = F.mse_loss(mapped, f.detach())
            its_loss = its_loss + share * (distillation(its_answer[0], targets, 1.0, multi_label) + its_apart)
            apart = F.mse_loss(f, mapped.detach())
            total = loss + share * (distillation(answer[0], its_targets, 1.0, multi_label) + apart)
        companion.follow(its_loss)
        total.backward()  # type: ignore[no-untyped-call]
        return loss

    return rule


def factorised(update: Mapping[str, Tensor], energy: float) -> Factors:
    """An update with its matrices cut to the fewest singular values whose squares hold a share ``energy`` of all."""
    parts: Factors = {part: {} for part in _PARTS}
    for name, tensor in update.items():
        matrix = tensor.double().flatten(1) if tensor.ndim > 1 else None
        if matrix is None or not bool(matrix.any()):
            parts["whole"][name] = tensor
            continue
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        held = s.square().cumsum(0) / s.square().sum()
        # Rounding may leave the last share below 1.
        rank = min(int((held < energy).sum()) + 1, len(s))
        if rank * sum(matrix.shape) >= matrix.numel():
            parts["whole"][name] = tensor
        else:
            parts["left"][name] = (u[:, :rank] * s[:rank]).to(tensor.dtype)
            parts["right"][name] = v[:rank].to(tensor.dtype).contiguous()
    return parts


def multiplied(parts: Factors, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The update that ``factorised`` cut, float64, in the shapes of ``like`` and its order."""
    made = {name: tensor.double() for name, tensor in parts["whole"].items()}
    for name in {**parts["left"], **parts["right"]}:
        made[name] = (parts["left"][name].double() @ parts["right"][name].double()).reshape(like[name].shape)
    return {name: made[name] for name in {**like, **made}}


def received(site: str, reply: Message, like: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """A site's update, multiplied, and its weight.

    Raises:
        SiteError: Names the site: factors that do not give tensors of the names and shapes of ``like``, a number that
            is not finite, or no weight.
    """
    try:
        update = multiplied({part: reply.group(part) for part in _PARTS}, like)
    except (KeyError, RuntimeError) as error:  # a name, or shapes that do not multiply
        raise SiteError(
            f"site {site!r} sent factors that do not give an update of the companion: {error}. All parties must have "
            "the same study file and the same version of the program."
        ) from None
    return checked(site, "update", like, Message.pack({"update": update}, **reply.scalars))
