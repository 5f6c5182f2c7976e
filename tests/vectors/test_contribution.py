"""Contributions written and read, and every way in which one is refused."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hospitals import (
    CLASSES,
    SITES,
    all_kinds,
    contribute,
    forge,
    identity,
    roster,
    sign,
    small_base,
    statement,
    tree,
    vector,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from polyclinic.errors import ContributionError
from polyclinic.vectors.base import Base
from polyclinic.vectors.contribution import Contribution, write_contribution
from polyclinic.vectors.folders import canonical_json
from polyclinic.vectors.manifest import FILES, Data, Membership, Privacy, binned, canonical, digest, parse_manifest
from polyclinic.vectors.sources import Source


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return small_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def sent(base: Base, tmp_path: Path) -> Path:
    """One contribution of everything, from north."""
    contribute(tmp_path / "sent", base, tensors=all_kinds(base))
    return tmp_path / "sent"


def test_everything_comes_back(base: Base, sent: Path) -> None:
    wanted = all_kinds(base)
    found: Source = Contribution.load(sent, base, roster())
    assert isinstance(found, Contribution)
    assert sorted(p.name for p in sent.iterdir()) == sorted(["manifest.json", "signature.json", *FILES])
    assert (found.site, found.images, found.held) == ("north", 100, (True, True, True))
    for kind, tensors in wanted.items():
        assert found.names(kind) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(found.read(kind, name), tensor)
    assert found.digest == digest(found.manifest)
    assert found.nbytes == sum((sent / name).stat().st_size for name in FILES)
    found.verify_files()
    manifest = json.loads((sent / "manifest.json").read_bytes())
    assert manifest["base"] == {"id": "tiny", "sha256": base.digest, "model": "small-cnn", "version": "1"}
    assert manifest["classes"] == list(CLASSES)
    assert manifest["statistics"] == {"included": True, "policy": "batch"}


def test_the_digest_is_that_of_the_manifests_file(base: Base, sent: Path) -> None:
    found = Contribution.load(sent, base, roster())
    assert found.digest == hashlib.sha256((sent / "manifest.json").read_bytes()).hexdigest()


def test_the_same_contribution_twice_is_the_same_bytes(base: Base, sent: Path, tmp_path: Path) -> None:
    contribute(tmp_path / "again", base, tensors=all_kinds(base))
    assert tree(tmp_path / "again") == tree(sent)


def test_half_precision_is_half_the_size(base: Base, tmp_path: Path) -> None:
    values = vector(base)
    for precision in (torch.float32, torch.bfloat16):
        out = tmp_path / str(precision)
        found = write_contribution(out, base, {"vector": values}, statement(), identity("north"), precision=precision)
        Contribution.load(out, base, roster())
        for name, tensor in values.items():
            assert torch.equal(found.read("vector", name), tensor.to(precision))
    full, half = (sum(t.nbytes for t in load_file(tmp_path / d / "vector.safetensors").values()) for d in FOLDERS)
    assert full == 2 * half
    with pytest.raises(ContributionError, match="float32 or bfloat16"):
        write_contribution(
            tmp_path / "x", base, {"vector": values}, statement(), identity("north"), precision=torch.half
        )
    # The largest float32 has no bfloat16.
    values["head.bias"] = torch.full((3,), torch.finfo(torch.float32).max)
    with pytest.raises(ContributionError, match="'head.bias' holds NaN or infinite"):
        write_contribution(
            tmp_path / "x", base, {"vector": values}, statement(), identity("north"), precision=torch.bfloat16
        )


FOLDERS = ("torch.float32", "torch.bfloat16")


def test_what_a_site_does_not_hold(base: Base, tmp_path: Path) -> None:
    stated = statement(classes_held=["covid"], images=binned(37))
    found = write_contribution(tmp_path / "sent", base, {"vector": vector(base)}, stated, identity("west"))
    assert (found.held, found.images, found.site) == ((False, False, True), 33, "west")
    assert found.names("gram") == frozenset()
    with pytest.raises(ContributionError, match="sent no gram"):
        found.read("gram", "head.weight")
    with pytest.raises(ContributionError, match=r"classes_held names 'flu'"):
        write_contribution(
            tmp_path / "x", base, {"vector": vector(base)}, statement(classes_held=["flu"]), identity("west")
        )


def test_a_sender_is_told_what_the_receiver_would_refuse(base: Base, tmp_path: Path) -> None:
    good = all_kinds(base)
    flipped = dict(good["head"], count=-good["head"]["count"])
    skewed = {"head.weight": torch.eye(8) + torch.triu(torch.full((8, 8), 0.1), 1)}
    cases: list[tuple[Any, str]] = [
        ({}, "one kind of tensors at least"),
        ({"vector": {n: t for n, t in good["vector"].items() if n != "head.bias"}}, "'head.bias' is missing"),
        ({"vector": {**good["vector"], "x": torch.ones(1)}}, "'x' is unknown to the base"),
        ({"vector": {**good["vector"], "blocks.1.running_var": torch.ones(2)}}, "running_var' is unknown to the base"),
        ({"vector": {**good["vector"], "head.bias": torch.ones(4)}}, r"has shape \(4,\); \(3,\) is right"),
        ({"vector": {**good["vector"], "head.bias": torch.full((3,), float("nan"))}}, "NaN or infinite"),
        ({"fisher": {**good["fisher"], "head.bias": -torch.ones(3)}}, "Fisher information is never negative"),
        ({"statistics": {**good["statistics"], "blocks.1.running_var": torch.zeros(2)}}, "holds the variance 0"),
        ({"gram": {}}, "is missing"),
        ({"gram": skewed}, "is no Gram matrix: it is not symmetric"),
        ({"gram": {"head.weight": -torch.eye(8)}}, "is no Gram matrix: its diagonal"),
        ({"gram": {"head.weight": torch.eye(8) + 2 * torch.eye(8).flip(0)}}, "is no Gram matrix: its diagonal"),
        ({"head": {**good["head"], "count": torch.tensor([1.0, 2, 3]).double()}}, "must be 'count'"),
        ({"head": flipped}, "negative number of images"),
        ({"head": {**good["head"], "second": good["head"]["second"] * 2}}, "must be 'first'"),
    ]
    for tensors, message in cases:
        with pytest.raises(ContributionError, match=message):
            write_contribution(tmp_path / "sent", base, tensors, statement(), identity("north"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "sent").mkdir()
    with pytest.raises(ContributionError, match="is there already"):
        contribute(tmp_path / "sent", base)


def put(folder: Path, **tensors: torch.Tensor) -> None:
    """Change tensors of the vector's file, as a dishonest site would, and sign."""
    path = folder / "vector.safetensors"
    save_file({**load_file(path), **tensors}, path)
    forge(folder)


