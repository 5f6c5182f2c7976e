"""What training and evaluation know of a task."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn


class Task(Protocol):
    """What is predicted: loss, probabilities, inference."""

    @property
    def kind(self) -> str:
        """``multi-class``, ``multi-label`` or ``segmentation``."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in the order of the outputs."""

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a batch, a scalar.

        Args:
            logits: ``[B, K]`` or ``[B, K, *spatial]``, any floating type; computed in float32. For segmentation
                also ``[V, B, K, *spatial]``, from a network that in training mode gives several views of an image:
                the loss is then the mean over views.
            targets: int64 ``[B]`` (multi-class), 0/1 float ``[B, K]`` (multi-label), uint8 ``[B, *spatial]``
                (segmentation).
        """

    def among(self, counts: Tensor) -> Task:
        """The task as a training set with these class counts sees it; only some losses look at them.

        Args:
            counts: Images per class as training sees them, float ``[K]``.
        """

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return float32 probabilities, same shape as ``logits``."""

    def predict(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return probabilities ``[B, K, ...]`` of a batch of whole images.

        The caller has put the model into evaluation mode and switched gradients off.
        """
