"""``polyclinic keys``: from two hospitals without keys to one roster, and everything that is refused on the way."""

from __future__ import annotations

import stat
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import typer

from polyclinic import api
from polyclinic.secure import identity
from polyclinic.secure.identity import Identity, Roster, load_credentials

Said = tuple[int, str, str]
PASSPHRASE = "correct horse battery"


@pytest.fixture(autouse=True)
def _no_passphrase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POLYCLINIC_PASSPHRASE", raising=False)


@pytest.fixture
def keys(polyclinic_says: Callable[..., Said]) -> Callable[..., Said]:
    """Runs ``polyclinic keys``."""
    return partial(polyclinic_says, "keys")


def refused(said: Said, message: str) -> None:
    assert said[0] == 2
    assert said[2].startswith("error: ")
    assert message in said[2]
    assert "Traceback" not in said[2]


def new(folder: Path, site: str) -> str:
    """A new key; its fingerprint."""
    return api.new_key(site, folder)[1]


def test_two_hospitals_make_exchange_and_pin_their_keys(keys: Callable[..., Said], tmp_path: Path) -> None:
    folders = {site: tmp_path / site for site in ("north", "south")}
    told = {}
    for site, folder in folders.items():
        code, said, _ = keys("new", site, "--out", folder)
        assert code == 0
        assert f"private key: {folder / site}.key" in said
        own = Identity.load(folder / f"{site}.key")
        assert f"fingerprint: {own.fingerprint}" in said
        assert "PRIVATE" not in said
        assert stat.S_IMODE((folder / f"{site}.key").stat().st_mode) == 0o600
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        told[site] = own.fingerprint
    roster = tmp_path / "roster.json"
    for site, folder in folders.items():
        code, said, _ = keys("trust", roster, folder / f"{site}.pub", "--fingerprint", told[site])
        assert code == 0
        assert f"trusts this key of {site}" in said
    assert keys("pair", "south", "north", "--out", folders["north"])[0] == 0
    for site, peer in (("north", "south"), ("south", "north")):
        found = load_credentials(site, folders[site], roster, None)
        assert found.identity.fingerprint == told[site]
        assert set(found.roster.keys) == {"north", "south"}
        assert set(found.pair_secrets) == ({peer} if site == "north" else set())


def test_show_tells_fingerprints_and_no_secret(keys: Callable[..., Said], tmp_path: Path) -> None:
    told = new(tmp_path, "north")
    api.new_key("west", tmp_path, passphrase=PASSPHRASE)
    secret = api.new_pair_secret("north", "south", tmp_path)
    roster = tmp_path / "roster.json"
    api.trust_key(roster, tmp_path / "north.pub", told)
    (tmp_path / "notes.txt").write_text("no key")
    code, said, _ = keys("show", tmp_path)
    assert code == 0
    lines = dict(line.split("  ", 1) for line in said.splitlines())
    assert lines["north.key"] == f"private key of north: {told}"
    assert lines["north.pub"] == f"public key of north: {told}"
    assert lines["roster.json"] == f"pinned key of north: {told}"
    assert lines["west.key"] == "private key of west: encrypted"
    assert lines["north--south.secret"].startswith("pair secret of north, south: ")
    assert len(lines) == 6
    for path in (tmp_path / "north.key", secret):
        for line in path.read_text().splitlines():
            assert len(line) < 30 or line.strip() not in said
    assert keys("show", roster)[1] == f"roster.json  pinned key of north: {told}\n"


def test_show_refuses_what_has_no_keys(keys: Callable[..., Said], tmp_path: Path) -> None:
    refused(keys("show", tmp_path), f"{tmp_path} has no keys. Make one with polyclinic keys new.")
    refused(keys("show", tmp_path / "missing.pub"), "can't be read: No such file")
    (tmp_path / "other.json").write_text('{"a": 1}')
    refused(keys("show", tmp_path / "other.json"), "must have the fields sites")


@pytest.mark.parametrize(
    "written", [str.upper, lambda text: text.replace(" ", ":"), lambda text: text.replace(" ", "")]
)
def test_a_fingerprint_may_be_written_in_other_ways(written: Callable[[str], str], tmp_path: Path) -> None:
    told = new(tmp_path, "north")
    assert api.trust_key(tmp_path / "roster.json", tmp_path / "north.pub", written(told)) == "north"


