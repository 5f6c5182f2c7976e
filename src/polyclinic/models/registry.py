"""From the study's model settings to a network that is known to fit the images and the task."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polyclinic.errors import RunError, StudyError
from polyclinic.models.amplitude_norm import BUFFER, AmplitudeNorm, amplitude_norms, harmonise
from polyclinic.models.catalog import NETWORKS, Network, find_network
from polyclinic.models.construct import construct, find_builder
from polyclinic.models.normalisation import check_policy, running_statistics
from polyclinic.models.weights import load_tensors, read_tensors
from polyclinic.seeds import derive_seed
from polyclinic.study import ImageSettings, ModelSettings, Study, TaskSettings

__all__ = ["NETWORKS", "Network", "build_model", "describe", "head_name", "start_model", "untrained_model"]

_DEFAULT_WIDTH: int = ModelSettings.model_fields["width"].default
_LARGE = 2**17  # values; importing what device meta needs costs a second


def build_model(
    settings: ModelSettings,
    task: TaskSettings,
    image: ImageSettings,
    seed: int,
    *,
    weights_path: Path | None = None,
    patch: Sequence[int] | None = None,
) -> nn.Module:
    """Build the study's network on the CPU, in training mode.

    The same seed gives the same values, and torch's global random state is left as it was. The network's penultimate
    feature, where it has one, is named in its attribute ``feature_tap``, its maps of rising depth in ``taps`` (see
    ``models.taps``). ``settings.embedding`` changes the last layer F -> C to F -> embedding, embedding -> C.

    A network for segmentation may return a leading axis of views in training mode, ``[V, B, K, *spatial]``: the loss
    is then the mean over views. In evaluation mode it returns ``[B, K, *spatial]``.

    Args:
        settings: ``model`` of the study.
        task: Decides the number of outputs and which networks are allowed.
        image: Decides input channels and dimensions.
        seed: Seed of the start values.
        weights_path: ``model.weights``, resolved. A file without the last layer's entries leaves that layer random.
        patch: ``training.patch``: what the network sees at once, instead of the whole image.

    Raises:
        StudyError: The network is unknown, cannot do the task, refuses an option, gives another shape than the task
            needs, or the file of weights does not fit.
    """
    seen = seen_size(image, patch)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = _construct(settings, task, image)
        if settings.embedding is not None:
            _embed(model, settings.embedding, task)
        check_policy(model, settings.norm)
        if settings.harmonise:
            norm = AmplitudeNorm(settings.harmonise, settings.harmonise_window, mean=image.mean, std=image.std)
            harmonise(model, norm, [image.channels, *seen])
        _check_output(model, settings.name, task, [image.channels, *seen])
    if weights_path is not None:
        _load_weights(model, weights_path, settings)
    return model.train()


def start_model(study: Study, settings: ModelSettings | None = None) -> nn.Module:
    """A network of the study with its start weights, the same at server and sites.

    Where ``proxies.pretrain`` says so it has been trained on the public images, all but its last layer.

    Args:
        study: Gives task, images, seed and the public images.
        settings: Of the network; None: ``study.model``.
    """
    model = untrained_model(study, settings)
    if study.proxies is not None and study.proxies.pretrain:
        from polyclinic.models.pretraining import pretrain

        pretrain(model, study, settings or study.model)
    return model


def untrained_model(study: Study, settings: ModelSettings | None = None) -> nn.Module:
    """As ``start_model``, before any pre-training: for whoever looks at the network or loads other weights into it."""
    settings = settings or study.model
    return build_model(
        settings,
        study.task,
        study.data.image,
        derive_seed(study.seed, "start weights"),
        weights_path=study.weights_of(settings),
        patch=study.training.patch,
    )


def describe(model: nn.Module) -> dict[str, int]:
    """Count a model: ``parameters`` (trainable values), ``buffers`` (other values), ``bytes`` (both, as stored)."""
    parameters, buffers = list(model.parameters()), list(model.buffers())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "buffers": sum(b.numel() for b in buffers),
        "bytes": sum(t.numel() * t.element_size() for t in parameters + buffers),
    }


def head_name(model: nn.Module) -> str:
    """Name the last layer that has parameters of its own: the one whose size depends on the classes."""
    own = [name for name, module in model.named_modules() if any(p is not None for p in module._parameters.values())]
    return own[-1] if own else ""


def seen_size(image: ImageSettings, patch: Sequence[int] | None) -> list[int]:
    """Size of what the network sees at once: the patch, else the image.

    Raises:
        StudyError: The patch does not fit into the image.
    """
    if patch is None:
        return list(image.size)
    if len(patch) != len(image.size) or any(p > s or p < 1 for p, s in zip(patch, image.size, strict=False)):
        raise StudyError(
            f"training.patch: {list(patch)} does not fit into data.image.size {list(image.size)}. "
            f"Give {len(image.size)} numbers, none larger than the image."
        )
    return list(patch)


def _construct(settings: ModelSettings, task: TaskSettings, image: ImageSettings) -> nn.Module:
    dims = len(image.size)
    fixed: dict[str, Any] = {
        "in_channels": image.channels,
        "out_channels": len(task.classes),
        "spatial_dims": dims,
        "norm": settings.norm,
    }
    own = ":" in settings.name
    network = None if own else find_network(settings.name, task.kind, dims)
    if network is not None and network.width:
        fixed["width"] = settings.width
    elif settings.width != _DEFAULT_WIDTH:
        users = ", ".join(n.name for n in NETWORKS.values() if n.width)
        raise StudyError(
            f"model.width is {settings.width}, but {settings.name!r} does not use it (only {users} do). "
            f"Remove it; networks of your own take model.options."
        )
    builder = find_builder(settings.name if network is None else network.builder)
    model = construct(builder, fixed, settings.options)
    if network is not None and network.tap:
        model.feature_tap = network.tap  # type: ignore[assignment]
    if network is not None and network.taps and not hasattr(model, "taps"):
        model.taps = network.taps  # type: ignore[assignment]
    return model


def _embed(model: nn.Module, width: int, task: TaskSettings) -> None:
    """Put ``width`` features between what entered the last layer and a new last layer.

    Nothing between the two: with a ReLU there, averages over space, which differ little from image to image, leave many
    features without any gradient, in a ShuffleNet with group normalisation all of them.
    """
    name = head_name(model)
    head = model.get_submodule(name) if name else None
    if not isinstance(head, nn.Linear) or task.kind == "segmentation":
        raise StudyError(
            f"model.embedding needs a network for classification whose last layer is linear; that of "
            f"{type(model).__name__}, {name!r}, is {type(head).__name__}. Leave it out."
        )
    last = nn.Linear(width, head.out_features, bias=head.bias is not None)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Sequential(nn.Linear(head.in_features, width), last))
    model.feature_tap = f"{name}.0"  # type: ignore[assignment]


def _check_output(model: nn.Module, name: str, task: TaskSettings, image_shape: list[int]) -> None:
    """Push zeros through copies of the model, in both modes, and compare the shape that comes out."""
    spatial = image_shape[1:] if task.kind == "segmentation" else []
    for training, batch in ((False, 1), (True, 2)):
        want = [batch, len(task.classes), *spatial]
        shape = "x".join(map(str, image_shape))
        try:
            output = _forward_zeros(copy.deepcopy(model).train(training), [batch, *image_shape])
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise StudyError(
                f"model {name!r} cannot process images of {shape} (channels x size): {error}. "
                f"Larger images, fewer strides (model.options) or model.norm: group may help."
            ) from error
        if not isinstance(output, torch.Tensor):
            raise StudyError(f"model {name!r} returns {type(output).__name__}; expected one tensor of shape {want}.")
        shown = list(output.shape)
        views = training and task.kind == "segmentation" and len(shown) == len(want) + 1 and shown[0] > 0
        if shown[views:] != want:
            raise StudyError(
                f"model {name!r} returns shape {shown} for images of {shape}; expected {want} "
                f"for {task.kind} with {len(task.classes)} classes."
            )


@torch.no_grad()
def _forward_zeros(model: nn.Module, shape: list[int]) -> Any:
    """Large images are tried without arithmetic first (device meta); networks that cannot do that compute."""
    if math.prod(shape) > _LARGE:
        try:
            return copy.deepcopy(model).to("meta")(torch.zeros(shape, device="meta"))
        except Exception:
            pass
    return model(torch.zeros(shape))


def _load_weights(model: nn.Module, path: Path, settings: ModelSettings) -> None:
    try:
        tensors, _ = read_tensors(path)
    except RunError as error:
        raise StudyError(f"model.weights: {error}") from error
    wanted = model.state_dict()
    last = head_name(model)
    head = tuple(f"{last}.{leaf}" for leaf in ("weight", "bias"))
    wrong = [n for n, t in wanted.items() if n in tensors and tensors[n].shape != t.shape]
    if wrong and all(name in head for name in wrong):
        raise StudyError(
            f"model.weights: {path.name} was made for {len(tensors[wrong[0]])} classes, the study has "
            f"{len(wanted[wrong[0]])} ({', '.join(wrong)}). To start with a random last layer, remove "
            f"{' and '.join(n for n in head if n in tensors)} from the file."
        )
    if wrong:
        name = wrong[0]
        raise StudyError(
            f"model.weights: {path.name} has shape {tuple(tensors[name].shape)} for {name!r}, the network has "
            f"{tuple(wanted[name].shape)} ({len(wrong)} such). Check model.name, model.width and data.image.channels."
        )
    optional = {n for n in wanted if n.endswith("num_batches_tracked")}
    if not any(name in tensors for name in head):
        optional.update(head)
        if settings.embedding is not None:
            before = f"{last.rpartition('.')[0]}.0"
            optional.update({f"{before}.weight", f"{before}.bias"} if f"{before}.weight" not in tensors else ())
    if settings.norm == "batch-local":
        optional.update(running_statistics(model))
    if amplitude_norms(model):
        optional.add(BUFFER)
    missing = [name for name in wanted if name not in tensors and name not in optional]
    unknown = [name for name in tensors if name not in wanted]
    if missing or unknown:
        what = f"lacks {missing[0]!r}" if missing else f"has {unknown[0]!r}, which the network does not"
        raise StudyError(
            f"model.weights: {path.name} {what} ({len(missing)} missing, {len(unknown)} unknown of {len(wanted)}). "
            f"It belongs to another network or another model.norm."
        )
    load_tensors(model, tensors)
