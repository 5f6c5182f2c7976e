"""Safetensors files read and written one tensor at a time; files made to do harm."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from polyclinic.errors import ContributionError
from polyclinic.vectors.tensor_file import TensorFile, TensorWriter, sha256_of

MOST = 10**6
GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw(path: Path, header: Any, values: bytes = bytes(8), length: int | None = None) -> Path:
    """A file with this header, given as JSON or as bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + values)
    return path


def write(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> str:
    with TensorWriter(path, [(n, t.dtype, t.shape) for n, t in tensors.items()], metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return writer.sha256


DRAWN = {
    "d": torch.randn(3, dtype=torch.float64),
    "b.weight": torch.randn(4, 3, 2),
    "a.scalar": torch.tensor(2.5),
    "half": torch.randn(5).half(),
    "brain": torch.randn(2, 2).bfloat16(),
}


def test_the_library_reads_what_is_written_and_the_other_way_round(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    digest = write(ours, DRAWN, origin="here")
    save_file(DRAWN, theirs, {"origin": "there"})
    assert digest == hashlib.sha256(ours.read_bytes()).hexdigest() == sha256_of(ours)
    back = load_file(ours)
    assert back.keys() == DRAWN.keys()
    file = TensorFile(theirs, max_bytes=MOST)
    assert file.metadata == {"origin": "there"}
    assert TensorFile(ours, max_bytes=MOST).metadata == {"origin": "here"}
    assert list(TensorFile(ours, max_bytes=MOST).specs) == list(DRAWN)
    for name, tensor in DRAWN.items():
        assert torch.equal(back[name], tensor)
        read = file.read(name)
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read, tensor)
    assert int.from_bytes(ours.read_bytes()[:8], "little") % 8 == 0


def test_a_tensor_is_memory_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write(path, {"a": torch.ones(4)})
    with TensorFile(path, max_bytes=MOST) as file:
        file.read("a").zero_()
        assert torch.equal(file.read("a"), torch.ones(4))
        out = torch.zeros(4)
        assert file.read_into("a", out) is out
        assert out.sum() == 4
        with pytest.raises(ValueError, match="does not fit"):
            file.read_into("a", torch.zeros(5))
        with pytest.raises(ContributionError, match="no tensor 'b'"):
            file.read("b")
    assert file.read("a").sum() == 4


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    write(tmp_path / "x", {"a": torch.ones(4)})
    before = len(os.listdir("/proc/self/fd"))
    kept = [TensorFile(tmp_path / "x", max_bytes=MOST) for _ in range(5)]
    for file in kept:
        file.read("a")
        with file:
            assert len(os.listdir("/proc/self/fd")) == before + 1
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_is_exchanged_or_cut_after_the_check_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write(path, {"a": torch.ones(4)})
    file = TensorFile(path, max_bytes=MOST)
    write(path, {"a": torch.zeros(4)})
    with pytest.raises(ContributionError, match="has changed since it was checked"):
        file.read("a")
    with TensorFile(path, max_bytes=MOST) as held:
        os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(ContributionError, match="ended while it was read"):
            held.read("a")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": {**GOOD, "shape": [3]}}, "needs 12 bytes; its offsets are"),
        ({"a": {**GOOD, "shape": [-2]}}, "impossible shape"),
        ({"a": {**GOOD, "shape": [True, 2]}}, "impossible shape"),
        ({"a": {**GOOD, "shape": [2.0]}}, "impossible shape"),
        ({"a": {**GOOD, "shape": [2**60, 2**60]}}, "impossible shape"),
        ({"a": {**GOOD, "shape": [2**40, 2**40]}}, "needs"),
        ({"a": {**GOOD, "shape": [0, 2]}}, "impossible shape"),
        ({"a": {**GOOD, "shape": [1] * 17}}, "impossible shape"),
        ({"a": {**GOOD, "shape": "2"}}, "impossible shape"),
        ({"a": {**GOOD, "data_offsets": [0]}}, "impossible offsets"),
        ({"a": {**GOOD, "data_offsets": [-8, 0]}}, "impossible offsets"),
        ({"a": {**GOOD, "data_offsets": [8, 0]}}, "needs 8 bytes"),
        ({"a": {**GOOD, "data_offsets": [8, 16]}}, "starts at 8; 0 is right"),
        ({"a": GOOD, "b": GOOD}, "starts at 0; 8 is right"),
        ({"a": {**GOOD, "shape": [1], "data_offsets": [0, 4]}}, "fill 4 bytes, the file has 8"),
        ({"a": {**GOOD, "dtype": "I64", "shape": [1]}}, "has dtype 'I64'"),
        ({"a": {**GOOD, "dtype": ["F32"]}}, "has dtype"),
        ({"a": {**GOOD, "more": 1}}, "must have dtype, shape and data_offsets, nothing else"),
        ({"a": {"dtype": "F32"}}, "must have dtype, shape and data_offsets"),
        ({"a": 3}, "must have dtype"),
        ({"../a": GOOD}, "no plain name"),
        ({"a/b": GOOD}, "no plain name"),
        ({"a\\b": GOOD}, "no plain name"),
        ({"a\n": GOOD}, "no plain name"),
        ({"": GOOD}, "no plain name"),
        ({"a" * 257: GOOD}, "no plain name"),
        ({"a": GOOD, "__metadata__": {"x": 1}}, "must be texts"),
        ({"a": GOOD, "__metadata__": []}, "must be texts"),
        ({"a": GOOD, "__metadata__": {"x": "y" * 20_000}}, "more than 16384 characters"),
        (b'{"a": {}, "a": {}}', "'a' is there twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F64"}}', "'dtype' is there twice"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": \xff}', "no JSON of ours"),
        (b'{"a": ' + b"[" * 100_000, "no JSON of ours"),
        (b"{" + b"9" * 5000, "no JSON of ours"),
    ],
)
def test_a_malformed_header_is_refused(header: Any, message: str, tmp_path: Path) -> None:
    path = raw(tmp_path / "x.safetensors", header)
    with pytest.raises(ContributionError, match=message) as refusal:
        TensorFile(path, max_bytes=MOST)
    assert str(path) in str(refusal.value)


