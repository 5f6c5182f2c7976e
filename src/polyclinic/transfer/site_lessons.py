"""One training of a site's own network in natimg-fl: its images, public ones, and what the central model says of these.

::

    L_k = L_X + alpha L_N + gamma align(f(own), f(public)) + beta D(G -> k) + eta T² KL(s_T(G) ‖ s_T(w_k))
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from polyclinic.data.augment import augment
from polyclinic.data.batches import balanced_batches
from polyclinic.federation.site import Site
from polyclinic.models.domain_statistics import NaturalStatistics, estimate_statistics, natural
from polyclinic.models.taps import tapped
from polyclinic.results import RunFolder
from polyclinic.seeds import derive_seed, generator
from polyclinic.training import Batch, Step, TrainingResult, learning_rate, plain_step
from polyclinic.transfer.alignment import aligned
from polyclinic.transfer.hypergradient import Parameters
from polyclinic.transfer.looks import Looks
from polyclinic.transfer.memory import Memory
from polyclinic.transfer.meta_step import MetaStep, network_of
from polyclinic.transfer.natimg_settings import NatIMGFLParams
from polyclinic.transfer.public_batches import PublicBatches
from polyclinic.transfer.pupil import Learnt, Mix, Pupil, chance, warm_up
from polyclinic.transfer.tally import Tally
from polyclinic.transfer.teachers import Shape, Teacher, pooled

TEACHER = "central"
_KEY = "pupil"
_BATCHES = 16
"""Of public images, which statistics are estimated on where training did not use any."""


class SiteLessons:
    """What natimg-fl adds to the local training of a round.

    Args:
        site: With its own model loaded.
        params: Settings.
        shape: Taps of its network.
        drawn: Positions of the public images of the round.
        parts: Positions to train on and to judge weights by; None: nothing is kept apart.
    """

    def __init__(
        self, site: Site, params: NatIMGFLParams, shape: Shape, drawn: Tensor, parts: tuple[Tensor, Tensor] | None
    ) -> None:
        self.site, self.params, self.shape, self._parts = site, params, shape, parts
        study, number = site.study, site.round
        self._seed = derive_seed(study.seed, site.name, number, "natimg-fl")
        # Vectors were made of images as they are, and both networks must see the same.
        changes = study.training.augment if params.transport == "weights" else None
        device = next(site.model.parameters()).device
        self._public = PublicBatches(site.proxies, drawn, self._seed, changes, device)
        first = derive_seed(study.seed, site.name, "natimg-fl")
        classes = len(site.proxies.classes)
        # Not from the loaded network, whose statistics are those of patients' images after its first training.
        begun = NaturalStatistics({n: site.initial[n].clone() for n in NaturalStatistics.of(site.model).tensors})
        self.pupil = Pupil(site.model, shape, classes, params.alignment, begun, first)
        self.pupil.mixed = study.training.amp and device.type == "cuda"
        self._first = first
        self._kept, scalars = site.state.load(_KEY) or ({}, {})
        self._history: list[dict[str, Any]] = json.loads(str(scalars.get("history", "[]")))
        self._rate = learning_rate(study.training, number, params.rounds)
        self._tally = Tally()
        self._meta: MetaStep | None = None
        self._looks: Looks | None = None
        self._learnt: Learnt | None = None

    @property
    def statistics(self) -> dict[str, Tensor]:
        """The network's running statistics for public images."""
        return self.pupil.statistics.tensors

    def train(self, teacher: Teacher | None, *, soft: bool) -> TrainingResult:
        """Train as ``local`` does, with the loss at the head of this file.

        Args:
            teacher: The central model; None: the round goes without it.
            soft: Whether it has learnt the study's classes, so that its soft outputs count.
        """
        site, params = self.site, self.params
        mix = Mix(
            params.alpha_of(site.round),
            params.beta if teacher else 0.0,
            params.eta if teacher and soft else 0.0,
            params.temperature,
            site.task.kind == "multi-label",
        )
        gamma = 0.0 if params.alignment == "none" else params.gamma_of(site.round)
        if teacher is not None and params.beta:
            seed = derive_seed(self._first, "matching")
            self.pupil.learn_from(TEACHER, list(teacher.channels), params.weights, seed)
            self._looks = Looks(self.pupil.matching, params.q) if params.weights != "uniform" else None
        training = site.study.training
        self._memory = Memory(self.pupil, training, self._rate, params.meta_lr)
        self._memory.load(self._kept)
        self._meta = self._memory.meta_step(params, params.beta)
        if not self._kept and params.warmup:
            seed = derive_seed(self._seed, "warm up")
            warm_up(self.pupil, self._public, params.warmup, training, self._rate, seed)
        used = bool(mix.alpha or gamma or mix.beta or mix.eta)
        rule = partial(self._step, mix=mix, gamma=gamma, teacher=teacher) if used else plain_step
        return site.train(rule=rule, among=None if self._parts is None else self._parts[0])

    def save(self) -> None:
        """Remember network and all beside it, and write what the weights look like into the site's own folder."""
        site = self.site
        record = {"round": site.round, **self._tally.means(), **self._looked()}
        history = [*self._history, record]
        site.state.save(_KEY, {**self._kept, **self._memory.tensors()}, history=json.dumps(history))
        site.state.save("personal", site.tensors)
        told = {"site": site.name, "levels": list(self.shape.levels), "rounds": history}
        folder = RunFolder(site.folder / "transfer")
        folder.guard(lambda: folder.path.mkdir(parents=True, exist_ok=True))
        folder.write(f"{site.name}.json", json.dumps(told, indent=1))

    def catch_up(self) -> None:
        """Estimate the statistics for public images where this training has not seen any."""
        if self._learnt is not None or not self.statistics:
            return
        model = self.pupil.network
        batches = (self._public.draw(self.site.study.training.batch_size).images for _ in range(_BATCHES))
        with natural(model, self.statistics), torch.no_grad():
            estimate_statistics(model, batches)

    def _step(self, step: Step, *, mix: Mix, gamma: float, teacher: Teacher | None) -> Tensor:
        """Gradients of L_k; its own optimizers and, every q steps, the weights move here."""
        tap = self.shape.feature
        with tapped(step.model, [tap] if gamma else []) as seen:
            loss = step.loss(step.batch)
        public = self._public.draw(len(step.batch.targets))
        with chance(derive_seed(step.seed, "public", step.number), public.images.device):
            taught = {TEACHER: teacher.say(public.positions, public.images)} if teacher else {}
            learnt = self.pupil.learn(public.images, public.labels, taught, {TEACHER: 1.0}, mix)
        total = loss + learnt.loss
        if gamma:
            # The first pass is that of patients' images; samples come after it.
            own = pooled(seen[tap][0]), step.batch.targets
            gap = aligned(self.params.alignment, own, (learnt.said.features, public.labels), gamma, self.pupil.judge)
            total = total + gap
            learnt.terms["alignment"] = gap.detach()
        total.backward()  # type: ignore[no-untyped-call]
        if self._meta is not None and learnt.sources and step.number % self.params.q == 0:
            self._learn_weights(step, public.images, learnt)
        self._memory.beside.step()
        self._tally.add(learnt.terms)
        if self._looks is not None:
            self._looks.see(step.number, learnt)
        self._learnt = learnt
        return loss

    def _learn_weights(self, step: Step, images: Tensor, learnt: Learnt) -> None:
        assert self._meta is not None
        judged, plain = self._judges(step), Batch(step.batch.inputs, step.batch.targets)
        seed = derive_seed(step.seed, "meta", step.number)
        self._meta(
            images,
            learnt.sources,
            {TEACHER: 1.0},
            objective=lambda theta: _loss_at(step, theta, judged),
            task=lambda theta: _loss_at(step, theta, plain),
            seed=seed,
        )

    def _judges(self, step: Step) -> Batch:
        """Images of patients that are not trained on, at most as many as in the step, balanced as training is."""
        assert self._parts is not None
        held, data = self._parts[1].numpy(), self.site.data
        rng = generator(step.seed, "judges", step.number)
        count = min(len(held), max(2, len(step.batch.targets)))
        if self.site.study.training.balanced:
            drawn = next(balanced_batches(held, data.targets[held].numpy(), rng, count))
        else:
            drawn = rng.choice(held, count, replace=False)
        chosen = torch.from_numpy(drawn)
        draws = torch.Generator().manual_seed(derive_seed(step.seed, "augment judges", step.number))
        inputs, _ = augment(data.inputs(chosen), None, self.site.study.training.augment, draws)
        device = step.batch.inputs.device
        return Batch(inputs.to(device), data.targets[chosen].to(device))

    def _looked(self) -> dict[str, Any]:
        """Weights of the matching, and how they were learned."""
        found = {} if self._looks is None else self._looks.tables().get(TEACHER, {})
        counted: Counter[str] = Counter() if self._meta is None else self._meta.done
        return {**found, "meta_steps": dict(counted)} if found else {}


class _With(nn.Module):
    """The network with other parameters, for ``Step.loss``."""

    def __init__(self, network: nn.Module, theta: Parameters) -> None:
        super().__init__()
        self._call: Callable[[Tensor], Tensor] = lambda images: functional_call(network, theta, (images,))

    def forward(self, images: Tensor) -> Tensor:
        return self._call(images)


def _loss_at(step: Step, theta: Parameters, batch: Batch) -> Tensor:
    """L_X of a batch without samples, at other parameters."""
    own = step.model
    step.model = _With(own, network_of(theta))
    try:
        return step.loss(batch)
    finally:
        step.model = own
