"""The networks of a process: one for all sites with the same settings, and others by the part they play."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from polyclinic.errors import DataError, nearest
from polyclinic.federation.site import Workbench
from polyclinic.models.registry import start_model, untrained_model
from polyclinic.study import ModelSettings, Study

SITE = "site"
"""The role of the network that a site trains and deploys."""


class Networks:
    """Workbenches, each made when it is first asked for.

    Memory grows with the number of different networks, not of sites: what a workbench holds is undefined at the start
    of an op, so an op that uses one loads what it needs.

    Args:
        study: Its ``model``, ``models`` and ``device`` count.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self._benches: dict[tuple[str, str], Workbench] = {}

    def of_site(self, name: str) -> Workbench:
        """The network of a site; sites with equal settings share one."""
        return self.of(self.study.model_of(name), SITE)

    def of(self, settings: ModelSettings, role: str) -> Workbench:
        """A network that plays another part, such as ``central`` or ``companion``.

        Args:
            settings: Of the network; its start weights are those of ``start_model``, whatever the role.
            role: Networks with equal settings and different roles are different workbenches.

        Raises:
            StudyError: There is no such network, or it does not fit the images or the task.
        """
        key = role, settings.model_dump_json()
        if key not in self._benches:
            self._benches[key] = Workbench(lambda: start_model(self.study, settings), self.study.device)
        return self._benches[key]


def check_models(study: Study, sites: Collection[str]) -> None:
    """Refuse a study that gives a network to a site that is not there.

    Args:
        study: With ``models``.
        sites: Names of all sites.

    Raises:
        DataError: Names the site of ``models`` that no table knows, and the nearest that there is.
    """
    for name in study.models:
        if name not in sites:
            raise DataError(f"models.{name}: there is no site {name!r}. {nearest(name, sorted(sites))}")


def site_networks(study: Study, sites: Collection[str]) -> dict[str, nn.Module]:
    """Every site's network before any training, to look at; sites with equal settings share one.

    Raises:
        StudyError: A network does not fit the images or the task. DataError: As ``check_models``.
    """
    check_models(study, sites)
    made: dict[str, nn.Module] = {}
    found = {}
    for name in sorted(sites):
        settings = study.model_of(name)
        key = settings.model_dump_json()
        if key not in made:
            made[key] = untrained_model(study, settings)
        found[name] = made[key]
    return found
