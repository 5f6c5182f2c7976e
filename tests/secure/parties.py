"""Sites that answer ``train`` with ready arrays, and run the real protocols with real keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from toys import toy_study

from polyclinic.federation.local import LocalChannel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Leaf, Op, Site
from polyclinic.secure.backends import Aggregation
from polyclinic.secure.fixed_point import Layout, encode, weight_steps
from polyclinic.secure.hidden import HiddenSum, Opened, Pending, SumProtocol
from polyclinic.secure.session import Attempt
from polyclinic.secure.sum import Total
from polyclinic.seeds import generator
from polyclinic.study import Study

MODEL = {"w": torch.full((3, 5), 0.5), "b": torch.zeros(7), "norm.running_var": torch.ones(4)}
"""What the server sends: a matrix, a vector that starts at zero, running statistics."""
STEPS = {"w": 2**23, "b": 2**24, "norm.running_var": 2**26}
"""Steps per unit: 2**22 over the power of two at or above the model's largest value, 0.25 at least; 2**26."""


class Watched:
    """A protocol whose attempts that came to a sum are kept."""

    def __init__(self, protocol: SumProtocol) -> None:
        self.ops = protocol.ops
        self.opened: dict[str, tuple[Attempt, Opened]] = {}
        """By purpose, the last one."""
        self._protocol = protocol

    def add(self, channel: Any, attempt: Attempt, layout: Layout) -> Opened:
        """One attempt."""
        opened = self._protocol.add(channel, attempt, layout)
        self.opened[attempt.purpose] = attempt, opened
        return opened


@dataclass
class Fault:
    """What happens to messages of one phase on their way.

    ``change(site, message)`` gives what arrives instead, None for nothing; it is asked for the given sites (all if
    none are), in sums of one purpose, in the first ``attempts`` attempts in which that phase is reached.
    """

    op: str
    change: Callable[[str, Message], Message | None]
    sites: tuple[str, ...] = ()
    purpose: str = "values"
    attempts: int = 1
    up: bool = True
    """Whether it befalls answers, rather than calls."""
    numbers: set[int] = field(default_factory=set)
    """Attempts that it befell."""

    def befall(self, op: str, call: Message, site: str, message: Message, *, up: bool) -> Message | None:
        """What arrives of this message."""
        if (op, up, str(call.scalars.get("purpose", self.purpose))) != (self.op, self.up, self.purpose):
            return message
        number = int(call.scalars.get("number", 0))
        if len(self.numbers - {number}) >= self.attempts or (self.sites and site not in self.sites):
            return message
        self.numbers.add(number)
        return self.change(site, message)


class Meddler(LocalChannel):
    """A channel with faults."""

    def __init__(self, sites: Mapping[str, Site], *faults: Fault) -> None:
        super().__init__(sites, tolerant=True)
        self.faults = faults

    def stream(self, op: str, messages: Mapping[str, Message]) -> Iterator[tuple[str, Message]]:
        """Calls and replies as the faults leave them."""
        arriving = {s: told for s, m in messages.items() if (told := self._fate(op, m, s, m, up=False)) is not None}
        self.absent.update({site: "not reached" for site in messages if site not in arriving})
        for site, reply in super().stream(op, arriving):
            told = self._fate(op, messages[site], site, reply, up=True)
            if told is None:
                self.absent[site] = "lost on its way"
            else:
                yield site, told

    def _fate(self, op: str, call: Message, site: str, message: Message, *, up: bool) -> Message | None:
        told: Message | None = message
        for fault in self.faults:
            told = fault.befall(op, call, site, told, up=up) if told is not None else None
        return told


