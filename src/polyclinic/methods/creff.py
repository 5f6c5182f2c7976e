"""CReFF: the classifier is re-trained on the server with features that are made from the sites' class gradients.

Shang, Lu, Huang, Wang: Federated learning on heterogeneous and long-tailed data via classifier re-training with
federated features. IJCAI 2022, Algorithm 1. arXiv 2204.13399. Numbers and order as in the published code (facts known
from that code).

Sites train as in fedavg. With the received network, but the re-trained last layer h in place of its own, a site also
computes for each class the mean gradient of the cross-entropy with respect to h over its training images. The server::

    g_c ← Σₖ nₖc gₖc / Σₖ nₖc                                 over the sites of the round
    X_c ← X_c − lr ∂/∂X_c Σ_rows (1 − cos(∇h CE(h(X_c), c), g_c))     match_steps times, X_c: per_class features
    h   ← a new layer, trained on all X_c                    head_epochs passes of plain gradient descent

The model that is used is fedavg's with h; fedavg itself goes on with its own last layer.

Ours: g_c weighs images (the code weighs sites) and is over all images, once (the code: ten draws of 32, augmented).
Sums go through the study's sum. A class that no site had in any round so far has no features and is not trained on. The
first round's gradients are at the start weights' last layer (the code: at another random one).

Cost at a site: a forward pass over its training images a round. It sends classes² × (features + 1) values more than
fedavg: mean gradients of the last layer over the images of one class. In clear those of a class with one image tell
that image's feature.
"""

from __future__ import annotations

import math
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
from polyclinic.methods.base import Leaf, Method, MethodParams, Op, draw_cohort, load_global
from polyclinic.methods.fedavg import UPDATE, add_update, train_from
from polyclinic.models.last_layer import entering, last_layer
from polyclinic.models.normalisation import shared_names
from polyclinic.models.registry import start_model
from polyclinic.secure.sum import SecureSum, Total
from polyclinic.seeds import derive_seed
from polyclinic.study import Study

_EPSILON = 1e-6
_BATCH = 32
Head = dict[str, Tensor]
"""``weight`` ``[K, F]`` and ``bias`` ``[K]`` of the last layer."""


class CReFFParams(MethodParams):
    """Settings of creff."""

    name: Literal["creff"] = "creff"
    per_class: int = Field(100, ge=1)
    """Features that the server keeps for each class."""
    match_steps: int = Field(100, ge=0)
    """Steps per round in which features learn to give the sites' gradients."""
    match_lr: float = Field(0.1, gt=0)
    """Rate of those steps."""
    head_epochs: int = Field(300, ge=0)
    """Passes over the features in which the last layer is trained anew, in batches of 32; 0: the averaged layer is
    used, which is fedavg."""
    head_lr: float = Field(0.01, gt=0)
    """Rate of those passes, plain gradient descent."""