def test_another_fingerprint_is_refused(keys: Callable[..., Said], tmp_path: Path) -> None:
    told = new(tmp_path, "north")
    roster, public = tmp_path / "roster.json", tmp_path / "north.pub"
    wrong = ("0" if told[0] != "0" else "1") + told[1:]
    for given in (wrong, told[:-1], told[:4], "-"):
        refused(keys("trust", roster, public, f"--fingerprint={given}"), f"is {told}, not {given}. Do not trust it")
    assert not roster.exists()


@pytest.mark.parametrize("answer", [True, False])
def test_without_a_fingerprint_a_person_compares(
    answer: bool, keys: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = new(tmp_path, "north")
    roster = tmp_path / "roster.json"
    asked = []
    monkeypatch.setattr(typer, "confirm", lambda question: asked.append(question) or answer)
    code, said, _ = keys("trust", roster, tmp_path / "north.pub")
    assert f"public key of north: {told}" in said
    assert asked == ["Call the site. Is this the fingerprint that it reads out?"]
    if answer:
        assert code == 0
        assert set(Roster.load(roster).keys) == {"north"}
    else:
        assert code == 1
        assert "nothing was changed" in said
        assert not roster.exists()


def test_only_a_public_key_can_be_trusted(keys: Callable[..., Said], tmp_path: Path) -> None:
    new(tmp_path, "north")
    refused(keys("trust", tmp_path / "roster.json", tmp_path / "north.key"), "is no key file")


def test_a_pinned_key_is_not_replaced(keys: Callable[..., Said], tmp_path: Path) -> None:
    first, second = new(tmp_path / "one", "north"), new(tmp_path / "two", "north")
    roster = tmp_path / "roster.json"
    api.trust_key(roster, tmp_path / "one" / "north.pub", first)
    before = roster.read_bytes()
    refused(
        keys("trust", roster, tmp_path / "two" / "north.pub", "--fingerprint", second),
        f"'north' is pinned to the key {first}; this one is {second}",
    )
    assert roster.read_bytes() == before


def test_a_key_is_made_once(keys: Callable[..., Said], tmp_path: Path) -> None:
    new(tmp_path, "north")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    refused(keys("new", "north", "--out", tmp_path), "north.key is there already")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "north.key").unlink()
    refused(keys("new", "north", "--out", tmp_path), "north.pub is there already")
    assert not (tmp_path / "north.key").exists()


def test_bad_names_and_folders_are_refused(keys: Callable[..., Said], tmp_path: Path) -> None:
    refused(keys("new", "../north", "--out", tmp_path), "'../north' is not a valid name")
    refused(keys("pair", "north", "a/b", "--out", tmp_path), "'a/b' is not a valid name")
    refused(keys("pair", "north", "north", "--out", tmp_path), "between two sites")
    (tmp_path / "file").write_text("")
    refused(keys("new", "north", "--out", tmp_path / "file"), "can't be written")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_passphrase_is_asked_twice_or_taken_from_the_environment(
    keys: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    refused(keys("new", "a", "--out", tmp_path, "--encrypt"), "no terminal to type it: set POLYCLINIC_PASSPHRASE")

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    typed = iter([PASSPHRASE, "another long one", PASSPHRASE, PASSPHRASE, "short", "short"])
    monkeypatch.setattr(identity.getpass, "getpass", lambda prompt: next(typed))
    refused(keys("new", "a", "--out", tmp_path, "--encrypt"), "the two passphrases differ; no key was made")
    assert not list(tmp_path.iterdir())
    code, said, _ = keys("new", "a", "--out", tmp_path, "--encrypt")
    assert code == 0
    assert PASSPHRASE not in said
    assert Identity.load(tmp_path / "a.key", passphrase=PASSPHRASE).fingerprint in said
    refused(keys("new", "b", "--out", tmp_path, "--encrypt"), "give at least 12")

    monkeypatch.setenv("POLYCLINIC_PASSPHRASE", PASSPHRASE)
    assert keys("new", "c", "--out", tmp_path, "--encrypt")[0] == 0
    assert Identity.load(tmp_path / "c.key", passphrase=PASSPHRASE).site == "c"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.key", "a.pub", "c.key", "c.pub"]


def test_no_command_takes_a_secret_as_an_argument(keys: Callable[..., Said]) -> None:
    for command in ("new", "show", "trust", "pair"):
        assert "--passphrase" not in keys(command, "--help")[1]
