"""What server and sites remember, and what they forget of an attempt that was killed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from polyclinic.errors import RunError
from polyclinic.federation.state import ServerState, SiteState


def value(state: SiteState, key: str) -> float | None:
    found = state.load(key)
    return None if found is None else float(found[0]["x"])


def put(state: SiteState, key: str, number: float) -> None:
    state.save(key, {"x": torch.tensor(number)})


def test_a_site_remembers_tensors_and_scalars(tmp_path: Path) -> None:
    state = SiteState(tmp_path / "north")
    state.begin_round(1)
    state.save("personal", {"w": torch.arange(3), "b": torch.tensor(0.5)}, steps=4, note="ü")

    found = SiteState(tmp_path / "north").load("personal")
    assert found is not None
    assert torch.equal(found[0]["w"], torch.arange(3))
    assert found[1] == {"steps": 4, "note": "ü"}
    assert state.load("control") is None


def test_the_newest_version_counts_and_older_ones_are_deleted(tmp_path: Path) -> None:
    state = SiteState(tmp_path)
    for number in (1, 2, 3):
        state.begin_round(number)
        put(state, "personal", number)
    assert value(state, "personal") == 3.0
    state.begin_round(4)
    assert [path.name for path in tmp_path.iterdir()] == ["personal.000003.safetensors"]


def test_what_a_killed_attempt_wrote_is_forgotten(tmp_path: Path) -> None:
    state = SiteState(tmp_path)
    state.begin_round(1)
    put(state, "personal", 1.0)
    put(state, "control", 10.0)
    state.begin_round(2)
    put(state, "personal", 2.0)

    resumed = SiteState(tmp_path)
    resumed.begin_round(2)
    assert (value(resumed, "personal"), value(resumed, "control")) == (1.0, 10.0)


def test_a_site_that_skipped_rounds_goes_back_as_far(tmp_path: Path) -> None:
    state = SiteState(tmp_path)
    for number in (1, 5):
        state.begin_round(number)
        put(state, "personal", number)
    resumed = SiteState(tmp_path)
    resumed.begin_round(3)
    assert value(resumed, "personal") == 1.0


def test_asking_twice_in_a_round_keeps_what_it_wrote(tmp_path: Path) -> None:
    state = SiteState(tmp_path)
    state.begin_round(1)
    put(state, "personal", 1.0)
    state.begin_round(1)
    assert state.saved("personal")
    assert value(state, "personal") == 1.0


def test_promote_renames_and_replaces(tmp_path: Path) -> None:
    state = SiteState(tmp_path)
    state.begin_round(1)
    put(state, "candidate", 1.0)
    state.promote("candidate", "chosen")
    assert not state.saved("candidate")
    assert value(state, "chosen") == 1.0
    state.begin_round(2)
    put(state, "candidate", 2.0)
    state.promote("candidate", "chosen")
    assert value(state, "chosen") == 2.0

    resumed = SiteState(tmp_path)
    resumed.begin_round(2)
    assert value(resumed, "chosen") == 1.0


@pytest.mark.parametrize("key", ["Personal", "a.b", "", "../x", "a b"])
def test_a_key_that_could_not_be_found_again_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="is no key"):
        SiteState(tmp_path).save(key, {})


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    state = SiteState(tmp_path)
    state.begin_round(1)
    (tmp_path / "personal.000001.safetensors").write_bytes(b"half")
    with pytest.raises(RunError, match=r"personal\.000001\.safetensors"):
        state.load("personal")


def test_the_server_state_comes_back_whole(tmp_path: Path) -> None:
    model = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(3, dtype=torch.int64)}
    state = ServerState({"model": model, "none": {}})
    state.scalars = {"best_score": -0.25, "chosen_round": 4}
    state.finished = 5
    state.save(tmp_path / "server.safetensors")

    back = ServerState.load(tmp_path / "server.safetensors")
    assert {name: set(group) for name, group in back.groups.items()} == {"model": {"w", "b"}, "none": set()}
    assert torch.equal(back.groups["model"]["w"], model["w"])
    assert back.groups["model"]["b"].dtype == torch.int64
    assert (back.scalars, back.finished) == (state.scalars, 5)


def test_a_tensor_in_two_groups_is_saved_once(tmp_path: Path) -> None:
    shared, other = torch.arange(4.0), torch.ones(2)
    state = ServerState({"model": {"w": shared, "v": other}})
    state.groups["chosen"] = {"w": shared, "v": torch.zeros(2)}
    path = tmp_path / "server.safetensors"
    state.save(path)

    with safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == ["chosen/v", "model/v", "model/w"]
    back = ServerState.load(path)
    assert torch.equal(back.groups["chosen"]["w"], shared)
    assert torch.equal(back.groups["chosen"]["v"], torch.zeros(2))
    assert back.groups["chosen"]["w"] is back.groups["model"]["w"]


def test_rounds_go_on_after_the_last_finished_one() -> None:
    state = ServerState({})
    seen = []
    for number in state.rounds(3):
        seen.append(number)
        state.finished = number
    assert seen == [1, 2, 3]
    assert list(state.rounds(3)) == []
    assert next(state.rounds(5)) == 4
