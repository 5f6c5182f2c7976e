from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyclinic.data.readers import Picture
from polyclinic.data.transforms import mask_array, to_array
from polyclinic.errors import DataError
from polyclinic.study import ImageSettings, TaskSettings, WindowSettings

TWO = TaskSettings(kind="segmentation", classes=["background", "lesion"])
FOUR = TaskSettings(kind="segmentation", classes=["background", "a", "b", "c"])


def grey(height: int, width: int, value: int = 100) -> Picture:
    return Picture(np.full((1, height, width), value, np.uint8))


def test_same_size_is_untouched() -> None:
    pixels = np.arange(16, dtype=np.uint8).reshape(1, 4, 4)
    np.testing.assert_array_equal(to_array(Picture(pixels), ImageSettings(size=[4, 4])), pixels)


def test_study_window_before_file_window_before_range() -> None:
    pixels = np.array([[[-1000, 0], [100, 500]]], np.float32)
    size = {"size": [2, 2]}
    study = ImageSettings(**size, window=WindowSettings(center=0, width=400))
    picture = Picture(pixels, window=(100, 800))
    np.testing.assert_allclose(to_array(picture, study), [[[0, 0.5], [0.75, 1]]])
    np.testing.assert_allclose(to_array(picture, ImageSettings(**size)), [[[0, 0.375], [0.5, 1]]])
    np.testing.assert_allclose(to_array(Picture(pixels), ImageSettings(**size)), [[[0, 2 / 3], [1100 / 1500, 1]]])
    assert to_array(Picture(np.full((1, 2, 2), 7, np.float32)), ImageSettings(**size)).max() == 0


@pytest.mark.parametrize(("fit", "filled"), [("pad", (slice(2, 6), slice(None))), ("crop", ...), ("stretch", ...)])
def test_fit(fit: str, filled: object) -> None:
    array = to_array(grey(20, 40), ImageSettings(size=[8, 8], fit=fit))
    wanted = np.zeros((8, 8), np.uint8)
    wanted[filled] = 100
    np.testing.assert_array_equal(array[0], wanted)


def test_crop_keeps_the_middle() -> None:
    pixels = np.zeros((1, 10, 30), np.uint8)
    pixels[..., 10:20] = 200
    array = to_array(Picture(pixels), ImageSettings(size=[10, 10], fit="crop"))
    np.testing.assert_array_equal(array, np.full((1, 10, 10), 200))


def test_shrinking_averages() -> None:
    checkers = np.indices((64, 64)).sum(axis=0).astype(np.uint8) % 2 * 200
    array = to_array(Picture(checkers[None]), ImageSettings(size=[8, 8]))
    assert array.min() > 90
    assert array.max() < 110


def test_volumes_average_and_grow() -> None:
    pixels = np.arange(4, dtype=np.uint8).repeat(16).reshape(1, 4, 4, 4) * 10
    array = to_array(Picture(pixels), ImageSettings(size=[2, 4, 4]))
    np.testing.assert_array_equal(array[0, :, 0, 0], [5, 25])
    assert to_array(Picture(pixels), ImageSettings(size=[8, 6, 6])).shape == (1, 8, 6, 6)
    padded = to_array(Picture(np.full((1, 2, 2, 4), 50, np.uint8)), ImageSettings(size=[2, 4, 4]))
    np.testing.assert_array_equal(padded[0, 0, :, 0], [0, 50, 50, 0])


def test_channels() -> None:
    colour = np.stack([np.full((4, 4), v, np.uint8) for v in (100, 104, 108)])
    assert to_array(Picture(colour), ImageSettings(size=[4, 4])).tolist() == [[[104] * 4] * 4]
    np.testing.assert_array_equal(to_array(grey(4, 4), ImageSettings(size=[4, 4], channels=3)), np.full((3, 4, 4), 100))
    colour[2] = 109
    with pytest.raises(DataError, match=r"a.png is a colour image in a grey study: .* up to 9 of 255 \(allowed: 8\)"):
        to_array(Picture(colour), ImageSettings(size=[4, 4]), "a.png")


def test_dimensions_must_agree() -> None:
    with pytest.raises(DataError, match=r"a has 2 dimensions \(4, 4\), data.image.size \[4, 4, 4\] has 3"):
        to_array(grey(4, 4), ImageSettings(size=[4, 4, 4]), "a")
    with pytest.raises(DataError, match="has 3 dimensions"):
        to_array(Picture(np.zeros((1, 5, 4, 4), np.uint8)), ImageSettings(size=[4, 4]))
    assert to_array(Picture(np.zeros((1, 1, 4, 4), np.uint8)), ImageSettings(size=[4, 4])).shape == (1, 4, 4)


@given(
    height=st.integers(1, 50),
    width=st.integers(1, 50),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    fit=st.sampled_from(["pad", "crop", "stretch"]),
    channels=st.sampled_from([1, 3]),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_fits_and_mask_follows_image(height, width, size, fit, channels) -> None:
    rule = ImageSettings(size=list(size), fit=fit, channels=channels)
    array = to_array(grey(height, width, 255), rule)
    mask = mask_array(np.ones((height, width), np.uint8), (height, width), TWO, rule)
    assert array.shape == (channels, *size)
    assert mask.shape == size
    np.testing.assert_array_equal(array[0] > 0, mask > 0)


def test_masks_of_two_classes() -> None:
    rule = ImageSettings(size=[1, 4])

    def read(*values: float, kind: type = np.uint8) -> list[int]:
        return mask_array(np.array([values], kind), (1, 4), TWO, rule)[0].tolist()

    assert read(0, 255, 0, 255) == [0, 1, 0, 1]
    assert read(0, 1, 1, 1) == [0, 1, 1, 1]
    assert read(0, 3, 127, 128) == [0, 0, 0, 1]
    assert read(255, 255, 255, 255) == [1, 1, 1, 1]
    assert read(0, 0, 0, 0) == [0, 0, 0, 0]
    assert read(0, 1, 0, 1, kind=np.float32) == [0, 1, 0, 1]
    with pytest.raises(DataError, match=r"the values 0, 1, 2; with 2 classes they must be 0 to 1 \(or 0 and one other"):
        read(0, 1, 2, 0)


def test_masks_of_more_classes_hold_indices() -> None:
    rule = ImageSettings(size=[1, 4])
    assert mask_array(np.array([[0, 3, 2, 1]], np.uint8), (1, 4), FOUR, rule).tolist() == [[0, 3, 2, 1]]
    for values in ([0, 4, 1, 1], [-1, 0, 1, 2], [0, 0.5, 1, 2]):
        with pytest.raises(DataError, match="with 4 classes they must be 0 to 3"):
            mask_array(np.array([values], np.float32), (1, 4), FOUR, rule)


def test_mask_of_another_size_is_refused() -> None:
    with pytest.raises(DataError, match=r"m.png has size \(4, 5\), its image \(5, 4\)"):
        mask_array(np.zeros((4, 5), np.uint8), (5, 4), TWO, ImageSettings(size=[4, 4]), "m.png")
