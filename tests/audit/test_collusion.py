"""The attack finds the update where it is to be found, and not behind masks; rigged masks are caught."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny import TINY, changed

from polyclinic.audit.collusion import BACKENDS, audit_collusion, coalitions, judged
from polyclinic.audit.judge import nearness, uniformity
from polyclinic.audit.tap import Recording, record
from polyclinic.errors import RunError, StudyError
from polyclinic.runner import load_sites
from polyclinic.secure import hidden, session
from polyclinic.study import Study, validate_study

SITES = [{"name": name, "patients": 12} for name in ("north", "south", "west", "east")]
FOUR = changed(TINY, {"data": {"phantom": {"kind": "chest-xray", "sites": SITES}}, "training": {"lr": 0.3, "steps": 4}})
FOUR["data"] = {**TINY["data"], **FOUR["data"]}
FOUR["aggregation"] = {"weight": "uniform"}
VICTIM, NEIGHBOURS, INITIATOR = "west", ("south", "east"), "north"
"""By name: east, north, south, west. The ring of round 1 begins at the second."""
SHARE = 0.25
ROUNDING = 2.0**-10
"""Distance of neighbouring float32 numbers between 8192 and 16384, the size of the published mask."""


def four(**sections: Any) -> Study:
    return validate_study(changed(FOUR, sections))


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("audit") / "out"
    audit_collusion(four(), out)
    return out, json.loads((out / "collusion.json").read_text())


def rows(found: dict[str, Any], backend: str, kind: str) -> list[dict[str, Any]]:
    (entry,) = [entry for entry in found["backends"] if entry["name"] == backend]
    return [row for row in entry["coalitions"] if row["kind"] == kind]


def test_the_victim_is_in_the_middle_of_the_ring(audited: tuple[Path, dict[str, Any]]) -> None:
    _, found = audited
    assert found["ring"] == ["north", "south", "west", "east"]
    assert (found["victim"], tuple(found["neighbours"])) == (VICTIM, NEIGHBOURS)


def test_coalitions() -> None:
    assert coalitions(["a", "b", "v", "c"], "v", ("b", "c")) == [
        ("server", ("server",)),
        *(("site", (s,)) for s in "abc"),
        *(("server+site", ("server", s)) for s in "abc"),
        ("neighbours", ("b", "c")),
        ("server+neighbours", ("server", "b", "c")),
        ("everyone", ("server", "a", "b", "c")),
    ]


def test_plain_hides_nothing_from_the_server(audited: tuple[Path, dict[str, Any]]) -> None:
    for kind in ("server", "server+site", "server+neighbours", "everyone"):
        for row in rows(audited[1], "plain", kind):
            assert row["verdict"] == "reconstructed"
            assert row["relative"] < 1e-6
    for kind in ("site", "neighbours"):
        assert {row["verdict"] for row in rows(audited[1], "plain", kind)} == {"nothing to attack"}


def test_two_neighbours_see_through_the_ring_as_published(audited: tuple[Path, dict[str, Any]]) -> None:
    pytest.importorskip("tenseal")
    for kind in ("neighbours", "server+site", "server+neighbours"):
        for row in rows(audited[1], "ring-as-published", kind):
            assert row["verdict"] == "reconstructed"
            assert row["max_abs"] * SHARE <= ROUNDING
            assert row["correlation"] > 0.99
    # Both come from the same training, and only one of them from a message in clear.
    (plain,), (ring,) = (rows(audited[1], name, "server+neighbours") for name in ("plain", "ring-as-published"))
    difference = np.subtract(plain["sample"]["found"], ring["sample"]["found"])
    assert 0 < np.abs(difference).max() * SHARE <= ROUNDING
    assert np.abs(plain["sample"]["found"]).max() > 10 * ROUNDING / SHARE


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name.startswith(("masked", "ring-he"))])
def test_nothing_is_found_behind_uniform_masks(audited: tuple[Path, dict[str, Any]], backend: str) -> None:
    if backend.startswith("ring"):
        pytest.importorskip("tenseal")
    tested = 0
    for kind in ("server", "site", "server+site", "neighbours", "server+neighbours"):
        for row in rows(audited[1], backend, kind):
            assert row["verdict"] in ("nothing found", "nothing to attack"), row["parties"]
            if row["verdict"] == "nothing found":
                tested += 1
                assert abs(row["correlation"]) < 6 / row["values"] ** 0.5
                assert row["relative"] > 10
                assert row["p"] > 1e-6
                assert sum(row["counts"]) > 5 * 256
                assert row["about"] == [VICTIM]
                assert row["covered_by"]
    # Who has the key at the initiator alone: coalitions of the server with it. Otherwise two members suffice to look.
    assert tested >= (1 if "initiator" in backend else 4)
    (row,) = rows(audited[1], backend, "everyone")
    assert row["verdict"] == "reconstructed"
    assert row["covered_by"] == []
    assert row["weight_found"]["update"] == pytest.approx(1.0)


def test_what_a_coalition_has_is_what_its_key_holder_has(audited: tuple[Path, dict[str, Any]]) -> None:
    pytest.importorskip("tenseal")
    found = audited[1]
    attacked = {
        holder: {
            tuple(row["parties"])
            for row in found["backends"][list(BACKENDS).index(f"ring-he, key at {holder}")]["coalitions"]
            if row["verdict"] != "nothing to attack" and row["kind"] != "everyone"
        }
        for holder in ("all sites", "the initiator", "the server")
    }
    with_server = {("server", name) for name in (INITIATOR, *NEIGHBOURS)}
    both = ("server", *NEIGHBOURS)
    assert attacked["all sites"] == {*with_server, NEIGHBOURS, both}
    assert attacked["the initiator"] == {("server", INITIATOR)}
    assert attacked["the server"] == {("server",), *with_server, both}


def test_the_sum_says_the_same_under_every_backend(audited: tuple[Path, dict[str, Any]]) -> None:
    found = {
        name: rows(audited[1], name, "server+neighbours")[0]["sum_of_others"]
        for name in ("masked, 32 bits", "masked, 16 bits")
    }
    for row in found.values():
        assert row["sites"] == ["north", "west"]
    assert found["masked, 32 bits"]["correlation"] == pytest.approx(found["masked, 16 bits"]["correlation"], abs=1e-3)
    assert found["masked, 32 bits"]["relative"] > 0.1


def recorded(backend: str, folder: Path) -> Recording:
    study = four(aggregation={"weight": "uniform", **BACKENDS[backend]})
    return record(study, load_sites(study, folder), folder)


def rig(monkeypatch: pytest.MonkeyPatch, key: bytes) -> None:
    """All pairs use this key for their masks."""
    derive = session.derive_key

    def rigged(secret: bytes, info: bytes, *, psk: bytes = b"") -> bytes:
        return key if info.startswith(b"mask") else derive(secret, info, psk=psk)

    monkeypatch.setattr(session, "derive_key", rigged)


def test_keys_of_zeros_are_caught(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rig(monkeypatch, bytes(32))
    row = judged(recorded("masked, 32 bits", tmp_path), "server", ["server"], VICTIM)
    assert row["verdict"] == "reconstructed"
    assert row["relative"] < 1e-2


@pytest.mark.parametrize("backend", ["masked, 16 bits", "ring-he, key at all sites"])
def test_one_key_for_all_pairs_is_caught(backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if backend.startswith("ring"):
        pytest.importorskip("tenseal")
    rig(monkeypatch, os.urandom(32))
    recording = recorded(backend, tmp_path)
    assert judged(recording, "server", ["server"], VICTIM)["verdict"] in ("nothing found", "nothing to attack")
    assert judged(recording, "server+site", ["server", INITIATOR], VICTIM)["verdict"] == "reconstructed"


def test_missing_masks_are_caught(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hidden.Contribution, "add_streams", lambda self, streams: None)
    row = judged(recorded("masked, 32 bits", tmp_path), "server", ["server"], VICTIM)
    assert row["verdict"] == "reconstructed"


def test_masks_that_are_too_short_show(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    take = session.Keystream.take

    def short(self: session.Keystream, out: np.ndarray) -> None:
        take(self, out)
        out &= out.dtype.type((1 << 8 * out.itemsize - 8) - 1)

    monkeypatch.setattr(session.Keystream, "take", short)
    row = judged(recorded("masked, 32 bits", tmp_path), "server", ["server"], VICTIM)
    assert row["verdict"] == "something shows"


def test_chi_square_by_hand() -> None:
    even = uniformity(np.tile(np.arange(256, dtype=np.uint8), 10))
    assert (even.statistic, even.p) == (0.0, 1.0)
    # All 2560 bytes alike: (2560 - 10)**2 / 10 + 255 * 10.
    single = uniformity(np.full(2560, 7, dtype=np.uint8))
    assert single.statistic == pytest.approx(2550**2 / 10 + 2550)
    assert single.p == pytest.approx(0.0, abs=1e-300)
    assert single.counts[7] == 2560
    assert uniformity(np.zeros(1279, dtype=np.uint8)).p is None


def test_nearness_by_hand() -> None:
    found = nearness(np.array([3.0, 4.0]), np.array([3.0, 4.5]))
    assert (found.values, found.max_abs, found.relative) == (2, 0.5, 0.1)
    assert found.correlation == pytest.approx(1.0)
    assert nearness(np.array([1.0, 2.0]), np.array([5.0, 5.0])).correlation is None


def test_three_sites_are_too_few(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="needs 4 to 16 sites and this study has 3"):
        audit_collusion(validate_study(TINY), tmp_path / "out")


def test_a_method_without_a_sum_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="method local sums no updates"):
        audit_collusion(four(method={"name": "local"}), tmp_path / "out")


def test_methods_with_several_sums_and_weights(tmp_path: Path) -> None:
    study = four(method={"name": "scaffold"}, aggregation={"backend": "masked", "weight": "images"})
    recording = record(study, load_sites(study, tmp_path), tmp_path)
    row = judged(recording, "everyone", ["server", INITIATOR, *NEIGHBOURS], VICTIM)
    assert row["verdict"] == "reconstructed"
    assert set(row["weight_found"]) == {"update", "control"}
    assert row["relative"] < 1e-3


def test_a_missing_library_is_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("seal", "tenseal"):
        monkeypatch.setitem(sys.modules, name, None)
    found = audit_collusion(four(), tmp_path / "out")
    missing = {entry["name"]: entry["missing"] for entry in found["backends"]}
    assert all('pip install "polyclinic[he]"' in missing[name] for name in BACKENDS if name.startswith("ring"))
    assert not any(missing[name] for name in BACKENDS if not name.startswith("ring"))
    assert "a library is missing here" in (tmp_path / "out" / "collusion.html").read_text()


def test_an_audit_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "collusion.json").write_text("{}")
    with pytest.raises(RunError, match="already holds an audit. Give another --out."):
        audit_collusion(four(), tmp_path)
    assert (tmp_path / "collusion.json").read_text() == "{}"


Said = tuple[int, str, str]


def test_command(polyclinic_says: Callable[..., Said], tmp_path: Path) -> None:
    (tmp_path / "four.yaml").write_text(yaml.safe_dump(FOUR))
    code, said, errors = polyclinic_says("audit", "collusion", tmp_path / "four.yaml", "--out", tmp_path / "out")
    assert (code, errors) == (0, "")
    assert "west (beside it: south and east)" in said
    assert str(tmp_path / "out" / "collusion.html") in said
    page = (tmp_path / "out" / "collusion.html").read_text()
    assert "No coalition short of everyone else found anything" in page
    assert page.count("<svg viewBox") >= 2
    found = json.loads((tmp_path / "out" / "collusion.json").read_text())
    assert [entry["name"] for entry in found["backends"]] == list(BACKENDS)
    assert found["alarms"] == []
    code, _, errors = polyclinic_says("audit", "collusion", tmp_path / "four.yaml", "--set", "method=local")
    assert code == 2
    assert "method local sums no updates" in errors


def test_command_raises_an_alarm(
    polyclinic_says: Callable[..., Said], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rig(monkeypatch, bytes(32))
    (tmp_path / "four.yaml").write_text(yaml.safe_dump(FOUR))
    code, _, errors = polyclinic_says("audit", "collusion", tmp_path / "four.yaml", "--out", tmp_path / "out")
    assert code == 1
    assert "reconstructed: masked, 32 bits, server" in errors
    page = (tmp_path / "out" / "collusion.html").read_text()
    assert "Something was found that should be hidden" in page
