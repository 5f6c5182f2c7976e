"""Gaussians of the trained network's features by class and device; its last layer is trained anew on draws from them.

CCVR (Luo et al., NeurIPS 2021, arXiv 2106.05001) has one Gaussian per class; that is ``devices: false``. With devices
it is a reconstruction (sheet 2.6): cell means are shrunk to ``a_c + b_d``, so that cells nobody owns have one as well,
and a class's covariance is shrunk to the pooled one. Seconds of CPU; sites make one forward pass.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyclinic.errors import StudyError
from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Leaf, Op, Site
from polyclinic.methods.base import load_global
from polyclinic.models.last_layer import entering, last_layer
from polyclinic.secure.sum import SecureSum
from polyclinic.seeds import derive_seed
from polyclinic.study import Study
from polyclinic.synthesis.cells import own_devices, own_images
from polyclinic.synthesis.settings import FeaturesSettings
from polyclinic.synthesis.statistics import device_names

_BATCH = 256
PRIOR_IMAGES = 5.0
"""Images that ``a_c + b_d`` counts for in a cell's mean."""
PRIOR_COVARIANCE = 64.0
"""Images that the pooled covariance counts for in a class's."""
RIDGE = 1e-4
UPDATES = 20


@dataclass(frozen=True)
class FeatureSums:
    """Sums over images, float64.

    Attributes:
        count: ``[C, D]``.
        first: Sum of features, ``[C, D, F]``.
        second: Sum of outer products by class, ``[C, F, F]``, or of squares, ``[C, F]``.
        negative: Features below zero, ``[1]``.
    """

    count: Tensor
    first: Tensor
    second: Tensor
    negative: Tensor


class FeatureGaussians:
    """Both sides of the re-calibration.

    Args:
        study: With ``synthesis.generator`` holding ``features``.
        settings: Of that generator.
    """

    def __init__(self, study: Study, settings: FeaturesSettings) -> None:
        assert study.synthesis is not None
        self.study, self.settings, self.floor = study, settings, study.synthesis.floor

    def due(self, number: int) -> bool:
        """Whether round ``number`` ends with a re-calibration: only where the round is judged as well."""
        steps = self.settings.every, self.study.evaluation.every
        return number == self.study.method.rounds or (all(steps) and not any(number % step for step in steps))

    def ops(self) -> dict[str, Op]:
        """Names of devices, and sums of features."""
        sums = (Leaf("features", "sum", "images", lanes=64), Leaf("weight/*", "scalar", "nothing"))
        return {
            "name-devices": Op(self.name_devices, (Leaf("devices", "scalar", "counts"),)),
            "gaussians": Op(self.send_sums, sums),
        }

    def name_devices(self, site: Site, message: Message) -> Message:
        """The devices that the site has enough patients of."""
        return Message(scalars={"devices": json.dumps(own_devices(site.data, self.floor))})

    def send_sums(self, site: Site, message: Message) -> Message:
        """One pass over the training images in cells of enough patients, through the received model."""
        load_global(site, message)
        devices = tuple(json.loads(str(message.scalars["devices"])))
        own = own_images(site.data, devices, self.floor)
        which = own.devices if self.settings.devices else torch.zeros_like(own.devices)
        _, layer = last_layer(site.model)
        site.model.eval()
        with torch.no_grad(), entering(layer) as found:
            # Of no images there is one part, an empty one, which not every network takes.
            for part in torch.split(own.positions, _BATCH) if len(own.positions) else ():
                site.model(site.data.inputs(part).to(layer.weight.device))
        seen = torch.cat(found).cpu() if found else torch.zeros(0, layer.in_features)
        columns = len(devices) if self.settings.devices else 1
        sums = feature_sums(seen, own.labels, which, (len(site.task.classes), columns), self.settings.covariance)
        return Message.pack({"features": vars(sums)}, **{"weight/features": 1.0})

    def calibrated(
        self, channel: Channel, sums: SecureSum, model: Mapping[str, Tensor], network: nn.Module
    ) -> dict[str, Tensor]:
        """The server's side: the last layer that the Gaussians of all sites give.

        Args:
            channel: To the sites.
            sums: For their sums.
            model: The global model, which sites see their images through.
            network: Tells the name of the last layer.

        Returns:
            Its tensors by name. Those of ``model``, unchanged, where no site has a cell of enough patients.
        """
        name, _ = last_layer(network)
        own = {leaf: model[f"{name}.{leaf}"] for leaf in ("weight", "bias")}
        replies = channel.call("name-devices", dict.fromkeys(channel.sites, Message()))
        told = [device_names(site, str(reply.scalars.get("devices", ""))) for site, reply in replies.items()]
        devices = sorted(set().union(*told))
        if devices:
            message = Message.pack({"model": model}, devices=json.dumps(devices))
            total = sums.sum(channel, "gaussians", dict.fromkeys(sorted(replies), message))
            seed = derive_seed(self.study.seed, "features", channel.round)
            own = retrained_head(own, FeatureSums(**total.sums["features"]), self.settings, seed)
        return {f"{name}.{leaf}": tensor for leaf, tensor in own.items()}


def check_bias(model: nn.Module) -> None:
    """Refuse a network whose last layer cannot be trained anew.

    Raises:
        StudyError: It is not linear, or has no bias.
    """
    name, layer = last_layer(model)
    if layer.bias is None:
        raise StudyError(
            f"synthesis.generator features trains weights and bias of the last layer, but {name!r} has no bias. Give "
            "it one, or use generator vae or amplitude."
        )


