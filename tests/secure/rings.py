"""What the tests of the ring share: the exact sum without any protocol, and a look at tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from parties import MODEL, Consortium

from polyclinic.federation.local import LocalChannel
from polyclinic.federation.message import Message
from polyclinic.secure.fixed_point import Layout, encode, plan, weight_steps
from polyclinic.seeds import generator

Hook = Callable[[str, str, Message], Message]
RING: dict[str, Any] = {"backend": "ring-he", "provider": "seal"}


def planned(c: Consortium) -> Layout:
    """The layout of what the sites answer."""
    settings = c.study.aggregation
    arrays = {f"update/{key}": array for key, array in next(iter(c.arrays.values())).items()}
    return plan(arrays, {"update": 16}, MODEL, narrow=settings.width, reach=settings.reach)


def exact_sums(c: Consortium, number: int = 1) -> dict[int, list[int]]:
    """Python integers by width: what those who took part in the last attempt added, without masks or encryption."""
    counted, summed = c.opened["counts"][0].sites, c.opened["values"][0].sites
    totals = {"update": sum(weight_steps(c.weights[s]) for s in counted)}
    sums: dict[int, list[int]] = {}
    for name in summed:
        arrays = {f"update/{key}": array for key, array in c.arrays[name].items()}
        steps = {"update": weight_steps(c.weights[name])}
        rng = generator(c.study.seed, name, number, "train", "rounding")
        lanes, _ = encode(planned(c), arrays, steps, totals, sites=len(summed), rng=rng)
        for bits, part in lanes.items():
            before = sums.get(bits, [0] * part.size)
            sums[bits] = [a + b for a, b in zip(before, part.tolist(), strict=True)]
    return sums


def opened_sums(c: Consortium) -> dict[int, list[int]]:
    """The same as the ring opened it."""
    return {bits: lanes.tolist() for bits, lanes in c.opened["values"][1].lanes.items()}


def bent(message: Message, name: str, at: int = -1) -> Message:
    """The message with one byte of an array changed."""
    array = message.arrays[name].clone()
    array[at] ^= 1
    return Message({**message.arrays, name: array}, message.scalars)


def blob(message: Message) -> bytes:
    """The token that a message carries."""
    return message.arrays["token/blob"].numpy().tobytes() if "token/blob" in message.arrays else b""


def purpose(message: Message) -> str:
    """Of the attempt that a call belongs to."""
    return str(message.scalars.get("purpose", ""))


class Relay(LocalChannel):
    """A channel that alters: ``down`` gets ``(op, site, call)``, ``up`` gets ``(op, site, reply)``."""

    down: Hook = staticmethod(lambda _, __, message: message)
    up: Hook = staticmethod(lambda _, __, message: message)

    def stream(self, op: str, messages: Mapping[str, Message]) -> Iterator[tuple[str, Message]]:
        """Calls and replies as the hooks leave them."""
        for site, reply in super().stream(op, {s: self.down(op, s, m) for s, m in messages.items()}):
            yield site, self.up(op, site, reply)


def relay(c: Consortium, *, down: Hook | None = None, up: Hook | None = None) -> None:
    """Put a ``Relay`` in the way."""
    c.channel = channel = Relay(c.sites, tolerant=True)
    if down:
        channel.down = down
    if up:
        channel.up = up
