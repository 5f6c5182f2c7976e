"""Sums that show nobody a single site's update: what the masked sum and the ring have in common.

Server and sites go through three steps. The op itself (``train``) runs as ever, but what it would send as sums stays at
the site, in its memory, and so do the weights. Then the weights are summed, by the protocol itself, so that no count
travels in clear; then shares of the weighted mean, with the weights beside them once more, since a site may be lost in
between. An attempt that fails before it is opened is repeated with fresh keys and without new training.

What stays visible: who took part. The weight of a site that is lost between both sums is what they differ by, as it is
between rounds with and without it; its update stays hidden.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyclinic.errors import MessageError, ProtocolError, SiteError
from polyclinic.federation.message import Message
from polyclinic.federation.site import Leaf, Op, check_declared
from polyclinic.secure.fixed_point import WEIGHT_STEPS, Lanes, Layout, decode, encode, plan, weight_steps, word
from polyclinic.secure.keystream import Keystream, add_streams
from polyclinic.secure.session import Attempt, Session, digest, too_few
from polyclinic.secure.sum import Total
from polyclinic.seeds import generator

if TYPE_CHECKING:
    from polyclinic.federation.channel import Channel
    from polyclinic.federation.site import Site


class AttemptFailed(SiteError):  # noqa: N818 - it is caught, not shown, unless no attempt is left
    """An attempt ended before its sum was known.

    Args:
        reason: What happened.
        refused: Sites that refused, with the site that each blames, or "".
    """

    def __init__(self, reason: str, refused: Mapping[str, str] | None = None) -> None:
        super().__init__(reason)
        self.refused = dict(refused or {})


@dataclass
class Contribution:
    """Integers of all widths, unsigned, as they are masked, added and sent: ``{bits: array}``."""

    lanes: dict[int, NDArray[Any]]

    @classmethod
    def of(cls, lanes: Lanes) -> Contribution:
        """Signed lanes, seen as unsigned ones."""
        return cls({bits: part.view(f"u{part.itemsize}") for bits, part in lanes.items()})

    def arrays(self) -> dict[str, Tensor]:
        """For a message: ``lanes/<bits>``."""
        return {f"lanes/{b}": torch.from_numpy(a.view(f"i{a.itemsize}")) for b, a in self.lanes.items()}

    @classmethod
    def unpack(cls, message: Message, layout: Layout) -> Contribution:
        """What ``arrays`` packed.

        Raises:
            MessageError: Not the lanes of this layout.
        """
        arrays = message.group("lanes")
        wanted = {str(b): ((layout.count(b),), f"torch.int{8 * word(b)}") for b in layout.widths}
        if {name: (tuple(array.shape), str(array.dtype)) for name, array in arrays.items()} != wanted:
            raise MessageError("a vector has other lanes than the layout says.")
        return cls.of({b: arrays[str(b)].contiguous().numpy() for b in layout.widths})

    def digests(self) -> list[bytes]:
        """SHA-256 of each width's lanes."""
        return [digest(part) for part in self.lanes.values()]

    def add(self, other: Contribution) -> None:
        """Add modulo the width, in place."""
        for bits, part in other.lanes.items():
            if bits in self.lanes:
                np.add(self.lanes[bits], part, out=self.lanes[bits])
            else:
                self.lanes[bits] = part.copy()

    def add_streams(self, streams: Sequence[tuple[Keystream, int]]) -> None:
        """Add signed streams, in place; they run on from each width to the next narrower one."""
        for bits in sorted(self.lanes, reverse=True):
            add_streams(self.lanes[bits], streams)

    def signed(self) -> Lanes:
        """Seen as signed integers."""
        return {bits: part.view(f"i{part.itemsize}") for bits, part in self.lanes.items()}


@dataclass(frozen=True)
class Opened:
    """A sum that is known, and whose it is."""

    sites: tuple[str, ...]
    asked: int
    """How many sites were asked, on which the scale of narrow lanes depends."""
    lanes: Lanes