def drop(folder: Path, name: str) -> None:
    path = folder / "vector.safetensors"
    save_file({n: t for n, t in load_file(path).items() if n != name}, path)
    forge(folder)


def content(folder: Path, name: str, what: bytes) -> None:
    """Exchange a file, and sign."""
    (folder / name).write_bytes(what)
    forge(folder)


def stated(folder: Path, change: Any) -> None:
    """Change the manifest, and sign."""
    forge(folder, edit=change)


def signed(folder: Path, site: str = "north", /, **fields: str) -> None:
    sign(folder, (folder / "manifest.json").read_bytes(), site, **fields)


def linked(path: Path) -> None:
    away = path.parent.parent / "away"
    path.rename(away)
    path.symlink_to(away)


def flip(path: Path, at: int) -> None:
    found = bytearray(path.read_bytes())
    found[at] ^= 1
    path.write_bytes(found)


OVERSIZED = struct.pack("<Q", 5 * 2**20) + b"{" + b" " * (5 * 2**20 - 1)
V = "vector.safetensors"
REFUSALS: dict[str, tuple[Any, str]] = {
    # Another base, other classes
    "wrong base": (lambda f: stated(f, lambda m: m["base"].update(sha256="0" * 64)), "starts from another base"),
    "class order": (lambda f: stated(f, lambda m: m["classes"].reverse()), "its classes are in another order: covid"),
    "classes": (lambda f: stated(f, lambda m: m.update(classes=[*CLASSES, "flu"])), "its classes are others"),
    "preprocessing": (lambda f: stated(f, lambda m: m.update(preprocessing="0" * 64)), "prepared in another way"),
    # Altered after signing
    "byte of a tensor": (lambda f: flip(f / V, -1), "was altered: its SHA-256 is not the one"),
    "byte of a header": (lambda f: flip(f / V, 20), "was altered: its SHA-256 is not the one"),
    "cut short": (lambda f: os.truncate(f / V, 100), "has 100 bytes, the manifest says"),
    "manifest": (
        lambda f: (f / "manifest.json").write_bytes((f / "manifest.json").read_bytes().replace(b":100,", b":150,")),
        "signature of site 'north' is wrong",
    ),
    "manifest with a space": (
        lambda f: (f / "manifest.json").write_bytes((f / "manifest.json").read_bytes() + b"\n"),
        "not in the canonical form",
    ),
    # Who signed
    "unknown site": (
        lambda f: (stated(f, lambda m: m.update(site="east")), signed(f, "east")),
        "site 'east' is not on the roster",
    ),
    "another site's key": (
        lambda f: signed(f, "south", site="north"),
        "names another key of site 'north' than the pinned",
    ),
    "another site's signature": (
        lambda f: signed(f, signature=json.loads(sigs(f, "south"))["signature"]),
        "signature of site 'north' is wrong",
    ),
    "signed by another site": (lambda f: signed(f, "south"), "signed by 'south', the manifest is of site 'north'"),
    "algorithm": (lambda f: signed(f, algorithm="none"), "the algorithm is 'none'; only Ed25519"),
    "no base64": (lambda f: signed(f, signature="~"), "signature is not in base64"),
    "short signature": (lambda f: signed(f, signature="QUFB"), "signature of site 'north' is wrong"),
    # The last character of base64 has bits that mean nothing: the same signature in another spelling.
    "spare bits of base64": (lambda f: signed(f, signature=respelled(sigs(f, "north"))), "not in the canonical form"),
    "more in the signature": (lambda f: signed(f, more="1"), "must have the texts algorithm, key, signature, site"),
    "no signature": (lambda f: (f / "signature.json").unlink(), "there is no file .*signature.json"),
    "large signature": (lambda f: (f / "signature.json").write_bytes(bytes(2**13)), "at most 4096 are read"),
    # What the manifest says
    "schema": (
        lambda f: stated(f, lambda m: m.update(schema="polyclinic-contribution/2")),
        "its schema is 'polyclinic-",
    ),
    "no schema": (lambda f: stated(f, lambda m: m.pop("schema")), "its schema is 'None'"),
    "unknown field": (lambda f: stated(f, lambda m: m.update(more=1)), "there is no field more"),
    "missing field": (lambda f: stated(f, lambda m: m.pop("training")), "training: Field required"),
    "sequence": (lambda f: stated(f, lambda m: m.update(sequence=0)), "sequence: Input should be greater"),
    "exact count": (
        lambda f: stated(f, lambda m: m["data"].update(images=137)),
        "137 is an exact count; give the rounded one, 150",
    ),
    "long text": (lambda f: stated(f, lambda m: m.update(licence="x" * 501)), "licence: String should have at most"),
    "epsilon without a mechanism": (
        lambda f: stated(f, lambda m: m["privacy"].update(epsilon=1.0)),
        "mechanism none has no epsilon",
    ),
    "a field twice": (
        lambda f: sign(f, (f / "manifest.json").read_bytes()[:-1] + b',"site":"north"}', "north"),
        "'site' is there twice",
    ),
    "no number": (
        lambda f: sign(f, (f / "manifest.json").read_bytes().replace(b'"lr":0.05', b'"lr":NaN'), "north"),
        "NaN is no number",
    ),
    "too large a number": (
        lambda f: sign(f, (f / "manifest.json").read_bytes().replace(b'"lr":0.05', b'"lr":1e999'), "north"),
        "training.lr: Input should be a finite number",
    ),
    "large manifest": (lambda f: (f / "manifest.json").write_bytes(b" " * 2**19), "at most 262144 are read"),
    # Files of tensors
    "oversized header": (lambda f: content(f, V, OVERSIZED), "has 5242888 bytes; at most"),
    "header said to be huge": (
        lambda f: content(f, V, struct.pack("<Q", 2**40) + b"{" + bytes(99)),
        "its header is said to have 1099511627776 bytes; at most",
    ),
    "pickle": (lambda f: content(f, V, pickle.dumps({"a": 1})), "is a Python pickle, which could run code"),
    "torch file": (lambda f: (torch.save([1], f / V), forge(f)), "zip archive, as torch.save writes it"),
    "nan": (lambda f: put(f, **{"head.bias": torch.full((3,), float("nan"))}), "'head.bias' holds NaN or infinite"),
    "infinity": (
        lambda f: put(f, **{"head.bias": torch.tensor([0, 0, -float("inf")])}),
        "'head.bias' holds NaN or inf",
    ),
    "shape": (lambda f: put(f, **{"head.bias": torch.ones(3, 1)}), r"'head.bias' has shape \(3, 1\); \(3,\) is right"),
    "dtype": (lambda f: put(f, **{"head.bias": torch.ones(3).double()}), "is float64; the file must be float32 or bfl"),
    "half": (lambda f: put(f, **{"head.bias": torch.ones(3).half()}), "is float16; the file must be float32 or bfloat"),
    "two dtypes": (lambda f: put(f, **{"head.bias": torch.ones(3).bfloat16()}), "the file must be float32 or bfloat16"),
    "integers": (lambda f: put(f, **{"head.bias": torch.ones(3).long()}), "'head.bias' has dtype 'I64'"),
    "unknown name": (lambda f: put(f, x=torch.ones(1)), "tensor 'x' is unknown to the base"),
    "statistics in the vector": (
        lambda f: put(f, **{"blocks.1.running_mean": torch.ones(2)}),
        "'blocks.1.running_mean' is unknown to the base",
    ),
    "path in a name": (lambda f: put(f, **{"../../x": torch.ones(1)}), "no plain name of a tensor"),
    "missing name": (lambda f: drop(f, "head.bias"), "tensor 'head.bias' is missing"),
    # Tricks with paths
    "path in the manifest": (
        lambda f: stated(f, lambda m: m["files"][0].update(name="../fisher.safetensors")),
        "'../fisher.safetensors' is no file of a contribution",
    ),
    "absolute path": (
        lambda f: stated(f, lambda m: m["files"][0].update(name="/etc/passwd")),
        "'/etc/passwd' is no file of a contribution",
    ),
    "file twice": (
        lambda f: stated(f, lambda m: m["files"].__setitem__(1, m["files"][0])),
        "files must be sorted by name",
    ),
    "extra file": (lambda f: (f / "notes.txt").touch(), "holds 'notes.txt'; only fisher.safetensors"),
    "hidden file": (lambda f: (f / ".x").touch(), "holds '.x'; only"),
    "subfolder": (lambda f: (f / "x").mkdir(), "holds 'x'; only"),
    "folder for a file": (lambda f: ((f / V).unlink(), (f / V).mkdir()), "vector.safetensors is no regular file"),
    "pipe for a file": (lambda f: ((f / V).unlink(), os.mkfifo(f / V)), "vector.safetensors is no regular file"),
    "link to a file": (lambda f: linked(f / V), "vector.safetensors is a link"),
    "link to the manifest": (lambda f: linked(f / "manifest.json"), "manifest.json is a link"),
    "link to the folder": (lambda f: linked(f), "is a link. Give the folder itself"),
    "file that is not named": (
        lambda f: stated(f, lambda m: m["files"].pop()),
        "vector.safetensors is not in the manifest",
    ),
    "file that is missing": (lambda f: (f / V).unlink(), "vector.safetensors is missing"),
    "statistics not said": (
        lambda f: stated(f, lambda m: m["statistics"].update(included=False)),
        "statistics.included must say whether",
    ),
}


