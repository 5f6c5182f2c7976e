"""What each party of a federation gets to see: the record that tests and the collusion audit attack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from polyclinic.errors import DataError, SiteError
from polyclinic.federation.channel import Channel, Traffic
from polyclinic.federation.message import Message

SERVER = "server"


@dataclass(frozen=True, slots=True)
class Seen:
    """One message on its way from one party to another; a party is ``"server"`` or the name of a site."""

    op: str
    round: int
    sender: str
    receiver: str
    message: Message


class Recorder:
    """A channel that passes everything on to another one and keeps what passed.

    Only for tests and the collusion audit. Nothing is copied, but every message stays referenced, so the memory of a
    run grows with each call, where other channels let a reply go before the next one comes.

    Args:
        channel: Does the work.

    Attributes:
        seen: Every message in the order in which it passed. What a call sends out counts as seen by all its receivers
            from the start, also by a site that then fails.

    Raises:
        DataError: A site is called ``server``, so its view could not be told from the server's.
    """

    def __init__(self, channel: Channel) -> None:
        if SERVER in channel.sites:
            raise DataError(f"a site cannot be called {SERVER!r}: that is the other party's name. Rename it.")
        self.seen: list[Seen] = []
        self._channel = channel

    def view(self, *parties: str) -> list[Seen]:
        """What any of these parties sent or received, in order: all that they could put together.

        Raises:
            ValueError: There is no such party; the view of a misspelt one would be empty, and look harmless.
        """
        known = {SERVER, *self.sites} | {party for seen in self.seen for party in (seen.sender, seen.receiver)}
        if not parties or not known.issuperset(parties):
            raise ValueError(f"views are of one or more of {sorted(known)}, not of {sorted(set(parties) - known)}.")
        return [seen for seen in self.seen if seen.sender in parties or seen.receiver in parties]

    @property
    def round(self) -> int:
        """The wrapped channel's round."""
        return self._channel.round

    @round.setter
    def round(self, number: int) -> None:
        self._channel.round = number

    @property
    def sites(self) -> tuple[str, ...]:
        """The roster, sorted."""
        return self._channel.sites

    @property
    def absent(self) -> Mapping[str, str]:
        """Sites that failed or were late in this round, with the reason."""
        return self._channel.absent

    @property
    def traffic(self) -> Traffic:
        """What this round has cost so far."""
        return self._channel.traffic

    def begin_round(self, number: int) -> None:
        """Start a round; what was recorded stays."""
        self._channel.begin_round(number)

    def stream(self, op: str, messages: Mapping[str, Message]) -> Iterator[tuple[str, Message]]:
        """Record all messages, then each reply as it comes."""
        self.seen += [Seen(op, self.round, SERVER, site, messages[site]) for site in sorted(messages)]
        for site, reply in self._channel.stream(op, messages):
            self.seen.append(Seen(op, self.round, site, SERVER, reply))
            yield site, reply

    def call(self, op: str, messages: Mapping[str, Message]) -> dict[str, Message]:
        """Gather ``stream``."""
        return dict(self.stream(op, messages))

    def refuse(self, site: str, error: SiteError) -> None:
        """Count a site that answered as failed; its answer was seen all the same."""
        self._channel.refuse(site, error)
