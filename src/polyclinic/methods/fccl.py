"""FCCL: networks agree on public images by the correlation of their answers, and do not forget what they knew.

Huang, Ye, Du: Learn from others and be yourself in heterogeneous federated learning. CVPR 2022. FCCL+: Huang, Ye, Shi,
Du: Generalizable heterogeneous federated cross-correlation and instance similarity learning. IEEE TPAMI 2023. arXiv
2309.16286. Constants, signs and order as in the published code (facts known from that code). A round::

    together  z(x) = network's scores on public images, zbar = their mean over sites
              M    = std(z)^T std(zbar) / B over a batch of B, every column standardised
              loss = sum_u (1 - M_uu)^2 + 0.0051 sum_{u != v} (1 + M_uv)^2       off the diagonal towards -1
    alone     cross-entropy + previous KL(own model of the last round || own) + pretrained KL(own first model || own)

The first model is the one after a site's first training, which is therefore plain and before any exchange. FCCL+ is
``features: 3``, ``temperature: 3``, ``non_target: true``, ``pretrained: 0``: with f the normalised features of a batch,
S = f f^T / 0.02 without its diagonal, also KL(softmax(mean of S over sites) || softmax(S)) by rows, which asks no equal
feature sizes; and the one KL left is between the classes that an image is not of.

Applied to public images are the outputs for the study's classes (the private head): what these mean there is of no
account, only how sites agree. zbar is that of the start of the round, as in the code, where it comes from copies of the
round before.

Ours: population deviations, so that M_uu = 1 where z = zbar; the KL of findings that do not exclude each other is
Bernoulli; probabilities of the classes that an image is not of are made to sum to 1, so that their KL is never negative
(the code leaves them as they are in the softmax over all classes); in batch normalisation a site's running statistics
stand still in the exchange. The public batches are the same at all sites, as similarities must be.

Leaves a site: its scores of the round's images, ``m x classes``; with ``features`` the cosines of all pairs within a
batch, ``B`` values an image more. Comes to a site: their means.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from polyclinic.data.proxies import PROXY_OPS
from polyclinic.errors import StudyError
from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Site
from polyclinic.federation.state import ServerState
from polyclinic.methods.base import Method, MethodParams, Op, load_own
from polyclinic.models.taps import feature_tap, features, tapped
from polyclinic.models.weights import load_tensors
from polyclinic.secure.sum import SecureSum
from polyclinic.study import Study
from polyclinic.training import Step, StepRule, plain_step
from polyclinic.transfer.proxy_logits import ANSWERS, DigestSettings, ProxyRound, check_public, digest, mean_rounds
from polyclinic.transfer.soft_targets import distillation, soft

OFF_DIAGONAL = 0.0051
"""Weight of the correlations between different outputs."""
SIMILARITY_TEMPERATURE = 0.02
_EPSILON = 1e-12


class FCCLParams(MethodParams):
    """Settings of fccl."""

    name: Literal["fccl"] = "fccl"
    proxies: int = Field(500, ge=2)
    """Public images of a round, drawn anew in each; all where there are fewer."""
    digest: DigestSettings = DigestSettings(batch_size=128)
    """How sites learn from the others on public images; correlations need large batches."""
    previous: float = Field(1.0, ge=0)
    """Weight of the KL to the site's model of the round before."""
    pretrained: float = Field(1.0, ge=0)
    """Weight of the KL to the site's model after its first training."""
    temperature: float = Field(1.0, gt=0)
    """Of both KL, times its square; FCCL+: 3."""
    non_target: bool = False
    """Both KL are between the classes that an image is not of (FCCL+)."""
    features: float = Field(0.0, ge=0)
    """Weight of the similarities of features within a public batch; FCCL+: 3, and 0: none."""