def feature_sums(seen: Tensor, labels: Tensor, devices: Tensor, shape: tuple[int, int], covariance: str) -> FeatureSums:
    """Sums over one site's features.

    Args:
        seen: ``[n, F]``.
        labels: int64 ``[n]``.
        devices: int64 ``[n]``.
        shape: Numbers of classes and devices.
        covariance: ``full`` or ``diagonal``.
    """
    x = seen.double()
    count = torch.zeros(shape, dtype=torch.float64)
    count.index_put_((labels, devices), torch.ones(len(x), dtype=torch.float64), accumulate=True)
    first = torch.zeros(*shape, x.shape[1], dtype=torch.float64).index_put_((labels, devices), x, accumulate=True)
    rows = [x[labels == label] for label in range(shape[0])]
    second = torch.stack([row.T @ row if covariance == "full" else row.square().sum(0) for row in rows])
    return FeatureSums(count, first, second, (x < 0).sum().double()[None])


def cell_means(count: Tensor, first: Tensor) -> Tensor:
    """Means of all cells of classes that are held, ``[C, D, F]``: between the cell's own and ``a_c + b_d``.

    ``b_d = sum_c n (mu - a_c) / (n_d + 5)`` and ``a_c = sum_d n (mu - b_d) / n_c``, in turn; the cell's own mean has
    the share ``n / (n + 5)``.
    """
    n = count[..., None]
    of_class, of_device = n.sum(1).clamp(min=1e-12), n.sum(0)
    device = torch.zeros_like(first[0])
    for _ in range(UPDATES):
        kind = (first - n * device).sum(1) / of_class
        device = (first - n * kind[:, None]).sum(0) / (of_device + PRIOR_IMAGES)
    kind = (first - n * device).sum(1) / of_class
    own = first / n.clamp(min=1e-12)
    share = n / (n + PRIOR_IMAGES)
    return share * own + (1 - share) * (kind[:, None] + device)


def class_covariances(sums: FeatureSums) -> Tensor:
    """Covariance within the cells of each class, shrunk to the pooled one, ``[C, F, F]``."""
    n_c, width = sums.count.sum(1), sums.first.shape[2]
    means = sums.first / sums.count[..., None].clamp(min=1e-12)
    if sums.second.ndim == 2:
        scatter = torch.diag_embed(sums.second - (sums.first * means).sum(1))
    else:
        scatter = sums.second - torch.einsum("cdf,cdg->cfg", sums.first, means)
    pooled = scatter.sum(0) / n_c.sum().clamp(min=1)
    share = (n_c / (n_c + PRIOR_COVARIANCE))[:, None, None]
    own = scatter / n_c.clamp(min=1)[:, None, None]
    return share * own + (1 - share) * pooled + RIDGE * torch.eye(width, dtype=scatter.dtype)


def drawn_features(sums: FeatureSums, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Features of every held class, as many from each cell, empty cells of that class as well.

    Returns:
        float32 ``[n, F]``, none below zero where no real feature is, and int64 classes ``[n]``.
    """
    means, spread = cell_means(sums.count, sums.first), class_covariances(sums)
    cells = [d for d in range(sums.count.shape[1]) if sums.count[:, d].sum() > 0]
    drawn, labels = [], []
    for label in torch.nonzero(sums.count.sum(1) > 0).flatten().tolist():
        # Not Cholesky: sums that went through fixed point may be short of positive definite by a rounding.
        values, vectors = torch.linalg.eigh(spread[label])
        # The symmetric root: eigenvectors turn about with the last bits of the sums, it does not.
        root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        which = torch.tensor(cells).repeat(-(-samples // len(cells)))[:samples]
        noise = torch.randn(samples, len(values), dtype=torch.float64, generator=generator)
        drawn.append(means[label, which] + noise @ root)
        labels.append(torch.full((samples,), label))
    x = torch.cat(drawn).float()
    return (x.clamp(min=0) if sums.negative.item() < 0.5 else x), torch.cat(labels)


def retrained_head(
    head: Mapping[str, Tensor], sums: FeatureSums, settings: FeaturesSettings, seed: int
) -> dict[str, Tensor]:
    """The last layer, trained on from where it is by sgd on draws: batches of 64, weight decay 5e-4.

    A class without draws has no part in it: its row stays, bit for bit, and it is left out of the softmax. Otherwise
    the draws of all others would push it down, and what sites learned of a class too rare for the floor were unlearned.

    Args:
        head: ``weight`` ``[C, F]`` and ``bias`` ``[C]``.
        sums: Over all sites.
        settings: Rate, passes, draws.
        seed: Of draws and order.
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    x, y = drawn_features(FeatureSums(**{n: t.cpu() for n, t in vars(sums).items()}), settings.samples, generator)
    held, y = torch.unique(y, return_inverse=True)
    weight, bias = (head[leaf].detach().cpu().float()[held].requires_grad_() for leaf in ("weight", "bias"))
    optimizer = torch.optim.SGD([weight, bias], lr=settings.lr, weight_decay=5e-4, fused=True)
    with torch.enable_grad():
        for _ in range(settings.epochs):
            for part in torch.split(torch.randperm(len(x), generator=generator), 64):
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(F.linear(x[part], weight, bias), y[part]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    made = {name: tensor.detach().clone() for name, tensor in head.items()}
    for name, rows in (("weight", weight), ("bias", bias)):
        made[name][held.to(made[name].device)] = rows.detach().to(made[name].device, made[name].dtype)
    return made
