"""Recipes: short forms, readable refusals, and a digest that every setting changes."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import ValidationError
from torch import nn

from polyclinic.vectors.recipe import AnyFilter, AnyRule, Recipe
from polyclinic.vectors.restoration import Restoration


def test_a_name_alone_is_a_rule_a_filter_a_head_or_a_mode() -> None:
    short = Recipe.model_validate({"rule": "ties", "filters": ["support"], "head": "ridge", "restoration": "bn-recal"})
    long = Recipe.model_validate(
        {
            "rule": {"name": "ties"},
            "filters": [{"name": "support"}],
            "head": {"name": "ridge"},
            "restoration": {"mode": "bn-recal"},
        }
    )
    assert short == long
    assert short.rule.name == "ties"


def test_every_rule_and_filter_can_be_named_and_comes_back_from_json() -> None:
    rules, filters = ([one.model_fields["name"].default for one in get_args(union)] for union in (AnyRule, AnyFilter))
    assert {"data-vector", "ties", "median", "base"} <= set(rules)
    recipes = [Recipe.model_validate({"rule": name}) for name in rules]
    recipes += [Recipe.model_validate({"filters": [name]}) for name in filters]
    for recipe in recipes:
        assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert len({recipe.digest for recipe in recipes}) == len(recipes)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"rule": "tyes"}, "no rule 'tyes'. Did you mean 'ties'"),
        ({"rule": {"name": "ties", "densty": 0.1}}, "no setting 'densty'. Did you mean 'density'"),
        ({"rule": {"density": 0.1}}, "rule data-vector has no setting 'density'"),
        ({"rule": 5}, "give the name of a rule"),
        ({"filters": ["nonsense"]}, "no filter 'nonsense'"),
        ({"head": {"name": "ridge", "gamma": 0}}, "greater than 0"),
        ({"restoration": "bn"}, "bn-recal"),
    ],
)
def test_what_is_wrong_is_said(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate(raw)


def test_the_digest_covers_every_setting() -> None:
    one = Recipe.model_validate({"rule": {"name": "ties", "density": 0.2}})
    assert one.digest == Recipe.model_validate({"rule": "ties"}).digest
    others = [
        {"rule": {"name": "ties", "density": 0.3}},
        {"rule": "ties", "head": "lda"},
        {"rule": "ties", "restoration": {"mode": "none", "epochs": 4}},
        {"rule": "ties", "filters": ["support"]},
    ]
    assert len({one.digest, *(Recipe.model_validate(raw).digest for raw in others)}) == 5


def test_auto_is_decided_by_the_network_and_needs_follow_the_recipe() -> None:
    auto = Recipe(restoration=Restoration(mode="auto"))
    assert auto.resolved(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))).restoration.mode == "bn-recal"
    assert auto.resolved(nn.Linear(2, 2)).restoration.mode == "none"
    assert Recipe.model_validate({"rule": "fisher", "restoration": "bn-pooled"}).needs == {"fisher", "statistics"}
    assert Restoration(mode="finetune").needs_images
    assert not Restoration(mode="bn-pooled").needs_images
