"""Which backend a study's sums go through, and what it changes at server and sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from polyclinic.errors import StudyError
from polyclinic.secure.sum import PlainSum, SecureSum

if TYPE_CHECKING:
    from polyclinic.federation.site import Op
    from polyclinic.secure.hidden import SumProtocol
    from polyclinic.secure.identity import Credentials, Roster
    from polyclinic.study import FederationSettings, Study


class Summing(Protocol):
    """What asks for sums over sites: a method, or the exchange of samples before it."""

    simulation_only: ClassVar[bool]

    def ops(self) -> dict[str, Op]:
        """What sites do, with all that leaves them."""


class Aggregation:
    """The two sides of ``aggregation.backend`` for one run.

    Args:
        study: The study.
        method: Its method, or its exchange. One that sums nothing (``local``) or over one pretended site (``pooled``)
            stays plain.
        sites: Names of the sites.

    Attributes:
        backend: Name of the backend that is used.
        hidden: What it keeps from the server, in a sentence for the report; empty where that is nothing.
        least: Sites that a sum needs.
        sums: What the method's server script gets.
        ops: The method's ops as sites run them, with those of the backend.
        credentials: Keys per site; empty for the plain sum.

    Raises:
        StudyError: A round has fewer sites than a secure sum can hide or more than it can add; keys are missing, or the
            backend's library is.
    """

    def __init__(self, study: Study, method: Summing, sites: Sequence[str]) -> None:
        self.ops: Mapping[str, Op] = method.ops()
        self.sums: SecureSum = PlainSum()
        self.credentials: Mapping[str, Credentials] = {}
        self.hidden, self.least = "", 1
        summed = _summed(method)
        self.backend = study.aggregation.backend if summed else "plain"
        if self.backend == "plain":
            return
        check_cohort(study, method, len(sites))
        from polyclinic.secure.hidden import HiddenSum, hide
        from polyclinic.secure.session import least_sites

        self.credentials = _credentials(study.federation, tuple(sites))
        roster = next(iter(self.credentials.values())).roster
        self.least = least_sites(study, len(roster.keys))
        protocol = _protocol(study, roster, self.least)
        self.hidden = (
            f"Only masked or encrypted leave a site: {', '.join(summed)}, with their weights. The server learns their "
            f"sum over {self.least} sites or more."
        )
        self.sums = HiddenSum(protocol, least=self.least, tolerant=study.federation.on_absent == "continue")
        self.ops = hide(self.ops, protocol)


def _protocol(study: Study, roster: Roster, least: int) -> SumProtocol:
    settings = study.aggregation
    if settings.backend == "masked":
        from polyclinic.secure.masked import MaskedSum

        return MaskedSum(roster, least)
    from polyclinic.secure.ring import BfvScheme, RingSum

    if settings.backend == "ring-he":
        return RingSum(roster, BfvScheme(settings.provider, settings.key_holder, settings.width))
    from polyclinic.secure.ring_as_published import PublishedScheme

    return RingSum(roster, PublishedScheme())


def _credentials(federation: FederationSettings, sites: tuple[str, ...]) -> Mapping[str, Credentials]:
    from polyclinic.secure.identity import ephemeral_credentials

    if bool(federation.roster) != bool(federation.keys):
        raise StudyError("federation.roster and federation.keys go together: give both, or neither.")
    if not federation.roster:
        return ephemeral_credentials(sites)
    return _loaded(Path(federation.keys), Path(federation.roster), sites)


@cache  # so that a comparison asks for each passphrase once
def _loaded(keys: Path, roster: Path, sites: tuple[str, ...]) -> Mapping[str, Credentials]:
    from polyclinic.secure.identity import ask_passphrase, key_path, load_credentials

    return {site: load_credentials(site, keys, roster, ask_passphrase(key_path(keys, site))) for site in sites}


def _summed(method: Summing) -> list[str]:
    """Groups of arrays that several sites sum in this method."""
    if method.simulation_only:
        return []
    return sorted({leaf.name for op in method.ops().values() for leaf in op.leaves if leaf.kind == "sum"})


def check_cohort(study: Study, method: Summing, sites: int) -> None:
    """Raise StudyError where a round has fewer sites than a secure sum can hide, or more than it can add."""
    backend = study.aggregation.backend
    if backend == "plain" or not _summed(method):
        return
    from polyclinic.secure.session import FEWEST, MOST

    cohort = study.cohort_size(sites)
    if cohort == FEWEST - 1:
        raise StudyError(
            f"aggregation.backend {backend}: two sites take part in a round, and each would find the other's update by "
            f"subtracting its own from the sum, whatever the encryption. Take {FEWEST} sites or more"
            f"{'' if sites == cohort else f': this study has {sites}, of which method.participation takes two'}."
        )
    fewest = max(FEWEST, study.aggregation.fewest or 0)
    if not fewest <= cohort <= MOST:
        raise StudyError(
            f"aggregation.backend {backend}: {cohort} of {sites} sites take part in a round; a secure sum needs "
            f"{fewest} to {MOST}. Change method.participation or the sites, or use aggregation.backend: plain."
        )
    if study.synthesis is not None and sites > MOST:
        raise StudyError(
            f"aggregation.backend {backend}: an exchange of samples asks all {sites} sites, whatever "
            f"method.participation says, but a secure sum adds {MOST} at most. Leave synthesis out, or use "
            "aggregation.backend: plain."
        )
