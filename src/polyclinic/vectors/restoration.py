"""Restoration: what is done to a merged model with the coordinator's own images.

Merged networks see other activations than the ones their running statistics were taken on (REPAIR: Jordan et al. 2022,
arXiv 2211.08403). The data-vectors paper (arXiv 2408.13038) restores after merging; summaries of it speak both of
aligning batch-norm statistics and of fine-tuning on a small set, so both are here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from polyclinic.data.augment import augment
from polyclinic.data.batches import balanced_batches, epoch_batches
from polyclinic.data.dataset import SiteData
from polyclinic.errors import ContributionError
from polyclinic.models.normalisation import running_statistics
from polyclinic.models.registry import head_name
from polyclinic.models.weights import load_tensors, shared_tensors, snapshot
from polyclinic.seeds import derive_seed, generator
from polyclinic.settings import Settings
from polyclinic.study import AugmentSettings, TrainingSettings
from polyclinic.tasks import Task
from polyclinic.tasks.segmentation import Segmentation
from polyclinic.training import Step, plain_step, train

_BatchNorm = nn.modules.batchnorm._BatchNorm
LEAST_VARIANCE = torch.finfo(torch.float32).tiny
"""A channel that never varies has variance zero; it is noted as this, far below the 1e-5 that layers add."""


_FAINTEST = 1e-7


class Restoration(Settings):
    """What is done after merging."""

    mode: Literal["none", "auto", "bn-pooled", "bn-recal", "finetune", "head-only"] = "none"
    """``auto``: bn-recal where the network has batch normalisation, else none. ``bn-pooled``: running statistics are
    those of all sites, which must have sent theirs. ``bn-recal``: they are taken anew on the coordinator's training
    images, without labels. ``finetune``: a few epochs on labelled images; ``head-only``: of the last layer alone. Both
    stop early on validation images."""
    images: int = Field(512, ge=2)
    """At most so many of the coordinator's training images are used, drawn with the seed."""
    augment: bool = True
    """bn-recal: images are augmented as in training, as in REPAIR's code."""
    balanced: bool | None = None
    """bn-recal: images are drawn so that classes are equally frequent, which needs their labels; empty: as
    ``training.balanced``. Sites that trained on balanced batches have statistics of balanced batches: taken anew at the
    classes' natural frequencies they would be those of another distribution."""
    epochs: int = Field(3, ge=1)
    """finetune and head-only: most passes over these images."""
    lr: float | None = Field(None, ge=0)
    """finetune and head-only: learning rate; empty: a tenth of the study's."""
    patience: int = Field(1, ge=1)
    """finetune and head-only: passes without a smaller validation loss before it ends; the best state is kept."""

    @property
    def needs_images(self) -> bool:
        """Whether it uses the coordinator's images (``auto``: it may)."""
        return self.mode not in ("none", "bn-pooled")

    def resolved(self, model: nn.Module) -> Restoration:
        """These settings with ``auto`` decided for a network."""
        if self.mode != "auto":
            return self
        return self.model_copy(update={"mode": "bn-recal" if _measured_layers(model) else "none"})


@dataclass(frozen=True)
class RestorationResult:
    """What restoration did.

    Attributes:
        mode: How.
        images: Different training images used.
        steps: Batches passed through the network: of images, or gradient steps.
        epochs: finetune and head-only: passes after which the kept state was reached; 0: the merged model was best.
        loss_before: finetune and head-only: mean validation loss of the merged model.
        loss_after: Of the kept state.
    """

    mode: str
    images: int = 0
    steps: int = 0
    epochs: int = 0
    loss_before: float | None = None
    loss_after: float | None = None


def restore(
    model: nn.Module,
    data: SiteData,
    task: Task,
    settings: Restoration,
    training: TrainingSettings,
    *,
    batch_size: int,
    seed: int,
) -> RestorationResult:
    """Restore a merged model in place, and leave it in evaluation mode.

    Modes ``none`` and ``bn-pooled`` (which belongs to the merge) do nothing here.

    Args:
        model: With the merged weights, on the device where it runs.
        data: The coordinator's images; training and, for finetune and head-only, validation images are used.
        task: Gives the loss.
        settings: The mode and its numbers.
        training: The study's; its augmentation, optimizer, batch size and learning rate.
        batch_size: Images a step of inference and of bn-recal.
        seed: Of which images are used, their order, augmentation and dropout.

    Raises:
        ContributionError: No batch normalisation to recalibrate, or no images for it.
        SiteError: Training diverged.
    """
    settings = settings.resolved(model)
    if not settings.needs_images:
        model.eval()
        return RestorationResult(settings.mode)
    chosen = _some(data, settings.images, seed)
    if settings.mode == "bn-recal":
        result = _recalibrate(model, chosen, task, settings, training, batch_size, seed)
    else:
        result = _fine_tune(model, chosen, task, settings, training, batch_size, seed)
    model.eval()
    _check_variances(model)
    return result


def _some(data: SiteData, images: int, seed: int) -> SiteData:
    """The same site with at most so many training images."""
    train_images = data.splits["train"]
    if len(train_images) < 2:
        raise ContributionError(
            f"restoration needs at least two training images, {data.site!r} has {len(train_images)}. Give the "
            "coordinator images, or set restoration: none."
        )
    drawn = generator(seed, "restoration images").permutation(len(train_images))[:images]
    some = copy.copy(data)
    some.splits = {**data.splits, "train": train_images[torch.from_numpy(drawn).sort().values]}
    return some