@dataclass
class Consortium:
    """Sites, the channel to them, and the study's sum."""

    study: Study
    sites: dict[str, Site]
    channel: LocalChannel
    sums: HiddenSum
    arrays: dict[str, dict[str, Tensor]]
    weights: dict[str, float]
    opened: dict[str, tuple[Attempt, Opened]] = field(default_factory=dict)
    """The sums of integers that were opened last, by purpose."""

    def meddle(self, *faults: Fault) -> None:
        """Put a ``Meddler`` in the way."""
        self.channel = Meddler(self.sites, *faults)

    def sum(self, number: int = 1, model: Mapping[str, Tensor] = MODEL) -> Total:
        """The sum of round ``number``."""
        self.channel.begin_round(number)
        call = Message.pack({"model": model})
        return self.sums.sum(self.channel, "train", dict.fromkeys(self.sites, call))

    def mean(self, contributors: list[str]) -> dict[str, Tensor]:
        """The weighted mean of what these sites hold, in float64, without any protocol."""
        whole = sum(self.weights[s] for s in contributors)
        return {
            name: sum(self.arrays[s][name].double() * (self.weights[s] / whole) for s in contributors)  # type: ignore[misc]
            for name in MODEL
        }

    def by_hand(self, contributors: list[str], asked: list[str] | None = None) -> dict[int, list[int]]:
        """The sum in 64- and 32-bit lanes in Python integers, without the code under test; ``asked`` set the shares."""
        total = sum(int(self.weights[s] * 65536) for s in asked or self.sites)
        sums = {64: [0] * 5, 32: [0] * 22}
        for site in contributors:
            steps = int(self.weights[site] * 65536)
            own: dict[int, list[int]] = {64: [steps], 32: []}
            for name, scale in STEPS.items():
                values = self.arrays[site][name].reshape(-1).tolist()
                own[64 if scale == 2**26 else 32] += [round(x * (steps / total * scale)) for x in values]
            sums = {bits: [a + b for a, b in zip(sums[bits], own[bits], strict=True)] for bits in sums}
        return sums

    def fixed_sum(self, contributors: list[str], asked: list[str]) -> dict[str, list[int]]:
        """Sums of the contributors' fixed-point values in Python integers, by width; ``asked`` set the scale."""
        totals = {"update": sum(weight_steps(self.weights[s]) for s in asked)}
        sums: dict[str, list[int]] = {}
        for name in contributors:
            layout = Pending.of(self.sites[name]).layout
            arrays = {f"update/{key}": array for key, array in self.arrays[name].items()}
            steps = {"update": weight_steps(self.weights[name])}
            rng = generator(self.study.seed, name, self.channel.round, "train", "rounding")
            lanes, _ = encode(layout, arrays, steps, totals, sites=len(asked), rng=rng)
            for bits, part in lanes.items():
                own = sums.setdefault(str(bits), [0] * part.size)
                for i, value in enumerate(part.tolist()):
                    own[i] += value
        return sums


def consortium(
    folder: Path,
    weights: Mapping[str, float] | int,
    *,
    aggregation: Mapping[str, Any] | str = "masked",
    arrays: Callable[[str], dict[str, Tensor]] | None = None,
    tolerant: bool = True,
    lanes: Any = 16,
) -> Consortium:
    """Sites named after letters with uneven weights, or those given.

    Args:
        folder: Of their states.
        weights: ``{site: weight}``, or how many sites.
        aggregation: The study's section.
        arrays: What a site's training changed, for names and shapes of ``MODEL``; drawn if not given.
        tolerant: Go on without a site that fails.
        lanes: Of the leaf that they send.
    """
    if isinstance(weights, int):
        weights = {chr(ord("a") + i): float(1 + 7 * i % 12) for i in range(weights)}
    study = toy_study("fedavg", aggregation=aggregation, federation={"on_absent": "continue"})
    drawn = {name: (arrays or random_arrays)(name) for name in weights}

    def train(site: Site, message: Message) -> Message:
        weight = weights[site.name]
        return Message.pack({"update": drawn[site.name]}, loss=0.5, **{"weight/update": weight})

    leaves = (
        Leaf("update", "sum", "images", lanes=lanes),
        Leaf("loss", "scalar", "images"),
        Leaf("weight/*", "scalar", "counts"),
    )
    method: Any = SimpleNamespace(simulation_only=False, ops=lambda: {"train": Op(train, leaves)})
    side = Aggregation(study, method, sorted(weights))
    bench: Any = SimpleNamespace(device=torch.device("cpu"))
    unused: Any = None
    sites = {
        name: Site(
            name,
            study,
            unused,
            unused,
            workbench=bench,
            ops=side.ops,
            folder=folder,
            credentials=side.credentials[name],
        )
        for name in weights
    }
    assert isinstance(side.sums, HiddenSum)
    watched = Watched(side.sums._protocol)
    channel = LocalChannel(sites, tolerant=tolerant)
    return Consortium(
        study,
        sites,
        channel,
        HiddenSum(watched, tolerant=tolerant, least=side.least),
        drawn,
        dict(weights),
        watched.opened,
    )


def random_arrays(name: str) -> dict[str, Tensor]:
    """Normal numbers of the size of updates; running statistics far larger."""
    draw = torch.Generator().manual_seed(sum(map(ord, name)))
    arrays = {key: 0.02 * torch.randn(tensor.shape, generator=draw) for key, tensor in MODEL.items()}
    arrays["norm.running_var"] *= 50_000
    return arrays
