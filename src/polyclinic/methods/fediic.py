"""FedIIC: margins by frequency and difficulty of the classes, and two contrastive losses, against class imbalance.

Wu, Yu, Yang, Cheng, Yan: FedIIC: towards robust federated learning for class-imbalanced medical image classification.
MICCAI 2023. arXiv 2206.13803. Details of which the paper can be read in several ways are as in the published code
(facts known from that code).

Before a round the sites sum the loss of the received model by class; L_c is its mean over all sites' images of class c.
With p_c the frequency of class c among the site's own training images a site then minimises::

    CE(logits + m, y)                                        m_c = margin · log(p_c / (L_c^power + 1e-5))
    + intra · mean over images i of  − mean over j with y_j = y_i of  log softmax_{k ≠ i}(f_i·f_k / t_ik)[j]
    + inter · CE(f P^T / 0.1, y)                             t_ik = max(0.07, sqrt(p_{y_i} p_{y_k}))

with unit features f of two views of each image; the first view alone counts in the CE. P has a unit row for each class,
made from the received classifier's rows so that they stand apart.

Of the paper: the three losses, temperatures, weights, and that L_c is global and p_c is not. Ours:

- No projection head: f is what enters the last layer, and P is made from its rows as they are. The network is fedavg's,
  and nothing more is sent. The paper projects both by a linear head that is trained with the network.
- P is the set of orthonormal rows nearest to the classifier's rows (their polar factor, in closed form), not what 1000
  steps of gradient descent on their largest cosines give.
- The second view changes the batch once more, by ``view``; without it, images with no other of their class in the
  batch are left out of the intra-client loss.
- L_c is summed over the sites of the round through the study's sum. A class that a site lacks is left out of its
  softmax, as in the code.

Cost: a forward pass over the training images, and per step twice the gradients of fedavg (once without ``view``). The
model travels down twice a round.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from polyclinic.data.augment import augment
from polyclinic.errors import StudyError
from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Site
from polyclinic.federation.state import ServerState
from polyclinic.methods.base import Leaf, Method, MethodParams, Op, draw_cohort, load_global
from polyclinic.methods.fedavg import UPDATE, add_update, train_from
from polyclinic.models.last_layer import entering, last_layer
from polyclinic.models.normalisation import shared_names
from polyclinic.secure.sum import SecureSum
from polyclinic.seeds import derive_seed
from polyclinic.study import AugmentSettings, Study
from polyclinic.training import Step, StepRule

LEAST_TEMPERATURE, PROTOTYPE_TEMPERATURE = 0.07, 0.1
_EPSILON = 1e-5


class FedIICParams(MethodParams):
    """Settings of fediic; margin, intra and inter 0 train as fedavg does."""

    name: Literal["fediic"] = "fediic"
    margin: float = Field(1.0, ge=0)
    """How much rare and difficult classes are favoured by the cross-entropy; 0: not at all."""
    power: float = Field(0.25, ge=0)
    """Power of a class's loss in its margin; 0: frequency alone, which saves a forward pass and a download."""
    intra: float = Field(2.0, ge=0)
    """Weight of the contrast between images of a batch."""
    inter: float = Field(2.0, ge=0)
    """Weight of the contrast with the prototypes of the classes."""
    view: AugmentSettings | None = AugmentSettings(rotate_degrees=15, scale=0.1, intensity=0.1)
    """Random changes that make the second view of an image for the contrasts; empty: one view, at half the cost."""


class FedIIC(Method):
    """Training is local with three losses; averaging is fedavg's."""

    Params = FedIICParams
    title = "averaging, with margins and contrasts for rare classes"
    reference = "Wu et al., MICCAI 2023, arXiv 2206.13803"
    needs = "a multi-class task and a network whose last layer is linear"

    @classmethod
    def check(cls, study: Study) -> None:
        """Refuse other tasks and losses, and samples that its losses would not see."""
        if study.task.kind != "multi-class" or study.task.loss not in ("auto", "cross-entropy"):
            raise StudyError(
                "method fediic brings its own loss for multi-class tasks: task.kind must be multi-class and task.loss "
                f"auto or cross-entropy, not {study.task.kind} and {study.task.loss}. Change them, or use fedavg."
            )
        if study.synthesis is not None and study.synthesis.generator:
            names = ", ".join(entry.name for entry in study.synthesis.generator)
            raise StudyError(
                f"method fediic does not train on synthetic samples (synthesis.generator: {names}). Use fedavg, or "
                "set synthesis.generator: []."
            )

    def shared(self, model: torch.nn.Module) -> list[str]:
        """As in fedavg; refuses a network without a linear last layer before anybody trains."""
        last_layer(model)
        return shared_names(model, self.study.model.norm)

    def server(self, channel: Channel, state: ServerState, sums: SecureSum) -> Iterator[None]:
        """Ask how difficult the classes are, send model and difficulties, average the updates."""
        params = self.study.method
        for number in state.rounds(params.rounds):
            cohort = draw_cohort(self.study, channel.sites, number)
            told = {"model": state.groups["model"]}
            if params.margin and params.power:
                found = sums.sum(channel, "difficulty", dict.fromkeys(cohort, Message.pack(told))).sums["classes"]
                told["classes"] = {"loss": found["losses"] / found["images"].clamp(min=1)}
            message = Message.pack(told)
            update = sums.sum(channel, "train", dict.fromkeys(cohort, message)).mean("update")
            state.groups["model"] = add_update(state.groups["model"], update)
            yield

    def ops(self) -> dict[str, Op]:
        """Two ops: losses by class, and training."""
        # 64 bits: sums over images, which no bound that suits weights holds.
        losses = (Leaf("classes", "sum", "images", lanes=64), Leaf("weight/*", "scalar", "nothing"))
        return {"difficulty": Op(class_losses, losses), "train": Op(self.train, UPDATE)}

    def train(self, site: Site, message: Message) -> Message:
        """Minimise the three losses, from the received model."""
        received, params = load_global(site, message), self.study.method
        if not (params.margin or params.intra or params.inter):
            return train_from(site, received)
        counts = torch.bincount(site.data.labels("train").cpu(), minlength=len(site.task.classes)).double()
        if site.study.training.balanced:
            counts = (counts > 0).double()
        rows = received[f"{last_layer(site.model)[0]}.weight"]
        frequencies = (counts / counts.sum()).to(rows.device)
        losses = message.group("classes").get("loss", torch.ones_like(frequencies))
        return train_from(site, received, rule=imbalance_rule(params, frequencies, losses, rows))


