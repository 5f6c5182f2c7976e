"""Mean features of classes ("prototypes"): what a site has of each, and a network that is drawn to those of all sites.

A feature is what enters a network's last layer. A row is a class; in a multi-label study a finding, whose mean is over
the images that have it, and, where a method asks for opposites, each finding once more for the images without it. Both
are ours: the papers have one class an image.

A mean over few patients tells their features, which for a small network is much of their images. So a row leaves a site
from ``floor`` training patients on; of smaller ones nothing leaves, not even the count.

The floor is that of each row by itself. Where rows overlap (multi-label), it does not hold for their differences: if
finding A has the patients of B and one more, the difference of the two sums is that one's features. Nothing is done
about it: without one row of such a pair, sums and differences of three rows and more would still tell.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyclinic.errors import StudyError
from polyclinic.federation.answers import accepted, check_arrays
from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Site
from polyclinic.models.last_layer import entering, last_layer
from polyclinic.models.taps import feature_size
from polyclinic.study import Study
from polyclinic.training import Step, StepRule

FLOOR = 5
"""Default of ``floor``: as in an exchange of samples."""
Means = dict[str, Tensor]
"""``means`` float32 ``[R, F]`` and ``held`` bool ``[R]``: the rows that there is a mean of; the others are zero."""


def membership(targets: Tensor, classes: int, opposites: bool = False) -> Tensor:
    """Which rows an image counts in, 0/1 float32 ``[N, R]``.

    Args:
        targets: int64 ``[N]``, or 0/1 float ``[N, classes]`` for multi-label.
        classes: Number of classes or findings.
        opposites: Multi-label: rows from ``classes`` on are the images without a finding, so R is twice as many.
    """
    if targets.ndim == 1:
        return F.one_hot(targets, classes).float()
    found = targets.float()
    return torch.cat([found, 1 - found], dim=1) if opposites else found


@torch.no_grad()
def class_sums(site: Site, floor: int, opposites: bool = False) -> tuple[Tensor, Tensor]:
    """Sums of the loaded network's features over the site's training images by row, and the images' number.

    Args:
        site: With its network loaded, which is left in evaluation mode.
        floor: Rows of fewer training patients are zero.
        opposites: As in ``membership``.

    Returns:
        float64 ``[R, F]`` and ``[R]``.
    """
    model, data = site.model.eval(), site.data
    layer = last_layer(model)[1]
    device = layer.weight.device
    rows = membership(data.labels("train").cpu(), len(site.task.classes), opposites).double()
    patients = data.patients("train")
    count = [len({patients[i] for i in rows[:, r].nonzero().flatten().tolist()}) for r in range(rows.shape[1])]
    rows *= torch.tensor(count) >= floor
    sums = torch.zeros(rows.shape[1], layer.in_features, dtype=torch.float64, device=device)
    size = site.study.evaluation.batch_size
    for part, own in zip(torch.split(data.splits["train"], size), torch.split(rows, size), strict=True):
        with entering(layer) as seen:
            model(data.inputs(part).to(device))
        sums += own.to(device).T @ seen[-1].double()
    return sums, rows.sum(0).to(device)


def means_of(sums: Tensor, counts: Tensor) -> Means:
    """Means of rows from their sums ``[R, F]`` and numbers of images ``[R]``."""
    return {"means": (sums / counts.clamp(min=1)[:, None]).float(), "held": counts > 0}


def drawn_to(means: Means, strength: float) -> StepRule:
    """The rule of a step on the study's loss and ``strength`` times the distance of features to their rows' means.

    The distance is the mean over the batch's pairs of an image and a row that it counts in, and over features, of the
    squared difference. A pair whose row has no mean adds nothing but counts.
    """

    def rule(step: Step) -> Tensor:
        with entering(last_layer(step.model)[1]) as seen:
            loss = step.loss(step.batch)
        # What a hidden sum gave lies on the CPU, wherever the network is.
        centres, held = (means[key].to(loss.device) for key in ("means", "held"))
        pairs = membership(step.batch.targets, len(held))
        apart = (seen[0].float()[:, None] - centres[None]).square().mean(2)
        total = loss + strength * (pairs * held * apart).sum() / pairs.sum().clamp(min=1)
        total.backward()  # type: ignore[no-untyped-call]
        return loss

    return rule


def gathered(channel: Channel, op: str, messages: Mapping[str, Message], rows: int, features: int) -> dict[str, Means]:
    """Call sites and gather the means that they answer with (``prototypes``), by site in the order of the roster.

    Args:
        channel: To the sites.
        op: Which op.
        messages: By site.
        rows: R.
        features: F.

    Raises:
        SiteError: As ``accepted``; an answer is one of means ``[R, F]``, finite, and which of them there are.
    """
    like = {"means": torch.empty(rows, features, device="meta"), "held": torch.empty(rows, device="meta")}

    def read(site: str, reply: Message) -> Means:
        own = reply.group("prototypes")
        check_arrays(site, "prototypes", like, own)
        return own

    return dict(accepted(channel, op, messages, read))


def equal_features(method: str, networks: Mapping[str, nn.Module]) -> None:
    """Refuse networks whose last layers take different numbers of features.

    Args:
        method: Its name, for the message.
        networks: By site.

    Raises:
        StudyError: Names the sizes by site; or a last layer is not linear.
    """
    sizes = {site: feature_size(model) for site, model in networks.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{site} {size}" for site, size in sizes.items())
        raise StudyError(
            f"method {method} compares features of the sites' networks, so all must have as many, but the last layers "
            f"take: {told}. Set embedding alike for all networks, for instance model.embedding: 64 and the same in "
            "models."
        )


def check_classification(study: Study) -> None:
    """Refuse a segmentation.

    Raises:
        StudyError: With what works.
    """
    if study.task.kind == "segmentation":
        raise StudyError(
            f"method {study.method.name} looks at one answer an image, but task.kind is segmentation. Use method "
            "fedavg, or local where networks differ."
        )


def check_plain(study: Study, sent: str) -> None:
    """Refuse a sum that hides what the server must see of each site.

    Args:
        study: The study.
        sent: What each site sends by itself, for the message.

    Raises:
        StudyError: With what works.
    """
    if study.aggregation.backend != "plain":
        raise StudyError(
            f"method {study.method.name}: the server needs {sent} of each site by itself, which aggregation.backend "
            f"{study.aggregation.backend} hides. Use aggregation.backend: plain, or a method whose server needs sums "
            "alone (fedproto, lg-fedavg, fml)."
        )
