"""Amplitude windows against pictures whose spectrum is known, and what a change of style may and may not do."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polyclinic.synthesis.amplitude import restyle, windows

SIZES = st.tuples(st.integers(7, 12), st.integers(7, 12))
HALVES = st.integers(0, 3)


def drawn(seed: int, size: tuple[int, int], count: int = 2, low: float = 0.0, high: float = 1.0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(count, 3, *size, generator=draw)


def wave(height: int, width: int, down: int, across: int, mean: float = 0.5, reach: float = 0.3) -> Tensor:
    """``mean + reach cos(...)`` with so many periods along each axis, ``[1, 1, H, W]``."""
    y, x = torch.arange(height)[:, None] / height, torch.arange(width)[None, :] / width
    return (mean + reach * torch.cos(2 * math.pi * (down * y + across * x) + 0.7))[None, None]


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (9, 20), (3, 3)])
def test_a_flat_picture_is_its_mean_and_nothing_else(size: tuple[int, int]) -> None:
    wanted = torch.zeros(1, 1, 3, 3)
    wanted[0, 0, 1, 1] = 0.25
    torch.testing.assert_close(windows(torch.full((1, 1, *size), 0.25), 1), wanted, rtol=0, atol=1e-7)


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (9, 20)])
def test_a_wave_is_two_numbers_of_half_its_reach_whatever_the_size(size: tuple[int, int]) -> None:
    """One period down, two across: frequencies (1, 2) and (-1, -2), which stand at (3, 4) and (1, 0) of 5 x 5."""
    wanted = torch.zeros(5, 5)
    wanted[2, 2], wanted[3, 4], wanted[1, 0] = 0.5, 0.15, 0.15
    torch.testing.assert_close(windows(wave(*size, 1, 2), 2)[0, 0], wanted, rtol=0, atol=1e-6)


@given(st.integers(0, 999), SIZES, HALVES)
def test_windows_by_the_definition(seed: int, size: tuple[int, int], half: int) -> None:
    images = drawn(seed, size, 1)
    u, v = size
    k = torch.arange(-half, half + 1)
    down = torch.exp(-2j * math.pi * k[:, None] * torch.arange(u)[None] / u)
    across = torch.exp(-2j * math.pi * torch.arange(v)[:, None] * k[None] / v)
    by_hand = (down @ images.to(torch.complex64) @ across).abs() / (u * v)
    torch.testing.assert_close(windows(images, half), by_hand, rtol=0, atol=1e-5)


@given(st.integers(0, 999), SIZES, HALVES, st.booleans())
def test_squares_of_a_window_add_up_to_one_at_most(seed: int, size: tuple[int, int], half: int, hard: bool) -> None:
    images = drawn(seed, size)
    images = (images > 0.5).float() if hard else images
    found = windows(images, half)
    assert (found >= 0).all()
    total = found.square().sum((-1, -2))
    assert (total <= images.square().mean((-1, -2)) + 1e-5).all()
    # What the noise on styles counts on.
    assert (found.sum((-1, -2)) <= 2 * half + 1 + 1e-5).all()


def test_the_bound_is_reached() -> None:
    assert windows(torch.ones(1, 1, 8, 8), 1).square().sum().item() == pytest.approx(1)


@given(st.integers(0, 999), SIZES, HALVES)
def test_the_own_window_and_no_strength_leave_the_picture(seed: int, size: tuple[int, int], half: int) -> None:
    images = drawn(seed, size)
    torch.testing.assert_close(restyle(images, windows(images, half)), images, rtol=0, atol=1e-5)
    other = windows(drawn(seed + 1, size), half)
    torch.testing.assert_close(restyle(images, other, 0.0), images, rtol=0, atol=1e-5)
    torch.testing.assert_close(restyle(images, other, torch.zeros(2)), images, rtol=0, atol=1e-5)


@given(st.integers(0, 999), SIZES, HALVES, st.floats(0, 1))
def test_pictures_stay_pictures(seed: int, size: tuple[int, int], half: int, strength: float) -> None:
    images, before = drawn(seed, size), drawn(seed, size)
    found = restyle(images, 3 * windows(drawn(seed + 1, size), half), strength)
    assert found.dtype == torch.float32
    assert found.shape == images.shape
    assert (found >= 0).all()
    assert (found <= 1).all()
    assert torch.equal(images, before), "the images given are not written to"


@settings(deadline=None)
@given(st.integers(0, 999), SIZES, HALVES, st.floats(0, 1))
def test_the_wanted_amplitude_is_reached_where_nothing_is_clipped(
    seed: int, size: tuple[int, int], half: int, strength: float
) -> None:
    images = drawn(seed, size, low=0.45, high=0.55)
    wanted = windows(drawn(seed + 1, size, low=0.4, high=0.6), half)
    found = restyle(images, wanted, strength)
    assert found.min() > 0
    assert found.max() < 1
    mixed = (1 - strength) * windows(images, half) + strength * wanted
    torch.testing.assert_close(windows(found, half), mixed, rtol=0, atol=1e-5)
    # Frequencies outside the window, and the phase of those inside, are what they were.
    before, after = (torch.fft.fft2(part, norm="forward") for part in (images, found))
    rows = torch.arange(half + 1, size[0] - half)
    torch.testing.assert_close(after[..., rows, :], before[..., rows, :], rtol=0, atol=1e-5)
    low = (before[..., 0, 0].angle() - after[..., 0, 0].angle()).abs()
    assert (low < 1e-4).all()


def test_strength_may_differ_from_picture_to_picture() -> None:
    images, wanted = torch.full((2, 1, 8, 8), 0.2), torch.zeros(1, 3, 3)
    wanted[0, 1, 1] = 0.6
    found = restyle(images, wanted, torch.tensor([0.25, 1.0]))
    assert found.mean((1, 2, 3)).tolist() == pytest.approx([0.3, 0.6])


def test_a_frequency_that_is_not_there_stays_away() -> None:
    """A flat picture has no wave whose phase could be kept, so that of the other style is not made up."""
    images = torch.full((1, 1, 8, 8), 0.5)
    wanted = windows(wave(8, 8, 1, 0, mean=0.5), 1)
    torch.testing.assert_close(restyle(images, wanted), images, rtol=0, atol=1e-6)


def test_the_shape_of_a_wave_stays_where_it_is() -> None:
    """Half the reach in the other style: the same wave, half as high, about the other mean."""
    own, other = wave(16, 12, 1, 1, mean=0.5, reach=0.2), wave(20, 20, 1, 1, mean=0.6, reach=0.1)
    found = restyle(own, windows(other, 1)[0])
    torch.testing.assert_close(found, 0.6 + (own - 0.5) / 2, rtol=0, atol=1e-6)