class FCCL(Method):
    """The private head's scores on public images are correlated with the sites' mean; two KL keep what was known."""

    Params = FCCLParams
    title = "correlated answers on public images"
    reference = "Huang et al., CVPR 2022; FCCL+ TPAMI 2023, arXiv 2309.16286"
    needs = "proxies: public images, their labels are not used"
    exchanges = False
    mixed_networks = True
    personal = True
    trained_at_home = True
    starts_global = False

    @classmethod
    def check(cls, study: Study) -> None:
        """One answer an image, from each site by itself; other classes than the target where KL is between these."""
        check_public(study, "the scores")
        if not study.method.non_target:
            return
        if study.task.kind == "multi-label":
            raise StudyError(
                "method fccl: non_target needs one class an image to leave out, but task.kind is multi-label. Set "
                "method.non_target: false."
            )
        if len(study.task.classes) < 3:
            raise StudyError(
                "method fccl: of two classes one is left beside an image's own, and non_target would compare nothing. "
                "Set method.non_target: false."
            )

    def check_networks(self, networks: Mapping[str, nn.Module]) -> None:
        """Where features are compared, every network says where they are."""
        if self.study.method.features:
            for model in networks.values():
                feature_tap(model)

    def server(self, channel: Channel, state: ServerState, sums: SecureSum) -> Iterator[None]:
        """Gather scores and similarities; their means are the next round's targets."""
        return mean_rounds(self, channel, state)

    def shared(self, model: nn.Module) -> list[str]:
        """No tensor of a network leaves."""
        return []

    def ops(self) -> dict[str, Op]:
        """Agree on the public images; learn, train, answer."""
        return {**PROXY_OPS, "train": Op(self.train, ANSWERS)}

    def train(self, site: Site, message: Message) -> Message:
        """Learn from the others, then train near what the site knew; answer on this round's public images."""
        load_own(site)
        said: dict[str, float] = {}
        targets = message.group("targets")
        first = site.state.load("pretrained")
        if first is not None and targets and self.study.method.digest.epochs:
            said["digest"] = self._digest(site, targets)
        result = site.train(rule=plain_step if first is None else self._near(site, first[0]))
        site.state.save("personal", site.tensors)
        if first is None:
            site.state.save("pretrained", site.tensors)
        return Message.pack({"answers": self._answers(site)}, loss=result.loss, **said)

    def _answers(self, site: Site) -> dict[str, Tensor]:
        now = ProxyRound.draw(site.proxies, self.study, site.round)
        own = {"scores": now.logits(site.model, self.study.evaluation.batch_size)}
        if self.study.method.features:
            device = own["scores"].device
            for number, rows in enumerate(batches(len(now), self.study.method.digest.batch_size)):
                inputs = site.proxies.inputs(now.positions[rows]).to(device)
                with torch.no_grad():
                    own[f"similarities.{number}"] = cosines(features(site.model.eval(), inputs).float())
        return own

    def _digest(self, site: Site, targets: Mapping[str, Tensor]) -> float:
        """The exchange: scores like the mean's, and where asked similarities."""
        params = self.study.method
        last = ProxyRound.draw(site.proxies, self.study, site.round - 1)
        each = batches(len(last), params.digest.batch_size)
        if not params.features:
            return digest(
                site, last, lambda z, rows: correlation_loss(z, targets["scores"][rows]), each * params.digest.epochs
            )
        tap = feature_tap(site.model)

        def loss(logits: Tensor, rows: Tensor) -> Tensor:
            found = seen[tap].pop()
            own = found.flatten(2).mean(2) if found.ndim > 2 else found
            goal = targets[f"similarities.{int(rows[0]) // params.digest.batch_size}"]
            similar = similarity_loss(own.float(), goal)
            weight: float = params.features
            return correlation_loss(logits, targets["scores"][rows]) + weight * similar

        with tapped(site.model, [tap]) as seen:
            return digest(site, last, loss, each * params.digest.epochs)

    def _near(self, site: Site, first: Mapping[str, Tensor]) -> StepRule:
        """The rule of a step that adds the KL to the site's model of the round before and to its first."""
        params = self.study.method
        kept = site.state.load("personal")
        others: list[tuple[float, nn.Module]] = []
        for role, weight, tensors in (
            ("previous", params.previous, kept[0] if kept else first),
            ("pretrained", params.pretrained, first),
        ):
            if weight:
                model = site.networks.of(self.study.model_of(site.name), role).model
                load_tensors(model, tensors)
                others.append((weight, model.eval()))
        if not others:
            return plain_step

        def rule(step: Step) -> Tensor:
            outputs: list[Tensor] = []
            handle = step.model.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
            try:
                loss = step.loss(step.batch)
            finally:
                handle.remove()
            total = loss
            for weight, model in others:
                with torch.no_grad():
                    goal = model(step.batch.inputs)
                total = total + weight * self._kl(outputs[0], goal, step.batch.targets)
            total.backward()  # type: ignore[no-untyped-call]
            return loss

        return rule

    def _kl(self, logits: Tensor, goal: Tensor, targets: Tensor) -> Tensor:
        params, multi_label = self.study.method, self.study.task.kind == "multi-label"
        if params.non_target:
            logits, goal = without_target(logits, targets), without_target(goal, targets)
        return distillation(logits, soft(goal, params.temperature, multi_label), params.temperature, multi_label)


def batches(count: int, size: int) -> list[Tensor]:
    """Rows of each public batch, the same at every site; a last one of a single row is joined to the one before it."""
    parts = list(torch.split(torch.arange(count), size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def correlation_loss(logits: Tensor, mean: Tensor) -> Tensor:
    """How far the cross-correlation of two sets of scores is from 1 on its diagonal and from -1 off it.

    Args:
        logits: ``[B, K]``, of the network that learns.
        mean: ``[B, K]``, over sites.
    """
    matrix = _standardised(logits).T @ _standardised(mean) / len(logits)
    diagonal = matrix.diagonal()
    off = (1 + matrix).square().sum() - (1 + diagonal).square().sum()
    return (1 - diagonal).square().sum() + OFF_DIAGONAL * off


def _standardised(scores: Tensor) -> Tensor:
    """Columns with mean 0 and population variance 1; a constant column becomes 0."""
    centred = scores - scores.mean(0)
    return centred / (centred.square().mean(0) + _EPSILON).sqrt()


def cosines(found: Tensor) -> Tensor:
    """Cosines between the features of all pairs of a batch, ``[B, B]`` from ``[B, F]``."""
    unit = F.normalize(found, dim=1)
    return unit @ unit.T


def similarity_loss(found: Tensor, goal: Tensor) -> Tensor:
    """KL from the sites' mean similarities to the network's own, by rows and without the diagonal.

    Args:
        found: Features of a batch, ``[B, F]``.
        goal: Mean over sites of the cosines, ``[B, B]``.
    """
    own, wanted = (_off_diagonal(matrix) / SIMILARITY_TEMPERATURE for matrix in (cosines(found), goal))
    return distillation(own, soft(wanted, 1.0, False), 1.0, False)


def _off_diagonal(matrix: Tensor) -> Tensor:
    """``[B, B - 1]``: each row without its own entry."""
    size = len(matrix)
    return matrix[~torch.eye(size, dtype=torch.bool, device=matrix.device)].view(size, size - 1)


def without_target(logits: Tensor, targets: Tensor) -> Tensor:
    """``[B, K - 1]``: each row of ``[B, K]`` without its own class, int64 ``[B]``."""
    other = torch.ones_like(logits, dtype=torch.bool).scatter_(1, targets[:, None], value=False)
    return logits[other].view(len(logits), -1)
