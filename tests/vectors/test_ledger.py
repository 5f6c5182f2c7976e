"""The ledger: what comes in, what goes out, what is refused without a trace, and what verifying finds."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hospitals import contribute, forge, identity, ledger_with, roster, small_base, tree, vector

from polyclinic.errors import ContributionError
from polyclinic.secure.identity import Identity
from polyclinic.secure.key_files import from_base64, to_base64
from polyclinic.vectors import chain
from polyclinic.vectors import ledger as ledger_module
from polyclinic.vectors.base import Base
from polyclinic.vectors.folders import canonical_json
from polyclinic.vectors.ledger import Ledger

COORDINATOR = identity("coordinator")
STRANGER = identity("stranger")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return small_base(tmp_path_factory.mktemp("base") / "base")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "chain.jsonl").read_bytes().splitlines()]


def test_a_new_ledger(base: Base, tmp_path: Path) -> None:
    ledger = ledger_with(tmp_path / "ledger", base)
    assert sorted(p.name for p in ledger.folder.iterdir()) == [
        *("base", "chain.jsonl", "contributions", "ledger.json", "roster.json"),
    ]
    assert (ledger.entries, ledger.contributions, ledger.decisions, ledger.releases) == ([], (), {}, ())
    assert ledger.head == hashlib.sha256((tmp_path / "ledger" / "ledger.json").read_bytes()).hexdigest()
    assert ledger.roster == roster()
    assert ledger.verify()[0] == f"base tiny 1: values match digest {base.digest[:12]}"
    with pytest.raises(ContributionError, match="is there already"):
        Ledger.create(tmp_path / "ledger", base.folder, COORDINATOR, roster())


def test_contributions_are_copied_and_kept_by_digest(base: Base, tmp_path: Path) -> None:
    ledger = ledger_with(tmp_path / "ledger", base, ["west", "north", "south"])
    found = ledger.contributions
    assert [c.digest for c in found] == sorted(c.digest for c in found)
    assert {c.site for c in found} == {"north", "south", "west"}
    for one in found:
        assert tree(one.folder) == tree(tmp_path / f"from-{one.site}")
        assert one.folder == tmp_path / "ledger" / "contributions" / one.digest
        one.verify_files()
    shutil.rmtree(tmp_path / "from-north")
    again = Ledger.open(tmp_path / "ledger")
    assert again.contributions == found
    assert again.head == ledger.head
    done = "\n".join(again.verify(ledger.head))
    assert "chain: 3 entries, each signed by coordinator and linked" in done
    assert done.count("signature, files and values") == 3
    assert f"head {ledger.head[:12]} is entry 3 of 3" in done


def test_every_line_names_the_one_before_and_is_signed(base: Base, tmp_path: Path) -> None:
    ledger = ledger_with(tmp_path / "ledger", base, ["west", "north"])
    ledger.remove(ledger.contributions[0].digest, "asked to", COORDINATOR)
    before = hashlib.sha256((ledger.folder / "ledger.json").read_bytes()).hexdigest()
    for number, line in enumerate((ledger.folder / "chain.jsonl").read_bytes().splitlines()):
        entry = json.loads(line)
        assert (entry["index"], entry["previous"]) == (number, before)
        signature = from_base64(entry.pop("signature"), "")
        message = b"polyclinic ledger 1\0" + json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()
        assert COORDINATOR.sign(message) == signature
        before = hashlib.sha256(line).hexdigest()
    assert ledger.head == before


def test_what_is_removed_is_gone_but_for_its_evidence(base: Base, tmp_path: Path) -> None:
    ledger = ledger_with(tmp_path / "ledger", base, ["west", "north"])
    west = next(c for c in ledger.contributions if c.site == "west")
    ledger.hold(west.digest, "odd", COORDINATOR)
    assert ledger.decisions == {west.digest: "hold"}
    ledger.remove(west.digest[:8], "the ethics vote ended", COORDINATOR)
    assert [c.site for c in ledger.contributions] == ["north"]
    assert ledger.decisions == {}
    assert sorted(p.name for p in west.folder.iterdir()) == ["manifest.json", "signature.json"]
    assert any("gone; manifest and signature" in line for line in ledger.verify())
    assert lines(ledger.folder)[-1]["reason"] == "the ethics vote ended"
    with pytest.raises(ContributionError, match="is no longer in the ledger: the ethics vote ended"):
        ledger.remove(west.digest, "again", COORDINATOR)
    with pytest.raises(ContributionError, match="was revoked"):
        ledger.add(tmp_path / "from-west", COORDINATOR)


def test_a_site_replaces_its_own(base: Base, tmp_path: Path) -> None:
    ledger = ledger_with(tmp_path / "ledger", base, ["north", "south"])
    old = next(c for c in ledger.contributions if c.site == "north")
    contribute(tmp_path / "new", base, sequence=2, replaces=[old.digest])
    new = ledger.add(tmp_path / "new", COORDINATOR)
    assert {c.digest for c in ledger.contributions if c.site == "north"} == {new.digest}
    assert not (old.folder / "vector.safetensors").exists()
    assert len(ledger.entries) == 3
    with pytest.raises(ContributionError, match=f"was revoked .replaced by {new.digest[:12]}.; it can't come back"):
        ledger.add(tmp_path / "from-north", COORDINATOR)
    ledger.verify()


def test_a_person_decides(base: Base, tmp_path: Path) -> None:
    ledger = ledger_with(tmp_path / "ledger", base, ["north", "south"])
    one, two = (c.digest for c in ledger.contributions)
    ledger.hold(one, "an outlier", COORDINATOR)
    ledger.accept(two, "looked at", COORDINATOR)
    assert Ledger.open(ledger.folder).decisions == {one: "hold", two: "accept"}
    with pytest.raises(ContributionError, match="is held back: accept it before a release, or leave it out"):
        ledger.record_release("1" * 64, "2" * 64, [one, two], COORDINATOR)
    ledger.accept(one, "a rare disease", COORDINATOR)
    assert ledger.decisions == {one: "accept", two: "accept"}
    ledger.record_release("1" * 64, "2" * 64, [one, two], COORDINATOR)
    with pytest.raises(ContributionError, match="0 contributions of the ledger begin with '123456'"):
        ledger.accept("123456", "", COORDINATOR)
    with pytest.raises(ContributionError, match="is too short"):
        ledger.accept(one[:5], "", COORDINATOR)


def test_a_release_with_something_that_has_gone_is_stale(base: Base, tmp_path: Path) -> None:
    ledger = ledger_with(tmp_path / "ledger", base, ["north", "south"])
    one, two = (c.digest for c in ledger.contributions)
    first = ledger.record_release("1" * 64, "2" * 64, [one, two], COORDINATOR)
    ledger.record_release("3" * 64, "4" * 64, [two], COORDINATOR)
    assert (first.model, first.recipe, first.contributions, first.stale) == ("1" * 64, "2" * 64, (one, two), False)
    ledger.remove(one, "left", COORDINATOR)
    found = Ledger.open(ledger.folder).releases
    assert [(r.stale, r.removed) for r in found] == [(True, (one,)), (False, ())]
    for digests, message in (
        ([one, two], "is no longer in the ledger: left"),
        ([], "one at least"),
        (["0" * 64], "there is no contribution 000000000000"),
        ([two, two], "sorted by digest, each once"),
    ):
        with pytest.raises(ContributionError, match=message):
            ledger.record_release("1" * 64, "2" * 64, digests, COORDINATOR)
    with pytest.raises(ContributionError, match="model: String should match"):
        ledger.record_release("x", "2" * 64, [two], COORDINATOR)


def test_a_site_joins_later(base: Base, tmp_path: Path) -> None:
    ledger = ledger_with(tmp_path / "ledger", base)
    contribute(tmp_path / "east", base, "east")
    with pytest.raises(ContributionError, match="site 'east' is not on the roster"):
        ledger.add(tmp_path / "east", COORDINATOR)
    ledger.join("east", identity("east").public, COORDINATOR)
    ledger.add(tmp_path / "east", COORDINATOR)
    again = Ledger.open(ledger.folder)
    assert set(again.roster.keys) == {"north", "south", "west", "east"}
    assert [c.site for c in again.contributions] == ["east"]
    again.verify()
    for site, key, message in (
        ("east", identity("x").public, "is on the ledger's roster already"),
        ("far", identity("east").public, "one key for 'east' and 'far'"),
        ("far", b"short", "Ed25519 keys have 32"),
        ("../far", identity("far").public, "is not a valid name"),
    ):
        with pytest.raises(ContributionError, match=message):
            ledger.join(site, key, COORDINATOR)


def test_the_order_of_arrival_leaves_the_same_contributions(base: Base, tmp_path: Path) -> None:
    ways = {
        "one": ledger_with(tmp_path / "one" / "ledger", base, ["north", "south", "west"]),
        "two": ledger_with(tmp_path / "two" / "ledger", base, ["west", "north", "south"]),
        "three": ledger_with(tmp_path / "three" / "ledger", base, ["north", "west", "south"]),
    }
    found = {name: [tree(c.folder) for c in ledger.contributions] for name, ledger in ways.items()}
    assert found["one"] == found["two"] == found["three"]
    # Join, then leave: what a merge reads is what it would read had the site never come.
    west = next(c.digest for c in ways["one"].contributions if c.site == "west")
    ways["one"].remove(west, "left", COORDINATOR)
    never = ledger_with(tmp_path / "never" / "ledger", base, ["south", "north"])
    assert [tree(c.folder) for c in ways["one"].contributions] == [tree(c.folder) for c in never.contributions]
    assert [c.digest for c in ways["one"].contributions] == [c.digest for c in never.contributions]


Send = Callable[[Path, Base, Ledger], Path]


def again(folder: Path, base: Base, ledger: Ledger) -> Path:
    return folder / "from-north"


def lower(folder: Path, base: Base, ledger: Ledger) -> Path:
    old = next(c.digest for c in ledger.contributions if c.site == "north")
    contribute(folder / "five", base, sequence=5, replaces=[old])
    new = ledger.add(folder / "five", COORDINATOR)
    contribute(folder / "new", base, sequence=4, replaces=[new.digest])
    return folder / "new"


def same_sequence(folder: Path, base: Base, ledger: Ledger) -> Path:
    old = next(c.digest for c in ledger.contributions if c.site == "north")
    contribute(folder / "new", base, sequence=1, replaces=[old], seed=99)
    return folder / "new"


def replay_after_removal(folder: Path, base: Base, ledger: Ledger) -> Path:
    ledger.remove(next(c.digest for c in ledger.contributions if c.site == "north"), "left", COORDINATOR)
    contribute(folder / "new", base, sequence=1, seed=99)
    return folder / "new"


def removed(folder: Path, base: Base, ledger: Ledger) -> Path:
    ledger.remove(next(c.digest for c in ledger.contributions if c.site == "north"), "left", COORDINATOR)
    return folder / "from-north"


def second(folder: Path, base: Base, ledger: Ledger) -> Path:
    contribute(folder / "new", base, sequence=2)
    return folder / "new"


def anothers(folder: Path, base: Base, ledger: Ledger) -> Path:
    south = next(c.digest for c in ledger.contributions if c.site == "south")
    contribute(folder / "new", base, "west", replaces=[south])
    return folder / "new"


def unknown(folder: Path, base: Base, ledger: Ledger) -> Path:
    contribute(folder / "new", base, "west", replaces=["0" * 64])
    return folder / "new"


def stranger(folder: Path, base: Base, ledger: Ledger) -> Path:
    contribute(folder / "new", base, "east")
    return folder / "new"


def other_base(folder: Path, base: Base, ledger: Ledger) -> Path:
    contribute(folder / "new", small_base(folder / "other", seed=5), "west")
    return folder / "new"


def other_order(folder: Path, base: Base, ledger: Ledger) -> Path:
    contribute(folder / "new", base, "west")
    forge(folder / "new", "west", lambda manifest: manifest["classes"].reverse())
    return folder / "new"


def tampered(folder: Path, base: Base, ledger: Ledger) -> Path:
    contribute(folder / "new", base, "west")
    path = folder / "new" / "vector.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    return folder / "new"


def pickled(folder: Path, base: Base, ledger: Ledger) -> Path:
    contribute(folder / "new", base, "west")
    torch.save(vector(base), folder / "new" / "vector.safetensors", _use_new_zipfile_serialization=False)
    forge(folder / "new", "west")
    return folder / "new"


def nan(folder: Path, base: Base, ledger: Ledger) -> Path:
    contribute(folder / "new", base, "west")
    path = folder / "new" / "vector.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")
    forge(folder / "new", "west")
    return folder / "new"


def linked(folder: Path, base: Base, ledger: Ledger) -> Path:
    contribute(folder / "new", base, "west")
    (folder / "new" / "head.safetensors").symlink_to("/etc/passwd")
    return folder / "new"


@pytest.mark.parametrize(
    ("send", "message"),
    [
        (again, "is a duplicate: it is in the ledger already"),
        (lower, "has sequence 4, but 5 was seen: a replay"),
        (same_sequence, "has sequence 1, but 1 was seen: a replay"),
        (replay_after_removal, "has sequence 1, but 1 was seen: a replay"),
        (removed, "was revoked .left.; it can't come back"),
        (second, "site 'north' has contribution .* does not name it in 'replaces'"),
        (anothers, "of site 'west' replaces .* which belongs to site 'south'"),
        (unknown, "replaces 000000000000, which is unknown"),
        (stranger, "site 'east' is not on the roster"),
        (other_base, "starts from another base"),
        (other_order, "its classes are in another order"),
        (tampered, "was altered: its SHA-256"),
        (pickled, "is a Python pickle"),
        (nan, "NaN or infinite"),
        (linked, "is a link"),
    ],
)
def test_refused_and_the_ledger_unchanged_byte_for_byte(send: Send, message: str, base: Base, tmp_path: Path) -> None:
    ledger = ledger_with(tmp_path / "ledger", base, ["north", "south"])
    folder = send(tmp_path, base, ledger)
    before, head, sites = tree(ledger.folder), ledger.head, [c.site for c in ledger.contributions]
    with pytest.raises(ContributionError, match=message):
        ledger.add(folder, COORDINATOR)
    assert tree(ledger.folder) == before
    assert (ledger.head, [c.site for c in ledger.contributions]) == (head, sites)
    ledger.verify(head)
    if "west" in (contribution := {c.site for c in ledger.contributions}):
        pytest.fail(f"refused, yet among {contribution}")
    # It still takes good ones.
    contribute(tmp_path / "good", base, "west", sequence=9)
    ledger.add(tmp_path / "good", COORDINATOR)


def test_what_is_exchanged_while_it_is_copied_is_checked_again(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = ledger_with(tmp_path / "ledger", base, ["north"])
    contribute(tmp_path / "new", base, "west")
    before, stage = tree(ledger.folder), Ledger._stage

    def exchanged(self: Ledger, folder: Path, *more: Any) -> Any:
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "from-north", folder)
        return stage(self, folder, *more)

    monkeypatch.setattr(Ledger, "_stage", exchanged)
    with pytest.raises(ContributionError, match="is a duplicate"):
        ledger.add(tmp_path / "new", COORDINATOR)
    assert tree(ledger.folder) == before


def test_only_the_coordinator_writes(base: Base, tmp_path: Path) -> None:
    ledger = ledger_with(tmp_path / "ledger", base, ["north"])
    digest = ledger.contributions[0].digest
    contribute(tmp_path / "new", base, "south")
    before = tree(ledger.folder)
    for other in (identity("north"), Identity.new("coordinator")):
        for call in (
            lambda who: ledger.add(tmp_path / "new", who),
            lambda who: ledger.remove(digest, "", who),
            lambda who: ledger.hold(digest, "", who),
            lambda who: ledger.record_release("1" * 64, "2" * 64, [digest], who),
            lambda who: ledger.join("east", identity("east").public, who),
        ):
            with pytest.raises(ContributionError, match="is signed by 'coordinator'"):
                call(other)
    assert tree(ledger.folder) == before


def test_a_ledger_is_full(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "MOST_ACTIVE", 2)
    ledger = ledger_with(tmp_path / "ledger", base, ["north", "south"])
    contribute(tmp_path / "new", base, "west")
    with pytest.raises(ContributionError, match="holds 2 contributions; 2 are the most"):
        ledger.add(tmp_path / "new", COORDINATOR)
    old = next(c.digest for c in ledger.contributions if c.site == "north")
    contribute(tmp_path / "two", base, "north", sequence=2, replaces=[old])
    ledger.add(tmp_path / "two", COORDINATOR)
    with pytest.raises(ContributionError, match="reason: String should have at most 500"):
        ledger.remove(ledger.contributions[0].digest, "x" * 501, COORDINATOR)


def test_two_writers_take_turns(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = ledger_with(tmp_path / "ledger", base, ["north"])
    two = Ledger.open(one.folder)
    contribute(tmp_path / "new", base, "south")
    two.add(tmp_path / "new", COORDINATOR)
    one.hold(one.contributions[0].digest, "", COORDINATOR)  # sees what the other wrote
    assert [entry.index for entry in Ledger.open(one.folder).entries] == [0, 1, 2]
    monkeypatch.setattr(ledger_module, "PATIENCE_S", 0.1)
    held = os.open(one.folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(ContributionError, match="another process is writing"):
        two.accept(two.contributions[0].digest, "", COORDINATOR)
    os.close(held)
    two.accept(two.contributions[0].digest, "", COORDINATOR)


def test_a_full_disk_leaves_the_ledger_as_it_was(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = ledger_with(tmp_path / "ledger", base, ["north"])
    contribute(tmp_path / "new", base, "south")
    before = tree(ledger.folder)

    def full(path: Path, content: bytes) -> None:
        raise ContributionError(f"{path} can't be written: No space left on device.")

    monkeypatch.setattr(ledger_module, "write_whole", full)
    with pytest.raises(ContributionError, match="No space left"):
        ledger.add(tmp_path / "new", COORDINATOR)
    assert tree(ledger.folder) == before
    assert [c.site for c in ledger.contributions] == ["north"]
    monkeypatch.undo()
    ledger.add(tmp_path / "new", COORDINATOR)
    ledger.verify()


def reseal(folder: Path, number: int, who: Identity, **fields: Any) -> None:
    """Change an entry and sign it."""
    found = lines(folder)
    own = {name: value for name, value in {**found[number], **fields}.items() if name != "signature"}
    found[number] = {
        **own,
        "signature": to_base64(who.sign(b"polyclinic ledger 1\0" + canonical_json(own))),
    }
    (folder / "chain.jsonl").write_bytes(b"".join(canonical_json(entry) + b"\n" for entry in found))


def rewrite(folder: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    found = (folder / "chain.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "chain.jsonl").write_bytes(b"".join(change(found)))


def inside(folder: Path) -> Path:
    """The folder of some active contribution."""
    gone = {entry["contribution"] for entry in lines(folder) if entry["event"] == "remove"}
    return next(p for p in sorted((folder / "contributions").iterdir()) if p.name not in gone)


def removed_one(folder: Path) -> Path:
    return folder / "contributions" / next(e["contribution"] for e in lines(folder) if e["event"] == "remove")


def swap(folder: Path) -> None:
    one, two = (p for p in (folder / "contributions").iterdir() if p.name != removed_one(folder).name)
    one.rename(folder / "x")
    two.rename(one)
    (folder / "x").rename(two)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: rewrite(f, lambda found: found[1:]), "says that it is entry 1: entries were taken out or moved"),
        (lambda f: rewrite(f, lambda found: [found[0], *found[2:]]), "entry 1 says that it is entry 2"),
        (lambda f: rewrite(f, lambda found: [found[1], found[0], *found[2:]]), "entry 0 says that it is entry 1"),
        (lambda f: rewrite(f, lambda found: [*found, found[-1]]), "entry 4 says that it is entry 3"),
        (lambda f: rewrite(f, lambda found: [*found[:-1], found[-1][:-1]]), "was cut short"),
        (
            lambda f: rewrite(f, lambda found: [found[0].replace(b'"sequence":1', b'"sequence":2'), *found[1:]]),
            "entry 0",
        ),
        (lambda f: rewrite(f, lambda found: [b" " + found[0], *found[1:]]), "not in the canonical form"),
        (lambda f: rewrite(f, lambda found: [b"{}\n"]), "entry 0"),
        (lambda f: rewrite(f, lambda found: [b" " * 70_000 + b"\n"]), "has 70000 bytes; at most 65536"),
        (lambda f: reseal(f, 3, STRANGER, reason="other"), "entry 3 is not signed by the ledger's coordinator"),
        (lambda f: reseal(f, 0, STRANGER, sequence=7), "entry 0 is not signed"),
        (lambda f: (f / "roster.json").write_text((f / "roster.json").read_text() + " "), "roster.json was altered"),
        (
            lambda f: (f / "ledger.json").write_text((f / "ledger.json").read_text() + " "),
            "does not follow from the one",
        ),
        (lambda f: shutil.rmtree(f / "base"), "is no folder"),
        (lambda f: (f / "notes").touch(), "notes does not belong into a ledger"),
        (lambda f: (f / "contributions" / "notes").touch(), "notes does not belong into a ledger"),
        (lambda f: (f / "contributions" / ("0" * 64)).touch(), "does not belong into a ledger"),
        (lambda f: shutil.rmtree(inside(f)), "is no folder"),
        (lambda f: (inside(f) / "vector.safetensors").unlink(), "vector.safetensors is missing"),
        (lambda f: (inside(f) / "notes").touch(), "holds 'notes'; only"),
        (lambda f: flip(inside(f) / "vector.safetensors"), "was altered: its SHA-256"),
        (lambda f: flip(inside(f) / "manifest.json"), "the signature of site .* is wrong"),
        (lambda f: flip(inside(f) / "signature.json"), "signature.json"),
        (lambda f: flip(removed_one(f) / "manifest.json"), "the signature of site .* is wrong"),
        (lambda f: shutil.rmtree(removed_one(f)), "is no folder"),
        (swap, "holds another contribution"),
        (lambda f: link(inside(f)), "is a link"),
    ],
)
def test_verify_finds(damage: Callable[[Path], None], message: str, base: Base, tmp_path: Path) -> None:
    ledger = ledger_with(tmp_path / "ledger", base, ["north", "south", "west"])
    ledger.remove(ledger.contributions[1].digest, "left", COORDINATOR)
    Ledger.open(ledger.folder).verify()
    damage(ledger.folder)
    with pytest.raises(ContributionError, match=message):
        ledger.verify()


def flip(path: Path) -> None:
    found = bytearray(path.read_bytes())
    found[-5] ^= 1
    path.write_bytes(found)


def link(path: Path) -> None:
    away = path.parent.parent.parent / "away"
    path.rename(away)
    path.symlink_to(away)


def test_a_ledger_that_was_put_back_is_found_by_its_head(base: Base, tmp_path: Path) -> None:
    ledger = ledger_with(tmp_path / "ledger", base, ["north"])
    early = ledger.head
    shutil.copytree(ledger.folder, tmp_path / "backup")
    ledger.remove(ledger.contributions[0].digest, "left", COORDINATOR)
    late = ledger.head
    assert f"head {early[:12]} is entry 1 of 2" in ledger.verify(early)
    back = Ledger.open(tmp_path / "backup")
    assert any("can't be seen" in line for line in back.verify())
    with pytest.raises(ContributionError, match="cut short, put back to an older state, or is another one"):
        back.verify(late)


def test_the_chain_must_say_what_the_manifest_says(base: Base, tmp_path: Path) -> None:
    ledger = ledger_with(tmp_path / "ledger", base, ["north"])
    reseal(ledger.folder, 0, COORDINATOR, sequence=7)  # the coordinator's own lie
    with pytest.raises(ContributionError, match="entry 0 of the chain has another site, sequence or replaces"):
        ledger.verify()


def test_a_chain_that_is_full(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = ledger_with(tmp_path / "ledger", base, ["north"])
    before = tree(ledger.folder)
    monkeypatch.setattr(ledger_module, "LARGEST_CHAIN", len(before["chain.jsonl"]) + 100)
    with pytest.raises(ContributionError, match="is full"):
        ledger.remove(ledger.contributions[0].digest, "left", COORDINATOR)
    assert tree(ledger.folder) == before
    assert len(ledger.contributions) == 1


def test_a_chain_of_another_ledger_is_refused(base: Base, tmp_path: Path) -> None:
    one = ledger_with(tmp_path / "one" / "ledger", base, ["north"])
    (tmp_path / "two").mkdir()
    two = Ledger.create(tmp_path / "two" / "ledger", base.folder, COORDINATOR, roster(["north", "south"]))
    shutil.copy(one.folder / "chain.jsonl", two.folder / "chain.jsonl")
    with pytest.raises(ContributionError, match="entry 0 does not follow"):
        Ledger.open(two.folder)