@torch.no_grad()
def class_losses(site: Site, message: Message) -> Message:
    """Cross-entropy of the received model on the site's training images, summed by class, and the images' number."""
    load_global(site, message)
    model, data, classes = site.model.eval(), site.data, len(site.task.classes)
    losses, images = torch.zeros(classes, dtype=torch.float64), torch.zeros(classes, dtype=torch.float64)
    device = next(model.parameters()).device
    for part in torch.split(data.splits["train"], site.study.evaluation.batch_size):
        targets = data.targets[part].cpu()
        found = F.cross_entropy(model(data.inputs(part).to(device)).float(), targets.to(device), reduction="none")
        losses.index_add_(0, targets, found.double().cpu())
        images += torch.bincount(targets, minlength=classes)
    return Message.pack({"classes": {"losses": losses, "images": images}}, **{"weight/classes": 1.0})


def class_margins(frequencies: Tensor, losses: Tensor, margin: float, power: float) -> Tensor:
    """What is added to the logits of each class, float32 ``[K]``: minus infinity for a class that is not there.

    Args:
        frequencies: p_c at the site, ``[K]``.
        losses: L_c over all sites, ``[K]``, not negative.
        margin: Factor of the whole.
        power: Of the losses.
    """
    difficulty = losses.to(frequencies).pow(power) + _EPSILON
    return (margin * (frequencies / difficulty).log()).float()


def prototypes(rows: Tensor) -> Tensor:
    """The orthonormal rows ``[K, F]`` nearest to the given ones: U Vᵀ of their singular value decomposition.

    With more classes than features they cannot all be orthogonal; the result is then the nearest tight frame.
    """
    left, _, right = torch.linalg.svd(rows.double(), full_matrices=False)
    return F.normalize(left @ right, dim=1).float()


def intra_contrast(features: Tensor, labels: Tensor, frequencies: Tensor) -> Tensor:
    """Supervised contrast within a batch; rarer pairs of classes are drawn together more sharply.

    Args:
        features: Unit length, ``[N, F]``.
        labels: int64 ``[N]``.
        frequencies: p_c, ``[K]``.

    Returns:
        The mean over images that have another of their class in the batch; 0 where none has.
    """
    own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positive = (labels[:, None] == labels[None]) & ~own
    anchors = positive.any(1)
    if not bool(anchors.any()):
        return features.sum() * 0
    shares = frequencies.to(features)[labels]
    temperature = (shares[:, None] * shares[None]).sqrt().clamp(min=LEAST_TEMPERATURE)
    logits = (features @ features.T / temperature).masked_fill(own, -torch.inf)
    log_shares = (logits - logits.logsumexp(1, keepdim=True)).masked_fill(~positive, 0.0)
    likelihood = log_shares.sum(1) / positive.sum(1).clamp(min=1)
    return -likelihood[anchors].mean()


def imbalance_rule(params: FedIICParams, frequencies: Tensor, losses: Tensor, rows: Tensor) -> StepRule:
    """The rule of a step on the three losses.

    Args:
        params: Weights and the second view.
        frequencies: p_c at the site, ``[K]``.
        losses: L_c over all sites, ``[K]``.
        rows: The received classifier's, ``[K, F]``.
    """
    targets_of, margins = prototypes(rows), None
    if params.margin:
        margins = class_margins(frequencies, losses, params.margin, params.power)

    def rule(step: Step) -> Tensor:
        inputs, labels = step.batch.inputs, step.batch.targets
        views = [inputs]
        if params.view is not None and (params.intra or params.inter):
            draws = torch.Generator().manual_seed(derive_seed(step.seed, "view", step.number))
            views.append(augment(inputs, None, params.view, draws)[0])
        # In float32, mixed precision or not: the temperatures are as low as 0.07.
        with entering(last_layer(step.model)[1]) as seen:
            logits = step.model(torch.cat(views))[: len(labels)]
        features, every = F.normalize(seen[-1], dim=1), labels.repeat(len(views))
        loss = F.cross_entropy(logits if margins is None else logits + margins, labels)
        if params.intra:
            loss = loss + params.intra * intra_contrast(features, every, frequencies)
        if params.inter:
            loss = loss + params.inter * F.cross_entropy(features @ targets_of.T / PROTOTYPE_TEMPERATURE, every)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return rule
