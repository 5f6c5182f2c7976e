"""What a server script takes from sites whose arrays it reads one by one: an answer that is whole, or none.

Sums over sites check what they add themselves (``secure.sum``); what is here is for methods that see single answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

from polyclinic.errors import SiteError
from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


def accepted(
    channel: Channel, op: str, messages: Mapping[str, Message], read: Callable[[str, Message], T]
) -> Iterator[tuple[str, T]]:
    """Call sites, read each answer as it arrives, and yield what was read, in the order of the roster.

    A site whose answer ``read`` refuses is absent where the channel goes on without a failed site.

    Args:
        channel: To the sites.
        op: Which op.
        messages: By site.
        read: Given the site and its answer; raises SiteError for one that cannot be used. ``checked`` is for that.

    Raises:
        SiteError: No answer was accepted, or one was refused and the channel does not go on without its site.
    """
    none = True
    for site, reply in channel.stream(op, messages):
        try:
            found = read(site, reply)
        except SiteError as error:
            channel.refuse(site, error)
            continue
        finally:
            del reply
        none = False
        yield site, found
        del found  # before the next site trains
    if none:
        raise nobody(channel, op)


def checked(site: str, group: str, like: Mapping[str, Tensor], reply: Message) -> tuple[dict[str, Tensor], float]:
    """One group of arrays of a site's answer, and its weight.

    Args:
        site: Whose answer it is.
        group: Of its arrays; its weight is the scalar ``weight/<group>``.
        like: Tensors of the names and shapes that it must have; their values and types are not looked at.
        reply: The answer.

    Raises:
        SiteError: As ``check_arrays``, or the weight is missing, not finite or below zero.
    """
    arrays = reply.group(group)
    check_arrays(site, group, like, arrays)
    weight = reply.scalars.get(f"weight/{group}")
    if not (isinstance(weight, int | float) and math.isfinite(weight) and weight >= 0):
        raise SiteError(
            f"site {site!r} gave {group!r} the weight {weight!r}; it must be a number of at least zero. All parties "
            "must have the same version of the program."
        )
    return arrays, float(weight)


def check_arrays(site: str, group: str, like: Mapping[str, Tensor], arrays: Mapping[str, Tensor]) -> None:
    """Refuse arrays of other names or shapes than wanted, or that are not finite.

    Raises:
        SiteError: Names the site, the first array that is wrong, and what to do.
    """
    wanted, own = ({name: tuple(t.shape) for name, t in part.items()} for part in (like, arrays))
    if wanted != own:
        name = next(n for n in {**wanted, **own} if wanted.get(n) != own.get(n))
        got, due = (f"with shape {part[name]}" if name in part else "not at all" for part in (own, wanted))
        raise SiteError(
            f"site {site!r} sent {group}/{name} {got}; it was to be sent {due}. All parties must have the same study "
            "file, models included, and the same version of the program."
        )
    for name, tensor in arrays.items():
        if not bool(tensor.isfinite().all()):
            raise SiteError(
                f"site {site!r} sent {group}/{name} with numbers that are not finite. Lower training.lr, or set "
                "training.clip."
            )


def nobody(channel: Channel, op: str) -> SiteError:
    """The error of a round in which no site answered."""
    reasons = "; ".join(f"{site}: {reason}" for site, reason in channel.absent.items())
    return SiteError(f"no site answered {op!r} in round {channel.round} ({reasons or 'none was asked'}).")
