"""The site's side of an op: its data, its state, the workbench network, and the guard at its door."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from polyclinic.errors import SiteError, UndeclaredError, nearest
from polyclinic.federation.message import Message
from polyclinic.federation.state import SiteState
from polyclinic.models.normalisation import shared_names
from polyclinic.models.weights import load_tensors, shared_tensors, snapshot
from polyclinic.seeds import derive_seed
from polyclinic.study import Study
from polyclinic.training import AdjustGradients, StepRule, TrainingResult, learning_rate, plain_step, train

if TYPE_CHECKING:
    from polyclinic.data.dataset import SiteData
    from polyclinic.data.proxies import Proxies
    from polyclinic.federation.networks import Networks
    from polyclinic.secure.identity import Credentials
    from polyclinic.secure.session import Party
    from polyclinic.synthesis.shelf import Shelf
    from polyclinic.tasks import Task


@dataclass(frozen=True)
class Leaf:
    """One thing that leaves a site in an op: a group of arrays or a scalar (``group/*`` for a family of scalars)."""

    name: str
    kind: Literal["sum", "array", "scalar"]
    """``sum``: arrays that leave only through the secure sum. ``array``: arrays that leave as they are."""
    derived_from: Literal["images", "labels", "counts", "nothing"]
    """The most sensitive thing it is computed from."""
    lanes: Literal[16, 32, 64] = 32
    """For a sum: the fewest bits that a secure sum may give each value. 16: values of the size of a model's weights,
    whose excess may wait for the next round. 32: what is too large is refused. 64: counters and what else grows."""


Handler = Callable[["Site", Message], Message]


@dataclass(frozen=True)
class Op:
    """What a site does when it is called, and all that may leave it then."""

    run: Handler
    leaves: tuple[Leaf, ...]


class Workbench:
    """A network of this process, which sites load their weights into in turn.

    Args:
        build: Makes the network with its start weights; the same each time.
        device: Where it runs.
    """

    def __init__(self, build: Callable[[], nn.Module], device: str) -> None:
        self._build = build
        self.device = torch.device(device)
        self.model = build().to(self.device)
        self.tensors = shared_tensors(self.model, shared_names(self.model, "batch"))

    @cached_property
    def initial(self) -> dict[str, Tensor]:
        """The start weights, made anew when first asked for."""
        return snapshot(shared_tensors(self._build().to(self.device), self.tensors))

    def restart(self) -> None:
        """Put the start weights into the network."""
        load_tensors(self.model, self.initial)


class Site:
    """One hospital in an op: what handlers get as their first argument.

    Attributes:
        name: Of the site.
        study: The study that all sites know.
        data: Its images.
        task: What is predicted.
        state: What it remembers between rounds.
        folder: Where it writes predictions.
        round: The round of the current op.
        party: Its side of secure sums, where the study asks for them.
        shelf: What it took from the exchange of samples, where there was one.
        agreed: Digest of the public images, once they were compared with the server's; empty before.
    """

    def __init__(
        self,
        name: str,
        study: Study,
        data: SiteData,
        task: Task,
        *,
        workbench: Workbench,
        ops: Mapping[str, Op],
        folder: Path,
        credentials: Credentials | None = None,
        exchanged: Path | None = None,
        networks: Networks | None = None,
    ) -> None:
        self.name, self.study, self.data, self.task = name, study, data, task
        self.state = SiteState(folder / "state" / name, workbench.device)
        self.folder = folder
        self.round = 0
        self.agreed = ""
        self._bench = workbench
        self._ops = ops
        self._credentials = credentials
        self._networks = networks
        self._exchanged = None if exchanged is None else SiteState(exchanged / "state" / name, workbench.device)

    @cached_property
    def party(self) -> Party:
        """This site in secure sums.

        Raises:
            SiteError: The site was given no key.
        """
        from polyclinic.secure.session import Party, least_sites

        if self._credentials is None:
            raise SiteError(f"site {self.name!r} has no key for secure sums.")
        least = least_sites(self.study, len(self._credentials.roster.keys))
        return Party(self.study.digest, self._credentials, self.state.folder / "sums.json", least)

    @cached_property
    def networks(self) -> Networks:
        """The networks of this process, for methods that use others beside the site's own."""
        from polyclinic.federation.networks import Networks

        return Networks(self.study) if self._networks is None else self._networks

    @cached_property
    def own_proxies(self) -> Proxies:
        """The public images of the study, as they lie at this site, each one compared with the manifest.

        Raises:
            SiteError: The study names none. DataError: An image is missing or is another than the manifest's.
        """
        from polyclinic.data.proxies import load_proxies

        if self.study.proxies is None:
            raise SiteError(f"site {self.name!r}: the study names no public images. Give proxies in the study file.")
        return load_proxies(self.study)

    @property
    def proxies(self) -> Proxies:
        """``own_proxies``, to be learnt from: they are the server's as well.

        Raises:
            SiteError: They were not compared with the server's since the site was started. Else as ``own_proxies``.
        """
        found = self.own_proxies
        if found.digest != self.agreed:
            raise SiteError(
                f"site {self.name!r} did not compare its public images {found.name!r} with the server's, so it learns "
                "nothing from them. The server asks for it at the start of each round (agree_on_proxies)."
            )
        return found

    def handle(self, op: str, number: int, message: Message) -> Message:
        """Answer one call; nothing leaves that the op did not declare.

        Raises:
            SiteError: There is no such op.
            UndeclaredError: The answer holds something that the op did not declare.
        """
        if op not in self._ops:
            raise SiteError(f"site {self.name!r} has no op {op!r}. {nearest(op, list(self._ops))}")
        self.round = number
        self.state.begin_round(number)
        reply = self._ops[op].run(self, message)
        check_declared(self.name, op, self._ops[op].leaves, reply)
        return reply

    @property
    def model(self) -> nn.Module:
        """The workbench of the site's network; what it holds is undefined at the start of an op."""
        return self._bench.model

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Live view of the network's float parameters and buffers, by name."""
        return self._bench.tensors

    @property
    def initial(self) -> Mapping[str, Tensor]:
        """The start weights that every site derives from the study's seed."""
        return self._bench.initial

    @property
    def images(self) -> int:
        """Number of training images."""
        return len(self.data.splits["train"])

    @property
    def weight(self) -> float:
        """The site's weight in sums over sites, as ``aggregation.weight`` of the study says."""
        kind = self.study.aggregation.weight
        if kind == "uniform":
            return 1.0
        return float(self.images if kind == "images" else len(set(self.data.patients("train"))))

    @cached_property
    def shelf(self) -> Shelf | None:
        """What this site took from the exchange of samples; None where there was none, or it missed it."""
        from polyclinic.synthesis.shelf import Shelf

        return None if self._exchanged is None else Shelf.load(self._exchanged)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors into the workbench network; the others keep their values."""
        load_tensors(self.model, tensors)

    def update(self, received: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What training changed: network minus ``received``, for the names in ``received``."""
        names = list(received)
        with torch.no_grad():
            changes = torch._foreach_sub([self.tensors[n] for n in names], [received[n] for n in names])
        return dict(zip(names, changes, strict=True))

    def train(
        self,
        *,
        purpose: str = "train",
        epochs: int | None = None,
        steps: int | None = None,
        lr: float | None = None,
        optimizer: str | None = None,
        only: Collection[str] | None = None,
        rule: StepRule = plain_step,
        adjust: AdjustGradients | None = None,
        samples: bool = True,
        among: Tensor | None = None,
    ) -> TrainingResult:
        """Train the workbench network on this site's training images, by default as the study says.

        Args:
            purpose: Names the stream of randomness, so that two trainings in a round draw differently.
            epochs: Instead of the study's number.
            steps: Instead of the study's number.
            lr: Instead of the study's rate for this round.
            optimizer: Instead of the study's; ``sgd`` is then without momentum.
            only: Names of the parameters that are trained; None: all.
            rule: How the gradients of a step come about.
            adjust: Changes the gradients before each step.
            samples: Use what the site took from the exchange of samples, if anything; else its own images alone.
            among: Positions of the images to train on; None: the training split.
        """
        settings = self.study.training
        if epochs is not None or steps is not None:
            settings = settings.model_copy(update={"epochs": epochs or 1, "steps": steps})
        if optimizer is not None:
            settings = settings.model_copy(update={"optimizer": optimizer, "momentum": 0.0})
        rate = learning_rate(self.study.training, self.round, self.study.method.rounds) if lr is None else lr
        seed = derive_seed(self.study.seed, self.name, self.round, purpose)
        extra = self.shelf.supplement(self.study, self.round) if samples and self.shelf else None
        return train(
            self.model,
            self.data if among is None else self.data.training_on(among),
            self.task,
            settings,
            lr=rate,
            seed=seed,
            only=only,
            rule=rule,
            adjust=adjust,
            supplement=extra,
        )


def check_declared(site: str, op: str, leaves: tuple[Leaf, ...], reply: Message) -> None:
    """Refuse a reply that holds a group of arrays or a scalar not among ``leaves``.

    Raises:
        UndeclaredError: Names the site, the op and what was not declared.
    """
    arrays = {leaf.name for leaf in leaves if leaf.kind != "scalar"}
    scalars = {leaf.name for leaf in leaves if leaf.kind == "scalar"}
    families = tuple(name[:-1] for name in scalars if name.endswith("/*"))
    for group in reply.groups():
        if group not in arrays:
            raise UndeclaredError(_undeclared(site, op, f"arrays {group!r}", sorted(arrays)))
    for name in reply.scalars:
        if name not in scalars and not (families and name.startswith(families)):
            raise UndeclaredError(_undeclared(site, op, f"scalar {name!r}", sorted(scalars)))


def _undeclared(site: str, op: str, what: str, declared: list[str]) -> str:
    return (
        f"site {site!r}, op {op!r}: the answer holds {what}, which the method does not declare "
        f"(declared: {', '.join(declared) or 'nothing'}). It was not sent. Declare it in the method's leaves."
    )
