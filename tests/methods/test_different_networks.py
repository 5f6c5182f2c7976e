"""What every method for different networks without public images must do where networks do differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mixed_sites import mixed_study
from test_contract import SECURE, end_state, same
from toys import enlarged, resumed, trained

from polyclinic.errors import StudyError
from polyclinic.study import Study

SETTINGS: dict[str, dict[str, Any]] = {
    "local": {},
    "fedproto": {"floor": 1},
    "fedtgp": {"floor": 1, "server_epochs": 5},
    "fedgh": {"floor": 1, "head_epochs": 5},
    "lg-fedavg": {},
    "fml": {"companion": {"width": 2}},
    "fedkd": {"companion": {"width": 2}},
    "heterofl": {},
}
WIDE = {"name": "small-cnn", "width": 4}
METHOD = pytest.mark.parametrize("method", SETTINGS)


def two_widths(method: str, **sections: Any) -> Study:
    """West has fewer channels, and as many features where the method wants that; two rounds at 16 pixels."""
    own = WIDE if method == "heterofl" else {**WIDE, "embedding": 6}
    base = {"model": own, "models": {"west": {**own, "width": 3}}, "data": {"image": {"size": [16, 16]}}}
    return mixed_study({"name": method, "rounds": 2, **SETTINGS[method]}, **{**base, **sections})


@METHOD
def test_a_new_process_goes_on_bit_for_bit(method: str, tmp_path: Path) -> None:
    study, data = two_widths(method), enlarged(16)
    whole = trained(study, data, tmp_path / "whole")
    assert same(end_state(whole), end_state(resumed(study, data, tmp_path / "parts")))


@METHOD
def test_a_site_keeps_a_network_of_its_own_shape(method: str, tmp_path: Path) -> None:
    run = trained(two_widths(method), enlarged(16), tmp_path)
    ends = end_state(run)
    assert ends["west/blocks.0.weight"].shape == (3, 1, 3, 3)
    assert ends["north/blocks.0.weight"].shape == (4, 1, 3, 3)
    leaves = {leaf.name for op in run.method.ops().values() for leaf in op.leaves if leaf.kind != "scalar"}
    assert bool(leaves) == (method != "local")


@pytest.mark.parametrize("method", ["fedproto", "lg-fedavg", "fml"])
def test_sums_over_different_networks_can_be_hidden(method: str, tmp_path: Path) -> None:
    aggregation, tolerance = SECURE["masked"]
    plain = trained(two_widths(method), enlarged(16), tmp_path / "plain")
    hidden = trained(two_widths(method, aggregation=aggregation), enlarged(16), tmp_path / "masked")
    wanted, found = end_state(plain), end_state(hidden)
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("method", ["fedtgp", "fedgh", "fedkd", "heterofl"])
def test_what_must_arrive_by_itself_cannot_be_hidden(method: str) -> None:
    with pytest.raises(StudyError, match=r"of each site by itself, which aggregation\.backend masked hides"):
        two_widths(method, aggregation="masked")
