"""The channel: all that a server script sees of the world."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from polyclinic.errors import SiteError
from polyclinic.federation.message import Message


@dataclass
class Traffic:
    """Bytes and seconds of the ops of one round, per site and op."""

    up: dict[tuple[str, str], int] = field(default_factory=dict)
    down: dict[tuple[str, str], int] = field(default_factory=dict)
    seconds: dict[tuple[str, str], float] = field(default_factory=dict)

    def add(self, site: str, op: str, *, down: int, up: int, seconds: float) -> None:
        """Count one call."""
        key = (site, op)
        self.down[key] = self.down.get(key, 0) + down
        self.up[key] = self.up.get(key, 0) + up
        self.seconds[key] = self.seconds.get(key, 0.0) + seconds

    def by_op(self) -> dict[str, dict[str, int]]:
        """``{op: {"up": bytes, "down": bytes}}`` over all sites."""
        ops = dict.fromkeys(op for _, op in self.down)
        return {
            op: {
                "up": sum(n for (_, o), n in self.up.items() if o == op),
                "down": sum(n for (_, o), n in self.down.items() if o == op),
            }
            for op in ops
        }

    def of_site(self, site: str) -> dict[str, float]:
        """``{"bytes_up", "bytes_down", "seconds"}`` of one site over all ops."""
        return {
            "bytes_up": sum(n for (s, _), n in self.up.items() if s == site),
            "bytes_down": sum(n for (s, _), n in self.down.items() if s == site),
            "seconds": sum(t for (s, _), t in self.seconds.items() if s == site),
        }


class Channel(Protocol):
    """Server's way to the sites. The same study gives the same numbers on every channel.

    ``stream`` is the primitive and yields in the order of the roster, so that a sum over sites needs one reply in
    memory at a time and does not depend on who was quickest; ``call`` gathers it.
    """

    round: int
    """The round that calls belong to, from 1; sites derive their randomness and versions of their state from it."""

    @property
    def sites(self) -> tuple[str, ...]:
        """The roster, sorted."""

    @property
    def absent(self) -> Mapping[str, str]:
        """Sites that failed or were late in this round, with the reason."""

    @property
    def traffic(self) -> Traffic:
        """What this round has cost so far."""

    def begin_round(self, number: int) -> None:
        """Start a round: empty ``absent`` and ``traffic``."""

    def stream(self, op: str, messages: Mapping[str, Message]) -> Iterator[tuple[str, Message]]:
        """Send each site its message and yield replies in the order of the roster; a failed site is left out."""

    def call(self, op: str, messages: Mapping[str, Message]) -> dict[str, Message]:
        """Send each site its message and gather the replies; a failed site is absent, with its reason kept."""

    def refuse(self, site: str, error: SiteError) -> None:
        """Count a site that answered as failed, for what is wrong with its answer.

        Raises:
            SiteError: ``error``, where the channel does not go on without a failed site.
        """
