"""A layer's tensor as a matrix: one row for each output.

Rules that work on matrices are published for 2-D weights. Reshaping convolution kernels ``(out, in, k, k)`` to
``(out, in * k * k)`` is ours where their code falls back to a mean. In a grouped convolution, rows of different groups
read different inputs and share columns all the same; nothing in the tensor tells.
"""

from __future__ import annotations

from torch import Tensor


def as_matrix(tensor: Tensor) -> Tensor | None:
    """The tensor as ``(out, rest)``, or None where it is none: a vector, or just one row or one column.

    Args:
        tensor: Any shape, the first axis being the outputs: linear ``(out, in)``, convolution ``(out, in, k...)``.
    """
    if tensor.ndim < 2 or tensor.numel() == 0:
        return None
    matrix = tensor.reshape(tensor.shape[0], -1)
    return matrix if min(matrix.shape) > 1 else None


def as_layer(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The matrix back in the layer's shape."""
    return matrix.reshape(shape)
