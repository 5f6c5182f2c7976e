"""The one local training loop.

Methods add to it in two places: ``rule`` says how the gradients of a step come about, where one backward pass is not
enough, and ``adjust`` changes them before the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from polyclinic.data.augment import augment
from polyclinic.data.dataset import SiteData
from polyclinic.errors import SiteError
from polyclinic.models.normalisation import running_statistics_used, statistics_kept
from polyclinic.seeds import generator
from polyclinic.study import TrainingSettings
from polyclinic.synthesis.supplement import Supplement
from polyclinic.tasks import Task

T = TypeVar("T")


class Batch(NamedTuple):
    """Images of a step, on the network's device.

    Attributes:
        inputs: Normalised, augmented ``[B, C, *spatial]``.
        targets: ``[B, ...]``.
        synthetic: Inputs and targets of samples that were not taken from a patient, where there are any.
    """

    inputs: Tensor
    targets: Tensor
    synthetic: tuple[Tensor, Tensor] | None = None


AdjustGradients = Callable[[list[Tensor], list[Tensor]], None]
"""``adjust(parameters, gradients)`` changes gradients in place; both in the order of ``trained_parameters(model)``."""


class Step:
    """One step of local training, as a rule sees it.

    Attributes:
        model: The network, in training mode.
        parameters: What the optimizer moves, in the order of ``trained_parameters``.
        seed: The seed of this call of ``train``.
        number: Of the step, from 1.
        batch: The step's own batch, the same that plain training would have seen.
    """

    def __init__(self, model: nn.Module, feed: _Feed, parameters: list[Tensor], mixed: bool) -> None:
        self.model, self.parameters = model, parameters
        self.seed = feed.seed
        self.number = 0
        self.batch: Batch
        self._feed, self._mixed = feed, mixed
        self._indices: Tensor

    def loss(self, batch: Batch, chance: int | None = None) -> Tensor:
        """Mean loss of a batch at the network's current values, with λ times the mean loss of its samples.

        Args:
            batch: The step's own, or ``another()``.
            chance: Seed of dropout for this pass, which then leaves the step's own stream as it was.
        """
        device = batch.inputs.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self._mixed):
            if chance is None:
                return self._loss(batch)
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                _seed_global(chance, device)
                return self._loss(batch)

    def _loss(self, batch: Batch) -> Tensor:
        task, supplement = self._feed.task, self._feed.supplement
        loss = task.loss(self.model(batch.inputs), batch.targets)
        if batch.synthetic is None or supplement is None:
            return loss
        inputs, targets = batch.synthetic
        # Running statistics never see a sample: they are what the model uses on patients.
        kept = statistics_kept if supplement.own_statistics else running_statistics_used
        with kept(self.model):
            return loss + supplement.weight * task.loss(self.model(inputs), targets)

    def another(self) -> Batch:
        """A batch of other training images than the step's own, as many or as many as there are, from its own stream.

        Raises:
            SiteError: There are none.
        """
        return self._feed.another(self._indices, self.parameters[0].device)

    def _take(self, indices: Tensor) -> None:
        self.number += 1
        self._indices = indices
        self.batch = self._feed.prepared(indices, self._feed.draws, self.parameters[0].device)


StepRule = Callable[[Step], Tensor]
"""``rule(step)`` leaves in each parameter's ``grad`` what the optimizer is to follow (None: it is not moved), and
returns the loss of ``step.batch``."""


def plain_step(step: Step) -> Tensor:
    """One backward pass through the step's own batch."""
    loss = step.loss(step.batch)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


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
    only: Collection[str] | None = None,
    rule: StepRule = plain_step,
    adjust: AdjustGradients | None = None,
    supplement: Supplement | None = None,
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
        only: Names of the parameters that are trained; None: all.
        rule: How the gradients of a step come about.
        adjust: Changes the gradients before clipping and the step.
        supplement: Samples beside the images, and styles that images are mixed with.

    Raises:
        SiteError: The loss is not finite; names the step and what to try.
    """
    with _only_trained(model, only):
        parameters: list[Tensor] = list(trained_parameters(model).values())
        device = parameters[0].device
        optimizer = make_optimizer(parameters, settings, lr)
        total = torch.zeros((), dtype=torch.float64, device=device)
        images = 0
        feed = _Feed(data, task, settings, seed, supplement)
        step = Step(model, feed, parameters, mixed=settings.amp and device.type == "cuda")
        model.train()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            _seed_global(seed, device)
            for indices in feed:
                step._take(indices)
                optimizer.zero_grad(set_to_none=True)
                loss = rule(step)
                if adjust is not None:
                    adjust(parameters, [_gradient(p) for p in parameters])
                if settings.clip is not None:
                    nn.utils.clip_grad_norm_(parameters, settings.clip, foreach=True)
                optimizer.step()
                total += loss.detach() * len(indices)
                images += len(indices)
        optimizer.zero_grad(set_to_none=True)
    mean = float(total) / images if images else math.nan
    if images:
        _check_finite(mean, parameters, step.number, lr)
    return TrainingResult(mean, step.number, images)


def fit(
    parameters: list[Tensor],
    batches: Iterable[T],
    loss: Callable[[T], Tensor],
    settings: TrainingSettings,
    *,
    lr: float,
    seed: int,
    device: torch.device | str = "cpu",
) -> float:
    """Minimise a loss over batches that are no site's patients: public images, logits, features.

    The plain loop with the study's optimizer and clipping. Modes of networks and order of batches are the caller's.

    Args:
        parameters: What the optimizer moves.
        batches: One a step, of whatever kind ``loss`` takes.
        loss: Mean loss of a batch at the parameters' current values.
        settings: Optimizer, its momentum and weight decay, clipping, mixed precision.
        lr: Learning rate, constant.
        seed: Of dropout, and whatever else draws from torch's global stream inside.
        device: Where the parameters are.

    Returns:
        The mean of the batches' losses (NaN without a batch).

    Raises:
        SiteError: The loss is not finite; names the step and what to try.
    """
    device = torch.device(device)
    optimizer = make_optimizer(parameters, settings, lr)
    total, steps = torch.zeros((), dtype=torch.float64, device=device), 0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        _seed_global(seed, device)
        for batch in batches:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.amp and device.type == "cuda"):
                found = loss(batch)
            found.backward()  # type: ignore[no-untyped-call]
            if settings.clip is not None:
                nn.utils.clip_grad_norm_(parameters, settings.clip, foreach=True)
            optimizer.step()
            total += found.detach()
            steps += 1
    optimizer.zero_grad(set_to_none=True)
    mean = float(total) / steps if steps else math.nan
    if steps:
        _check_finite(mean, parameters, steps, lr)
    return mean


def _check_finite(mean: float, parameters: list[Tensor], steps: int, lr: float) -> None:
    if not math.isfinite(mean) or not bool(torch.stack(torch._foreach_norm(parameters)).isfinite().all()):
        raise SiteError(
            f"training diverged (loss {mean}) within {steps} steps at learning rate {lr:g}. "
            "Lower it (training.lr, or the rates that the method sets), or set training.clip."
        )


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What ``train`` changes and ``adjust`` sees, by name and in that order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def learning_rate(settings: TrainingSettings, number: int, rounds: int) -> float:
    """Learning rate of round ``number`` (from 1) of ``rounds``: constant, or a half cosine that ends above zero."""
    if settings.schedule == "cosine" and rounds > 0:
        return settings.lr * 0.5 * (1 + math.cos(math.pi * (number - 1) / rounds))
    return settings.lr


def make_optimizer(parameters: list[Tensor], settings: TrainingSettings, lr: float) -> torch.optim.Optimizer:
    """The optimizer that the training asks for, fresh."""
    # fused: one call updates all parameters, on CPU as well.
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=lr, momentum=settings.momentum, weight_decay=settings.weight_decay, fused=True
        )
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=lr, weight_decay=settings.weight_decay, fused=True)


class _Feed:
    """The batches of one call of ``train``: positions in order, and from positions to inputs and targets."""

    def __init__(
        self, data: SiteData, task: Task, settings: TrainingSettings, seed: int, supplement: Supplement | None
    ) -> None:
        self.data, self.settings, self.seed, self.supplement = data, settings, seed, supplement
        self.task = _among(task, data, settings.balanced, supplement)
        self.draws = _draws(seed, "augment")
        self._styles = generator(seed, "style")

    def __iter__(self) -> Iterator[Tensor]:
        order, settings = generator(self.seed, "order"), self.settings
        passes = settings.epochs if settings.steps is None else 1
        for _ in range(passes):
            yield from self.data.train_batches(order, settings.batch_size, settings.steps, settings.balanced)

    def prepared(self, indices: Tensor, draws: torch.Generator, device: torch.device) -> Batch:
        """Normalised, augmented inputs and targets."""
        from polyclinic.tasks.segmentation import Segmentation

        if isinstance(self.task, Segmentation) and self.task.patch is not None:
            inputs, targets = self.task.training_patches(self.data, indices, draws)
        else:
            inputs, targets = self.data.inputs(indices), self.data.targets[indices]
        extra = self.supplement
        if extra is not None:
            inputs = extra.restyled(inputs, self.data.mean, self.data.std, self._styles)
        masks = targets if self.task.kind == "segmentation" else None
        inputs, masks = augment(inputs, masks, self.settings.augment, draws)
        targets = targets if masks is None else masks
        batch = Batch(inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True))
        return batch if extra is None else batch._replace(synthetic=self._samples(extra, len(indices), device))

    @cached_property
    def _sampling(self) -> tuple[np.random.Generator, torch.Generator]:
        return generator(self.seed, "samples"), _draws(self.seed, "augment samples")

    def _samples(self, extra: Supplement, real: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Samples that go with so many real images, augmented as those are."""
        if not extra.active:
            return None
        rng, draws = self._sampling
        inputs, targets = extra.batch(real, self.data.mean, self.data.std, rng)
        inputs, _ = augment(inputs, None, self.settings.augment, draws)
        return inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)

    @cached_property
    def _others(self) -> tuple[np.random.Generator, torch.Generator]:
        return generator(self.seed, "another batch"), _draws(self.seed, "augment another batch")

    def another(self, indices: Tensor, device: torch.device) -> Batch:
        rng, draws = self._others
        other = other_batch(self.data, indices, rng, self.settings.balanced)
        return self.prepared(other, draws, device)


