"""What ``secure_sum.py`` measures: one round of one option in a fresh process, as ``secure_sum_probes.py JSON``."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from overhead_probes import memory
from secure_sum_peers import PEERS, Case, Meter, clocks, distance
from tables import Json

from polyclinic.federation.channel import Traffic
from polyclinic.federation.message import Message
from polyclinic.federation.site import Op, Site
from polyclinic.methods.fedavg import UPDATE
from polyclinic.secure.backends import Aggregation
from polyclinic.study import validate_study

OURS: dict[str, Json] = {
    "plain": {"backend": "plain"},
    "masked-32": {"backend": "masked"},
    "masked-16": {"backend": "masked", "lanes": 16},
    "ring-he-seal": {"backend": "ring-he", "provider": "seal"},
    "ring-he-tenseal": {"backend": "ring-he", "provider": "tenseal"},
}
OP = "train"
BYTES = ", bytes"
"""Added to the name of an op: reading and writing its messages."""
ONE_SITE = ("ring-open",)
"""Ops that one site does for all."""
YARDSTICK = 2**26


class Wire:
    """A channel to sites of this process that turns every message into bytes and back, and times each party.

    Args:
        sites: By name.
        meter: Gets a phase per op, and one for reading and writing its messages.
    """

    def __init__(self, sites: Mapping[str, Site], meter: Meter) -> None:
        self.round = 1
        self.sites = tuple(sorted(sites))
        self.absent: dict[str, str] = {}
        self.traffic = Traffic()
        self._sites, self._meter = sites, meter
        self._last: tuple[Message, bytes] | None = None

    def stream(self, op: str, messages: Mapping[str, Message]) -> Iterator[tuple[str, Message]]:
        """Let each site answer in turn."""
        for name in sorted(messages):
            with self._bytes("server", op, op == OP):
                sent = self._written(messages[name])
            answer = self._at_site(name, op, sent)
            self.traffic.add(name, op, down=len(sent), up=len(answer), seconds=0.0)
            with self._bytes("server", op):
                reply = Message.from_bytes(answer)
            del answer
            yield name, reply
            del reply

    def call(self, op: str, messages: Mapping[str, Message]) -> dict[str, Message]:
        """Gather ``stream``."""
        return dict(self.stream(op, messages))

    def _written(self, message: Message) -> bytes:
        if self._last is None or self._last[0] is not message:  # what goes to all sites is written once
            self._last = (message, message.to_bytes())
        return self._last[1]

    def _at_site(self, name: str, op: str, sent: bytes) -> bytes:
        with self._meter.one_site(op):
            with self._bytes("site", op, op == OP):
                message = Message.from_bytes(sent)
            with self._meter.phase("site", op, self._times(op)):
                reply = self._sites[name].handle(op, self.round, message)
            with self._bytes("site", op):
                return reply.to_bytes()

    def _bytes(self, party: Literal["site", "server"], op: str, model: bool = False) -> AbstractContextManager[None]:
        """The model that training starts from is no part of a sum."""
        if model:
            return self._meter.leave_out()
        return self._meter.phase(party, op + BYTES, self._times(op) if party == "site" else 1.0)

    def _times(self, op: str) -> float:
        return 1.0 if op in ONE_SITE else 1 / len(self.sites)


def ours(case: Case, meter: Meter, aggregation: Json) -> Json:
    """One sum over sites by one of our backends. Making the update is not counted; keeping it for the sum is."""

    def give(site: Site, message: Message) -> Message:
        with meter.leave_out():
            update = {n: torch.from_numpy(a) for n, a in case.update(names.index(site.name)).items()}
        return Message.pack({"update": update}, **{"weight/update": 100.0})

    names = [f"site{k:02d}" for k in range(case.sites)]
    raw = {
        "name": "secure-sum",
        "task": {"classes": ["a", "b"]},
        "data": {"phantom": {"sites": [{"name": name} for name in names]}},
        "aggregation": aggregation,
    }
    study: Any = validate_study(raw)
    method: Any = SimpleNamespace(simulation_only=False, ops=lambda: {OP: Op(give, UPDATE)})
    parts: Any = {"data": None, "task": None, "workbench": SimpleNamespace(device="cpu")}
    model = {name: torch.from_numpy(a) for name, a in case.update(case.sites).items()}
    with tempfile.TemporaryDirectory() as scratch:
        backend = Aggregation(study, method, names)
        sites = {
            name: Site(
                name, study, ops=backend.ops, folder=Path(scratch), credentials=backend.credentials.get(name), **parts
            )
            for name in names
        }
        wire = Wire(sites, meter)
        with meter.phase("server", "sum"):
            total = backend.sums.sum(wire, OP, dict.fromkeys(names, Message.pack({"model": model})))
            mean = total.mean("update")
    found = {name: tensor.numpy() for name, tensor in mean.items()}
    ups = [wire.traffic.of_site(name)["bytes_up"] for name in names]
    largest = max(wire.traffic.up.values())
    return {"up": sum(ups) / len(ups), "largest": largest, "error": distance(found, case.mean(range(case.sites)))}


def measure(option: str, sites: int, parameters: int) -> Json:
    """One round of one option.

    Returns:
        ``seconds`` and ``memory`` as in ``Meter``; ``float32``: bytes of the vector; ``peak``: MiB above what the
        process held with everything imported; ``up``: bytes that a site sends; ``largest``: bytes of the largest
        message; ``error``: largest distance from the real mean; ``yardstick``: seconds of a fixed piece of work, to see
        a machine that was slower.
    """
    case, meter = Case(sites, parameters), Meter()
    probe: Callable[[Case, Meter], Json] = PEERS.get(option) or (lambda *given: ours(*given, OURS[option]))
    probe(Case(sites, 1000), Meter())  # imports, and what is built once
    started = clocks()[0]
    hashlib.sha256(bytes(YARDSTICK)).digest()
    yardstick = clocks()[0] - started
    before = memory("VmRSS")
    found = probe(case, meter)
    meter.note_peak()
    about = {"seconds": meter.seconds, "memory": meter.memory, "peak": meter.peak - before, "yardstick": yardstick}
    return {"largest": found["up"], "float32": 4 * parameters, **found, **about}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