class SumProtocol(Protocol):
    """How integers are summed so that no party sees one site's: ``masked.py``, ``ring.py``."""

    def ops(self) -> dict[str, Op]:
        """The sites' side."""

    def add(self, channel: Channel, attempt: Attempt, layout: Layout) -> Opened:
        """The server's side of one attempt.

        Raises:
            AttemptFailed: It can be repeated.
        """


class HiddenSum:
    """Weighted sums by a protocol that hides what each site adds.

    Args:
        protocol: The protocol.
        least: Sites that refuse a sum over fewer than so many need not be asked.
        tolerant: Go on without a site that keeps refusing; otherwise it ends the run.

    Attributes:
        incidents: What was refused and repeated since they were last read.
    """

    def __init__(self, protocol: SumProtocol, *, tolerant: bool, least: int) -> None:
        self._protocol, self._tolerant, self._least = protocol, tolerant, least
        self._number = 0
        self.incidents: list[str] = []

    def sum(self, channel: Channel, op: str, messages: Mapping[str, Message]) -> Total:
        """Run ``op``, then sum what the sites kept of its answers.

        Raises:
            SiteError: Fewer sites than a sum needs are left, their arrays are not alike, or every attempt failed.
        """
        scalars: dict[str, Mapping[str, Any]] = {}
        layouts: dict[str, str] = {}
        for site, reply in channel.stream(op, messages):
            layouts[site] = str(reply.scalars.get("layout", ""))
            scalars[site] = {name: value for name, value in reply.scalars.items() if name != "layout"}
        sites = sorted(scalars)
        if len(sites) < self._least:
            reasons = "; ".join(f"{site}: {reason}" for site, reason in channel.absent.items())
            raise SiteError(f"{op!r}, round {channel.round}: {too_few(sites, self._least)} {reasons}".rstrip())
        layout = _common(layouts)
        counts = self._add(channel, op, "counts", sites, Layout((), layout.groups))
        totals = tuple(map(int, counts.lanes[64]))
        values = self._add(channel, op, "values", counts.sites, layout, totals)
        weights, means = decode(layout, values.lanes, sites=values.asked)
        _check_weights(weights.values(), totals, everyone=values.sites == counts.sites)
        whole = {group: total / WEIGHT_STEPS for group, total in zip(layout.groups, totals, strict=True)}
        sums: dict[str, dict[str, Tensor]] = {group: {} for group in layout.groups}
        for key in list(means):
            group, _, name = key.partition("/")
            sums[group][name] = torch.from_numpy(means.pop(key)).mul_(whole[group])
        return Total(sums, {g: steps / WEIGHT_STEPS for g, steps in weights.items()}, scalars)

    def _add(
        self,
        channel: Channel,
        op: str,
        purpose: str,
        sites: Sequence[str],
        layout: Layout,
        totals: tuple[int, ...] = (),
    ) -> Opened:
        """Attempts until one succeeds: once more with the same sites after a refusal, then without its cause."""
        tried: list[list[str]] = []
        sites = list(sites)
        while True:
            # The clock keeps numbers growing over restarts of the server, which remembers none.
            self._number = max(time.time_ns() // 1_000_000, self._number + 1)
            attempt = Attempt(op, purpose, channel.round, self._number, tuple(sites), totals)
            try:
                return self._protocol.add(channel, attempt, layout)
            except AttemptFailed as failure:
                self.incidents.append(f"{op}, {purpose}: {failure}")
                tried.append(sites)
                sites = [site for site in sites if site not in channel.absent]
                if tried.count(sites) > 1 and self._tolerant:
                    sites = _without_cause(sites, failure.refused)
                if len(sites) < self._least or tried.count(sites) > 1:
                    raise SiteError(f"{op!r}, round {channel.round}: no sum came about: {failure}") from failure


def _check_weights(weights: Iterable[int], totals: Sequence[int], *, everyone: bool) -> None:
    """Weights travel with the values once more: where they do not add up, masks have not cancelled, or a site lied."""
    for steps, total in zip(weights, totals, strict=True):
        slack = WEIGHT_STEPS + total // 1_000_000  # for the ring as published, which is not exact
        if not (total if everyone else 0) - slack <= steps <= total + slack:
            raise SiteError(
                "the weights in a sum add up to another number than when they were summed alone: masks did not cancel, "
                "or a site did not keep to the protocol. The sum was thrown away; --resume repeats the round."
            )


def _without_cause(sites: Sequence[str], refused: Mapping[str, str]) -> list[str]:
    """Leave out a site that the server blames, or most of the others; else those who refused."""
    for site in sites:
        if refused.get("server") == site or list(refused.values()).count(site) > (len(sites) - 1) / 2:
            return [s for s in sites if s != site]
    return [s for s in sites if s not in refused]


def _common(layouts: Mapping[str, str]) -> Layout:
    first, *others = layouts
    for site in others:
        if layouts[site] != layouts[first]:
            ours, theirs = (Layout.from_text(layouts[s]) for s in (first, site))
            a, b = ({e.name: e.shape for e in own.entries} for own in (ours, theirs))
            name = next((n for n in {**a, **b} if a.get(n) != b.get(n)), "bounds")
            raise SiteError(
                f"site {site!r} answered {name} with shape {b.get(name)}, site {first!r} with {a.get(name)}. "
                "Networks, and the models that sites received, must be alike to be averaged."
            )
    return Layout.from_text(layouts[first])


def ask(
    channel: Channel, attempt: Attempt, op: str, calls: Mapping[str, Message], least: int, *, refusals: bool = False
) -> dict[str, Message]:
    """Call a phase; a site that refuses ends the attempt, unless ``refusals`` may be passed over.

    Raises:
        AttemptFailed: A refusal, or fewer than ``least`` answers.
    """
    replies = channel.call(op, {site: attempt.message(call) for site, call in calls.items()})
    refused = {site: reply for site, reply in replies.items() if "refused" in reply.scalars}
    answers = {site: reply for site, reply in replies.items() if site not in refused}
    if refused and (len(answers) < least or not refusals):
        raise refusal(op, refused)
    if len(answers) < least:
        silent = {site: channel.absent.get(site, "no answer") for site in calls if site not in replies}
        failed = "; ".join(f"site {site!r} failed in {op!r}: {reason}" for site, reason in silent.items())
        raise AttemptFailed(failed if len(calls) == 1 else f"{failed}. {too_few(sorted(answers), least)}")
    return answers


def refusal(op: str, refused: Mapping[str, Message]) -> AttemptFailed:
    """The end of an attempt in which these sites answered ``op`` with a refusal."""
    reasons = "; ".join(f"site {site!r} refused {op!r}: {r.scalars['refused']}" for site, r in refused.items())
    return AttemptFailed(reasons, {site: str(reply.scalars.get("blames", "")) for site, reply in refused.items()})


def hide(ops: Mapping[str, Op], protocol: SumProtocol) -> dict[str, Op]:
    """A method's ops with their sums hidden, and the protocol's own."""
    hidden = {name: _hidden(name, op) if _sums(op) else op for name, op in ops.items()}
    return {**hidden, **protocol.ops()}


def _sums(op: Op) -> tuple[Leaf, ...]:
    return tuple(leaf for leaf in op.leaves if leaf.kind == "sum")


def _hidden(name: str, op: Op) -> Op:
    least = {leaf.name: leaf.lanes for leaf in _sums(op)}

    def run(site: Site, message: Message) -> Message:
        reply = op.run(site, message)
        check_declared(site.name, name, op.leaves, reply)
        kept = {key: array for key, array in reply.arrays.items() if key.partition("/")[0] in least}
        other = {key: array for key, array in reply.arrays.items() if key not in kept}
        groups = list(dict.fromkeys(key.partition("/")[0] for key in kept))
        weights = {group: float(reply.scalars[f"weight/{group}"]) for group in groups}
        rest = {key: value for key, value in reply.scalars.items() if not key.startswith("weight/")}
        settings = site.study.aggregation
        layout = plan(kept, least, message.group("model"), narrow=settings.width, reach=settings.reach)
        Pending.keep(site, name, message.digest(), layout, kept, weights)
        return Message(other, {**rest, "layout": layout.to_text()})

    visible = tuple(leaf for leaf in op.leaves if leaf.kind != "sum" and leaf.name != "weight/*")
    return Op(run, (*visible, Leaf("layout", "scalar", "nothing")))


@dataclass(frozen=True)
class Pending:
    """What a site has computed and will only give away as part of a sum.

    In memory: writing the arrays would cost as much as masking them, and the weights need not lie on a disk.
    """

    round: int
    op: str
    model: str
    """SHA-256 of what the site received for it."""
    layout: Layout
    steps: dict[str, int]
    arrays: Mapping[str, Tensor]

    @classmethod
    def keep(
        cls, site: Site, op: str, model: str, layout: Layout, arrays: Mapping[str, Tensor], weights: Mapping[str, float]
    ) -> None:
        """Hold it until the next round; what narrow lanes lost in the round before is added."""
        steps = {group: weight_steps(weight) for group, weight in weights.items()}
        before = site.state.load(_lost(op))
        lost = before[0] if before else {}
        arrays = {key: array + lost[key] if key in lost else array for key, array in arrays.items()}
        site.party.hold(cls(site.round, op, model, layout, steps, arrays))

    @classmethod
    def of(cls, site: Site) -> Pending:
        """What the site holds.

        Raises:
            SiteError: It computed nothing in this round, or was restarted since.
        """
        held = site.party.held
        if held is None or held.round != site.round:
            raise SiteError(
                f"site {site.name!r} has nothing to sum in round {site.round}: it computed nothing, or was restarted "
                "and lost it."
            )
        return held


def _lost(op: str) -> str:
    """Key of what narrow lanes lost of an op's answer in a site's state."""
    return "sum_lost_" + op.replace("-", "_")


def enter(site: Site, message: Message, **facts: str) -> Message:
    """First phase of every protocol: begin the attempt with what the site computed; answers with its signed keys.

    Args:
        site: The site.
        message: The server's call.
        facts: What else must be alike at all sites.

    Raises:
        ProtocolError: What ``Party.begin`` refuses.
    """
    attempt = Attempt.read(message)
    pending = Pending.of(site)
    if pending.op != attempt.op:
        raise SiteError(f"site {site.name!r} last computed {pending.op!r}, not {attempt.op!r}.")
    own = {"model": pending.model, "layout": pending.layout.digest, "backend": site.study.aggregation.backend}
    return site.party.begin(attempt, site.round, {**own, **facts})


def layout_of(site: Site, attempt: Attempt) -> Layout:
    """What travels in an attempt: the weights alone, or everything that the site computed."""
    layout = Pending.of(site).layout
    return Layout((), layout.groups) if attempt.purpose == "counts" else layout


def own_lanes(site: Site, session: Session) -> Lanes:
    """What this site adds in an attempt: its weights, or its share of the weighted mean.

    Raises:
        ProtocolError: A value does not fit its lanes.
    """
    attempt, pending = session.attempt, Pending.of(site)
    groups = pending.layout.groups
    if (pending.model, pending.layout.digest) != (session.context["model"], session.context["layout"]):
        raise ProtocolError("what is to be summed was computed from another model than this attempt's keys say.")
    if attempt.purpose == "counts":
        return encode(Layout((), groups), {}, pending.steps, {}, sites=len(attempt.sites))[0]
    if len(attempt.totals) != len(groups):
        raise ProtocolError(f"the call says {len(attempt.totals)} sums of weights, and there are {len(groups)}.")
    totals = dict(zip(groups, attempt.totals, strict=True))
    # Rounding hides nothing, so its randomness may follow from the study's seed; masks have keys of their own.
    rng = generator(site.study.seed, site.name, site.round, attempt.op, "rounding")
    lanes, lost = encode(pending.layout, pending.arrays, pending.steps, totals, sites=len(attempt.sites), rng=rng)
    if lost:
        tensors = {e.name: torch.from_numpy(lost[e.name]).reshape(e.shape) for e in pending.layout.entries if e.narrow}
        site.state.save(_lost(attempt.op), tensors)
    return lanes
