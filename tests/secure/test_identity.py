"""Keys, rosters and pair secrets: what they accept, what they refuse, what they never show."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from polyclinic.errors import DataError, ProtocolError, SiteError
from polyclinic.secure import identity
from polyclinic.secure.identity import (
    Credentials,
    Identity,
    Roster,
    ask_passphrase,
    ephemeral_credentials,
    fingerprint,
    key_path,
    load_credentials,
    public_path,
    read_public,
)
from polyclinic.secure.pair_secrets import new_pair_secret, pair_path, read_pair_secret

PASSPHRASE = "correct horse battery"

# RFC 8032 section 7.1, tests 1 to 3: private key, public key, message, signature.
RFC_8032 = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
        "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
]


@pytest.fixture(autouse=True)
def _no_passphrase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POLYCLINIC_PASSPHRASE", raising=False)


@pytest.mark.parametrize(("private", "public", "message", "signature"), RFC_8032)
def test_ed25519_rfc_8032_7_1(private: str, public: str, message: str, signature: str) -> None:
    own = Identity("north", Ed25519PrivateKey.from_private_bytes(bytes.fromhex(private)))
    said, signed = bytes.fromhex(message), bytes.fromhex(signature)
    assert own.public == bytes.fromhex(public)
    assert own.sign(said) == signed
    roster = Roster({"north": bytes.fromhex(public)})
    roster.verify("north", said, signed)
    altered = [(said + b"\0", signed), (said, b""), (said, signed[:-1])]
    altered += [(said, bytes([*signed[:at], signed[at] ^ 1, *signed[at + 1 :]])) for at in (0, 31, 32, 63)]
    for text, signature_ in altered:
        with pytest.raises(ProtocolError, match="signature of site 'north' is wrong"):
            roster.verify("north", text, signature_)


def test_a_signature_is_of_one_site_only() -> None:
    here = ephemeral_credentials(["a", "b", "c"])
    signature = here["a"].identity.sign(b"hello")
    roster = here["c"].roster
    roster.verify("a", b"hello", signature)
    with pytest.raises(ProtocolError, match="signature of site 'b' is wrong"):
        roster.verify("b", b"hello", signature)
    with pytest.raises(ProtocolError, match="site 'd' is not on the roster"):
        roster.verify("d", b"hello", signature)
    stranger = Identity.new("a")
    with pytest.raises(ProtocolError, match="signature of site 'a' is wrong"):
        roster.verify("a", b"hello", stranger.sign(b"hello"))


def test_ephemeral_keys_are_fresh_and_on_one_roster() -> None:
    one, two = ephemeral_credentials(["a", "b"]), ephemeral_credentials(["a", "b"])
    assert one["a"].roster == one["b"].roster
    assert one["a"].roster.keys == {name: c.identity.public for name, c in one.items()}
    assert len({c.identity.public for here in (one, two) for c in here.values()}) == 4
    assert one["a"].pair_secrets == {}


def test_a_fingerprint_is_of_the_name_and_the_key() -> None:
    key = bytes(range(32))
    digest = hashlib.sha256(b"polyclinic key 1\0\x05north" + key).hexdigest()
    wanted = fingerprint("north", key)
    assert wanted.replace(" ", "") == digest[:40]
    assert [len(group) for group in wanted.split(" ")] == [4] * 10
    assert fingerprint("south", key) != wanted
    assert fingerprint("north", bytes(32)) != wanted


def test_a_rosters_digest_is_of_the_named_sites_only() -> None:
    keys = {"b": b"B" * 32, "a": b"A" * 32, "cc": b"C" * 32}
    roster = Roster(keys)
    wanted = hashlib.sha256(b"polyclinic roster 1\0" + b"\x01a" + b"A" * 32 + b"\x02cc" + b"C" * 32).hexdigest()
    assert roster.digest(["cc", "a"]) == roster.digest(["a", "cc"]) == wanted
    assert roster.digest(["a", "b"]) != wanted
    assert Roster({**keys, "a": b"X" * 32}).digest(["a", "cc"]) != wanted
    assert Roster({**keys, "b": b"X" * 32}).digest(["a", "cc"]) == wanted
    with pytest.raises(ProtocolError, match=r"site 'aa' is not on the roster.*keys trust"):
        roster.digest(["a", "aa"])


def test_a_roster_keeps_what_it_was_given() -> None:
    keys = {"a": b"A" * 32}
    roster = Roster(keys)
    keys["a"] = b"X" * 32
    assert roster.keys["a"] == b"A" * 32
    with pytest.raises(TypeError):
        roster.keys["a"] = b"X" * 32  # type: ignore[index]


def test_a_pinned_key_does_not_change() -> None:
    empty = Roster({})
    roster = empty.trust("a", b"A" * 32)
    assert empty.keys == {}
    assert roster.trust("a", b"A" * 32) == roster
    assert roster.trust("b", b"B" * 32).keys == {"a": b"A" * 32, "b": b"B" * 32}
    with pytest.raises(ProtocolError, match=fingerprint("a", b"X" * 32)):
        roster.trust("a", b"X" * 32)


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"a": b"A" * 31}, SiteError, "key of 'a' has 31 bytes; Ed25519 keys have 32"),
        ({"a": b"A" * 32, "b": b"A" * 32}, SiteError, "one key for 'a' and 'b'"),
        ({"../a": b"A" * 32}, DataError, "'../a' is not a valid name"),
    ],
)
def test_an_impossible_roster_is_refused(keys: dict[str, bytes], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Roster(keys)


def test_a_roster_file(tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    Roster({"b": b"B" * 32, "a": b"A" * 32}).save(path)
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert stored == {"sites": {"a": base64.b64encode(b"A" * 32).decode(), "b": base64.b64encode(b"B" * 32).decode()}}
    assert list(stored["sites"]) == ["a", "b"]
    assert Roster.load(path).keys == {"a": b"A" * 32, "b": b"B" * 32}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no key file"),
        ("[]", "must have the fields sites"),
        ('{"sites": {}, "more": 1}', "must have the fields sites"),
        ('{"sites": []}', "must map names to keys"),
        ('{"sites": {"a": 3}}', "key of 'a' is not in base64"),
        ('{"sites": {"a": "~~~~"}}', "key of 'a' is not in base64"),
        ('{"sites": {"a": "QUFB"}}', "has 3 bytes"),
        ('{"sites": {"a": "QUFB", "a": "QUFC"}}', "'a' is there twice"),
        ('{"sites": {"a/b": "QUFB"}}', "'a/b' is not a valid name"),
        ("[" * 100_000, "is no key file"),
    ],
)
def test_a_damaged_roster_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    path.write_text(text)
    with pytest.raises((SiteError, DataError), match=message) as refusal:
        Roster.load(path)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize("passphrase", [None, PASSPHRASE])
def test_a_key_comes_back_and_is_its_owners_alone(passphrase: str | None, tmp_path: Path) -> None:
    own = Identity.new("north")
    path = tmp_path / "north.key"
    before = os.umask(0)  # the most careless one
    try:
        own.save(path, passphrase)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["north.key"]
    again = Identity.load(path, passphrase=passphrase)
    assert (again.site, again.public, again.sign(b"x")) == ("north", own.public, own.sign(b"x"))
    assert Identity.load(path, "south", passphrase).site == "south"
    parsed = serialization.load_pem_private_key(path.read_bytes(), passphrase and passphrase.encode())
    assert isinstance(parsed, Ed25519PrivateKey)
    assert (b"ENCRYPTED" in path.read_bytes()) == (passphrase is not None)


def test_a_key_is_never_open_to_others_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    sync = os.fsync

    def look(descriptor: int) -> None:
        seen.extend(stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir())
        sync(descriptor)

    monkeypatch.setattr("polyclinic.files.os.fsync", look)
    before = os.umask(0)
    try:
        Identity.new("north").save(tmp_path / "north.key", None)
        new_pair_secret(tmp_path, "north", "south")
    finally:
        os.umask(before)
    assert seen
    assert set(seen) == {0o600}


def test_a_key_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "north.key"
    own = Identity.new("north")
    own.save(path, None)
    with pytest.raises(SiteError, match="is there already"):
        Identity.new("north").save(path, None)
    assert Identity.load(path).public == own.public
    own.save_public(tmp_path / "north.pub")
    with pytest.raises(SiteError, match="is there already"):
        own.save_public(tmp_path / "north.pub")
    new_pair_secret(tmp_path, "a", "b")
    with pytest.raises(SiteError, match="is there already"):
        new_pair_secret(tmp_path, "b", "a")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644])
def test_a_file_that_others_can_read_is_refused(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "north.key"
    Identity.new("north").save(path, None)
    secret = new_pair_secret(tmp_path, "north", "south")
    for file in (path, secret):
        file.chmod(mode)
    with pytest.raises(SiteError, match=f"mode {mode:o}.*chmod 600"):
        Identity.load(path)
    with pytest.raises(SiteError, match="can be read by others"):
        ask_passphrase(path)
    with pytest.raises(SiteError, match="can be read by others"):
        read_pair_secret(secret, "north", "south")


def test_keys_that_cannot_be_opened(tmp_path: Path) -> None:
    path, plain, other = tmp_path / "a.key", tmp_path / "b.key", tmp_path / "c.key"
    Identity.new("a").save(path, PASSPHRASE)
    Identity.new("b").save(plain, None)
    with pytest.raises(SiteError, match="is encrypted: set POLYCLINIC_PASSPHRASE"):
        Identity.load(path)
    with pytest.raises(SiteError, match="passphrase is wrong") as wrong:
        Identity.load(path, passphrase="wrong horse battery")
    assert "horse" not in str(wrong.value)
    with pytest.raises(SiteError, match="is not encrypted, yet"):
        Identity.load(plain, passphrase=PASSPHRASE)
    with pytest.raises(SiteError, match=r"there is no file .*polyclinic keys new"):
        Identity.load(tmp_path / "missing.key")
    with pytest.raises(SiteError, match="the passphrase has 5 characters; give at least 12"):
        Identity.new("d").save(tmp_path / "d.key", "short")
    assert not (tmp_path / "d.key").exists()
    x25519 = X25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for content, message in ((x25519, "another kind of key"), (b"nothing", "c.key is damaged")):
        other.write_bytes(content)
        other.chmod(0o600)
        with pytest.raises(SiteError, match=message):
            Identity.load(other)


def test_a_public_key_file(tmp_path: Path) -> None:
    own = Identity.new("north")
    path = public_path(tmp_path, "north")
    own.save_public(path)
    assert read_public(path) == ("north", own.public)
    with pytest.raises(SiteError, match="can't be read"):
        read_public(tmp_path / "missing.pub")


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ({"site": "a b", "key": "QUFB"}, DataError, "'a b' is not a valid name"),
        ({"site": ["a"], "key": "QUFB"}, DataError, "is not a valid name"),
        ({"site": "a", "key": "QUFB"}, SiteError, "has 3 bytes"),
        ({"site": "a", "key": None}, SiteError, "not in base64"),
        ({"site": "a"}, SiteError, "must have the fields key, site"),
    ],
)
def test_a_damaged_public_key_file_is_refused(
    content: dict[str, object], error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.pub"
    path.write_text(json.dumps(content))
    with pytest.raises(error, match=message):
        read_public(path)


@pytest.mark.parametrize("name", ["", "..", "a/b", "../a", "-a", "a" * 65, "a\0"])
def test_a_site_name_never_chooses_a_path(name: str, tmp_path: Path) -> None:
    calls: list[Callable[[], object]] = [
        lambda: Identity.new(name),
        lambda: key_path(tmp_path, name),
        lambda: public_path(tmp_path, name),
        lambda: pair_path(tmp_path, name, "a"),
        lambda: pair_path(tmp_path, "a", name),
        lambda: new_pair_secret(tmp_path, "a", name),
        lambda: load_credentials(name, tmp_path, tmp_path / "roster.json", None),
    ]
    for call in calls:
        with pytest.raises(DataError, match="is not a valid name"):
            call()


def test_credentials_from_files(tmp_path: Path) -> None:
    roster, path = Roster({}), tmp_path / "roster.json"
    for name in ("a", "b", "c"):
        own = Identity.new(name)
        own.save(key_path(tmp_path, name), PASSPHRASE if name == "b" else None)
        roster = roster.trust(name, own.public)
    roster.save(path)
    secret = read_pair_secret(new_pair_secret(tmp_path, "b", "a"), "a", "b")
    found = load_credentials("a", tmp_path, path, None)
    assert found.identity.public == roster.keys["a"]
    assert found.roster == roster
    assert found.pair_secrets == {"b": secret}
    assert load_credentials("b", tmp_path, path, PASSPHRASE).pair_secrets == {"a": secret}
    assert load_credentials("c", tmp_path, path, None).pair_secrets == {}


def test_a_key_that_the_roster_does_not_pin_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    own = Identity.new("a")
    own.save(key_path(tmp_path, "a"), None)
    for keys, message in (({"b": b"B" * 32}, "the roster has none"), ({"a": b"A" * 32}, fingerprint("a", b"A" * 32))):
        Roster(keys).save(path)
        with pytest.raises(SiteError, match=message):
            load_credentials("a", tmp_path, path, None)


def test_the_passphrase_comes_from_the_environment_or_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, locked = tmp_path / "a.key", tmp_path / "b.key"
    Identity.new("a").save(plain, None)
    Identity.new("b").save(locked, PASSPHRASE)
    assert ask_passphrase(plain) is None
    monkeypatch.setattr(identity.sys.stdin, "isatty", lambda: False, raising=False)
    with pytest.raises(SiteError, match="no terminal to type it: set POLYCLINIC_PASSPHRASE"):
        ask_passphrase(locked)
    monkeypatch.setattr(identity.sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(identity.getpass, "getpass", lambda prompt: f"typed at {prompt}")
    assert ask_passphrase(locked) == f"typed at Passphrase of {locked}: "
    monkeypatch.setenv("POLYCLINIC_PASSPHRASE", PASSPHRASE)
    assert ask_passphrase(locked) == PASSPHRASE


def test_nothing_shows_a_secret(tmp_path: Path) -> None:
    private = Ed25519PrivateKey.generate()
    own = Identity("north", private)
    secret = bytes(range(32))
    shown = repr(Credentials(own, Roster({"north": own.public}), {"south": secret}))
    assert repr(own) == f"Identity('north', {own.fingerprint})"
    for hidden in (private.private_bytes_raw(), secret):
        for form in (repr(hidden)[2:-1], hidden.hex(), base64.b64encode(hidden).decode()):
            assert form not in shown
    assert "north" in shown