def respelled(signature_file: bytes) -> str:
    text: str = json.loads(signature_file)["signature"]
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    assert text.endswith("==")
    other = text[:-3] + alphabet[alphabet.index(text[-3]) + 1] + "=="
    assert base64.b64decode(other) == base64.b64decode(text)
    return other


def sigs(folder: Path, site: str) -> bytes:
    """The signature's file, had this site signed."""
    before = (folder / "signature.json").read_bytes()
    signed(folder, site)
    found = (folder / "signature.json").read_bytes()
    (folder / "signature.json").write_bytes(before)
    return found


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_with_its_reason(case: str, base: Base, sent: Path) -> None:
    damage, message = REFUSALS[case]
    damage(sent)
    with pytest.raises(ContributionError, match=message) as refusal:
        Contribution.load(sent, base, roster((*SITES,)))
    assert sent.name in str(refusal.value)


def test_a_forged_contribution_without_a_fault_would_be_read(base: Base, sent: Path) -> None:
    """Else the cases above could be refused for the forging alone."""
    before = tree(sent)
    forge(sent)
    assert tree(sent) == before
    put(sent, **{"head.bias": torch.ones(3)})
    assert Contribution.load(sent, base, roster()).read("vector", "head.bias").tolist() == [1, 1, 1]


def test_every_changed_byte_is_found(base: Base, tmp_path: Path) -> None:
    contribute(tmp_path / "sent", base)
    before = Contribution.load(tmp_path / "sent", base, roster()).digest

    @given(st.data())
    @settings(max_examples=150, deadline=None)
    def change_one(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(["manifest.json", "signature.json", V]))
        path = tmp_path / "sent" / name
        whole = path.read_bytes()
        at = data.draw(st.integers(0, len(whole) - 1))
        other = data.draw(st.integers(0, 255).filter(lambda value: value != whole[at]))
        path.write_bytes(whole[:at] + bytes([other]) + whole[at + 1 :])
        try:
            with pytest.raises(ContributionError):
                Contribution.load(tmp_path / "sent", base, roster())
        finally:
            path.write_bytes(whole)

    change_one()
    assert Contribution.load(tmp_path / "sent", base, roster()).digest == before


