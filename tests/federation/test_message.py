"""Messages: one binary form, exact size, nothing but arrays and scalars."""

from __future__ import annotations

import json
import pickle
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from polyclinic.errors import MessageError
from polyclinic.federation.message import Message

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
NAMES = st.tuples(st.sampled_from(["model", "update", "a-b", "Größe"]), TEXT).map("/".join)
SHAPES = st.lists(st.integers(0, 3), max_size=4)
SCALARS = st.one_of(TEXT, st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False))


@st.composite
def arrays(draw: st.DrawFn) -> torch.Tensor:
    shape, dtype = draw(SHAPES), draw(st.sampled_from(DTYPES))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return torch.randint(0, 100, shape, generator=seed).to(dtype)


MESSAGES = st.builds(Message, st.dictionaries(NAMES, arrays(), max_size=5), st.dictionaries(TEXT, SCALARS, max_size=5))


@settings(max_examples=150, deadline=None)
@given(message=MESSAGES)
def test_the_binary_form_gives_the_message_back(message: Message) -> None:
    data = message.to_bytes()
    back = Message.from_bytes(data)

    assert message.nbytes == len(data)
    assert list(back.arrays) == list(message.arrays)
    for name, array in message.arrays.items():
        assert back.arrays[name].dtype == array.dtype
        assert back.arrays[name].shape == array.shape
        assert torch.equal(back.arrays[name], array)
    assert back.scalars == message.scalars
    assert [type(v) for v in back.scalars.values()] == [type(v) for v in message.scalars.values()]


def test_the_safetensors_library_reads_it() -> None:
    message = Message.pack({"model": {"w": torch.arange(6.0).reshape(2, 3)}}, loss=0.5)
    assert torch.equal(load(message.to_bytes())["model/w"], torch.arange(6.0).reshape(2, 3))


def test_not_a_number_survives() -> None:
    back = Message.from_bytes(Message({"a/x": torch.tensor(float("nan"))}, {"loss": float("nan")}).to_bytes())
    assert back.scalars["loss"] != back.scalars["loss"]
    assert torch.isnan(back.arrays["a/x"])


def test_strided_arrays_are_written_in_order() -> None:
    message = Message({"a/x": torch.arange(6).reshape(2, 3).T})
    assert torch.equal(Message.from_bytes(message.to_bytes()).arrays["a/x"], torch.tensor([[0, 3], [1, 4], [2, 5]]))


def test_groups() -> None:
    message = Message.pack({"model": {"a.b": torch.ones(1), "c": torch.ones(2)}, "control": {"a.b": torch.ones(3)}})
    assert message.groups() == ["model", "control"]
    assert {n: len(a) for n, a in message.group("model").items()} == {"a.b": 1, "c": 2}
    assert message.group("mod") == {}


@settings(max_examples=100, deadline=None)
@given(message=MESSAGES, data=st.data())
def test_a_truncated_message_is_refused(message: Message, data: st.DataObject) -> None:
    whole = message.to_bytes()
    with pytest.raises(MessageError, match="damaged"):
        Message.from_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])


@settings(max_examples=300, deadline=None)
@given(junk=st.binary(max_size=300))
def test_junk_is_refused(junk: bytes) -> None:
    with pytest.raises(MessageError):
        Message.from_bytes(junk)


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_changed_byte_is_refused_or_harmless(at: int, value: int) -> None:
    data = bytearray(Message.pack({"m": {"w": torch.ones(3, 2)}}, loss=1.5, note="ä").to_bytes())
    data[at % len(data)] = value
    try:
        back = Message.from_bytes(bytes(data))
    except MessageError:
        return
    assert all(isinstance(v, int | float | str | bool) for v in back.scalars.values())


def test_an_oversized_message_is_refused_before_it_is_read() -> None:
    data = Message({"a/x": torch.zeros(100)}).to_bytes()
    with pytest.raises(MessageError, match=f"{len(data)} bytes is over the limit of 99 bytes"):
        Message.from_bytes(data, max_bytes=99)
    assert len(Message.from_bytes(data, max_bytes=len(data)).arrays) == 1


@pytest.mark.parametrize("value", [{"a": 1}, None])
def test_pickle_is_not_accepted(value: object) -> None:
    with pytest.raises(MessageError):
        Message.from_bytes(pickle.dumps(value))


@pytest.mark.parametrize("scalars", ["[1, 2]", '{"a": null}', '{"a": [1]}', '{"a": {"b": 1}}', "{", "[" * 100_000])
def test_other_scalars_are_refused(scalars: str) -> None:
    with pytest.raises(MessageError):
        Message.from_bytes(save({"a/x": torch.zeros(1)}, {"scalars": scalars}))


def test_a_header_that_is_too_long_is_refused() -> None:
    text = json.dumps({"__metadata__": {"scalars": "{}"}}).encode()
    with pytest.raises(MessageError):
        Message.from_bytes(struct.pack("<Q", 1 << 60) + text)
    with pytest.raises(MessageError):
        Message.from_bytes(save({"a/x": torch.zeros(1)}))


def test_what_has_no_place_in_a_message() -> None:
    with pytest.raises(MessageError, match=r"complex64"):
        Message({"a/x": torch.zeros(1, dtype=torch.complex64)}).to_bytes()
    with pytest.raises(MessageError, match="__metadata__"):
        _ = Message({"__metadata__": torch.zeros(1)}).nbytes
