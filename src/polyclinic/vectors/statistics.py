"""What a site can send beside its vector: Fisher information, Gram matrices, running statistics, sums for a head.

All of it is computed in evaluation mode on training images without augmentation, drawn with a seed; no gradients are
kept and the network is left as it was, but in evaluation mode.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from polyclinic.data.dataset import SiteData
from polyclinic.errors import ContributionError, nearest
from polyclinic.models.normalisation import running_statistics, shared_names
from polyclinic.models.taps import features
from polyclinic.models.weights import shared_tensors
from polyclinic.seeds import derive_seed, generator
from polyclinic.tasks import Task
from polyclinic.vectors.head import HeadSums
from polyclinic.vectors.restoration import LEAST_VARIANCE
from polyclinic.vectors.sources import Kind

_GRADIENT_VALUES = 2**26  # of all images of a chunk: 256 MB in float32
_PATCH_VALUES = 2**23
_BATCH = 64
_Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def site_statistics(
    model: nn.Module, data: SiteData, task: Task, kinds: Collection[Kind], seed: int
) -> dict[Kind, dict[str, Tensor]]:
    """All kinds asked for but vectors, with the default numbers of images.

    Raises:
        ContributionError: As the functions below.
    """
    made: dict[Kind, Callable[[], dict[str, Tensor]]] = {
        "fisher": lambda: fisher_diagonal(model, data, task, seed=seed),
        "gram": lambda: input_grams(model, data, seed=seed),
        "statistics": lambda: running_statistics_of(model),
        "head": lambda: head_sums(model, data, task),
    }
    return {kind: made[kind]() for kind in made if kind in kinds}


def running_statistics_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the running means and variances, float32; a channel that never varied has a variance just above 0."""
    names = [name for name in shared_names(model, "batch") if name in running_statistics(model)]
    copies = {name: tensor.float().cpu().clone() for name, tensor in shared_tensors(model, names).items()}
    for name, tensor in copies.items():
        if name.endswith("running_var"):
            tensor.clamp_(min=LEAST_VARIANCE)
    return copies


