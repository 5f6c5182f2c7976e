"""Which backend a study's sums go through, and what it changes at server and sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from polyclinic.errors import StudyError
from polyclinic.secure.sum import PlainSum, SecureSum

if TYPE_CHECKING:
    from polyclinic.federation.site import Op
    from polyclinic.methods.base import Method
    from polyclinic.secure.identity import Credentials
    from polyclinic.study import Study


class Aggregation:
    """The two sides of ``aggregation.backend`` for one run.

    Args:
        study: The study.
        method: Its method. A method that needs no federation (``pooled``) has one site in its sums and stays plain.
        sites: Names of the sites.

    Attributes:
        backend: Name of the backend that is used.
        sums: What the method's server script gets.
        ops: The method's ops as sites run them, with those of the backend.
        credentials: Keys per site; empty for the plain sum.

    Raises:
        StudyError: Keys are missing, or the backend's library is.
    """

    def __init__(self, study: Study, method: Method, sites: Sequence[str]) -> None:
        self.backend = "plain" if method.simulation_only else study.aggregation.backend
        self.sums: SecureSum = PlainSum()
        self.ops: Mapping[str, Op] = method.ops()
        self.credentials: Mapping[str, Credentials] = {}
        if self.backend == "plain":
            return
        from polyclinic.secure.hidden import HiddenSum, SumProtocol, hide

        self.credentials = _credentials(study, sites)
        roster = next(iter(self.credentials.values())).roster
        protocol: SumProtocol
        if self.backend == "masked":
            from polyclinic.secure.masked import MaskedSum

            protocol = MaskedSum(roster)
        elif self.backend == "ring-he":
            from polyclinic.secure.ring import BfvScheme, RingSum

            settings = study.aggregation
            protocol = RingSum(roster, BfvScheme(settings.provider, settings.key_holder, settings.width))
        else:
            from polyclinic.secure.ring import RingSum
            from polyclinic.secure.ring_as_published import PublishedScheme

            protocol = RingSum(roster, PublishedScheme())
        self.sums = HiddenSum(protocol)
        self.ops = hide(self.ops, protocol)


def _credentials(study: Study, sites: Sequence[str]) -> Mapping[str, Credentials]:
    from polyclinic.secure.identity import ask_passphrase, ephemeral_credentials, key_path, load_credentials

    federation = study.federation
    if bool(federation.roster) != bool(federation.keys):
        raise StudyError("federation.roster and federation.keys go together: give both, or neither.")
    if not federation.roster:
        return ephemeral_credentials(sites)
    keys, roster = Path(federation.keys), Path(federation.roster)
    return {site: load_credentials(site, keys, roster, ask_passphrase(key_path(keys, site))) for site in sites}


def check_cohort(study: Study, method: Method, sites: int) -> None:
    """Raise StudyError where a round has fewer sites than a secure sum can hide, or more than it can add."""
    backend = study.aggregation.backend
    if (
        backend == "plain"
        or method.simulation_only
        or not any(leaf.kind == "sum" for op in method.ops().values() for leaf in op.leaves)
    ):
        return
    cohort = max(1, round(study.method.participation * sites))
    if cohort == 2:
        raise StudyError(
            f"aggregation.backend {backend}: two sites take part in a round, and each would find the other's update by "
            "subtracting its own from the sum, whatever the encryption. Take three sites or more."
        )
    if not 3 <= cohort <= 16:
        raise StudyError(
            f"aggregation.backend {backend}: {cohort} of {sites} sites take part in a round; a secure sum needs 3 to "
            "16. Change method.participation or the sites, or use aggregation.backend: plain."
        )
