"""Servers that read single answers take one that is whole, or none, and say whose it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mixed_sites import prepared
from test_contract import same
from toys import enlarged, sites, toy_study, trained

from polyclinic.errors import SiteError
from polyclinic.federation.message import Message
from polyclinic.federation.site import Op, Site
from polyclinic.runner import Run
from polyclinic.study import Study

Arrays = dict[str, torch.Tensor]

READ = {
    "feddf": "model/1.weight",
    "fedkd": "whole/1.bias",
    "heterofl": "update/head.weight",
    "fedtgp": "prototypes/means",
    "fedgh": "prototypes/means",
}
"""One array of an answer; fedkd cuts its matrix in two, see below."""
WEIGHED = {"feddf": "weight/model", "fedkd": "weight/update", "heterofl": "weight/update"}


def one_round(method: str, **sections: Any) -> tuple[Study, dict[str, Any]]:
    """A study of one round, and its sites; heterofl with two widths, for else its sums are the backend's."""
    settings: dict[str, Any] = {"name": method, "rounds": 1}
    if method == "heterofl":
        wide = {"name": "small-cnn", "width": 3, "norm": "group", "options": {"strides": [2, 2]}}
        mixed = {"model": wide, "models": {"west": {**wide, "width": 2}}, "data": {"image": {"size": [16, 16]}}}
        return toy_study(settings, **{**mixed, **sections}), enlarged(16)
    if method == "feddf":
        settings["steps"] = 0
    if method == "fedkd":
        settings |= {"companion": {"name": "toys:linear"}}
        sections = {"model": {"name": "toys:two_layers"}, **sections}
    return toy_study(settings, **sections), sites()


def altered(run: Run, site: str, change: Callable[[Arrays, dict[str, Any]], None]) -> None:
    """Let a site's answers be changed before they leave."""
    own = run.channel._sites[site]
    op = own._ops["train"]

    def answers(site: Site, message: Message) -> Message:
        reply = op.run(site, message)
        arrays, scalars = dict(reply.arrays), dict(reply.scalars)
        change(arrays, scalars)
        return Message(arrays, scalars)

    own._ops = {**own._ops, "train": Op(answers, op.leaves)}


def broken(kind: str, name: str) -> Callable[[Arrays, dict[str, Any]], None]:
    """What is wrong with the array of that name."""

    def change(arrays: Arrays, scalars: dict[str, Any]) -> None:
        if kind == "nan":
            arrays[name] = arrays[name].clone().fill_(torch.nan)
        elif kind == "missing":
            del arrays[name]
        elif kind == "extra":
            arrays[f"{name}2"] = arrays[name]
        else:
            arrays[name] = arrays[name][:-1]

    return change


@pytest.mark.parametrize("method", READ)
@pytest.mark.parametrize("kind", ["nan", "missing", "extra", "shape"])
def test_a_broken_array_ends_the_run_with_the_names_of_site_and_array(method: str, kind: str, tmp_path: Path) -> None:
    study, data = one_round(method)
    run = prepared(study, data, tmp_path)
    altered(run, "south", broken(kind, READ[method]))
    leaf = READ[method].partition("/")[2]
    with pytest.raises(SiteError, match=rf"site 'south' sent .*{leaf}.*(training\.lr|study file)"):
        run.train()


@pytest.mark.parametrize("part", ["left", "right"])
@pytest.mark.parametrize("kind", ["nan", "missing", "extra", "shape"])
def test_broken_factors_end_the_run_with_the_name_of_the_site(part: str, kind: str, tmp_path: Path) -> None:
    study, data = one_round("fedkd", model={"name": "toys:linear"})
    run = prepared(study, data, tmp_path)
    altered(run, "south", broken(kind, f"{part}/1.weight"))
    with pytest.raises(SiteError, match=r"site 'south' sent .*(1\.weight|factors).*(training\.lr|study file)"):
        run.train()


@pytest.mark.parametrize("method", WEIGHED)
@pytest.mark.parametrize("weight", [None, float("nan"), float("inf"), -1.0])
def test_a_weight_that_is_none_ends_the_run(method: str, weight: float | None, tmp_path: Path) -> None:
    study, data = one_round(method)
    run = prepared(study, data, tmp_path)

    def change(arrays: Arrays, scalars: dict[str, Any]) -> None:
        del scalars[WEIGHED[method]]
        if weight is not None:
            scalars[WEIGHED[method]] = weight

    altered(run, "south", change)
    with pytest.raises(SiteError, match=r"site 'south' gave '(model|update)' the weight"):
        run.train()


@pytest.mark.parametrize("method", READ)
def test_where_sites_may_be_absent_the_round_goes_on_without(method: str, tmp_path: Path) -> None:
    study, data = one_round(method, federation={"on_absent": "continue"})
    run = prepared(study, data, tmp_path / "run")
    altered(run, "south", broken("nan", READ[method]))
    run.train()
    assert "site 'south' sent" in run.records[0]["absent"]["south"]
    assert set(run.records[0]["absent"]) == {"south"}
    others = trained(study, {site: own for site, own in data.items() if site != "south"}, tmp_path / "others")
    group = {"fedtgp": "prototypes", "fedgh": "head", "fedkd": "companion"}.get(method, "model")
    assert same(run.state.groups[group], others.state.groups[group])