@torch.no_grad()
def head_sums(
    model: nn.Module,
    data: SiteData,
    task: Task,
    split: str = "train",
    fewest: int = 5,
    classes: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Sums over penultimate features, as ``head.HeadSums`` holds them.

    Images with a class of fewer than ``fewest`` patients are left out: sums over so few images show the images.

    Args:
        model: A classification network with a feature tap.
        data: The site's images.
        task: Its classes, in the site's order.
        split: Which images.
        fewest: Patients that a class needs.
        classes: The base's, in its order, where that is another one.

    Raises:
        ContributionError: Segmentation, a class that the base lacks, or no class with enough patients.
    """
    if task.kind == "segmentation":
        raise ContributionError("head sums are for classification; a segmentation network has no penultimate feature.")
    wanted = tuple(task.classes if classes is None else classes)
    if unknown := [name for name in task.classes if name not in wanted]:
        raise ContributionError(f"class {unknown[0]!r} is not a class of the base. {nearest(unknown[0], wanted)}")
    member = _membership(data, task, split)
    chosen = _supported(member, data.patients(split), fewest)
    if not bool(chosen.any()):
        raise ContributionError(
            f"site {data.site!r}: no class has {fewest} patients among its {split} images. Sums over fewer would show "
            "them; send no head sums."
        )
    indices, member = data.splits[split][chosen], member[chosen]
    spread = torch.zeros(len(member), len(wanted))
    spread[:, [wanted.index(name) for name in task.classes]] = member
    device = next(model.parameters()).device
    model.eval()
    total: HeadSums | None = None
    for part, rows in zip(torch.split(indices, _BATCH), torch.split(spread, _BATCH), strict=True):
        found = features(model, data.inputs(part).to(device)).cpu()
        sums = HeadSums.of(found, rows if task.kind == "multi-label" else rows.argmax(1), len(wanted))
        total = sums if total is None else total + sums
    assert total is not None
    return total.tensors()


def _membership(data: SiteData, task: Task, split: str) -> Tensor:
    """Which classes each image has, 0/1 ``[N, C]``."""
    labels = data.labels(split).cpu()
    return labels.float() if task.kind == "multi-label" else F.one_hot(labels, len(task.classes)).float()


def _supported(member: Tensor, patients: Sequence[str], fewest: int) -> Tensor:
    """Images none of whose classes has too few patients; what is left out can make another class too small."""
    number = {name: k for k, name in enumerate(dict.fromkeys(patients))}
    who = torch.tensor([number[name] for name in patients], dtype=torch.int64)
    chosen = torch.ones(len(member), dtype=torch.bool)
    while True:
        patients_of = [len(set(who[chosen & (column > 0)].tolist())) for column in member.T]
        rare = [c for c, count in enumerate(patients_of) if 0 < count < fewest]
        if not rare:
            # Multi-label: images without any finding count as well.
            return chosen if len(set(who[chosen].tolist())) >= fewest else torch.zeros_like(chosen)
        chosen &= (member[:, rare] == 0).all(1)


def fisher_diagonal(
    model: nn.Module, data: SiteData, task: Task, images: int = 256, seed: int = 0
) -> dict[str, Tensor]:
    """Diagonal Fisher information: mean over images of the squared gradient of the log-likelihood.

    Each image's own gradient is squared, not that of a batch, whose parts cancel. Labels are drawn from what the
    network predicts, as the definition has it. For segmentation the log-likelihood is a pixel's mean.

    Args:
        model: Fine-tuned.
        data: The site's images.
        task: What the outputs mean.
        images: At most so many training images.
        seed: Of images and labels.

    Returns:
        For every weight float32, its shape; zeros for buffers and weights that are not trained.

    References:
        Matena and Raffel, NeurIPS 2022 (arXiv 2111.09832), section 2.3.
    """
    model.eval()
    device = next(model.parameters()).device
    values = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    still = {n: t for n, t in itertools.chain(model.named_parameters(), model.named_buffers()) if n not in values}
    squares = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in values.items()}
    draws = torch.Generator().manual_seed(derive_seed(seed, "fisher labels"))

    def surprise(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(model, (weights, still), (image.unsqueeze(0),))
        return -_log_likelihood(task, logits, label.unsqueeze(0))

    each = vmap(grad(surprise), in_dims=(None, 0, 0))
    indices = _drawn(data, images, seed)
    chunk = max(1, min(32, _GRADIENT_VALUES // max(1, sum(p.numel() for p in values.values()))))
    for part in torch.split(indices, chunk):
        inputs = data.inputs(part).to(device)
        with torch.no_grad():
            labels = _drawn_labels(task, task.probabilities(model(inputs)).cpu(), draws).to(device)
        for name, gradient in each(values, inputs, labels).items():
            squares[name] += gradient.square().sum(0, dtype=torch.float64).cpu()
    moving = running_statistics(model)
    whole = shared_tensors(model, [n for n in shared_names(model, "batch") if n not in moving])
    return {
        name: (squares[name] / len(indices)).float() if name in squares else torch.zeros(tensor.shape)
        for name, tensor in whole.items()
    }


def _log_likelihood(task: Task, logits: Tensor, labels: Tensor) -> Tensor:
    if task.kind == "multi-label":
        return -F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
    return -F.cross_entropy(logits, labels)


def _drawn_labels(task: Task, probabilities: Tensor, draws: torch.Generator) -> Tensor:
    """Labels with the chances that the network gives them: int64 ``[B, *spatial]``, or 0/1 ``[B, K]``."""
    chance = torch.rand(
        probabilities.shape if task.kind == "multi-label" else (len(probabilities), 1, *probabilities.shape[2:]),
        generator=draws,
    )
    if task.kind == "multi-label":
        return (chance < probabilities).float()
    below = (probabilities.cumsum(1) < chance).sum(1)
    return below.clamp(max=probabilities.shape[1] - 1)


def _drawn(data: SiteData, images: int, seed: int) -> Tensor:
    """Positions of training images, at most so many, in order."""
    train = data.splits["train"]
    if len(train) == 0:
        raise ContributionError(f"site {data.site!r} has no training images to compute statistics on.")
    return train[torch.from_numpy(generator(seed, "statistics").permutation(len(train))[:images]).sort().values]


@torch.no_grad()
def input_grams(
    model: nn.Module, data: SiteData, images: int = 512, largest: int = 2304, seed: int = 0
) -> dict[str, Tensor]:
    """Gram matrices of the inputs of linear and convolutional layers: mean of ``x x^T`` over all inputs seen.

    For a convolution ``x`` is a patch as its kernel sees it, in the order of ``weight.reshape(out, -1)``. Layers with
    groups and those with more than ``largest`` inputs are left out, and so are layers that the network's forward pass
    does not call as modules.

    Args:
        model: Fine-tuned.
        data: The site's images.
        images: At most so many training images.
        largest: Inputs of a layer; the matrix has their square.
        seed: Of which images.

    Returns:
        ``<layer>.weight`` to float32 ``[in, in]``.

    References:
        Jin et al., RegMean, ICLR 2023 (arXiv 2212.09849).
    """
    model.eval()
    device = next(model.parameters()).device
    layers = {n: m for n, m in model.named_modules() if _is_matrix(m) and math.prod(m.weight.shape[1:]) <= largest}
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = dict.fromkeys(layers, 0)

    def record(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(layer: nn.Module, inputs: Any) -> None:
            for rows in _rows(layer, inputs[0].detach().float()):
                gram = (rows.T @ rows).double()
                sums[name] = sums[name].add_(gram) if name in sums else gram
                counts[name] += len(rows)

        return hook

    handles = [layer.register_forward_pre_hook(record(name)) for name, layer in layers.items()]
    try:
        for part in torch.split(_drawn(data, images, seed), _BATCH):
            model(data.inputs(part).to(device))
    finally:
        for handle in handles:
            handle.remove()
    return {f"{n}.weight" if n else "weight": (gram / counts[n]).float().cpu() for n, gram in sums.items()}


def _is_matrix(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or (isinstance(layer, _Convolution) and layer.groups == 1)


def _rows(layer: Any, inputs: Tensor) -> list[Tensor] | Any:
    """Inputs as rows ``[n, in]``, in parts that fit into memory."""
    if isinstance(layer, nn.Linear):
        yield inputs.reshape(-1, inputs.shape[-1])
        return
    windows = _windows(layer, inputs)
    axes, size = len(layer.kernel_size), math.prod(layer.weight.shape[1:])
    places = math.prod(windows.shape[2 : 2 + axes])
    order = [0, *range(2, 2 + axes), 1, *range(2 + axes, 2 + 2 * axes)]
    for image in torch.split(windows, max(1, _PATCH_VALUES // (places * size))):
        per_line = max(1, _PATCH_VALUES // max(1, places // image.shape[2] * size * len(image)))
        for part in torch.split(image, per_line, dim=2):
            yield part.permute(order).reshape(-1, size)


def _windows(layer: Any, inputs: Tensor) -> Tensor:
    """A view of all patches: ``[B, C, *places, *kernel]``."""
    axes = len(layer.kernel_size)
    if layer.padding != "valid":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        inputs = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    for axis in range(axes):
        reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
        inputs = inputs.unfold(2 + axis, reach, layer.stride[axis])[..., :: layer.dilation[axis]]
    return inputs
