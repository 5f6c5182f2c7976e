"""From ``aggregation`` in a study file to the sum that a run uses, end to end."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from parties import consortium, random_arrays
from toys import sites, toy_study, trained

import polyclinic
from polyclinic.errors import PolyclinicError, SiteError, StudyError
from polyclinic.secure.backends import _loaded
from polyclinic.study import load_study

File = Callable[..., Path]
TWO = {"kind": "chest-xray", "sites": [{"name": "north", "patients": 12}, {"name": "south", "patients": 10}]}


def test_a_backend_alone_is_short_for_the_section(tiny_file: File) -> None:
    assert load_study(tiny_file(aggregation="ring-he")).aggregation.backend == "ring-he"
    path = tiny_file(aggregation={"weight": "patients", "lanes": 16})
    found = load_study(path, overrides=["aggregation=masked"]).aggregation
    assert (found.backend, found.weight, found.lanes) == ("masked", "patients", 16)
    found = load_study(path, overrides=["aggregation=ring-he", "aggregation.key_holder=server"]).aggregation
    assert (found.backend, found.weight, found.key_holder) == ("ring-he", "patients", "server")
    found = load_study(tiny_file(aggregation="masked"), overrides=["aggregation.lanes=16"]).aggregation
    assert (found.backend, found.lanes) == ("masked", 16)
    with pytest.raises(StudyError, match="backend"):
        load_study(path, overrides=["aggregation=paillier"])


@pytest.mark.parametrize("backend", ["masked", "ring-he", "ring-as-published"])
def test_a_study_under_a_secure_sum(backend: str, tiny_file: File, tmp_path: Path) -> None:
    folder = polyclinic.run(load_study(tiny_file(aggregation=backend)), out=tmp_path / "run")
    told = json.loads((folder / "privacy.json").read_text())
    assert told["aggregation"] == backend
    assert "Only masked or encrypted leave a site: update, with their weights." in told["hidden"]
    names = {leaf["name"] for leaf in told["leaves"]["train"]}
    assert names == {"loss", "layout"}
    page = (folder / "report.html").read_text()
    assert f"Aggregation: {backend}. Only masked or encrypted leave a site" in page
    for line in (folder / "rounds.jsonl").read_text().splitlines():
        assert json.loads(line)["incidents"] == []


def test_methods_that_sum_nothing_over_sites_stay_plain(tmp_path: Path) -> None:
    for method, backend in {"local": "plain", "pooled": "plain", "ditto": "masked"}.items():
        study = toy_study(method, aggregation="masked")
        assert trained(study, sites(), tmp_path / method).aggregation.backend == backend


@pytest.mark.parametrize("backend", ["masked", "ring-he", "ring-as-published"])
def test_two_sites_are_refused_before_training(backend: str, tiny_file: File, tmp_path: Path) -> None:
    study = load_study(tiny_file(data={"phantom": TWO}, aggregation=backend))
    reason = "two sites take part in a round, and each would find the other's update"
    with pytest.raises(StudyError, match=reason):
        polyclinic.check(study)
    with pytest.raises(StudyError, match=reason):
        polyclinic.run(study, out=tmp_path / "run")
    assert not (tmp_path / "run" / "rounds.jsonl").exists()


def test_a_cohort_too_small_is_refused(tiny_file: File) -> None:
    study = load_study(tiny_file(aggregation="masked", method={"participation": 0.3}))
    with pytest.raises(StudyError, match=r"1 of 3 sites take part in a round.*Change method.participation"):
        polyclinic.check(study)


@pytest.mark.parametrize(
    ("aggregation", "missing"),
    [
        ("ring-as-published", "tenseal"),
        ({"backend": "ring-he", "provider": "tenseal"}, "tenseal"),
        ({"backend": "ring-he", "provider": "seal"}, "seal"),
    ],
)
def test_a_missing_library_is_named_before_training(
    aggregation: Any, missing: str, tiny_file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(StudyError, match=r'pip install "polyclinic\[he\]"'):
        polyclinic.check(load_study(tiny_file(aggregation=aggregation)))


def keys_of(folder: Path, *sites: str) -> Path:
    """Keys of sites and a roster that pins them."""
    from polyclinic import api

    roster = folder / "roster.json"
    for site in sites:
        _, fingerprint = api.new_key(site, folder / "keys")
        api.trust_key(roster, folder / "keys" / f"{site}.pub", fingerprint)
    return roster


def test_a_rehearsal_with_real_keys(tiny_file: File, tmp_path: Path) -> None:
    keys_of(tmp_path, "north", "south", "west")
    federation = {"roster": "roster.json", "keys": "keys"}
    folder = polyclinic.run(load_study(tiny_file(aggregation="masked", federation=federation)), out=tmp_path / "run")
    assert (folder / "report.html").is_file()
    private = re.sub(r"-----.*?-----|\s", "", (tmp_path / "keys" / "north.key").read_text())
    for path in folder.rglob("*"):
        assert not path.is_file() or private.encode() not in path.read_bytes()
    raw = yaml.safe_load((folder / "study.yaml").read_text())
    assert Path(raw["federation"]["roster"]) == tmp_path / "roster.json"


def test_keys_that_do_not_fit_are_refused_before_training(tiny_file: File, tmp_path: Path) -> None:
    keys_of(tmp_path, "north", "south")
    federation = {"roster": "roster.json", "keys": "keys"}
    with pytest.raises(PolyclinicError, match=r"west"):
        polyclinic.check(load_study(tiny_file(aggregation="masked", federation=federation)))
    with pytest.raises(StudyError, match="go together"):
        polyclinic.check(load_study(tiny_file(aggregation="masked", federation={"roster": "roster.json"})))


@pytest.fixture(autouse=True)
def _no_kept_keys() -> None:
    _loaded.cache_clear()


def too_large(name: str) -> dict[str, torch.Tensor]:
    """At site b, a value that no lane carries."""
    return {key: tensor * (1e9 if name == "b" else 1) for key, tensor in random_arrays(name).items()}


def test_a_site_that_keeps_refusing_is_left_out_or_ends_the_run(tmp_path: Path) -> None:
    tolerant = consortium(tmp_path / "a", 5, arrays=too_large)
    total = tolerant.sum()
    wanted = tolerant.mean(["a", "c", "d", "e"])
    for name, tensor in total.mean("update").items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-5)
    assert len(tolerant.sums.incidents) == 2
    strict = consortium(tmp_path / "b", 5, arrays=too_large, tolerant=False)
    with pytest.raises(SiteError, match="no sum came about: site 'b' refused 'masked-vector': update/"):
        strict.sum()
    assert len(strict.sums.incidents) == 2
