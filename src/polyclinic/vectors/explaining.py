"""``polyclinic vectors explain``: how each contribution compares with the others, and what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from polyclinic.vectors.admission import Admission, admission
from polyclinic.vectors.contribution import Contribution
from polyclinic.vectors.ledger import Ledger
from polyclinic.vectors.survey import survey_vectors


def explain_ledger(ledger: Path | Ledger, sent: Sequence[Contribution] | None = None) -> Mapping[str, Admission]:
    """The admission report of every contribution that brings a vector, by digest.

    It is made anew from the whole set each time, so it does not depend on who arrived first.

    Args:
        ledger: Or its folder.
        sent: What it holds, where that is at hand.
    """
    opened = ledger if isinstance(ledger, Ledger) else Ledger.open(ledger)
    sources = [one for one in (opened.contributions if sent is None else sent) if one.names("vector")]
    if not sources:
        return {}
    outline = opened.base.outline
    survey = survey_vectors(outline, sources)
    return admission(outline, sources, survey, opened.decisions, changed=survey.changed)
