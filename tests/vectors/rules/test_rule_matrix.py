"""Layers as matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyclinic.vectors.rules.matrix import as_layer, as_matrix


@given(st.lists(st.integers(1, 5), min_size=0, max_size=5))
def test_round_trip(shape: list[int]) -> None:
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    matrix = as_matrix(tensor)
    if matrix is None:
        assert len(shape) < 2 or shape[0] == 1 or tensor.numel() == shape[0]
    else:
        assert matrix.shape == (shape[0], tensor.numel() // shape[0])
        assert torch.equal(as_layer(matrix, tuple(shape)), tensor)


def test_a_row_holds_what_one_output_reads() -> None:
    kernel = torch.randn(4, 3, 2, 2)
    matrix = as_matrix(kernel)
    assert matrix is not None
    assert torch.equal(matrix[2], kernel[2].flatten())


@pytest.mark.parametrize("shape", [(), (1,), (7,), (1, 9), (9, 1), (1, 1, 3), (0, 4)])
def test_vectors_rows_columns_and_nothing_are_no_matrices(shape: tuple[int, ...]) -> None:
    assert as_matrix(torch.zeros(shape)) is None
