"""FedDF: models of one architecture are averaged, then learn at the server what the ensemble of all sites says.

Lin, Kong, Stich, Jaggi: Ensemble distillation for robust model fusion in federated learning. NeurIPS 2020, Algorithms 1
and 3. arXiv 2006.07242. Numbers and order as in the published code (facts known from that code). A round, with P_t the
public images of the round (their labels are not used)::

    site k     starts from its group's model; trained on its own images; w_k sent
    server     w_g = sum_k n_k w_k / sum_k n_k             over the sites k of architecture g
               w_g ← Adam on KL(softmax(mean over all sites of z_k(x)) || softmax(z_g(x))), x in P_t
               w_g sent to the sites of g

Sites with equal network settings are a group. Adam has rate 1e-3, as published. Ours:

* The published code watches a validation set of the task at the server. Ours has no patients: a tenth of the round's
  public images is kept apart. Of the average and the values after every ``every`` steps those with the smallest KL
  there are used; ``patience`` steps without gain end it. So what does not even help on public images changes nothing.
* A constant rate instead of a cosine to zero over 10,000 steps, far fewer steps, and no teacher is dropped.
* In batch normalisation the group's model uses the averaged running statistics of patients' images, which do not
  move. So networks whose statistics stay at home (``norm: batch-local``) are refused: the server could not ask them.
* With findings that do not exclude each other, sigmoid for softmax and the Bernoulli KL.

A group without an answer in a round keeps its model, which still learns from the others. A site that misses the group's
model goes on from its own.

Leaves a site: its network's tensors, its weight and a loss. Comes to a site: its group's tensors. Nothing about public
images travels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from polyclinic.data.batches import proxy_batches
from polyclinic.data.proxies import PROXY_OPS, agree_on_proxies
from polyclinic.errors import StudyError
from polyclinic.federation.answers import accepted, checked
from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Site
from polyclinic.federation.state import ServerState
from polyclinic.methods.base import TRAINED, Leaf, Method, MethodParams, Op, draw_cohort, load_own
from polyclinic.models.normalisation import running_statistics_used
from polyclinic.models.weights import load_tensors, snapshot
from polyclinic.secure.sum import SecureSum
from polyclinic.seeds import derive_seed, generator
from polyclinic.study import Study, TrainingSettings
from polyclinic.transfer.proxy_logits import ProxyRound, check_public
from polyclinic.transfer.soft_targets import distillation, soft

HELD_OUT = 0.1
"""Share of a round's public images that judges, and is not learnt from."""
Tensors = dict[str, Tensor]


class FedDFParams(MethodParams):
    """Settings of feddf."""

    name: Literal["feddf"] = "feddf"
    proxies: int = Field(500, ge=4)
    """Public images of a round, drawn anew in each; all where there are fewer."""
    steps: int = Field(200, ge=0)
    """Most steps of distillation a round and group; 0: the averages are used as they are."""
    batch_size: int = Field(128, ge=2)
    """Public images per step."""
    lr: float = Field(1e-3, ge=0)
    """Rate of Adam at the server."""
    every: int = Field(10, ge=1)
    """Steps between two looks at the public images that are kept apart."""
    patience: int = Field(50, ge=1)
    """Steps without gain on these that end a distillation."""