def _recalibrate(
    model: nn.Module,
    data: SiteData,
    task: Task,
    settings: Restoration,
    training: TrainingSettings,
    batch_size: int,
    seed: int,
) -> RestorationResult:
    layers = _measured_layers(model)
    if not layers:
        raise ContributionError(
            "restoration: bn-recal takes running statistics anew, but the network has no batch normalisation. "
            "Set restoration: head-only or finetune, or none."
        )
    device = next(model.parameters()).device
    draws = torch.Generator().manual_seed(derive_seed(seed, "restoration augment"))
    steps = seen = 0
    with _measuring(model, layers), torch.no_grad():
        for indices in _batches(data, settings, training, batch_size, seed):
            changes = training.augment if settings.augment else AugmentSettings()
            seen += len(indices)
            for layer in layers:
                # Every image counts the same: with an average over batches a small last one would weigh as the others.
                layer.momentum = len(indices) / seen
            model(_inputs(data, task, torch.from_numpy(indices), changes, draws).to(device))
            steps += 1
    for layer in layers:
        layer.running_var.clamp_(min=LEAST_VARIANCE)  # type: ignore[union-attr]
    return RestorationResult(settings.mode, len(data.splits["train"]), steps)


def _batches(
    data: SiteData, settings: Restoration, training: TrainingSettings, batch_size: int, seed: int
) -> Iterator[NDArray[np.int64]]:
    rng, indices = generator(seed, "restoration order"), data.splits["train"].numpy()
    if training.balanced if settings.balanced is None else settings.balanced:
        return balanced_batches(indices, data.labels("train").cpu().numpy(), rng, batch_size)
    return epoch_batches(indices, rng, batch_size)


def _measured_layers(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_var is not None]


def _inputs(data: SiteData, task: Task, indices: Tensor, changes: AugmentSettings, draws: torch.Generator) -> Tensor:
    if isinstance(task, Segmentation) and task.patch is not None:
        images, _ = task.training_patches(data, indices, draws)
    else:
        images = data.inputs(indices)
    return augment(images, None, changes, draws)[0]


@contextmanager
def _measuring(model: nn.Module, layers: list[_BatchNorm]) -> Iterator[None]:
    """Inside, batch normalisation takes its statistics anew; everything else is as for use."""
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.train()
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        model.eval()


def _fine_tune(
    model: nn.Module,
    data: SiteData,
    task: Task,
    settings: Restoration,
    training: TrainingSettings,
    batch_size: int,
    seed: int,
) -> RestorationResult:
    if len(data.splits["val"]) == 0:
        raise ContributionError(
            f"restoration: {settings.mode} ends when the validation loss no longer falls, but {data.site!r} has no "
            "validation images. Give the split a validation share, or set restoration: bn-recal or none."
        )
    head = head_name(model)
    only = {f"{head}.weight", f"{head}.bias"} if settings.mode == "head-only" else None
    lr = training.lr / 10 if settings.lr is None else settings.lr
    once = training.model_copy(update={"epochs": 1, "steps": None})
    values = shared_tensors(model, [n for n, t in model.state_dict().items() if torch.is_floating_point(t)])
    best, kept, steps = 0, snapshot(values), 0
    before = lowest = _validation_loss(model, data, task, batch_size)
    for epoch in range(1, settings.epochs + 1):
        rule = plain_step if only is None else _as_in_use
        at = derive_seed(seed, "restoration", epoch)
        steps += train(model, data, task, once, lr=lr, seed=at, only=only, rule=rule).steps
        loss = _validation_loss(model, data, task, batch_size)
        if loss < lowest:
            best, kept, lowest = epoch, snapshot(values), loss
        elif epoch - best >= settings.patience:
            break
    load_tensors(model, kept)
    return RestorationResult(settings.mode, len(data.splits["train"]), steps, best, before, lowest)


def _as_in_use(step: Step) -> Tensor:
    """A step for the head alone: the layers before it compute as in use, without dropout, and are left alone."""
    step.model.eval()
    return plain_step(step)


@torch.no_grad()
def _validation_loss(model: nn.Module, data: SiteData, task: Task, batch_size: int) -> float:
    """Mean loss over the validation images, in evaluation mode."""
    device = next(model.parameters()).device
    model.eval()
    total, indices = 0.0, data.splits["val"]
    for part in torch.split(indices, batch_size):
        inputs, targets = data.inputs(part).to(device), data.targets[part].to(device)
        whole = not isinstance(task, Segmentation) or task.patch is None
        # The softmax of log probabilities is these probabilities, so a sliding window has a loss as well.
        logits = model(inputs) if whole else task.predict(model, inputs).clamp(min=_FAINTEST).log()
        total += float(task.loss(logits, targets)) * len(part)
    return total / len(indices)


def _check_variances(model: nn.Module) -> None:
    for name, values in shared_tensors(model, running_statistics(model)).items():
        if name.endswith("running_var"):
            least = float(values.min())
            if not (math.isfinite(float(values.max())) and least > 0):
                raise ContributionError(
                    f"{name} is not above zero and finite after restoration ({least:g}). Lower restoration.lr, or "
                    "set restoration: bn-recal."
                )