def _among(task: Task, data: SiteData, balanced: bool, supplement: Supplement | None) -> Task:
    """The task, knowing how often this training shows each class: images as they are drawn, and samples with them."""
    if task.kind != "multi-class":
        return task
    counts = torch.bincount(data.labels("train"), minlength=len(task.classes)).double()
    if balanced:
        held = counts > 0
        counts = held * counts.sum() / held.sum().clamp(min=1)
    return task.among(counts if supplement is None else supplement.mixture(counts))


def other_batch(data: SiteData, indices: Tensor, rng: np.random.Generator, balanced: bool = False) -> Tensor:
    """Positions of training images that are not among ``indices``, int64: as many, or as many as there are.

    Args:
        data: The site's images.
        indices: Positions of a batch.
        rng: Source of chance.
        balanced: Classes are drawn with equal chance.

    Raises:
        SiteError: Every training image is in the batch.
    """
    rest = np.setdiff1d(data.splits["train"].numpy(), indices.numpy())
    if len(rest) == 0:
        raise SiteError(
            f"site {data.site!r} has {len(indices)} training images, all in one batch, but the method needs two "
            "batches without an image in common. Lower training.batch_size."
        )
    chance = None
    if balanced:
        labels = data.targets[torch.from_numpy(rest)].numpy()
        chance = 1 / np.bincount(labels)[labels]
        chance /= chance.sum()
    return torch.from_numpy(rng.choice(rest, size=min(len(indices), len(rest)), replace=False, p=chance))


def _draws(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(generator(seed, name).integers(2**62).item())


def _seed_global(seed: int, device: torch.device) -> None:
    # Not torch.manual_seed: without CUDA it notes a stack trace for later, which takes longer than a small step.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


@contextmanager
def _only_trained(model: nn.Module, names: Collection[str] | None) -> Iterator[None]:
    """Inside, no other parameter needs a gradient."""
    still = [] if names is None else [p for name, p in trained_parameters(model).items() if name not in names]
    for parameter in still:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in still:
            parameter.requires_grad_(True)


def _gradient(parameter: Tensor) -> Tensor:
    """The gradient, zeros where the loss does not reach the parameter."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
