"""The kinds of tensors that a contribution may bring: which names, shapes, types and values are right."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from polyclinic.errors import ContributionError
from polyclinic.vectors.base import check_finite, check_variance
from polyclinic.vectors.sources import Kind, Outline

KINDS: tuple[Kind, ...] = get_args(Kind)
_SYMMETRY = 1e-4
_AGREEMENT = 1e-6

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Form:
    """What a file of one kind must look like.

    Attributes:
        shapes: Of all tensors that there can be.
        dtypes: Any one of these, the same for the whole file.
        whole: Whether every tensor must be there; otherwise one at least.
    """

    shapes: Shapes
    dtypes: tuple[torch.dtype, ...]
    whole: bool = True

    def check(self, found: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], where: str) -> None:
        """Compare names, shapes and types.

        Raises:
            ContributionError: Names the first tensor that is wrong.
        """
        if unknown := sorted(found.keys() - self.shapes.keys()):
            raise ContributionError(f"{where}: tensor {unknown[0]!r} is unknown to the base ({len(unknown)} such).")
        missing = sorted(self.shapes.keys() - found.keys())
        if not found or (self.whole and missing):
            raise ContributionError(f"{where}: tensor {missing[0]!r} is missing ({len(missing)} such).")
        first = next(iter(found.values()))[0]
        for name, (dtype, shape) in found.items():
            if shape != self.shapes[name]:
                raise ContributionError(f"{where}: tensor {name!r} has shape {shape}; {self.shapes[name]} is right.")
            if dtype not in self.dtypes or dtype != first:
                names = " or ".join(str(d).removeprefix("torch.") for d in self.dtypes)
                raise ContributionError(
                    f"{where}: tensor {name!r} is {str(dtype).removeprefix('torch.')}; the file must be {names}."
                )

    @property
    def most_bytes(self) -> int:
        """Of all values together."""
        widest = max(dtype.itemsize for dtype in self.dtypes)
        return widest * sum(math.prod(shape) for shape in self.shapes.values())


def form(kind: Kind, outline: Outline, task: str = "multi-class") -> Form:
    """What a file of this kind must look like for this network and kind of task."""
    weights = {spec.name: spec.shape for spec in outline.weights}
    match kind:
        case "vector":
            return Form(weights, (torch.float32, torch.bfloat16))
        case "fisher":
            return Form(weights, (torch.float32,))
        case "gram":
            layers = {n: math.prod(s[1:]) for n, s in weights.items() if len(s) > 1 and n.endswith(".weight")}
            return Form({name: (size, size) for name, size in layers.items()}, (torch.float32,), whole=False)
        case "statistics":
            moving = {spec.name: spec.shape for spec in outline.specs if spec.statistic}
            return Form(moving, (torch.float32,))
        case "head":
            # Findings overlap, so multi-label sums have a row more: all images.
            rows = len(outline.classes) + (task == "multi-label")
            inputs = math.prod(weights[f"{outline.head}.weight"][1:]) + 1
            shapes = {"count": (rows,), "first": (rows, inputs), "second": (rows, inputs, inputs)}
            return Form(shapes, (torch.float64,))


def check_values(kind: Kind, names: list[str], read: Callable[[str], Tensor], where: str) -> None:
    """Look at every value, one tensor at a time.

    Raises:
        ContributionError: NaN or infinity anywhere; a negative Fisher information; a Gram matrix that is none; a
            variance that is not positive; sums for the head that contradict each other.
    """
    for name in names:
        tensor, place = read(name), f"{where}: tensor {name!r}"
        check_finite(tensor, place)
        if kind == "statistics":
            check_variance(tensor, name, place)
        if kind == "fisher" and float(tensor.min()) < 0:
            raise ContributionError(f"{place} holds {float(tensor.min()):g}; Fisher information is never negative.")
        if kind == "gram":
            _check_gram(tensor, place)
        del tensor
    if kind == "head":
        _check_head(read, where)


def _check_gram(gram: Tensor, where: str) -> None:
    """A sum of outer products is symmetric, and no entry is larger than the largest on the diagonal, which is positive
    or zero."""
    most = float(gram.diagonal().max())
    if float(gram.diagonal().min()) < 0 or float(gram.abs().max()) > most * (1 + _SYMMETRY):
        raise ContributionError(f"{where} is no Gram matrix: its diagonal must be positive and hold its largest value.")
    if float((gram - gram.T).abs_().max()) > _SYMMETRY * most:
        raise ContributionError(f"{where} is no Gram matrix: it is not symmetric.")


def _check_head(read: Callable[[str], Tensor], where: str) -> None:
    """The last feature is the constant one, so counts and sums appear again in the sums of higher order."""
    count, first = read("count"), read("first")
    if float(count.min()) < 0:
        raise ContributionError(f"{where}: tensor 'count' holds a negative number of images.")
    if not _close(first[:, -1], count):
        raise ContributionError(f"{where}: the last column of 'first' must be 'count': the sums contradict each other.")
    second = read("second")
    if not _close(second[:, -1, :], first) or not _close(second[:, :, -1], first):
        raise ContributionError(f"{where}: the last row and column of 'second' must be 'first'.")
    for matrix in second:
        _check_gram(matrix, f"{where}: tensor 'second'")


def _close(one: Tensor, two: Tensor) -> bool:
    scale = max(float(two.abs().max()), 1.0)
    return float((one - two).abs().max()) <= _AGREEMENT * scale
