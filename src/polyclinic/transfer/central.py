"""One training of the central model of natimg-fl, at the server, on public images alone.

::

    L_G = L_N + beta_s Σₖ πₖ D(k -> G) + eta_s T² KL( Σₖ πₖ s_T(w_k) ‖ s_T(G) )
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from polyclinic.data.proxies import Proxies
from polyclinic.errors import SiteError
from polyclinic.federation.site import Workbench
from polyclinic.federation.state import ServerState
from polyclinic.models.weights import load_tensors, snapshot
from polyclinic.seeds import derive_seed, generator
from polyclinic.study import Study
from polyclinic.training import learning_rate, make_optimizer, trained_parameters
from polyclinic.transfer.hypergradient import Parameters
from polyclinic.transfer.looks import Looks
from polyclinic.transfer.memory import Memory
from polyclinic.transfer.meta_step import MetaStep
from polyclinic.transfer.natimg_settings import NatIMGFLParams
from polyclinic.transfer.public_batches import PublicBatch, PublicBatches
from polyclinic.transfer.pupil import Learnt, Mix, Pupil, chance, warm_up
from polyclinic.transfer.tally import Tally
from polyclinic.transfer.teachers import Shape, Teacher

Shares = dict[str, float]


class CentralTraining:
    """The central model in one round. The server's state keeps its values (``central``) and its memory (``memory``).

    Args:
        study: With the method's settings.
        bench: The central network.
        proxies: Public images.
        drawn: Positions of those of the round.
        number: The round, from 1; 0 before the first.
    """

    def __init__(self, study: Study, bench: Workbench, proxies: Proxies, drawn: Tensor, number: int) -> None:
        params: NatIMGFLParams = study.method
        self._study, self._params, self._bench, self._number = study, params, bench, number
        self._proxies, self._held = proxies, proxies.parts(study.seed)[1]
        self._seed = derive_seed(study.seed, "central", number)
        changes = study.training.augment if params.transport == "weights" else None
        self._public = PublicBatches(proxies, drawn, self._seed, changes, bench.device)
        self._judges = PublicBatches(proxies, self._held, derive_seed(self._seed, "judges"), changes, bench.device)
        self._rate = learning_rate(study.training, max(number, 1), params.rounds)
        self._mix = Mix(
            1.0, params.beta_server, params.eta_server, params.temperature, study.task.kind == "multi-label"
        )

    def begin(self, state: ServerState) -> None:
        """Put the start weights into the state, after the method's passes over the public images."""
        self._bench.restart()
        pupil = self._pupil({})
        if self._params.warmup:
            warm_up(pupil, self._public, self._params.warmup, self._study.training, self._rate, self._seed)
        self._keep(state, pupil, self._memory(pupil))

    def train(self, state: ServerState, teachers: Mapping[str, Teacher], weights: Mapping[str, float]) -> None:
        """Train on from the state, and put the result there.

        Args:
            state: Of the server.
            teachers: The sites' networks, or what they said.
            weights: What each of them weighs.

        Raises:
            SiteError: Training diverged.
        """
        load_tensors(self._bench.model, state.groups["central"])
        pupil = self._pupil(teachers)
        memory = self._memory(pupil)
        memory.load(state.groups["memory"])
        meta = memory.meta_step(self._params, self._params.beta_server)
        looks = Looks(pupil.matching, self._params.q)
        tally = self._steps(pupil, memory, meta, looks, teachers, weights)
        if not tally.finite:
            raise SiteError(
                f"training of the central model diverged in round {self._number} at learning rate {self._rate:g}. "
                "Lower training.lr, or set training.clip."
            )
        self._keep(state, pupil, memory)
        record = {
            "round": self._number,
            "natural_accuracy": self._accuracy(pupil),
            **tally.means(),
            "sites": looks.tables(),
        }
        told = [*json.loads(str(state.scalars.get("transfer", "[]"))), record]
        state.scalars["transfer"] = json.dumps(told)

    def _steps(
        self,
        pupil: Pupil,
        memory: Memory,
        meta: MetaStep | None,
        looks: Looks,
        teachers: Mapping[str, Teacher],
        weights: Mapping[str, float],
    ) -> Tally:
        settings, tally = self._study.training, Tally()
        moved: list[Tensor] = list(trained_parameters(pupil.network).values())
        optimizer = make_optimizer(moved, settings, self._rate)
        rng = generator(self._seed, "teachers")
        pupil.network.train()
        for step in range(1, self._params.server_steps + 1):
            shares = self._some(weights, rng)
            shown = self._public.draw(settings.batch_size)
            with chance(derive_seed(self._seed, "step", step), pupil.device):
                taught = {site: teachers[site].say(shown.positions, shown.images) for site in shares}
                learnt = pupil.learn(shown.images, shown.labels, taught, shares, self._mix)
            optimizer.zero_grad(set_to_none=True)
            learnt.loss.backward()  # type: ignore[no-untyped-call]
            if meta is not None and learnt.sources and step % self._params.q == 0:
                self._learn_weights(meta, shown, learnt, shares, step)
            if settings.clip is not None:
                nn.utils.clip_grad_norm_(moved, settings.clip, foreach=True)
            optimizer.step()
            memory.beside.step()
            tally.add({"loss": learnt.loss, **learnt.terms})
            if self._params.weights != "uniform":
                looks.see(step, learnt)
        optimizer.zero_grad(set_to_none=True)
        return tally

    def _some(self, weights: Mapping[str, float], rng: Any) -> Shares:
        """Shares of the sites that teach in a step, drawn where there are many; they sum to one."""
        sites = sorted(weights)
        if len(sites) > self._params.teachers:
            sites = sorted(rng.choice(sites, self._params.teachers, replace=False).tolist())
        total = sum(weights[site] for site in sites)
        return {site: weights[site] / total for site in sites}

    def _learn_weights(self, meta: MetaStep, shown: PublicBatch, learnt: Learnt, shares: Shares, step: int) -> None:
        """Judged by the classes of public images that are not trained on."""
        judged = self._judges.draw(self._study.training.batch_size)

        def loss_on(batch: PublicBatch, theta: Parameters) -> Tensor:
            seen = functional_call(meta.pupil, theta, (batch.images,))
            return F.cross_entropy(seen.classes, batch.labels)

        meta(
            shown.images,
            learnt.sources,
            shares,
            objective=lambda theta: loss_on(judged, theta),
            task=lambda theta: loss_on(shown, theta),
            seed=derive_seed(self._seed, "meta", step),
        )

    def _pupil(self, teachers: Mapping[str, Teacher]) -> Pupil:
        """The central network as it is, with what it needs to learn from these."""
        params, first = self._params, derive_seed(self._study.seed, "central")
        shape = Shape.of(self._bench.model, self._study.data.image)
        pupil = Pupil(self._bench.model, shape, len(self._proxies.classes), "none", None, first)
        pupil.mixed = self._study.training.amp and pupil.device.type == "cuda"
        for site, teacher in teachers.items() if params.beta_server else ():
            pupil.learn_from(site, list(teacher.channels), params.weights, derive_seed(first, "matching", site))
        return pupil

    def _memory(self, pupil: Pupil) -> Memory:
        return Memory(pupil, self._study.training, self._rate, self._params.meta_lr)

    def _keep(self, state: ServerState, pupil: Pupil, memory: Memory) -> None:
        """Everything that the next round needs; matchings with absent sites stay as they were."""
        state.groups["central"] = snapshot({**self._bench.tensors, **pupil.statistics.tensors})
        state.groups["memory"] = {**state.groups.get("memory", {}), **memory.tensors()}

    @torch.no_grad()
    def _accuracy(self, pupil: Pupil) -> float:
        """Share of the public images that are not trained on whose class the second head names."""
        pupil.network.eval()
        size, right = self._study.evaluation.batch_size, 0
        plain = PublicBatches(self._proxies, self._held, 0, None, pupil.device)
        with pupil.statistics.natural(pupil.network):
            for positions in torch.split(self._held, size):
                batch = plain.at(positions)
                right += int((pupil(batch.images).classes.argmax(1) == batch.labels).sum())
        return right / len(self._held)
