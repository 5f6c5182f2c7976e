"""Sites with different networks, images with several findings, sites that fail, and what passes over a channel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from toys import sites, toy_study, trained

from polyclinic.data.dataset import SiteData
from polyclinic.data.manifest import Case
from polyclinic.federation.message import Message
from polyclinic.federation.site import Op, Site
from polyclinic.results import RunFolder
from polyclinic.runner import Run, Silent
from polyclinic.study import Study

SMALL = {"name": "small-cnn", "width": 4, "embedding": 6}
MOBILE = {"name": "mobilenet", "options": {"alpha": 0.25}, "embedding": 6}
FINDINGS = ["a", "b", "c"]

Shapes = dict[str, list[int]]


def mixed_study(method: str | dict[str, Any], **sections: Any) -> Study:
    """``west`` has a MobileNet, the others a small CNN; one round at 32 pixels."""
    given = {"name": method} if isinstance(method, str) else method
    base = {
        "model": SMALL,
        "models": {"west": MOBILE},
        "data": {"image": {"size": [32, 32]}},
        "training": {"batch_size": 6, "lr": 0.01},
    }
    return toy_study({"rounds": 1, **given}, **{**base, **sections})


def with_findings(size: int = 4) -> dict[str, SiteData]:
    """The toy sites' images with three findings each, drawn at random, the last one rare."""
    made = {}
    for name, own in sites().items():
        draw = torch.Generator().manual_seed(sum(map(ord, name)))
        targets = (torch.rand(len(own), 3, generator=draw) < torch.tensor([0.5, 0.6, 0.3])).float()
        labels = ["|".join(f for f, y in zip(FINDINGS, row, strict=True) if y) for row in targets.tolist()]
        cases = [
            Case(c.image, c.patient, name, label=label, split=c.split)
            for c, label in zip(own.cases, labels, strict=True)
        ]
        images = F.interpolate(own.images, size=(size, size))
        made[name] = SiteData(name, cases, images, targets, own.splits)
    return made


def multi_label(method: str | dict[str, Any], **sections: Any) -> Study:
    """A study of those findings."""
    return toy_study(method, task={"kind": "multi-label", "classes": FINDINGS}, **sections)


def prepared(study: Study, data: dict[str, SiteData], folder: Path) -> Run:
    """A run before its first round."""
    opened = RunFolder(folder)
    opened.create(study)
    return Run(study, data, opened, Silent())


def failing(run: Run, site: str, op: str = "train") -> None:
    """Let a site fail whenever it is called."""

    def fails(site: Site, message: Message) -> Message:
        raise ValueError("no power")

    own = run.channel._sites[site]
    own._ops = {**own._ops, op: Op(fails, own._ops[op].leaves)}


def without_west(method: str | dict[str, Any], folder: Path) -> tuple[Run, Run]:
    """A run in which ``west`` fails in every round, and one of the other sites alone, both after their last round."""
    study = toy_study(method, federation={"on_absent": "continue"})
    run = prepared(study, sites(), folder / "run")
    failing(run, "west")
    run.train()
    others = {name: own for name, own in sites().items() if name != "west"}
    return run, trained(study, others, folder / "others")


def passing(run: Run, op: str = "train") -> list[tuple[str, Message, Message]]:
    """A list that gets every site, message and reply of an op while the run trains."""
    seen: list[tuple[str, Message, Message]] = []
    inner = run.channel.stream

    def watched(called: str, messages: dict[str, Message]) -> Any:
        for site, reply in inner(called, messages):
            if called == op:
                seen.append((site, messages[site], reply))
            yield site, reply

    run.channel.stream = watched  # type: ignore[method-assign, assignment]
    return seen


def shapes(message: Message) -> Shapes:
    """Names and shapes of a message's arrays."""
    return {name: list(array.shape) for name, array in message.arrays.items()}
