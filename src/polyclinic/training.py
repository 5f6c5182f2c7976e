"""The one local training loop. Methods add to it only through ``adjust``, which sees gradients before the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from polyclinic.data.augment import augment
from polyclinic.data.dataset import SiteData
from polyclinic.errors import SiteError
from polyclinic.seeds import generator
from polyclinic.study import TrainingSettings
from polyclinic.tasks import Task

AdjustGradients = Callable[[list[Tensor], list[Tensor]], None]
"""``adjust(parameters, gradients)`` changes gradients in place; both in the order of ``trained_parameters(model)``."""


@dataclass(frozen=True)
class TrainingResult:
    """What one call of ``train`` did."""

    loss: float
    """Mean training loss over the images seen (NaN without a step)."""
    steps: int
    """Gradient steps taken."""
    images: int
    """Images seen, repeats counted."""


def train(
    model: nn.Module,
    data: SiteData,
    task: Task,
    settings: TrainingSettings,
    *,
    lr: float,
    seed: int,
    adjust: AdjustGradients | None = None,
) -> TrainingResult:
    """Train ``model`` in place on the training images of one site.

    The same model, data, settings, ``lr`` and ``seed`` give the same result bit for bit on one CPU.

    Args:
        model: On the device where it is to be trained.
        data: The site's images; only its training split is used.
        task: Gives the loss.
        settings: Optimizer, batch size, ``epochs`` or ``steps``, clipping, augmentation.
        lr: Learning rate of this call, constant within it.
        seed: Of the order of images, augmentation and dropout.
        adjust: Changes the gradients before clipping and the step.

    Raises:
        SiteError: The loss is not finite; names the step and what to try.
    """
    parameters: list[Tensor] = list(trained_parameters(model).values())
    device = parameters[0].device
    optimizer = _optimizer(parameters, settings, lr)
    total = torch.zeros((), dtype=torch.float64, device=device)
    steps = images = 0
    mixed = settings.amp and device.type == "cuda"
    model.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # Not torch.manual_seed: without CUDA it notes a stack trace for later, which takes longer than a small step.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        for inputs, targets in _batches(data, task, settings, seed):
            inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                loss = task.loss(model(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            if adjust is not None:
                adjust(parameters, [_gradient(p) for p in parameters])
            if settings.clip is not None:
                nn.utils.clip_grad_norm_(parameters, settings.clip, foreach=True)
            optimizer.step()
            total += loss.detach() * len(inputs)
            steps, images = steps + 1, images + len(inputs)
    optimizer.zero_grad(set_to_none=True)
    mean = float(total) / images if images else math.nan
    finite = math.isfinite(mean) and bool(torch.stack(torch._foreach_norm(parameters)).isfinite().all())
    if images and not finite:
        raise SiteError(
            f"training diverged (loss {mean}) within {steps} steps at learning rate {lr:g}. "
            "Lower training.lr, or set training.clip."
        )
    return TrainingResult(mean, steps, images)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What ``train`` changes and ``adjust`` sees, by name and in that order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def learning_rate(settings: TrainingSettings, number: int, rounds: int) -> float:
    """Learning rate of round ``number`` (from 1) of ``rounds``: constant, or a half cosine that ends above zero."""
    if settings.schedule == "cosine" and rounds > 0:
        return settings.lr * 0.5 * (1 + math.cos(math.pi * (number - 1) / rounds))
    return settings.lr


def _optimizer(parameters: list[Tensor], settings: TrainingSettings, lr: float) -> torch.optim.Optimizer:
    # fused: one call updates all parameters, on CPU as well.
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=lr, momentum=settings.momentum, weight_decay=settings.weight_decay, fused=True
        )
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=lr, weight_decay=settings.weight_decay, fused=True)


def _batches(data: SiteData, task: Task, settings: TrainingSettings, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised, augmented inputs and targets of each step."""
    order = generator(seed, "order")
    draws = torch.Generator().manual_seed(generator(seed, "augment").integers(2**62).item())
    passes = settings.epochs if settings.steps is None else 1
    batches = (data.train_batches(order, settings.batch_size, settings.steps, settings.balanced) for _ in range(passes))
    for indices in chain.from_iterable(batches):
        inputs, targets = data.inputs(indices), data.targets[indices]
        masks = targets if task.kind == "segmentation" else None
        if masks is not None and settings.patch is not None:
            from polyclinic.tasks.segmentation import training_patches

            inputs, masks = training_patches(inputs, masks, settings.patch, draws)
        inputs, masks = augment(inputs, masks, settings.augment, draws)
        yield inputs, targets if masks is None else masks


def _gradient(parameter: Tensor) -> Tensor:
    """The gradient, zeros where the loss does not reach the parameter."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
