"""Secrets of pairs of sites: whose they are, and that only their owners read them."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from polyclinic.errors import SiteError
from polyclinic.secure.pair_secrets import describe_pair_secret, new_pair_secret, pair_path, read_pair_secret


def test_pair_secrets(tmp_path: Path) -> None:
    path = new_pair_secret(tmp_path, "south", "north")
    assert path == pair_path(tmp_path, "north", "south") == tmp_path / "north--south.secret"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    secret = read_pair_secret(path, "north", "south")
    assert secret == read_pair_secret(path, "south", "north")
    assert len(secret) == 32
    assert secret != read_pair_secret(new_pair_secret(tmp_path, "south", "west"), "south", "west")
    with pytest.raises(SiteError, match="between two sites; 'north' is one"):
        new_pair_secret(tmp_path, "north", "north")


def test_a_pair_secret_knows_whose_it_is(tmp_path: Path) -> None:
    """``a--b`` with ``c`` and ``a`` with ``b--c`` share a file name; the names inside tell them apart."""
    path = new_pair_secret(tmp_path, "a--b", "c")
    assert pair_path(tmp_path, "a", "b--c") == path
    with pytest.raises(SiteError, match="is not the secret of 'a' and 'b--c'"):
        read_pair_secret(path, "a", "b--c")
    short = {"sites": ["a--b", "c"], "secret": "QUFB"}
    path.write_text(json.dumps(short))
    with pytest.raises(SiteError, match="a list of two sites and 32 bytes"):
        read_pair_secret(path, "a--b", "c")


def test_its_fingerprint_is_the_same_at_both_sites_and_shows_nothing_of_it(tmp_path: Path) -> None:
    path = new_pair_secret(tmp_path / "one", "a", "b")
    copy = tmp_path / "copy.secret"
    copy.write_bytes(path.read_bytes())
    copy.chmod(0o600)
    owners, shown = describe_pair_secret(path)
    assert owners == "a, b"
    assert describe_pair_secret(copy) == (owners, shown)
    assert describe_pair_secret(new_pair_secret(tmp_path / "two", "a", "b"))[1] != shown
    assert shown.replace(" ", "")[:8] not in read_pair_secret(path, "a", "b").hex()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"sites": ["a", "b"]}, "must have the fields secret, sites"),
        ({"sites": ["a", "b"], "secret": 5}, "not in base64"),
        ({"sites": "a, b", "secret": "A" * 43 + "="}, "a list of two sites"),
    ],
)
def test_a_damaged_secret_is_refused(content: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "a--b.secret"
    path.write_text(json.dumps(content))
    path.chmod(0o600)
    with pytest.raises(SiteError, match=message):
        read_pair_secret(path, "a", "b")