def test_without_contents_only_headers_are_read_and_verify_files_finds_the_rest(base: Base, sent: Path) -> None:
    flip(sent / V, -1)
    found = Contribution.load(sent, base, roster(), contents=False)
    with pytest.raises(ContributionError, match=r"vector.safetensors was altered"):
        found.verify_files()


def test_a_file_changed_after_the_check_is_noticed(base: Base, sent: Path) -> None:
    found = Contribution.load(sent, base, roster())
    flip(sent / V, -1)
    with pytest.raises(ContributionError, match="has changed since it was checked"):
        found.read("vector", "head.bias")
    with pytest.raises(ContributionError, match="has changed since it was checked"):
        found.verify_files()


LADDER = [0, 10, 15, 22, 33, 47, 68, 100, 150, 220, 330, 470, 680, 1000, 1500, 2200, 3300, 4700, 6800, 10_000]


def test_counts_are_rounded_to_six_a_decade() -> None:
    assert sorted({binned(n) for n in range(12_000)}) == LADDER
    assert [binned(n) for n in (0, 1, 9, 12, 13, 18, 19, 83, 116, 122, 123)] == [
        *(0, 10, 10, 10, 15, 15, 22, 100, 100, 100, 150),
    ]
    for bad in (-1, 10**9 + 1):
        with pytest.raises(ValueError, match="a count must be"):
            binned(bad)


