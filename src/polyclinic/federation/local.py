"""Sites in this process, one after another, all on one workbench network."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from polyclinic.errors import RunError, SiteError, UndeclaredError
from polyclinic.federation.channel import Traffic
from polyclinic.federation.message import Message
from polyclinic.federation.site import Site


class LocalChannel:
    """A channel to sites of this process.

    Messages pass by reference: their bytes are counted from the exact length of the binary form, which is not made.

    Args:
        sites: By name.
        hidden: Sites that answer but are not on the roster (the union of all sites for ``pooled``).
        tolerant: Go on without a site that fails; otherwise its error ends the call.
        on_call: Told ``(op, site, reply)`` after each answer, for a progress display.
    """

    def __init__(
        self,
        sites: Mapping[str, Site],
        *,
        hidden: Mapping[str, Site] | None = None,
        tolerant: bool = False,
        on_call: Callable[[str, str, Message], None] | None = None,
    ) -> None:
        self.round = 0
        self.traffic = Traffic()
        self.absent: dict[str, str] = {}
        self.sites = tuple(sorted(sites))
        self._sites = {**sites, **(hidden or {})}
        self._tolerant = tolerant
        self._on_call = on_call

    def begin_round(self, number: int) -> None:
        """Start a round: empty ``absent`` and ``traffic``."""
        self.round, self.absent, self.traffic = number, {}, Traffic()

    def stream(self, op: str, messages: Mapping[str, Message]) -> Iterator[tuple[str, Message]]:
        """Let each site answer in turn, in the order of their names."""
        for name in sorted(messages):
            started = time.perf_counter()
            try:
                reply = self._sites[name].handle(op, self.round, messages[name])
            except (UndeclaredError, RunError):
                # Neither is the site's absence: a leak that was stopped, and a results folder that takes no more.
                raise
            except Exception as error:
                self.traffic.add(name, op, down=messages[name].nbytes, up=0, seconds=time.perf_counter() - started)
                if not self._tolerant:
                    raise SiteError(f"site {name!r} failed in {op!r}, round {self.round}: {error}") from error
                self.absent[name] = f"{type(error).__name__}: {error}"
                continue
            seconds = time.perf_counter() - started
            self.traffic.add(name, op, down=messages[name].nbytes, up=reply.nbytes, seconds=seconds)
            if self._on_call:
                self._on_call(op, name, reply)
            yield name, reply
            del reply  # before the next site trains

    def call(self, op: str, messages: Mapping[str, Message]) -> dict[str, Message]:
        """Gather ``stream``."""
        return dict(self.stream(op, messages))

    def refuse(self, site: str, error: SiteError) -> None:
        """Count a site that answered as absent, or raise ``error`` where none may fail."""
        if not self._tolerant:
            raise error
        self.absent[site] = f"{type(error).__name__}: {error}"
