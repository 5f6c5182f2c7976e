"""Samples: names, selection, messages, and what is refused when it comes from elsewhere."""

import hashlib

import pytest
import torch
from torch import Tensor

from polyclinic.errors import MessageError
from polyclinic.federation.message import Message
from polyclinic.synthesis.pool import Bounds, Samples, unpack

BOUNDS = Bounds(classes=3, devices=2, channels=3, side=8, samples=10, nbytes=3 * 8 * 8 * 4)


def made(count: int = 3, side: int = 4) -> Samples:
    images = torch.arange(count * 3 * side * side).remainder(251).to(torch.uint8).reshape(count, 3, side, side)
    numbers = torch.arange(count)
    return Samples(numbers % 3, numbers % 2, numbers + 100, images)


def changed(**arrays: Tensor) -> Message:
    return Message.pack({"samples": made().arrays() | arrays})


def test_id_is_a_hash_of_line_and_pixels() -> None:
    image = torch.tensor([[[[1, 2], [3, 4]]]], dtype=torch.uint8)
    one = Samples(torch.tensor([2]), torch.tensor([1]), torch.tensor([258]), image)
    line = bytes([2, *[0] * 7, 1, *[0] * 7, 2, 1, *[0] * 6])
    assert one.ids() == [hashlib.sha256(line + bytes([1, 2, 3, 4])).hexdigest()[:16]]
    assert one.pixel_digests() == [hashlib.sha256(bytes([1, 2, 3, 4])).hexdigest()]


def test_every_part_changes_the_id() -> None:
    one = made(1)
    assert one.images is not None
    other = one.images.clone()
    other[0, 2, 3, 3] ^= 1
    variants = [
        one,
        Samples(one.labels + 1, one.devices, one.seeds, one.images),
        Samples(one.labels, one.devices + 1, one.seeds, one.images),
        Samples(one.labels, one.devices, one.seeds + 1, one.images),
        one.with_images(other),
    ]
    assert len({sample.ids()[0] for sample in variants}) == len(variants)


def test_memory_layout_does_not_change_the_id() -> None:
    one = made(2)
    assert one.images is not None
    strided = one.images.transpose(2, 3).contiguous().transpose(2, 3)
    assert not strided.is_contiguous()
    assert one.with_images(strided).ids() == one.ids()


def test_no_id_without_images() -> None:
    with pytest.raises(ValueError, match="decode"):
        made().without_images().ids()


def test_some_of_them() -> None:
    all_three = made()
    by_mask, by_place = all_three.only(torch.tensor([True, False, True])), all_three.only(torch.tensor([2, 0]))
    assert len(by_mask) == 2
    assert by_mask.ids() == [all_three.ids()[0], all_three.ids()[2]]
    assert by_place.ids() == [all_three.ids()[2], all_three.ids()[0]]
    assert all_three.without_images().only(torch.tensor([1])).seeds.tolist() == [101]


def test_they_travel() -> None:
    """By the binary form of a message, with and without images, and none at all."""
    for sent in (made(), made().without_images(), made(0), made(0).without_images()):
        message = Message.from_bytes(Message.pack({"pool": sent.arrays()}, devices="[]").to_bytes())
        got = unpack(message, BOUNDS, "pool")
        assert len(got) == len(sent)
        assert got.seeds.tolist() == sent.seeds.tolist()
        assert (got.images is None) == (sent.images is None)
        if sent.images is not None:
            assert got.ids() == sent.ids()


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"labels": torch.tensor([0, 1, 3])}, "labels of samples go from 0 to 3, wanted 0 to 2"),
        ({"labels": torch.tensor([-1, 1, 2])}, "go from -1"),
        ({"devices": torch.tensor([0, 2, 1])}, "devices of samples go from 0 to 2, wanted 0 to 1"),
        ({"seeds": torch.tensor([5, -9, 1])}, "seeds of samples go from -9"),
        ({"labels": torch.tensor([0.0, 1.0, 2.0])}, "labels of samples are torch.float32"),
        ({"labels": torch.tensor([0, 1, 2], dtype=torch.int32)}, "torch.int32"),
        ({"labels": torch.zeros(3, 1, dtype=torch.int64)}, r"shape \(3, 1\)"),
        ({"labels": torch.tensor(1)}, r"shape \(\)"),
        ({"devices": torch.zeros(2, dtype=torch.int64)}, r"devices .* shape \(2,\)"),
        ({"images": torch.zeros(3, 3, 4, 4)}, "images of samples are torch.float32"),
        ({"images": torch.zeros(3, 1, 4, 4, dtype=torch.uint8)}, r"wanted torch.uint8 of shape \(3, 3, s, s\)"),
        ({"images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, r"shape \(2, 3, 4, 4\)"),
        ({"images": torch.zeros(3, 3, 4, 5, dtype=torch.uint8)}, r"shape \(3, 3, 4, 5\)"),
        ({"images": torch.zeros(3, 3, 9, 9, dtype=torch.uint8)}, "s from 1 to 8"),
        ({"images": torch.zeros(3, 3, 0, 0, dtype=torch.uint8)}, "s from 1 to 8"),
        ({"images": torch.zeros(3, 48, dtype=torch.uint8)}, r"shape \(3, 48\)"),
        ({"ages": torch.zeros(3)}, "holds 'ages'"),
    ],
)
def test_wrong_messages_are_refused(arrays: dict[str, Tensor], reason: str) -> None:
    with pytest.raises(MessageError, match=reason):
        unpack(changed(**arrays), BOUNDS)


def test_a_missing_column_is_refused() -> None:
    arrays = made().arrays()
    del arrays["seeds"]
    with pytest.raises(MessageError, match="lacks 'seeds'"):
        unpack(Message.pack({"samples": arrays}), BOUNDS)
    with pytest.raises(MessageError, match="lacks 'labels'"):
        unpack(Message(), BOUNDS)


def test_too_much_is_refused() -> None:
    with pytest.raises(MessageError, match="11 samples came, at most 10"):
        unpack(Message.pack({"samples": made(11).without_images().arrays()}), BOUNDS)
    assert len(unpack(Message.pack({"samples": made(4, 8).arrays()}), BOUNDS)) == 4
    with pytest.raises(MessageError, match="960 bytes, at most 768"):
        unpack(Message.pack({"samples": made(5, 8).arrays()}), BOUNDS)
