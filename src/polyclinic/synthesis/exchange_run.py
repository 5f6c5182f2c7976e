"""An exchange from its first phase, or the one where a killed run was, to what the results folder says of it."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from polyclinic.federation.channel import Channel
from polyclinic.federation.state import ServerState
from polyclinic.results import RunFolder
from polyclinic.secure.backends import Aggregation
from polyclinic.seeds import generator
from polyclinic.synthesis.exchange import Exchange
from polyclinic.synthesis.ledger import entries, write_ledger
from polyclinic.synthesis.pool import Samples

if TYPE_CHECKING:
    from polyclinic.runner import Observer

Json = dict[str, Any]
SHOWN = 6
"""Most samples of a class that the report shows."""


class ExchangeRun:
    """Drives an exchange over its own channel, with a state of its own.

    Args:
        exchange: What is run.
        channel: To the sites; their states lie beside those of the rounds.
        aggregation: How its sums are hidden.
        folder: Results.
        observer: Told of progress.

    Attributes:
        ops: What sites do in it, with all that leaves them.
    """

    def __init__(
        self, exchange: Exchange, channel: Channel, aggregation: Aggregation, folder: RunFolder, observer: Observer
    ) -> None:
        self.exchange, self.ops = exchange, aggregation.ops
        self._channel, self._sums, self._folder, self._observer = channel, aggregation.sums, folder, observer
        self._checkpoint = folder.path / "state" / "exchange" / "server.safetensors"

    @property
    def bytes(self) -> dict[str, dict[str, int]]:
        """``{op: {"up": bytes, "down": bytes}}`` over all sites."""
        found: dict[str, dict[str, int]] = self._told["bytes"]
        return found

    @property
    def seconds(self) -> float:
        """Of the whole exchange."""
        return float(self._told["wall_seconds"])

    @property
    def _told(self) -> Json:
        found: Json = json.loads((self._folder.path / "synthesis.json").read_text(encoding="utf-8"))
        return found

    def finish(self) -> None:
        """Run what is not yet finished; after each phase everything is safe on disk."""
        if (self._folder.path / "synthesis.json").is_file():
            return
        self._folder.guard(lambda: self._checkpoint.parent.mkdir(parents=True, exist_ok=True))
        state = ServerState({})
        if self._checkpoint.is_file():
            state = ServerState.load(self._checkpoint)
        channel, total = self._channel, self._phases
        channel.begin_round(state.finished + 1)
        self._observer.working("exchange of samples", state.finished, total)
        started = time.perf_counter()
        for _ in self.exchange.server(channel, state, self._sums):
            state.finished += 1
            self._count(state, time.perf_counter() - started)
            self._folder.guard(lambda: state.save(self._checkpoint))
            self._observer.working("exchange of samples", min(state.finished, total), total)
            channel.begin_round(state.finished + 1)
            started = time.perf_counter()
        self._observer.working("exchange of samples", total, total)
        self._write(state)

    @property
    def _phases(self) -> int:
        vae = self.exchange.settings.of_kind("vae")
        return 5 + (vae.rounds if vae is not None and vae.placement == "sites" else 1 if vae is not None else 0)

    def _count(self, state: ServerState, seconds: float) -> None:
        """Add the traffic of a phase to what there was."""
        told = json.loads(str(state.scalars.get("traffic", '{"bytes": {}, "seconds": {}, "wall": 0}')))
        for op, part in self._channel.traffic.by_op().items():
            known = told["bytes"].setdefault(op, {"up": 0, "down": 0})
            known["up"], known["down"] = known["up"] + part["up"], known["down"] + part["down"]
        for (site, op), spent in self._channel.traffic.seconds.items():
            known = told["seconds"].setdefault(op, {})
            known[site] = known.get(site, 0.0) + spent
        told["wall"] += seconds
        told.setdefault("incidents", []).extend(self._sums.incidents)
        self._sums.incidents.clear()
        state.scalars["traffic"] = json.dumps(told)

    def _write(self, state: ServerState) -> None:
        """The ledger, examples, and at last ``synthesis.json``, which says that all is there."""
        exchange, study = self.exchange, self.exchange.study
        cells, plan, released = exchange.cells(state), exchange.plan(state), Samples.of(state.groups["released"])
        counts = np.zeros_like(plan.wanted)
        np.add.at(counts, (released.labels.numpy(), released.devices.numpy()), 1)
        gate = _read(state, "gate", {})
        if len(released):
            makers, seen_by = ["vae"] * len(released), [sorted(gate)] * len(released)
            lines = entries(released, cells.classes, cells.devices, makers, seen_by)
            write_ledger(self._folder.path / "samples.csv", lines)
            if study.evaluation.examples:
                self._folder.guard(lambda: self._write_examples(released))
        traffic = _read(state, "traffic", {})
        found: Json = {
            "settings": exchange.settings.model_dump(mode="json"),
            "generator": [entry.name for entry in exchange.settings.generator],
            "classes": list(cells.classes),
            "devices": list(cells.devices),
            "floor": exchange.settings.floor,
            "epsilon": exchange.settings.epsilon,
            "before": {"patients": cells.patients.tolist(), "images": cells.images.tolist()},
            "budget": exchange.budget(state),
            "level": plan.level,
            "limit": plan.limit.tolist(),
            "wanted": plan.wanted.tolist(),
            "at_sites": exchange.at_sites(state, plan).tolist(),
            "released": counts.tolist(),
            "quality": _read(state, "quality", {"candidates": 0, "dropped": {}}),
            "gate": gate,
            "taken": {site: {"samples": n} for site, n in _read(state, "taken", {}).items()},
            "absent": _read(state, "absent", {}),
            "fit": exchange.generator.summary(state) if exchange.generator is not None else {},
            "notes": [
                *_read(state, "notes", []),
                *(f"the sum was begun again: {incident}" for incident in traffic["incidents"]),
            ],
            "seconds": traffic["seconds"],
            "bytes": traffic["bytes"],
            "wall_seconds": traffic["wall"],
        }
        self._folder.write("synthesis.json", json.dumps(found, indent=1))

    def _write_examples(self, released: Samples) -> None:
        assert released.images is not None
        rng, chosen = generator(0, "examples of samples"), []
        for label in range(len(self.exchange.study.task.classes)):
            rows = np.flatnonzero(released.labels.numpy() == label)
            chosen += sorted(rng.permutation(rows)[:SHOWN].tolist())
        path = self._folder.path / "synthesis" / "examples.npz"
        path.parent.mkdir(exist_ok=True)
        shown = {name: array[chosen].numpy() for name, array in released.arrays().items() if name != "seeds"}
        np.savez_compressed(path, **shown)  # type: ignore[arg-type]


def _read(state: ServerState, name: str, default: Any) -> Any:
    return json.loads(str(state.scalars[name])) if name in state.scalars else default