@given(st.integers(1, 10**9), st.integers(1, 10**9))
def test_rounding_keeps_order_and_is_near(one: int, two: int) -> None:
    assert binned(binned(one)) == binned(one)
    if one <= two:
        assert binned(one) <= binned(two)
    if one >= 10:
        assert 0.8 < binned(one) / one < 1.25


TEXT = st.text(max_size=20)


@given(TEXT, TEXT, st.floats(0, 1e6), st.integers(1, 10**9), st.lists(TEXT.filter(bool), max_size=3))
def test_the_canonical_form_is_read_back(
    licence: str, dates: str, lr: float, sequence: int, devices: list[str]
) -> None:
    data = Data(images=10, classes_held=["é"], patient_split=True, dates=dates, devices=devices)
    base_statement = statement(sequence).model_copy(update={"licence": licence, "data": data})
    raw = base_statement.model_dump(mode="json", by_alias=True)
    raw["training"]["lr"] = lr
    raw.update(
        schema="polyclinic-contribution/1",
        site="north",
        base={"id": "b", "sha256": "0" * 64, "model": "m", "version": "1"},
        classes=["é", "|\n"],
        preprocessing="1" * 64,
        files=[{"name": V, "sha256": "2" * 64, "bytes": 5}],
        statistics={"included": False, "policy": "batch"},
    )
    content = canonical_json(raw)
    found = parse_manifest(content, "here")
    assert canonical(found) == content
    assert found.training.lr == lr


@given(st.binary(max_size=100) | st.text(max_size=100).map(str.encode))
def test_random_manifests_are_refused(content: bytes) -> None:
    with pytest.raises(ContributionError):
        parse_manifest(content, "here")


def test_a_privacy_statement_is_whole() -> None:
    parts: dict[str, Any] = {
        "epsilon": 2,
        "delta": 1e-5,
        "clip": 1,
        "noise": 1.1,
        "accountant": "rdp",
        "unit": "patient",
    }
    Privacy(mechanism="dp-sgd", **parts)
    for name in parts:
        with pytest.raises(ValueError, match=f"mechanism dp-sgd needs {name}"):
            Privacy(mechanism="dp-sgd", **{key: value for key, value in parts.items() if key != name})
    audit = {"attack": "loss", "auc": 0.5, "low": 0.4, "high": 0.6, "tpr": 0.1, "fpr": 0.1, "limit": 0.6}
    made = Membership.model_validate({**audit, "members": 100, "nonmembers": 90, "passed": True})
    assert Privacy(membership=made).membership == made