class CReFF(Method):
    """Body by fedavg, last layer by re-training on federated features."""

    Params = CReFFParams
    title = "averaging, with the last layer re-trained on federated features"
    reference = "Shang et al., IJCAI 2022, arXiv 2204.13399"
    needs = "a multi-class task and a network whose last layer is linear, with a bias"

    @classmethod
    def check(cls, study: Study) -> None:
        """Refuse other tasks, and a second method that re-trains the last layer."""
        if study.task.kind != "multi-class":
            raise StudyError(f"method creff has gradients by class, but task.kind is {study.task.kind}. Use fedavg.")
        if study.synthesis is not None and study.synthesis.of_kind("features") is not None:
            raise StudyError(
                "method creff and synthesis.generator features both re-train the last layer. Leave one of them out."
            )

    def shared(self, model: nn.Module) -> list[str]:
        """As in fedavg; refuses a network without such a last layer before anybody trains."""
        name, layer = last_layer(model)
        if layer.bias is None:
            raise StudyError(f"method creff: the last layer {name!r} has no bias. Use another network or method.")
        return shared_names(model, self.study.model.norm)

    def server(self, channel: Channel, state: ServerState, sums: SecureSum) -> Iterator[None]:
        """Average the updates as fedavg; fit features to the gradients and a last layer to the features."""
        params = self.study.method
        if "head" not in state.groups:
            name, _ = last_layer(start_model(self.study))
            state.groups["head"] = {key: state.groups["model"][key] for key in (f"{name}.weight", f"{name}.bias")}
            state.groups["features"] = self._first_features(state.groups["head"])
        for number in state.rounds(params.rounds):
            cohort = draw_cohort(self.study, channel.sites, number)
            message = Message.pack({"model": state.groups["model"], "head": state.groups["head"]})
            total = sums.sum(channel, "train", dict.fromkeys(cohort, message))
            state.groups["model"] = add_update(state.groups["model"], total.mean("update"))
            self._retrain(state, total, number)
            yield

    def ops(self) -> dict[str, Op]:
        """One op: class gradients at the received model, then training."""
        # 64 bits: a gradient is as large as features are, and its small parts have a say in its direction.
        groups = [class_group(c) for c in range(len(self.study.task.classes))]
        gradients = tuple(Leaf(group, "sum", "images", lanes=64) for group in groups)
        return {"train": Op(train_with_gradients, (*UPDATE, *gradients))}

    def deployment(self, state: ServerState) -> Message:
        """The averaged network with the re-trained last layer."""
        return Message.pack({"model": {**state.groups["model"], **state.groups.get("head", {})}})

    def _first_features(self, head: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weight = next(iter(head.values()))
        draws = torch.Generator().manual_seed(derive_seed(self.study.seed, "federated features"))
        shape = (weight.shape[0], self.study.method.per_class, weight.shape[1])
        values = torch.randn(shape, generator=draws)
        return {"values": values.to(weight.device), "fitted": torch.zeros(shape[0], dtype=torch.int64)}

    def _retrain(self, state: ServerState, total: Total, number: int) -> None:
        """Features and last layer of the next deployment, on the CPU."""
        params, names = self.study.method, list(state.groups["head"])
        if not params.head_epochs:
            state.groups["head"] = {name: state.groups["model"][name] for name in names}
            return
        values, fitted = (state.groups["features"][key] for key in ("values", "fitted"))
        head = {key: state.groups["head"][name].cpu() for key, name in zip(("weight", "bias"), names, strict=True)}
        held = [c for c in range(len(fitted)) if total.weights[class_group(c)] > 0]
        wanted = [total.mean(class_group(c)) for c in held]
        goal = {key: torch.stack([own[name] for own in wanted]).float().cpu() for key, name in _pairs(names)}
        values, fitted = values.cpu().clone(), fitted.cpu().clone()
        values[held] = match(values[held], torch.tensor(held), head, goal, params)
        fitted[held] += 1
        seed = derive_seed(self.study.seed, "re-trained head", number)
        known = fitted > 0
        made = fit_head(values[known], known.nonzero().flatten(), head, params, seed)
        device = state.groups["model"][names[0]].device
        state.groups["features"] = {"values": values.to(device), "fitted": fitted.to(device)}
        state.groups["head"] = {name: made[key].to(device) for key, name in _pairs(names)}


def class_group(number: int) -> str:
    """The group of arrays that a class's gradient travels in, with a weight of its own."""
    return f"class{number}"


def _pairs(names: list[str]) -> list[tuple[str, str]]:
    return list(zip(("weight", "bias"), names, strict=True))


def train_with_gradients(site: Site, message: Message) -> Message:
    """Gradients of the re-trained last layer by class at the received body, then fedavg's training."""
    received = load_global(site, message)
    site.load(message.group("head"))
    gradients, counts = class_gradients(site)
    site.load(received)
    reply = train_from(site, received)
    names = list(message.group("head"))
    groups = {class_group(c): {name: gradients[key][c] for key, name in _pairs(names)} for c in range(len(counts))}
    weights = {f"weight/{class_group(c)}": float(count) for c, count in enumerate(counts.tolist())}
    extra = Message.pack(groups)
    return Message({**reply.arrays, **extra.arrays}, {**reply.scalars, **weights})


@torch.no_grad()
def class_gradients(site: Site) -> tuple[Head, Tensor]:
    """Mean gradients of the cross-entropy with respect to the last layer of the loaded network, by class.

    Returns:
        ``weight`` ``[C, K, F]`` and ``bias`` ``[C, K]``, zero for a class without training images; and the number of
        images of each class, ``[C]``.
    """
    model, data = site.model.eval(), site.data
    layer = last_layer(model)[1]
    classes, device = layer.out_features, layer.weight.device
    weight = torch.zeros(classes, classes, layer.in_features, dtype=torch.float64, device=device)
    bias, counts = weight.new_zeros(classes, classes), weight.new_zeros(classes)
    for part in torch.split(data.splits["train"], site.study.evaluation.batch_size):
        labels = F.one_hot(data.targets[part], classes).double().to(device)
        with entering(layer) as seen:
            logits = model(data.inputs(part).to(device))
        error = logits.double().softmax(1) - labels
        weight += torch.einsum("nc,nk,nf->ckf", labels, error, seen[-1].double())
        bias += labels.T @ error
        counts += labels.sum(0)
    each = counts.clamp(min=1)
    return {"weight": weight / each[:, None, None], "bias": bias / each[:, None]}, counts


def match(features: Tensor, labels: Tensor, head: Head, goal: Head, params: CReFFParams) -> Tensor:
    """Features whose gradients point where the sites' do.

    Args:
        features: ``[C, m, F]``, where to start.
        labels: Class of each set, int64 ``[C]``.
        head: The layer that the gradients are of.
        goal: The sites' mean gradients, ``[C, K, F]`` and ``[C, K]``.
        params: Steps and their rate.

    Returns:
        New features of the same shape.
    """
    current = features.clone()
    target = F.one_hot(labels, len(head["bias"])).to(current)[:, None]
    for _ in range(params.match_steps):
        current.requires_grad_()
        error = (current @ head["weight"].T + head["bias"]).softmax(2) - target
        weight = error.transpose(1, 2) @ current / current.shape[1]
        distance = _apart(weight, goal["weight"]).sum() + _apart(error.mean(1), goal["bias"]).sum()
        (slope,) = torch.autograd.grad(distance, current)
        current = (current - params.match_lr * slope).detach()
    return current


def _apart(ours: Tensor, theirs: Tensor) -> Tensor:
    """1 − cosine along the last axis."""
    lengths: Tensor = torch.linalg.vector_norm(ours, dim=-1) * torch.linalg.vector_norm(theirs, dim=-1)
    return 1 - (ours * theirs).sum(-1) / (lengths + _EPSILON)


def fit_head(features: Tensor, labels: Tensor, like: Head, params: CReFFParams, seed: int) -> Head:
    """A new last layer trained on features by plain gradient descent.

    Args:
        features: ``[C, m, F]``.
        labels: Class of each set, int64 ``[C]``.
        like: A layer of the wanted shape.
        params: Passes and rate.
        seed: Of start values and order.
    """
    draws = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(features.shape[2])  # as torch starts a linear layer
    weight, bias = (torch.empty_like(like[key]).uniform_(-bound, bound, generator=draws) for key in ("weight", "bias"))
    inputs = features.flatten(0, 1)
    targets = F.one_hot(labels, len(bias)).to(inputs).repeat_interleave(features.shape[1], dim=0)
    for _ in range(params.head_epochs):
        for part in torch.split(torch.randperm(len(inputs), generator=draws), _BATCH):
            own = inputs[part]
            error = (torch.addmm(bias, own, weight.T).softmax(1) - targets[part]) * (params.head_lr / len(part))
            weight -= error.T @ own
            bias -= error.sum(0)
    return {"weight": weight, "bias": bias}
