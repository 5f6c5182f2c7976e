"""KT-pFL: every site has a target of its own on public images, mixed with coefficients that the server learns.

Zhang, Guo, Ma, Wang, Xu, Wu: Parameterized knowledge transfer for personalized federated learning. NeurIPS 2021. arXiv
2111.02862. Constants as in the published code (facts known from that code). A round, with K sites, P_t the public
images of the round (their labels are not used) and coefficients c, ``K x K``, whose rows sum to 1::

    site k    w_k ← fitted to its last target on P_{t-1}; then trained on its own images
              p_k(x) = softmax(z_k(x) / T)                                   for x in P_t, sent; T = 10
    server    L_k(c_k) = mean_x,j (sum_m c_km p_m(x) - p_k(x))^2 + rho mean_m (c_km - 1/K)^2
              c_k ← softmax(5 (c_k - step dL_k/dc_k));  target of k = sum_m c_km p_m

Fitted means T^2 KL(target || softmax(z / T)). The penalty, rho = 0.7, keeps sites from listening to themselves alone,
where the first term is zero.

Ours: what is fitted is summed over the C classes and has the factor T^2, where the code takes the mean over images and
classes without it: 100 C times less at T = 10. The step is the exact minimum of L_k along its gradient (L_k is
quadratic), where the code searches for a step. A site that was absent keeps its row; its target is mixed from the sites
that answered, with its coefficients for these scaled to sum to 1. A round begins with the target of the round before,
so that a site is called once a round and what it deploys was trained on its own images last. In batch normalisation a
site's running statistics stand still while it learns from public images. With findings that do not exclude each other,
sigmoid(z / T) for softmax and the Bernoulli KL, averaged over findings.

Leaves a site: its softened probabilities of the round's images, ``m x classes`` values, and two losses. Comes to a
site: its own target, of the same size. The coefficients stay at the server, which learns from them which sites are
alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from polyclinic.data.proxies import PROXY_OPS, agree_on_proxies
from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Site
from polyclinic.federation.state import ServerState
from polyclinic.methods.base import Method, MethodParams, Op, draw_cohort, load_own
from polyclinic.secure.sum import SecureSum
from polyclinic.study import Study
from polyclinic.transfer.proxy_logits import ANSWERS, DigestSettings, ProxyRound, answers, check_public, digest
from polyclinic.transfer.soft_targets import distillation, soft


class KTpFLParams(MethodParams):
    """Settings of kt-pfl."""

    name: Literal["kt-pfl"] = "kt-pfl"
    proxies: int = Field(500, ge=2)
    """Public images of a round, drawn anew in each; all where there are fewer."""
    digest: DigestSettings = DigestSettings()
    """How a site learns its target."""
    temperature: float = Field(10.0, gt=0)
    """T of the probabilities: more is softer."""
    rho: float = Field(0.7, ge=0)
    """Weight of the penalty that draws coefficients to 1/K."""
    sharpness: float = Field(5.0, gt=0)
    """Factor of the coefficients inside the softmax that makes them sum to 1."""


class KTpFL(Method):
    """Target of site k: Σₘ cₖₘ pₘ on public images, c learnt at the server."""

    Params = KTpFLParams
    title = "personal mixtures of answers on public images"
    reference = "Zhang et al., NeurIPS 2021, arXiv 2111.02862"
    needs = "proxies: public images, their labels are not used"
    exchanges = False
    mixed_networks = True
    personal = True
    trained_at_home = True
    starts_global = False

    @classmethod
    def check(cls, study: Study) -> None:
        """One answer an image, from each site by itself."""
        check_public(study, "the probabilities")

    def server(self, channel: Channel, state: ServerState, sums: SecureSum) -> Iterator[None]:
        """Gather probabilities, learn who should listen to whom, mix each site's target."""
        if state.finished == 0:
            count = len(channel.sites)
            state.groups["coefficients"] = {"matrix": torch.full((count, count), 1 / count, dtype=torch.float64)}
        for number in state.rounds(self.study.method.rounds):
            agree_on_proxies(channel, self.study, state)
            cohort = draw_cohort(self.study, channel.sites, number)
            targets = state.groups.get("targets", {})
            own = {s: {"probabilities": targets[s]} if s in targets else {} for s in cohort}
            found = answers(channel, "train", {s: Message.pack({"target": target}) for s, target in own.items()})
            self._mix(channel.sites, state, {site: answer["probabilities"] for site, answer in found.items()})
            yield

    def shared(self, model: nn.Module) -> list[str]:
        """No tensor of a network leaves."""
        return []

    def ops(self) -> dict[str, Op]:
        """Agree on the public images; learn, train, answer."""
        return {**PROXY_OPS, "train": Op(self.train, ANSWERS)}

    def train(self, site: Site, message: Message) -> Message:
        """The last round's target first, then the site's own images; answer with softened probabilities."""
        params, multi_label = self.study.method, self.study.task.kind == "multi-label"
        load_own(site)
        said: dict[str, float] = {}
        target = message.group("target")
        if target and params.digest.epochs:
            goal, last = target["probabilities"], ProxyRound.draw(site.proxies, self.study, site.round - 1)
            said["digest"] = digest(
                site, last, lambda z, rows: distillation(z, goal[rows], params.temperature, multi_label)
            )
        result = site.train()
        site.state.save("personal", site.tensors)
        now = ProxyRound.draw(site.proxies, self.study, site.round)
        logits = now.logits(site.model, self.study.evaluation.batch_size)
        own = {"probabilities": soft(logits, params.temperature, multi_label)}
        return Message.pack({"answers": own}, loss=result.loss, **said)

    def _mix(self, sites: tuple[str, ...], state: ServerState, found: Mapping[str, Tensor]) -> None:
        """New coefficients of the sites that answered, and every site's target."""
        params, matrix = self.study.method, state.groups["coefficients"]["matrix"].cpu().clone()
        there = [sites.index(site) for site in found]
        stacked = torch.stack([answer.double().cpu().flatten() for answer in found.values()])
        part = matrix[there][:, there]
        held = part.sum(1, keepdim=True)
        better = learnt_coefficients(part / held, stacked, params.rho, params.sharpness)
        # What a row gives to absent sites stays as it was.
        matrix[torch.tensor(there)[:, None], torch.tensor(there)] = better * held
        state.groups["coefficients"] = {"matrix": matrix}
        like = next(iter(found.values()))
        mixed = matrix[:, there] / matrix[:, there].sum(1, keepdim=True) @ stacked
        state.groups["targets"] = {s: mixed[k].reshape(like.shape).to(like) for k, s in enumerate(sites)}


def learnt_coefficients(coefficients: Tensor, answers: Tensor, rho: float, sharpness: float) -> Tensor:
    """One step of every row to the minimum of its loss along the gradient, then a softmax over each row.

    Args:
        coefficients: ``[K, K]``, rows sum to 1.
        answers: ``[K, D]``: each site's probabilities of all images and classes.
        rho: Weight of the penalty.
        sharpness: Factor inside the softmax.

    Returns:
        ``[K, K]``, positive, rows sum to 1.
    """
    count = len(coefficients)
    gram = answers @ answers.T / answers.shape[1]
    penalty = rho / count
    # The loss of row k is (c - e_k)^T G (c - e_k) + rho / K |c - 1/K|^2.
    slope = 2 * (coefficients - torch.eye(count).to(gram)) @ gram + 2 * penalty * (coefficients - 1 / count)
    curvature = 2 * ((slope @ gram) * slope).sum(1, keepdim=True) + 2 * penalty * slope.square().sum(1, keepdim=True)
    size = torch.where(curvature > 0, slope.square().sum(1, keepdim=True) / curvature, 0.0)
    return torch.softmax(sharpness * (coefficients - size * slope), dim=1)
