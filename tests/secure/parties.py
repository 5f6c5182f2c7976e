"""Sites that answer ``train`` with ready arrays, and run the real protocols with real keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from toys import toy_study

from polyclinic.federation.local import LocalChannel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Leaf, Op, Site
from polyclinic.secure.backends import Aggregation
from polyclinic.secure.fixed_point import decode, encode, weight_steps
from polyclinic.secure.hidden import HiddenSum, Pending
from polyclinic.secure.sum import Total
from polyclinic.study import Study

MODEL = {"w": torch.full((3, 5), 0.5), "b": torch.zeros(7), "norm.running_var": torch.ones(4)}
"""What the server sends: a matrix, a vector that starts at zero, running statistics."""


@dataclass
class Consortium:
    """Sites, the channel to them, and the study's sum."""

    study: Study
    sites: dict[str, Site]
    channel: LocalChannel
    sums: HiddenSum
    arrays: dict[str, dict[str, Tensor]]
    weights: dict[str, float]

    def sum(self, number: int = 1, model: Mapping[str, Tensor] = MODEL) -> Total:
        """The sum of round ``number``."""
        self.channel.begin_round(number)
        call = Message.pack({"model": model})
        return self.sums.sum(self.channel, "train", dict.fromkeys(self.sites, call))

    def mean(self, contributors: list[str]) -> dict[str, Tensor]:
        """The weighted mean of what these sites hold, in float64, without any protocol."""
        whole = sum(self.weights[s] for s in contributors)
        return {
            name: sum(self.arrays[s][name].double() * (self.weights[s] / whole) for s in contributors)  # type: ignore[misc]
            for name in MODEL
        }

    def fixed_sum(self, contributors: list[str], asked: list[str]) -> dict[str, list[int]]:
        """Sums of the contributors' fixed-point values in Python integers, by width; ``asked`` set the scale."""
        totals = {"update": sum(weight_steps(self.weights[s]) for s in asked)}
        sums: dict[str, list[int]] = {}
        for name in contributors:
            layout = Pending.of(self.sites[name]).layout
            arrays = {f"update/{key}": array for key, array in self.arrays[name].items()}
            steps = {"update": weight_steps(self.weights[name])}
            lanes, _ = encode(layout, arrays, steps, totals, sites=len(asked), rng=np.random.default_rng(0))
            for bits, part in lanes.items():
                own = sums.setdefault(str(bits), [0] * part.size)
                for i, value in enumerate(part.tolist()):
                    own[i] += value
        return sums


def consortium(
    folder: Path,
    weights: Mapping[str, float] | int,
    *,
    aggregation: Mapping[str, Any] | str = "masked",
    arrays: Callable[[str], dict[str, Tensor]] | None = None,
    tolerant: bool = True,
    lanes: Any = 16,
) -> Consortium:
    """Sites named after letters with uneven weights, or those given.

    Args:
        folder: Of their states.
        weights: ``{site: weight}``, or how many sites.
        aggregation: The study's section.
        arrays: What a site's training changed, for names and shapes of ``MODEL``; drawn if not given.
        tolerant: Go on without a site that fails.
        lanes: Of the leaf that they send.
    """
    if isinstance(weights, int):
        weights = {chr(ord("a") + i): float(1 + 7 * i % 12) for i in range(weights)}
    study = toy_study("fedavg", aggregation=aggregation, federation={"on_absent": "continue"})
    drawn = {name: (arrays or random_arrays)(name) for name in weights}

    def train(site: Site, message: Message) -> Message:
        weight = weights[site.name]
        return Message.pack({"update": drawn[site.name]}, loss=0.5, **{"weight/update": weight})

    leaves = (
        Leaf("update", "sum", "images", lanes=lanes),
        Leaf("loss", "scalar", "images"),
        Leaf("weight/*", "scalar", "counts"),
    )
    method: Any = SimpleNamespace(simulation_only=False, ops=lambda: {"train": Op(train, leaves)})
    side = Aggregation(study, method, sorted(weights))
    bench: Any = SimpleNamespace(device=torch.device("cpu"))
    unused: Any = None
    sites = {
        name: Site(
            name, study, unused, unused, workbench=bench, ops=side.ops, folder=folder, credentials=side.credentials[name]
        )
        for name in weights
    }
    assert isinstance(side.sums, HiddenSum)
    return Consortium(study, sites, LocalChannel(sites, tolerant=tolerant), side.sums, drawn, dict(weights))


def random_arrays(name: str) -> dict[str, Tensor]:
    """Normal numbers of the size of updates; running statistics far larger."""
    draw = torch.Generator().manual_seed(sum(map(ord, name)))
    arrays = {key: 0.02 * torch.randn(tensor.shape, generator=draw) for key, tensor in MODEL.items()}
    arrays["norm.running_var"] *= 50_000
    return arrays


__all__ = ["MODEL", "Consortium", "consortium", "decode", "random_arrays"]
