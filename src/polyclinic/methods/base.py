"""What every method is: settings, a server script over rounds, site ops with declared leaves, and a deployed model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message
from polyclinic.federation.networks import Networks
from polyclinic.federation.site import Leaf, Op, Site
from polyclinic.federation.state import ServerState
from polyclinic.models.normalisation import shared_names
from polyclinic.secure.sum import SecureSum
from polyclinic.seeds import generator
from polyclinic.settings import Settings
from polyclinic.study import ModelSettings, Study

if TYPE_CHECKING:
    from polyclinic.data.dataset import SiteData


class MethodParams(Settings):
    """Settings that every method has."""

    name: str
    label: str = Field("", pattern=r"^([A-Za-z0-9][A-Za-z0-9_.-]{0,63})?$")
    """What tables call it; needed where a comparison lists a method twice with different settings."""
    rounds: int = Field(10, ge=1)
    """Communication rounds."""
    participation: float = Field(1.0, gt=0, le=1)
    """Share of the sites that train in a round, drawn anew each round (at least one)."""

    @property
    def title(self) -> str:
        """The label, else the name."""
        return self.label or self.name


class Method(ABC):
    """A method: one file with both sides.

    A subclass gives ``Params``, ``title``, ``reference``, ``server`` and ``ops``; what it leaves out is FedAvg's: all
    float tensors but local running statistics are shared, and the global model is what a site deploys.
    """

    Params: ClassVar[type[MethodParams]]
    title: ClassVar[str]
    """The method in a few words, for listings."""
    reference: ClassVar[str]
    """Authors, venue and arXiv number of the paper."""
    needs: ClassVar[str] = ""
    """What a study must have for this method, for listings; ``check`` enforces it."""
    simulation_only: ClassVar[bool] = False
    """True where the server script needs what no federation gives."""
    exchanges: ClassVar[bool] = True
    """Whether sites can exchange samples before the first round (``synthesis``)."""
    starts_global: ClassVar[bool] = True
    """Whether what a site deploys starts from the server's model, its last layer included."""
    mixed_networks: ClassVar[bool] = False
    """Whether sites may have different networks (``models`` of the study)."""
    trained_at_home: ClassVar[bool] = False
    """Whether a site deploys the very model that it trained; nothing is sent for it."""
    personal: bool = False
    """True where sites deploy models of their own, which they then keep themselves."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.personal = self.personal or study.model.norm == "batch-local"

    @classmethod  # noqa: B027 - most methods take every study
    def check(cls, study: Study) -> None:
        """Raise StudyError for settings that cannot work with this method."""

    @classmethod
    def adapted(cls, study: Study) -> Study:
        """The study as this method runs it: what the study leaves open is filled in."""
        return study if cls.exchanges else study.model_copy(update={"synthesis": None})

    @classmethod
    def controls(cls, params: MethodParams) -> list[dict[str, Any]]:
        """Methods that a comparison with this one must have beside it, as ``compare.methods`` has them."""
        return []

    @cached_property
    def networks(self) -> Networks:
        """The networks of this process: those of sites, and others that the method asks for by their role."""
        return Networks(self.study)

    def check_networks(self, networks: Mapping[str, nn.Module]) -> None:  # noqa: B027 - most methods take every network
        """Raise StudyError for networks that this method cannot bring together.

        Called by ``polyclinic check`` and before training.

        Args:
            networks: Every site's own, with some start weights; sites with equal settings share one. Read only.
        """

    def central(self, state: ServerState) -> tuple[ModelSettings, dict[str, Tensor]] | None:
        """The server's own model, where there is one beside those of the sites that classifies: settings and tensors.

        After the last round it is saved and tested at every site. Its settings must be in the study: ``model``, one
        of ``models``, or among those of the method.
        """
        return None

    def records(self, state: ServerState) -> dict[str, Any]:
        """What the results folder keeps of how sites learnt from each other (``transfer.json``); empty: nothing."""
        return {}

    def check_data(self, data: SiteData) -> None:  # noqa: B027 - most methods take every site
        """Raise DataError for a site's images that this method cannot train on."""

    @abstractmethod
    def server(self, channel: Channel, state: ServerState, sums: SecureSum) -> Iterator[None]:
        """Train: one ``yield`` per finished round, with all that the next round needs in ``state``.

        ``state.groups["model"]`` holds the shared tensors when training starts; after a restart the generator is made
        anew from the last saved state.
        """

    @abstractmethod
    def ops(self) -> dict[str, Op]:
        """What sites do, by op."""

    def ready(self, number: int) -> bool:
        """Whether there is a model to judge after round ``number``; there must be one after the last."""
        return True

    def shared(self, model: nn.Module) -> list[str]:
        """Names of the tensors that leave a site."""
        return shared_names(model, self.study.model.norm)

    def deployment(self, state: ServerState) -> Message:
        """What the server sends to a site that wants to use the model."""
        return Message() if self.trained_at_home else Message.pack({"model": state.groups["model"]})

    def deploy(self, site: Site, message: Message) -> None:
        """Load into the site's network the model that it would use now."""
        if self.trained_at_home:
            load_own(site)
        else:
            load_global(site, message)


def load_global(site: Site, message: Message) -> dict[str, Tensor]:
    """Load the received model; tensors that are not shared come from the site's own memory, else the start weights.

    Returns:
        The received tensors, the point that the site's update is measured from.
    """
    received = message.group("model")
    if len(received) < len(site.tensors):
        kept = site.state.load("local")
        own = kept[0] if kept else site.initial
        site.load({name: own[name] for name in site.tensors if name not in received})
    site.load(received)
    return received


def load_own(site: Site) -> None:
    """Load the site's own model, or the start weights before its first training."""
    kept = site.state.load("personal")
    site.load(kept[0] if kept else site.initial)


def keep_local(site: Site, received: Mapping[str, Tensor]) -> None:
    """Remember the tensors that are not shared."""
    own = {name: tensor for name, tensor in site.tensors.items() if name not in received}
    if own:
        site.state.save("local", own)


def draw_cohort(study: Study, sites: Sequence[str], number: int) -> list[str]:
    """The sites that train in round ``number``: a share ``participation`` of the roster, without replacement."""
    count = study.cohort_size(len(sites))
    if count == len(sites):
        return list(sites)
    rng = generator(study.seed, "cohort", number)
    return sorted(rng.choice(sorted(sites), size=count, replace=False).tolist())


TRAINED = (
    Leaf("loss", "scalar", "images"),
    Leaf("weight/*", "scalar", "counts"),
)
"""Leaves of an ordinary training op beside its arrays."""

__all__ = ["TRAINED", "Leaf", "Method", "MethodParams", "Op", "draw_cohort", "keep_local", "load_global", "load_own"]
