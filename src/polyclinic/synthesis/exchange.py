"""The exchange before the first round: count, plan, make, examine, release, and let sites take.

FedSSG (reconstruction; what is known of Pavan et al., ICPR 2026, arXiv 2604.26324): that synthetic samples are made by
class and device and distributed over sites is the paper's; every formula below is ours.

It is written like a method: ``server`` runs over the channel, one ``yield`` per finished phase, with all that the next
one needs in ``state``; ``ops`` is the sites' side (``at_site.py``). It has a state of its own, so a killed run goes on
in the phase where it was, and the rounds of the method after it count from 1.

A site that drops out (``federation.on_absent: continue``): before the examination the others go on alone; nothing is
released that one of the sites has not examined; a site that misses the release trains without samples and styles.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from polyclinic.errors import SiteError
from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Op, Workbench
from polyclinic.federation.state import ServerState
from polyclinic.models.last_layer import last_layer
from polyclinic.models.taps import feature_tap
from polyclinic.secure.sum import SecureSum
from polyclinic.seeds import derive_seed, generator
from polyclinic.study import Study
from polyclinic.synthesis.at_site import AtSite, told_devices
from polyclinic.synthesis.cells import Cells
from polyclinic.synthesis.frozen import frozen_features
from polyclinic.synthesis.generators import image_generator
from polyclinic.synthesis.plan import Plan, split_by_owner, water_filling
from polyclinic.synthesis.pool import MOST_BYTES, MOST_SAMPLES, Samples
from polyclinic.synthesis.quality import keep
from polyclinic.synthesis.statistics import gather, statistics_ops
from polyclinic.synthesis.verdict import checked_verdict
from polyclinic.vectors.head import HeadSums

Json = dict[str, Any]
CANDIDATES = 2
"""Candidates per sample that is wanted: half may be dropped."""


class Exchange:
    """One exchange of samples.

    Args:
        study: With ``synthesis``.
        bench: The network of this process; candidates are looked at with its start weights.

    Raises:
        StudyError: The network has no such features or no such last layer as its generators need.
    """

    simulation_only: ClassVar[bool] = False

    def __init__(self, study: Study, bench: Workbench) -> None:
        assert study.synthesis is not None
        self.study, self.settings, self._bench = study, study.synthesis, bench
        self.generator = image_generator(study)
        # Both are asked for much later, when half of the work is done.
        if self.generator is not None:
            feature_tap(bench.model)
        if self.settings.of_kind("features") is not None:
            last_layer(bench.model)

    def server(self, channel: Channel, state: ServerState, sums: SecureSum) -> Iterator[None]:
        """Phase by phase; ``state.scalars["phase"]`` is the last one finished."""
        if "phase" not in state.scalars:
            cells, styles = gather(channel, sums, self.study)
            state.groups["cells"] = {
                "patients": torch.from_numpy(cells.patients),
                "images": torch.from_numpy(cells.images),
                "styles": styles,
            }
            state.scalars["devices"] = json.dumps(cells.devices)
            exact = [
                one.name for one in self.settings.generator if one.name == "features" or getattr(one, "dp", 0) is None
            ]
            if self.settings.epsilon and exact:
                self._note(state, f"epsilon covers counts and styles; the sums for {', '.join(exact)} have no noise")
            yield from self._finished(channel, state, "counted")
        plan = self.plan(state)
        if state.scalars["phase"] == "counted":
            if self.generator is not None and self._made_here(state, plan).any():
                yield from self._fitted(channel, state, sums, self.generator)
            yield from self._finished(channel, state, "fitted")
        if state.scalars["phase"] == "fitted":
            state.groups["candidates"] = self._candidates(channel, state, sums, plan).arrays()
            yield from self._finished(channel, state, "made")
        if state.scalars["phase"] == "made":
            state.groups["released"] = self._examined(channel, state, plan).arrays()
            yield from self._finished(channel, state, "examined")
        if state.scalars["phase"] == "examined":
            self._release(channel, state, plan)
            yield from self._finished(channel, state, "done")

    def cells(self, state: ServerState) -> Cells:
        """Counts over all sites."""
        group = state.groups["cells"]
        devices = tuple(json.loads(str(state.scalars["devices"])))
        return Cells(tuple(self.study.task.classes), devices, group["patients"].numpy(), group["images"].numpy())

    def budget(self, state: ServerState) -> int:
        """Samples in all; none where only features are drawn."""
        if not any(entry.name != "features" for entry in self.settings.generator):
            return 0
        return min(int(self.settings.plan.budget * self.cells(state).images.sum()), self._most)

    def plan(self, state: ServerState) -> Plan:
        """How many samples of which cell: a function of the counts."""
        settings = self.settings.plan
        return water_filling(
            self.cells(state).patients,
            self.budget(state),
            cap=settings.cap,
            floor=self.settings.floor,
            borrow=settings.borrow,
        )

    def at_sites(self, state: ServerState, plan: Plan) -> Any:
        """Of the plan what sites make of their own images: cells that nobody owns, int64 ``[classes, devices]``."""
        if self.settings.of_kind("amplitude") is None:
            return np.zeros_like(plan.wanted)
        return split_by_owner(plan.wanted, self.cells(state).patients)[1]

    def _finished(self, channel: Channel, state: ServerState, phase: str, during: str = "") -> Iterator[None]:
        """Go to ``phase``; whoever is missing now was so ``during`` it, or a longer one that is not over."""
        state.scalars["phase"] = phase
        if channel.absent:
            told = json.loads(str(state.scalars.get("absent", "{}")))
            told.setdefault(during or phase, {}).update(channel.absent)
            state.scalars["absent"] = json.dumps(told)
        yield

    def _fitted(self, channel: Channel, state: ServerState, sums: SecureSum, generator_: Any) -> Iterator[None]:
        state.scalars.setdefault("fit_from", state.finished)
        for _ in generator_.fit(channel, state, sums, self.cells(state)):
            yield from self._finished(channel, state, "counted", during="fitted")

    def _made_here(self, state: ServerState, plan: Plan) -> Any:
        """Of the plan what the image generator makes: all, or the owned cells where others are restyled at sites."""
        if self.generator is None:
            return np.zeros_like(plan.wanted)
        owned, _ = split_by_owner(plan.wanted, self.cells(state).patients)
        return owned if self.settings.of_kind("amplitude") else plan.wanted

    def _candidates(self, channel: Channel, state: ServerState, sums: SecureSum, plan: Plan) -> Samples:
        """Twice the wanted lines, without those that are unlikely, far from their class, or twins."""
        wanted = self._made_here(state, plan)
        lines = candidate_lines(wanted, derive_seed(self.study.seed, "candidates"))
        if self.generator is None or len(lines) == 0 or not self.settings.filter:
            return lines
        samples = lines.with_images(self._decoded(state, lines))
        message = Message(scalars={"devices": str(state.scalars["devices"])})
        total = sums.sum(channel, "sum-features", dict.fromkeys(channel.sites, message))
        found = total.sums["features"]
        known = HeadSums(found["count"], found["first"], found["second"])
        self._bench.restart()
        assert samples.images is not None
        features = frozen_features(self._bench.model, samples.images, self.study.data.image)
        kept = keep(features, samples.labels, known, least=self.settings.filter)
        state.scalars["quality"] = json.dumps({"candidates": len(lines), "dropped": kept.dropped})
        if not kept.mask.any():
            self._note(state, "the filter dropped every candidate: the generator may need more rounds or more images")
        return lines.only(kept.mask)

    def _decoded(self, state: ServerState, lines: Samples) -> Tensor:
        assert self.generator is not None
        return self.generator.decode(state.groups["decoder"], lines.labels, lines.devices, lines.seeds)

    def _examined(self, channel: Channel, state: ServerState, plan: Plan) -> Samples:
        """The candidates that every site has looked at and none has refused, as many as are wanted."""
        lines = Samples.of(state.groups["candidates"])
        if len(lines) == 0:
            return lines
        message = Message.pack(
            {"samples": lines.arrays(), "decoder": state.groups["decoder"]}, devices=str(state.scalars["devices"])
        )
        accepted, verdicts = torch.ones(len(lines), dtype=torch.bool), {}
        for site, reply in channel.stream("examine", dict.fromkeys(channel.sites, message)):
            accepted &= _flags(site, reply.group("verdict").get("accepted"), len(lines))
            told = str(reply.scalars.get("report", ""))
            verdicts[site] = checked_verdict(site, told, self.study.task.classes, told_devices(message))
        missing = sorted(set(channel.sites) - set(verdicts))
        if missing:
            accepted[:] = False
            self._note(state, f"nothing was released: {', '.join(missing)} did not examine the candidates")
        elif not accepted.any():
            self._note(state, "nothing was released: each candidate was refused by a site; its gate says why")
        state.scalars["gate"] = json.dumps(verdicts)
        left = torch.from_numpy(self._made_here(state, plan)).clone()
        chosen = []
        for position in torch.nonzero(accepted).flatten().tolist():
            cell = int(lines.labels[position]), int(lines.devices[position])
            if left[cell] > 0:
                left[cell] -= 1
                chosen.append(position)
        released = lines.only(torch.tensor(chosen, dtype=torch.int64))
        return released.with_images(self._decoded(state, released)) if chosen else released

    def _release(self, channel: Channel, state: ServerState, plan: Plan) -> None:
        released = Samples.of(state.groups["released"])
        as_images = self.settings.share.form == "images" or len(released) == 0
        groups: dict[str, Mapping[str, Tensor]] = {
            "plan": {
                "wanted": torch.from_numpy(plan.wanted),
                "patients": state.groups["cells"]["patients"],
                "styles": state.groups["cells"]["styles"],
            },
            "samples": (released if as_images else released.without_images()).arrays(),
        }
        if not as_images:
            groups["decoder"] = state.groups["decoder"]
        message = Message.pack(groups, devices=str(state.scalars["devices"]), level=plan.level)
        replies = channel.call("receive", dict.fromkeys(channel.sites, message))
        state.scalars["taken"] = json.dumps({site: int(reply.scalars["samples"]) for site, reply in replies.items()})

    def _note(self, state: ServerState, text: str) -> None:
        state.scalars["notes"] = json.dumps([*json.loads(str(state.scalars.get("notes", "[]"))), text])

    def ops(self) -> dict[str, Op]:
        """The sites' side: counts, fit of the generator, and what ``AtSite`` does."""
        fit = self.generator.ops() if self.generator is not None else {}
        return {**statistics_ops(self.study), **fit, **AtSite(self.study, self.generator).ops()}

    @property
    def _most(self) -> int:
        """Samples that sites would take in a message, and as candidates."""
        vae = self.settings.of_kind("vae")
        if vae is None:
            return MOST_SAMPLES
        each = int(self.study.data.image.channels * vae.size**2) if self.settings.share.form == "images" else 1
        return min(MOST_SAMPLES // CANDIDATES, MOST_BYTES // each)


def candidate_lines(wanted: Any, seed: int) -> Samples:
    """Lines of ``CANDIDATES`` times the wanted samples of each cell; every line has a seed of its own.

    Args:
        wanted: int64 ``[classes, devices]``.
        seed: Of the seeds.
    """
    cells = np.argwhere(wanted > 0)
    counts = CANDIDATES * wanted[cells[:, 0], cells[:, 1]] if len(cells) else np.zeros(0, np.int64)
    lines = torch.from_numpy(np.repeat(cells, counts, axis=0))
    seeds = generator(seed, "lines").permutation(np.iinfo(np.int32).max // 1024)[: len(lines)]
    return Samples(lines[:, 0].clone(), lines[:, 1].clone(), torch.from_numpy(seeds.astype(np.int64)))


def _flags(site: str, flags: Tensor | None, count: int) -> Tensor:
    if flags is None:
        raise SiteError(f"site {site!r} answered without a verdict. Its program is of another version.")
    if flags.dtype != torch.uint8 or tuple(flags.shape) != (count,):
        raise SiteError(
            f"site {site!r} answered for {tuple(flags.shape)} candidates of type {flags.dtype}, asked were {count} as "
            "torch.uint8. Its program is of another version."
        )
    return flags.cpu().bool()
