"""A network that learns from others on public images: what it needs beside itself, and its loss there.

The loss on a batch of public images with classes is ::

    α CE(head, classes) + β Σₖ πₖ D(k → network) + η T² KL( Σₖ πₖ s_T(zₖ) ‖ s_T(z) )

over the teachers k, with D of ``dual_weights`` and z the outputs for the study's own classes. A reconstruction: of the
paper that it stands for (NatIMG-FL) the abstract alone is public.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyclinic.models.domain_statistics import NaturalStatistics
from polyclinic.study import TrainingSettings
from polyclinic.training import fit, trained_parameters
from polyclinic.transfer.alignment import Kind, make_judge
from polyclinic.transfer.dual_weights import Matching, Source, Weights
from polyclinic.transfer.public_batches import PublicBatches
from polyclinic.transfer.soft_targets import distillation, soft
from polyclinic.transfer.teachers import Said, Shape, say


class Mix(NamedTuple):
    """Weights of the terms of a loss on public images; a term of weight zero is not computed."""

    alpha: float
    beta: float
    eta: float
    temperature: float
    multi_label: bool


class Seen(NamedTuple):
    """One pass of public images.

    Attributes:
        said: What the network said.
        classes: Logits for the public classes, ``[B, C_n]``.
        errors: ``[B, N, ΣC]`` for each source, in their order.
    """

    said: Said
    classes: Tensor
    errors: list[Tensor]


class Learnt(NamedTuple):
    """One loss on public images and what went into it.

    Attributes:
        loss: The weighted sum.
        said: What the pupil said, with gradients.
        sources: What each teacher said, ready to be matched; empty without β.
        terms: The terms by name, unweighted and without gradients.
    """

    loss: Tensor
    said: Said
    sources: dict[str, Source]
    terms: dict[str, Tensor]


class Pupil(nn.Module):
    """A network with a head for public classes, a matching for each teacher, and where needed a judge of domains.

    Args:
        network: Shared with whoever trains it; nothing here changes it but gradients.
        shape: Its taps.
        classes: Of the public images.
        kind: Of the alignment.
        statistics: Running statistics for public images; None: a copy of the network's own.
        seed: Of all start values here.

    Attributes:
        mixed: Whether passes of the network use 16 bits.
    """

    mixed = False

    def __init__(
        self,
        network: nn.Module,
        shape: Shape,
        classes: int,
        kind: Kind,
        statistics: NaturalStatistics | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.network, self.shape = network, shape
        self.device = next(network.parameters()).device
        self.statistics = NaturalStatistics.of(network) if statistics is None else statistics
        self.names: list[str] = []
        self.matchings = nn.ModuleList()
        with chance(seed, self.device):
            self.head = nn.Linear(shape.features, classes).to(self.device)
            self.judge = make_judge(kind, shape.features)
        if self.judge is not None:
            self.judge.to(self.device)

    def learn_from(self, teacher: str, channels: list[int], weights: Weights, seed: int) -> None:
        """Add a matching with the maps of a teacher."""
        with chance(seed, self.device):
            matching = Matching(channels, self.shape.channels, weights)
        self.names.append(teacher)
        self.matchings.append(matching.to(self.device))

    @property
    def matching(self) -> dict[str, Matching]:
        """By teacher."""
        return {name: m for name, m in zip(self.names, self.matchings, strict=True) if isinstance(m, Matching)}

    def beside(self) -> dict[str, nn.Parameter]:
        """What trains with the network: head, judge, and of each matching all that is not φ."""
        found = {f"head/{name}": p for name, p in self.head.named_parameters()}
        if self.judge is not None:
            found |= {f"judge/{name}": p for name, p in self.judge.named_parameters()}
        for teacher, matching in self.matching.items():
            joint = {id(p) for p in matching.joint_parameters}
            found |= {f"of/{teacher}/{name}": p for name, p in matching.named_parameters() if id(p) in joint}
        return found

    def meta(self) -> dict[str, nn.Parameter]:
        """φ of all matchings."""
        found: dict[str, nn.Parameter] = {}
        for teacher, matching in self.matching.items():
            own = {id(p) for p in matching.meta_parameters}
            found |= {f"of/{teacher}/{name}": p for name, p in matching.named_parameters() if id(p) in own}
        return found

    def forward(self, images: Tensor, sources: Mapping[str, Source] | None = None) -> Seen:
        """One pass of public images, and the errors of matching the network with sources."""
        said = say(self.network, images, self.shape.levels, self.shape.feature)
        errors = [self.matching[name].errors(source, said.maps) for name, source in (sources or {}).items()]
        return Seen(said, self.head(said.features.float()), errors)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed)

    def learn(
        self, images: Tensor, labels: Tensor, taught: Mapping[str, Said], shares: Mapping[str, float], mix: Mix
    ) -> Learnt:
        """The loss of one batch, as at the head of this file; one forward pass of the network.

        Args:
            images: Public, on the network's device.
            labels: Their classes, there.
            taught: What each teacher says of them.
            shares: πₖ, which sum to one.
            mix: Weights.
        """
        with self.statistics.natural(self.network), self._precision():
            said, classes, _ = self(images)
        loss = torch.zeros((), device=self.device)
        terms: dict[str, Tensor] = {}
        sources: dict[str, Source] = {}
        if mix.alpha:
            terms["natural"] = F.cross_entropy(classes.float(), labels)
            loss = loss + mix.alpha * terms["natural"]
        if mix.beta and taught:
            sources = {name: self.matching[name].see(other.maps, said.maps) for name, other in taught.items()}
            each = [shares[name] * self.matching[name](source, said.maps) for name, source in sources.items()]
            terms["matching"] = torch.stack(each).sum()
            loss = loss + mix.beta * terms["matching"]
        if mix.eta and taught:
            softened = {name: soft(other.logits, mix.temperature, mix.multi_label) for name, other in taught.items()}
            goal = torch.stack([shares[name] * part for name, part in softened.items()]).sum(0)
            terms["soft"] = distillation(said.logits, goal, mix.temperature, mix.multi_label)
            loss = loss + mix.eta * terms["soft"]
        return Learnt(loss, said, sources, {name: term.detach() for name, term in terms.items()})


def warm_up(pupil: Pupil, public: PublicBatches, passes: int, settings: TrainingSettings, lr: float, seed: int) -> None:
    """Train network and head on the classes of public images alone, for as many images as in so many passes."""
    steps = passes * math.ceil(len(public) / settings.batch_size)
    mix = Mix(alpha=1.0, beta=0.0, eta=0.0, temperature=1.0, multi_label=False)
    pupil.network.train()
    fit(
        [*trained_parameters(pupil.network).values(), *pupil.head.parameters()],
        (public.draw(settings.batch_size) for _ in range(steps)),
        lambda batch: pupil.learn(batch.images, batch.labels, {}, {}, mix).loss,
        settings,
        lr=lr,
        seed=seed,
        device=pupil.device,
    )


@contextmanager
def chance(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's global stream starts from a seed; outside it goes on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        yield
