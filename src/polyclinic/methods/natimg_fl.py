"""NatIMG-FL (reconstruction): hospitals with different networks learn from a central one through natural images.

Zhang, Liu, Hu, Huang, Xue, Huang, Tan, Wu: Enhancing X-ray image classification through heterogeneous federated
learning with natural image-augmented models. IEEE TPAMI, early access 2026. Of this paper the abstract alone is public.
From it: different networks at the sites, a central model, labelled natural images as a second task and as what
knowledge is exchanged on, alignment of the two kinds of images, and two kinds of learned weights. Everything else is
ours, the losses and all numbers among it; what the weights mean and how they are learned is after Jang et al., ICML
2019 (arXiv 1905.05901). A round::

    server   sends G, from round t_warm on
    site k   L_k = L_X + alpha L_N + gamma align(f(X-rays), f(naturals)) + beta D(G -> k)
                   + eta T² KL(s_T(G) || s_T(w_k))
             w_k <- the study's optimizer on L_k; every q steps the weights of D learn from held-out X-rays
             sends w_k
    server   L_G = L_N + beta_s sum_k pi_k D(k -> G) + eta_s T² KL(sum_k pi_k s_T(w_k) || s_T(G))
             G <- the study's optimizer on L_G; every q steps the weights of D learn from held-out natural images

L_X is the study's loss, L_N the cross-entropy of a second head over the natural classes, pi_k the site's share of
``aggregation.weight``. D is in ``transfer.dual_weights``, align in ``transfer.alignment``, the learning of weights in
``transfer.hypergradient``; L_k is computed in ``transfer.site_lessons`` and L_G in ``transfer.central``. X-rays and
natural images pass in batches of their own, with running statistics of their own (``models.domain_statistics``).

A site that is absent keeps its model, the server keeps its matching for it, and pi sums to one over those who answered;
where nobody answered the run stops. An answer of other tensors than the site's network has, or with a number that is
not finite, is none.

Travels to a site, from round t_warm on: all of G but its second head, its running statistics being of natural images,
and whether G has learnt the study's classes (``taught``), before which its soft outputs are left out.
Leaves a site: its loss, its weight, and all of its network but the second head, with running statistics of natural
images in the place of its own. With ``transport: vectors`` instead, both ways: for each natural image of the round the
taps' means over space, and the logits. All in float16. Never: running statistics, features, labels or outputs of a
site's own images, second heads, regressors, meta-networks, optimizers. What the weights look like is written into the
site's own folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from polyclinic.data.dataset import SiteData
from polyclinic.data.proxies import PROXY_OPS, Proxies, agree_on_proxies
from polyclinic.errors import StudyError
from polyclinic.federation.answers import accepted, checked
from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Site, Workbench
from polyclinic.federation.state import ServerState
from polyclinic.methods.base import TRAINED, Leaf, Method, Op, draw_cohort, load_own
from polyclinic.models.domain_statistics import NaturalStatistics
from polyclinic.models.registry import untrained_model
from polyclinic.models.weights import load_tensors
from polyclinic.secure.sum import SecureSum
from polyclinic.seeds import generator
from polyclinic.study import ModelSettings, Study
from polyclinic.transfer.central import CentralTraining
from polyclinic.transfer.held_out import held_out
from polyclinic.transfer.natimg_settings import NatIMGFLParams
from polyclinic.transfer.proxy_logits import check_public
from polyclinic.transfer.site_lessons import SiteLessons
from polyclinic.transfer.teachers import NetworkTeacher, Shape, Teacher, VectorTeacher, like_vectors, vectors
from polyclinic.transfer.wire import halved, widened

CENTRAL, TEACHER = "central", "teacher"
"""Roles of networks: the one that the server trains, and those that are asked."""
Tensors = dict[str, Tensor]


class NatIMGFL(Method):
    """L_k at the sites and L_G at the server, as at the head of this file."""

    Params = NatIMGFLParams
    title = "different networks and a central one, through natural images (reconstruction)"
    reference = "Zhang et al., IEEE TPAMI 2026, 10.1109/TPAMI.2026.3704679 (abstract); Jang et al., arXiv 1905.05901"
    needs = "proxies: public images with labels, and networks that name their taps"
    mixed_networks = True
    personal = True
    trained_at_home = True
    starts_global = False

    @classmethod
    def check(cls, study: Study) -> None:
        """One answer an image, networks in clear, no common amplitude, one class an image for the contrast."""
        params = study.method
        check_public(study, "what the network says" if params.transport == "vectors" else "the network")
        if any(own.harmonise for own in (study.model, *study.models.values(), params.central or study.model)):
            raise StudyError(
                "method natimg-fl: model.harmonise would give natural images the amplitude of patients' ones. Set "
                "harmonise: 0."
            )
        if params.alignment == "supcon" and study.task.kind != "multi-class":
            raise StudyError(
                f"method natimg-fl: alignment supcon ties one class to each image, but task.kind is {study.task.kind}. "
                "Use alignment: mmd."
            )

    def check_networks(self, networks: Mapping[str, nn.Module]) -> None:
        """All networks, the central one too, must say where their maps and features are."""
        central = untrained_model(self.study, self.central_settings)
        for model in {id(model): model for model in (*networks.values(), central)}.values():
            Shape.of(model, self.study.data.image)

    def check_data(self, data: SiteData) -> None:
        """Refuse a site without patients to keep apart, where weights are learned."""
        self.parts(data)

    def server(self, channel: Channel, state: ServerState, sums: SecureSum) -> Iterator[None]:
        """Each round agree on the natural images, send G, gather what sites learnt, train G."""
        params = self.study.method
        for number in state.rounds(params.rounds):
            proxies = agree_on_proxies(channel, self.study, state)
            if "central" not in state.groups:
                self._central(proxies, 0).begin(state)
            self._round(channel, state, proxies, number)
            yield

    def _round(self, channel: Channel, state: ServerState, proxies: Proxies, number: int) -> None:
        """One round. Networks of sites are held in here alone, not while the next round trains."""
        params, message = self.study.method, Message()
        if params.to_sites(number):
            sent = self._sent(state.groups["central"], proxies, number)
            message = Message.pack({"central": sent}, taught=bool(state.scalars.get("taught")))
        cohort = draw_cohort(self.study, channel.sites, number)
        like = {site: self._answer(site, proxies, number) for site in cohort}
        teachers: dict[str, Teacher] = {}
        weights: dict[str, float] = {}
        for site, (received, weight) in accepted(
            channel, "train", dict.fromkeys(cohort, message), lambda s, reply: checked(s, "network", like[s], reply)
        ):
            if params.to_central and weight > 0:
                teachers[site] = self.teacher(self.study.model_of(site), received, proxies, number)
                weights[site] = weight
        self._central(proxies, number).train(state, teachers, weights)
        if teachers and params.teaches_classes:
            state.scalars["taught"] = True

    def ops(self) -> dict[str, Op]:
        """Agree on the natural images; train."""
        return {**PROXY_OPS, "train": Op(self.train, (Leaf("network", "array", "images"), *TRAINED))}

    def train(self, site: Site, message: Message) -> Message:
        """Train the site's own network with L_k and send it, or what it says."""
        params, proxies = self.study.method, site.proxies
        load_own(site)
        received = message.group("central")
        teacher = None
        if received:
            # Widened once, as it speaks in every step.
            wide = widened(received, site.state.device)
            teacher = self.teacher(self.central_settings, wide, proxies, site.round)
        drawn = self.drawn(proxies, site.round)
        lessons = SiteLessons(site, params, Shape.of(site.model, self.study.data.image), drawn, self.parts(site.data))
        result = lessons.train(teacher, soft=bool(message.scalars.get("taught")))
        sent: Tensors = {}
        if params.to_central and params.transport == "vectors":
            lessons.catch_up()
            sent = vectors(site.model, lessons.shape, lessons.statistics, proxies, drawn, self._size)
        elif params.to_central:
            lessons.catch_up()
            sent = halved({**site.tensors, **lessons.statistics})
        lessons.save()
        return Message.pack({"network": sent}, loss=result.loss, **{"weight/network": site.weight})

    def shared(self, model: nn.Module) -> list[str]:
        """No tensor is everybody's: each network travels by itself."""
        return []

    def central(self, state: ServerState) -> tuple[ModelSettings, Tensors] | None:
        """G, where it has learnt the study's classes. Its running statistics are those of natural images."""
        return (self.central_settings, state.groups["central"]) if state.scalars.get("taught") else None

    def records(self, state: ServerState) -> dict[str, Any]:
        """Of each round what the central model learnt, and the mean weights of its matching with each site."""
        shape = Shape.of(self._central_bench().model, self.study.data.image)
        return {"levels": list(shape.levels), "rounds": json.loads(str(state.scalars.get("transfer", "[]")))}

    @property
    def central_settings(self) -> ModelSettings:
        """The network of the central model."""
        return self.study.method.central or self.study.model

    def parts(self, data: SiteData) -> tuple[Tensor, Tensor] | None:
        """Positions that a site trains on and that judge the weights; None where nothing is kept apart."""
        params = self.study.method
        if not params.holds_out():
            return None
        if data.site not in self._parts:
            rng = generator(self.study.seed, data.site, "held-out patients")
            self._parts[data.site] = held_out(data, params.held_out, rng)
        return self._parts[data.site]

    @cached_property
    def _parts(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By site: the same in every round."""
        return {}

    def drawn(self, proxies: Proxies, number: int) -> Tensor:
        """Positions of the natural images that a round trains on, int64 and sorted: the same at server and sites."""
        positions, _ = proxies.parts(self.study.seed)
        subset = self.study.method.subset if self.study.method.transport == "vectors" else None
        if subset is None or subset >= len(positions):
            return positions
        rng = generator(self.study.seed, "natural images of a round", number)
        return torch.from_numpy(rng.choice(positions.numpy(), subset, replace=False)).sort().values

    def teacher(self, settings: ModelSettings, sent: Tensors, proxies: Proxies, number: int) -> Teacher:
        """Someone to learn from, from what was sent."""
        bench = self.networks.of(settings, TEACHER)
        if self.study.method.transport == "vectors":
            return VectorTeacher(sent, self.drawn(proxies, number), bench.device)
        return NetworkTeacher(bench.model, sent, Shape.of(bench.model, self.study.data.image))

    def _answer(self, site: str, proxies: Proxies, number: int) -> Tensors:
        """Tensors of the names and shapes of what a site sends; their values say nothing."""
        if not self.study.method.to_central:
            return {}
        bench = self.networks.of(self.study.model_of(site), TEACHER)
        if self.study.method.transport == "weights":
            return bench.tensors
        return like_vectors(Shape.of(bench.model, self.study.data.image), len(self.drawn(proxies, number)))

    @property
    def _size(self) -> int:
        return self.study.evaluation.batch_size

    def _central_bench(self) -> Workbench:
        return self.networks.of(self.central_settings, CENTRAL)

    def _central(self, proxies: Proxies, number: int) -> CentralTraining:
        return CentralTraining(self.study, self._central_bench(), proxies, self.drawn(proxies, number), number)

    def _sent(self, tensors: Tensors, proxies: Proxies, number: int) -> Tensors:
        """G as it travels."""
        if self.study.method.transport == "weights":
            return halved(tensors)
        model = self.networks.of(self.central_settings, TEACHER).model
        load_tensors(model, tensors)
        shape, statistics = Shape.of(model, self.study.data.image), NaturalStatistics.of(model).tensors
        return vectors(model, shape, statistics, proxies, self.drawn(proxies, number), self._size)