def test_a_good_header_of_the_same_making_is_read(tmp_path: Path) -> None:
    assert TensorFile(raw(tmp_path / "x", {"a": GOOD}), max_bytes=MOST).read("a").tolist() == [0, 0]


def test_an_oversized_header_or_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = raw(tmp_path / "x", b"{" + b" " * 2**21)
    with pytest.raises(ContributionError, match=r"its header is said to have 2097153 bytes; at most 1048576"):
        TensorFile(path, max_bytes=10**8)
    with pytest.raises(ContributionError, match=r"has 2097169 bytes; at most 1000000 can be right"):
        TensorFile(path, max_bytes=MOST)
    with pytest.raises(ContributionError, match="said to have 200000000 bytes; at most 100000000"):
        TensorFile(raw(path, {"a": GOOD}, length=200_000_000), max_bytes=MOST, max_header=10**10)
    with pytest.raises(ContributionError, match="said to have 500 bytes, the file has"):
        TensorFile(raw(path, {"a": GOOD}, length=500), max_bytes=MOST)


class Harm:
    """Unpickled, it would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    path, trace = tmp_path / "vector.safetensors", tmp_path / "trace"
    for protocol in (2, 3, 4, 5):
        path.write_bytes(pickle.dumps(Harm(trace), protocol))
        with pytest.raises(ContributionError, match="is a Python pickle, which could run code"):
            TensorFile(path, max_bytes=MOST)
    torch.save({"a": torch.ones(3)}, path)
    with pytest.raises(ContributionError, match="zip archive, as torch.save writes it"):
        TensorFile(path, max_bytes=MOST)
    for content in (b"", b"abc", b"\x08" + bytes(30)):
        path.write_bytes(content)
        with pytest.raises(ContributionError, match="is no safetensors file"):
            TensorFile(path, max_bytes=MOST)
    assert not trace.exists()


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
def test_a_header_whose_length_begins_like_a_pickle_is_read(length: int, tmp_path: Path) -> None:
    header = json.dumps({"a": GOOD}).encode().ljust(length)
    assert TensorFile(raw(tmp_path / "x", header), max_bytes=MOST).specs.keys() == {"a"}


def test_only_a_regular_file_is_opened(tmp_path: Path) -> None:
    write(tmp_path / "x", {"a": torch.ones(4)})
    (tmp_path / "link").symlink_to(tmp_path / "x")
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("link", "is a link"),
        ("pipe", "is no regular file"),
        (".", "is no regular file"),
        ("y", "there is no file"),
    ):
        with pytest.raises(ContributionError, match=message):
            TensorFile(tmp_path / name, max_bytes=MOST)
        with pytest.raises(ContributionError, match=message):
            sha256_of(tmp_path / name)


def put(path: Path, specs: Any, calls: list[tuple[str, torch.Tensor]]) -> None:
    with TensorWriter(path, specs) as writer:
        for name, tensor in calls:
            writer.write(name, tensor)


def test_the_writer_wants_what_was_announced(tmp_path: Path) -> None:
    path = tmp_path / "x"
    specs = [("a", torch.float32, (2,)), ("b", torch.float32, (3,))]
    cases = [
        ([("b", torch.ones(3))], "'b' came, 'a' is next"),
        ([("a", torch.ones(3))], r"of shape \(3,\)"),
        ([("a", torch.ones(2).double())], "torch.float64"),
        ([("a", torch.ones(2))], "1 tensors were never written, the first is 'b'"),
        ([("a", torch.ones(2)), ("b", torch.ones(3)), ("c", torch.ones(1))], "was not announced"),
    ]
    path.write_bytes(b"old")
    for calls, message in cases:
        with pytest.raises(ContributionError, match=message):
            put(path, specs, calls)
        assert path.read_bytes() == b"old"
        assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_impossible_announcements(tmp_path: Path) -> None:
    f32, f64 = torch.float32, torch.float64
    for specs, message in (
        ([("a", f32, (1,)), ("b", f64, (1,))], "put tensors of wider types first"),
        ([("a", f32, (1,)), ("a", f32, (1,))], "is there twice"),
        ([("a", torch.int64, (1,))], "floating-point types only"),
        ([("a/b", f32, (1,))], "no plain name"),
        ([("a", f32, (0,))], "impossible shape"),
    ):
        with pytest.raises(ContributionError, match=message):
            TensorWriter(tmp_path / "x", specs)
    with (
        pytest.raises(ContributionError, match="can't be written: No such file"),
        TensorWriter(tmp_path / "none" / "x", [("a", f32, (1,))]),
    ):
        pass


@given(st.binary(max_size=300))
@settings(max_examples=200)
def test_random_bytes_never_crash(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random-bytes"
    path.write_bytes(content)
    with pytest.raises(ContributionError):
        TensorFile(path, max_bytes=MOST)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
SIZES = st.lists(st.integers(-1, 5) | st.just(2**63) | JSON, max_size=3)
ENTRIES = st.fixed_dictionaries({"dtype": st.sampled_from(["F32", "F64", "X"]), "shape": SIZES, "data_offsets": SIZES})


@given(
    st.dictionaries(st.text(max_size=8) | st.just("__metadata__"), JSON | ENTRIES, max_size=3), st.binary(max_size=16)
)
@settings(max_examples=300)
def test_random_headers_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], values: bytes
) -> None:
    path = raw(tmp_path_factory.getbasetemp() / "random-header", header, values)
    try:
        file = TensorFile(path, max_bytes=MOST)
    except ContributionError:
        return
    assert sum(spec.nbytes for spec in file.specs.values()) == len(values)
    for name, spec in file.specs.items():
        assert tuple(file.read(name).shape) == spec.shape


@given(st.data())
@settings(max_examples=200)
def test_one_changed_byte_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "changed-byte"
    write(path, {"a": torch.ones(3, dtype=torch.float64), "b": torch.ones(2, 2)}, k="v")
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        file = TensorFile(path, max_bytes=MOST)
    except ContributionError:
        return
    for name in file.specs:
        file.read(name)
