"""The errors that Polyclinic raises on purpose. Each says what is wrong, where, and what to do.

PolyclinicError
├── StudyError        the study file: unknown key, wrong type, impossible combination
├── DataError         images, labels, masks, tables, splits
├── SiteError         a site could not do what it was asked
│   ├── UndeclaredError   something was about to leave a site that the method did not declare
│   └── ProtocolError     a party of a secure sum refused a message
├── ContributionError a base, a contribution or a ledger of data vectors is refused
├── MessageError      a message that is damaged, too large, or not in our form
└── RunError          the results folder: cannot be written, does not match, is not finished
"""

import difflib
from collections.abc import Iterable

MOST_NAMES = 12


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` with the nearest of the known names, or nothing where none is near."""
    names = {candidate.lower().replace("_", "-"): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower().replace("_", "-"), names, n=1)
    return f" Did you mean {names[close[0]]!r}?" if close else ""


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence to end an error message with: ``Did you mean 'x'?``, or else the first known names."""
    names = list(known)
    more = ", ..." if len(names) > MOST_NAMES else ""
    listed = f"Known: {', '.join(names[:MOST_NAMES])}{more}." if names else "None are known."
    return did_you_mean(name, names).lstrip() or listed


class PolyclinicError(Exception):
    """Root of all errors that the command line prints without a traceback."""


class StudyError(PolyclinicError):
    """The study file is wrong."""


class DataError(PolyclinicError):
    """The data are wrong: a table, an image, a label, a mask or a split."""


class SiteError(PolyclinicError):
    """A site failed in an op; the message names the site, the op and the cause."""


class UndeclaredError(SiteError):
    """A site handler tried to send something that its method did not declare."""


class ProtocolError(SiteError):
    """A party of a secure sum refused: wrong signature, replay, foreign roster, overflow, a second opening, ...

    Args:
        reason: What was refused, and why.
        blames: The site whose message was refused, where there is one.
    """

    def __init__(self, reason: str, blames: str | None = None) -> None:
        super().__init__(reason)
        self.blames = blames


class ContributionError(PolyclinicError):
    """A base, a contribution or a ledger of data vectors is refused; the message says why and what to do."""


class MessageError(PolyclinicError):
    """A received message is damaged, too large or not in our form."""


class RunError(PolyclinicError):
    """A results folder cannot be written, does not match the study or is incomplete."""
