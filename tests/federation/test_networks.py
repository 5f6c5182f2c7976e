"""Workbenches of sites and of other roles, and what is refused of ``models``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy_proxies import MIXED
from toys import toy_study

from polyclinic.errors import DataError, StudyError
from polyclinic.federation.networks import SITE, Networks, check_models, site_networks
from polyclinic.models.registry import describe, start_model
from polyclinic.study import ModelSettings, Study

NARROW = {"name": "toy_proxies:narrow"}


def study(**sections: Any) -> Study:
    return toy_study(
        "local", **{"models": {"north": NARROW, "west": NARROW, "south": {"name": "toys:linear"}}, **sections}
    )


def test_sites_with_equal_settings_share_a_workbench() -> None:
    networks = Networks(study())
    assert networks.of_site("north") is networks.of_site("west") is not networks.of_site("south")
    assert networks.of_site("south") is networks.of_site("elsewhere") is networks.of(study().model, SITE)
    assert networks.of_site("north") is networks.of(ModelSettings(**NARROW), SITE)


def test_another_role_is_another_workbench_with_the_same_start() -> None:
    networks = Networks(study())
    own, central = networks.of_site("north"), networks.of(ModelSettings(**NARROW), "central")
    assert own is not central
    assert central is networks.of(ModelSettings(**NARROW), "central")
    with torch.no_grad():
        next(own.model.parameters()).add_(1)
    start = start_model(study(), ModelSettings(**NARROW)).state_dict()
    assert all(torch.equal(start[name], tensor) for name, tensor in central.tensors.items())
    assert not all(torch.equal(start[name], tensor) for name, tensor in own.tensors.items())
    own.restart()
    assert all(torch.equal(start[name], tensor) for name, tensor in own.tensors.items())


def test_networks_are_made_when_they_are_asked_for() -> None:
    networks = Networks(study(models={"north": {"name": "toy_proxies:no_such"}}))
    networks.of_site("south")
    with pytest.raises(StudyError, match="no function 'no_such'"):
        networks.of_site("north")


def test_a_site_that_is_not_there_has_no_network() -> None:
    check_models(study(), ["north", "south", "west"])
    with pytest.raises(DataError, match=r"models\.west: there is no site 'west'. Did you mean 'wst'\?"):
        check_models(study(), ["north", "south", "wst"])


def test_networks_to_look_at_are_shared_by_sites_with_equal_settings() -> None:
    found = site_networks(study(), ["west", "south", "north"])
    assert list(found) == ["north", "south", "west"]
    assert found["north"] is found["west"]
    assert describe(found["south"])["parameters"] == 34  # 16 pixels, 2 classes
    assert describe(found["north"])["parameters"] == 3 * 9 + 3 + 3 * 2 + 2


def test_equal_settings_are_no_mixture() -> None:
    assert study().mixed
    assert not study(models={"north": {"name": "toys:linear"}}).mixed
    assert not study(models={}).mixed
    assert study().model_of("north").name == "toy_proxies:narrow"
    assert study().model_of("elsewhere").name == "toys:linear"


def test_a_method_for_one_network_refuses_several() -> None:
    with pytest.raises(StudyError, match=r"method fedavg needs the same network.*gives another to north, south.*local"):
        toy_study("fedavg", models=MIXED)
    toy_study("fedavg", models={"north": {"name": "toys:linear"}})
