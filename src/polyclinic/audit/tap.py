"""One real round of a study with all messages and all secrets kept, for the audits to attack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from polyclinic.errors import StudyError
from polyclinic.federation.local import LocalChannel
from polyclinic.federation.networks import SITE
from polyclinic.federation.site import Site
from polyclinic.federation.state import ServerState
from polyclinic.methods import make_method
from polyclinic.models.weights import shared_tensors, snapshot
from polyclinic.secure.backends import Aggregation
from polyclinic.secure.fixed_point import WEIGHT_STEPS
from polyclinic.secure.hidden import HiddenSum, Pending
from polyclinic.secure.ring import BfvScheme, RingSum
from polyclinic.secure.session import Session
from polyclinic.secure.view import Recorder
from polyclinic.tasks import make_task

if TYPE_CHECKING:
    from polyclinic.data.dataset import SiteData
    from polyclinic.federation.channel import Channel
    from polyclinic.federation.message import Message
    from polyclinic.secure.bfv import Keys
    from polyclinic.study import Study

Arrays = dict[str, NDArray[np.float64]]
"""``{group/name: array}``."""


@dataclass
class Held:
    """What a site knew in an attempt beside its messages and its input."""

    session: Session
    memory: dict[str, Any]
    """All that its session remembered at any time: a curious site forgets nothing."""


class Tap(Recorder):
    """A recorder that also keeps the sites' secrets of the newest attempt.

    Args:
        channel: To ``sites``, in this process.
        sites: Whose sessions are looked into; none for the plain sum.

    Attributes:
        held: By site.
    """

    def __init__(self, channel: Channel, sites: Mapping[str, Site]) -> None:
        super().__init__(channel)
        self.held: dict[str, Held] = {}
        self._watched = sites

    def stream(self, op: str, messages: Mapping[str, Message]) -> Iterator[tuple[str, Message]]:
        """Record the messages and what each site then knows."""
        for name, reply in super().stream(op, messages):
            session = self._watched[name].party._session if name in self._watched else None
            if session is not None:
                before = self.held.get(name)
                kept = before.memory if before and before.session is session else {}
                self.held[name] = Held(session, {**kept, **session.memory})
            yield name, reply


@dataclass
class Recording:
    """A round, and what only the auditor knows of it."""

    study: Study
    backend: str
    tap: Tap
    sites: dict[str, Site]
    server_keys: list[Keys]
    """Key pairs that the server made for itself."""

    def truth(self, name: str) -> Arrays:
        """What a site's training changed, before any weighting."""
        kept = self._plain_reply(name).arrays if self.backend == "plain" else Pending.of(self.sites[name]).arrays
        return {key: tensor.detach().cpu().double().numpy() for key, tensor in kept.items()}

    def weights(self, name: str) -> dict[str, float]:
        """A site's weight per group."""
        if self.backend == "plain":
            given = self._plain_reply(name).scalars
            return {k.removeprefix("weight/"): float(v) for k, v in given.items() if k.startswith("weight/")}
        return {group: steps / WEIGHT_STEPS for group, steps in Pending.of(self.sites[name]).steps.items()}

    def _plain_reply(self, name: str) -> Message:
        return next(seen.message for seen in self.tap.seen if seen.sender == name and seen.message.arrays)


def record(study: Study, data: Mapping[str, SiteData], folder: Path) -> Recording:
    """Run one round of the study's method over its ``aggregation.backend``.

    Args:
        study: The study.
        data: From ``load_sites``.
        folder: Where sites keep their states; the recording needs it as long as it is attacked.

    Raises:
        StudyError: The method sums nothing, or the backend cannot run here.
    """
    method = make_method(study)
    if method.simulation_only or not any(leaf.kind == "sum" for op in method.ops().values() for leaf in op.leaves):
        raise StudyError(
            f"method {study.method.name} sums no updates over sites, so there is no sum to attack. Audit a study with "
            "fedavg, for instance: --set method=fedavg"
        )
    for own in data.values():
        method.check_data(own)
    aggregation = Aggregation(study, method, sorted(data))
    server_keys = _kept_keys(aggregation)
    bench = method.networks.of(study.model, SITE)
    task = make_task(study.task, study.training)
    sites = {
        name: Site(
            name,
            study,
            own,
            task,
            workbench=method.networks.of_site(name),
            networks=method.networks,
            ops=aggregation.ops,
            folder=folder,
            credentials=aggregation.credentials.get(name),
        )
        for name, own in data.items()
    }
    tap = Tap(LocalChannel(sites), sites if aggregation.credentials else {})
    state = ServerState({"model": snapshot(shared_tensors(bench.model, method.shared(bench.model)))})
    tap.begin_round(1)
    next(method.server(tap, state, aggregation.sums))
    return Recording(study, aggregation.backend, tap, sites, server_keys)


def _kept_keys(aggregation: Aggregation) -> list[Keys]:
    """A list that fills with the pairs which the server of a ring makes; they are in no message."""
    made: list[Keys] = []
    ring = aggregation.sums._protocol if isinstance(aggregation.sums, HiddenSum) else None
    if isinstance(ring, RingSum) and isinstance(ring._scheme, BfvScheme) and ring._scheme.holder == "server":
        fresh = ring._scheme.new_keys

        def keeping() -> Keys:
            made.append(fresh())
            return made[-1]

        ring._scheme.new_keys = keeping  # type: ignore[method-assign]
    return made
