"""DS-FL: sites learn the sharpened mean of their probabilities of public images, and a central model does too.

Itahara, Nishio, Koda, Morikura, Yamamoto: Distillation-based semi-supervised federated learning for
communication-efficient collaborative training with non-IID private data. IEEE Transactions on Mobile Computing 2021.
arXiv 2008.06180. A round, with P_t the public images of the round (their labels are not used)::

    site k     w_k ← fitted to the last targets on P_{t-1}; then trained on its own images
               p_k(x) = softmax(z_k(x))                                  for x in P_t, sent
    server     target(x) = softmax(mean over sites of p_k(x) / T)        T = 0.1: entropy reduction aggregation
               central model ← fitted to the targets on P_t

Fitted means KL(target || softmax(z)), which has the gradients of the paper's cross-entropy with soft targets.

What is averaged and sharpened are **probabilities**, as we read the paper; published versions differ (of logits the
result is far sharper). With findings that do not exclude each other each is a distribution over yes and no: sigmoid for
softmax, and the sharpened mean is sigmoid((2 p - 1) / T) (ours).

Ours: a round begins with the targets of the round before, so that a site is called once a round and what it deploys was
trained on its own images last; in batch normalisation a site's running statistics stand still while it learns from
public images. The central model has never seen a patient; with batch normalisation its statistics are those of public
images.

Leaves a site: its probabilities of the round's images, ``m x classes`` values, and two losses. Comes to a site: targets
of the same size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from polyclinic.data.batches import proxy_batches
from polyclinic.data.proxies import PROXY_OPS, agree_on_proxies
from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Site
from polyclinic.federation.state import ServerState
from polyclinic.methods.base import Method, MethodParams, Op, draw_cohort, load_own
from polyclinic.models.weights import load_tensors, snapshot
from polyclinic.secure.sum import SecureSum
from polyclinic.seeds import derive_seed, generator
from polyclinic.study import ModelSettings, Study
from polyclinic.training import learning_rate
from polyclinic.transfer.proxy_logits import (
    ANSWERS,
    DigestSettings,
    ProxyRound,
    TargetLoss,
    answers,
    check_public,
    digest,
    mean_answer,
)
from polyclinic.transfer.soft_targets import distillation, soft


class DSFLParams(MethodParams):
    """Settings of ds-fl."""

    name: Literal["ds-fl"] = "ds-fl"
    proxies: int = Field(500, ge=2)
    """Public images of a round, drawn anew in each; all where there are fewer."""
    temperature: float = Field(0.1, gt=0, le=1)
    """T of the sharpening: 1 hardly sharpens, less more."""
    digest: DigestSettings = DigestSettings()
    """How sites, and the server's central model, learn the targets."""
    central: ModelSettings | None = None
    """The server's network; empty: ``model`` of the study."""


class DSFL(Method):
    """p ← softmax(meanₖ softmax(zₖ) / T) on public images, for all sites and the server to learn."""

    Params = DSFLParams
    title = "sharpened mean probabilities of public images"
    reference = "Itahara et al., IEEE TMC 2021, arXiv 2008.06180"
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
        """Gather probabilities, sharpen their mean, teach the central model."""
        for number in state.rounds(self.study.method.rounds):
            proxies = agree_on_proxies(channel, self.study, state)
            cohort = draw_cohort(self.study, channel.sites, number)
            message = Message.pack({"targets": state.groups.get("targets", {})})
            mean = mean_answer(answers(channel, "train", dict.fromkeys(cohort, message)))["probabilities"]
            targets = self.sharpened(mean)
            state.groups["targets"] = {"probabilities": targets}
            state.groups["central"] = self._taught(state, ProxyRound.draw(proxies, self.study, number), targets)
            yield

    def shared(self, model: nn.Module) -> list[str]:
        """No tensor of a network leaves."""
        return []

    def ops(self) -> dict[str, Op]:
        """Agree on the public images; learn, train, answer."""
        return {**PROXY_OPS, "train": Op(self.train, ANSWERS)}

    def central(self, state: ServerState) -> tuple[ModelSettings, dict[str, Tensor]] | None:
        """The server's model, once it has learnt anything."""
        found = state.groups.get("central")
        return None if found is None else (self._central_settings, found)

    @property
    def _central_settings(self) -> ModelSettings:
        return self.study.method.central or self.study.model

    @property
    def _multi_label(self) -> bool:
        return self.study.task.kind == "multi-label"

    def sharpened(self, mean: Tensor) -> Tensor:
        """Entropy reduction: mean probabilities ``[m, K]`` to targets of the same shape."""
        if self._multi_label:
            # Softmax over (p, 1 - p) / T, of which the first entry is this.
            return soft(2 * mean - 1, self.study.method.temperature, True)
        return soft(mean, self.study.method.temperature, False)

    def _loss(self, targets: Tensor) -> TargetLoss:
        return lambda logits, rows: distillation(logits, targets[rows], 1.0, self._multi_label)

    def train(self, site: Site, message: Message) -> Message:
        """The last round's targets first, then the site's own images; answer with probabilities."""
        load_own(site)
        said = {}
        targets = message.group("targets")
        if targets and self.study.method.digest.epochs:
            last = ProxyRound.draw(site.proxies, self.study, site.round - 1)
            said["digest"] = digest(site, last, self._loss(targets["probabilities"]))
        result = site.train()
        site.state.save("personal", site.tensors)
        now = ProxyRound.draw(site.proxies, self.study, site.round)
        logits = now.logits(site.model, self.study.evaluation.batch_size)
        own = {"probabilities": soft(logits, 1.0, self._multi_label)}
        return Message.pack({"answers": own}, loss=result.loss, **said)

    def _taught(self, state: ServerState, shown: ProxyRound, targets: Tensor) -> dict[str, Tensor]:
        """The central model after this round's targets; as sites have it, but for its moving running statistics."""
        params, number = self.study.method, state.finished + 1
        bench = self.networks.of(self._central_settings, "central")
        load_tensors(bench.model, state.groups.get("central", bench.initial))
        if params.digest.epochs:
            rng = generator(self.study.seed, "central order", number)
            batches = proxy_batches(len(shown), rng, params.digest.batch_size, passes=params.digest.epochs)
            rate = learning_rate(self.study.training, number, params.rounds)
            lr, seed = params.digest.lr, derive_seed(self.study.seed, "central", number)
            model, training = bench.model.train(), self.study.training
            shown.fit(model, self._loss(targets), batches, training, lr=rate if lr is None else lr, seed=seed)
        return snapshot(bench.tensors)