class FedDF(Method):
    """w_g ← Σₖ nₖ wₖ / Σₖ nₖ over its sites, then distilled from meanₖ zₖ over all sites on public images."""

    Params = FedDFParams
    title = "averages by architecture, distilled from the ensemble"
    reference = "Lin et al., NeurIPS 2020, arXiv 2006.07242"
    needs = "proxies: public images, their labels are not used"
    exchanges = False
    mixed_networks = True
    personal = True
    starts_global = False

    @classmethod
    def check(cls, study: Study) -> None:
        """One answer an image; each site's whole network by itself."""
        check_public(study, "the network")
        if any(own.norm == "batch-local" for own in (study.model, *study.models.values())):
            raise StudyError(
                "method feddf: the server asks each site's network about public images, but with norm batch-local "
                "the statistics that it needs for that stay at the site. Use norm: batch or group, or method ds-fl."
            )

    def server(self, channel: Channel, state: ServerState, sums: SecureSum) -> Iterator[None]:
        """Gather networks, average each group, distil the ensemble into it, send it back."""
        groups = self.groups(channel.sites)
        for number in state.rounds(self.study.method.rounds):
            proxies = agree_on_proxies(channel, self.study, state)
            shown = ProxyRound.draw(proxies, self.study, number)
            cohort = draw_cohort(self.study, channel.sites, number)
            averages, mean = self._gathered(channel, cohort, groups, shown)
            for group, members in groups.items():
                bench = self.networks.of_site(members[0])
                start = averages.get(group) or state.groups.get(group) or self._start(members[0])
                load_tensors(bench.model, start)
                self._distil(bench.model, shown, mean, derive_seed(self.study.seed, "fusion", group, number))
                state.groups[group] = snapshot({name: bench.tensors[name] for name in start})
            fused = {site: state.groups[group] for group, members in groups.items() for site in members}
            channel.call("receive", {site: Message.pack({"model": model}) for site, model in fused.items()})
            yield

    def ops(self) -> dict[str, Op]:
        """Agree on the public images; train and send the network; keep the group's."""
        sent = (Leaf("model", "array", "images"), *TRAINED)
        return {**PROXY_OPS, "train": Op(self.train, sent), "receive": Op(receive, ())}

    def deployment(self, state: ServerState) -> Message:
        """Nothing: sites have their group's model."""
        return Message()

    def deploy(self, site: Site, message: Message) -> None:
        """Load the model that the site keeps."""
        load_own(site)

    def train(self, site: Site, message: Message) -> Message:
        """Train on from the group's model, and send what it came to."""
        load_own(site)
        result = site.train()
        site.state.save("personal", site.tensors)
        sent = snapshot({name: site.tensors[name] for name in self.shared(site.model)})
        return Message.pack({"model": sent}, loss=result.loss, **{"weight/model": site.weight})

    def groups(self, sites: tuple[str, ...]) -> dict[str, list[str]]:
        """Sites with equal network settings, by their model's name in the server's state; the study's is ``model``."""
        found: dict[str, list[str]] = {}
        for site in sites:
            own = self.study.model_of(site)
            alike = next((name for name, group in found.items() if self.study.model_of(group[0]) == own), None)
            found.setdefault(alike or ("model" if own == self.study.model else f"model.{site}"), []).append(site)
        return found

    def _start(self, site: str) -> Tensors:
        bench = self.networks.of_site(site)
        return {name: bench.initial[name] for name in self.shared(bench.model)}

    def _gathered(
        self, channel: Channel, cohort: list[str], groups: Mapping[str, list[str]], shown: ProxyRound
    ) -> tuple[dict[str, Tensors], Tensor]:
        """Weighted averages by group, and the mean of all networks' logits; one reply is held at a time."""
        group_of = {site: group for group, members in groups.items() for site in members}
        sums: dict[str, Tensors] = {}
        weights: dict[str, float] = {}
        logits: list[Tensor] = []

        def read(site: str, reply: Message) -> tuple[Tensors, float]:
            return checked(site, "model", self._start(site), reply)

        for site, (received, weight) in accepted(channel, "train", dict.fromkeys(cohort, Message()), read):
            group = group_of[site]
            into = sums.setdefault(group, {n: torch.zeros_like(t, dtype=torch.float64) for n, t in received.items()})
            for name, tensor in received.items():
                into[name].add_(tensor, alpha=weight)
            weights[group] = weights.get(group, 0.0) + weight
            model = self.networks.of_site(site).model
            load_tensors(model, received)
            logits.append(shown.logits(model, self.study.evaluation.batch_size))
            del received  # before the next site trains
        averages = {g: {n: (t / weights[g]).float() for n, t in own.items()} for g, own in sums.items() if weights[g]}
        return averages, torch.stack(logits).double().mean(0).float()

    def _distil(self, model: nn.Module, shown: ProxyRound, mean: Tensor, seed: int) -> None:
        """Fit the loaded network to the ensemble; leave in it the values that did best on the images kept apart.

        Args:
            model: Changed in place.
            shown: The round's images.
            mean: The ensemble's logits of them, ``[m, K]``.
            seed: Of the order of images and dropout.
        """
        params, multi_label = self.study.method, self.study.task.kind == "multi-label"
        if not params.steps:
            return
        goal = soft(mean, 1.0, multi_label)
        held = max(1, round(HELD_OUT * len(shown)))
        apart, learnt = ProxyRound(shown.proxies, shown.positions[:held]), torch.arange(held, len(shown))
        best: list[tuple[float, Tensors]] = []
        since = 0

        def improved() -> bool:
            logits = apart.logits(model, self.study.evaluation.batch_size)
            found = float(distillation(logits, goal[:held], 1.0, multi_label))
            if best and found >= best[0][0]:
                return False
            best[:] = [(found, snapshot(dict(model.named_parameters())))]
            return True

        def watched() -> Iterator[Tensor]:
            # What comes after a yield sees the network after the step.
            nonlocal since
            order = generator(seed, "order")
            for number, rows in enumerate(proxy_batches(learnt, order, params.batch_size, steps=params.steps), 1):
                yield rows
                if number % params.every == 0 or number == params.steps:
                    since = 0 if improved() else since + params.every
                    if since >= params.patience:
                        return

        model.train()
        with running_statistics_used(model):
            improved()
            shown.fit(
                model,
                lambda logits, rows: distillation(logits, goal[rows], 1.0, multi_label),
                watched(),
                TrainingSettings(optimizer="adam", amp=self.study.training.amp),
                lr=params.lr,
                seed=seed,
            )
        load_tensors(model, best[0][1])


def receive(site: Site, message: Message) -> Message:
    """Keep the group's model, with what never left the site."""
    load_own(site)
    site.load(message.group("model"))
    site.state.save("personal", site.tensors)
    return Message()
