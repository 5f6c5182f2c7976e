from __future__ import annotations

import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyclinic.data.manifest import Case
from polyclinic.data.split import check_split, check_splits, patient_groups, split_cases, write_splits
from polyclinic.errors import DataError
from polyclinic.study import SplitSettings

QUARTERS = SplitSettings(fractions=(0.5, 0.25, 0.25))


def cohort(count: int, label: str = "nv", site: str = "north", images: int = 1) -> list[Case]:
    return [
        Case(f"{label}{p}-{i}", f"{label}{p}", site, label=label, source=f"/{site}")
        for p in range(count)
        for i in range(images)
    ]


def patients(cases: list[Case], label: str | None = None) -> Counter[str]:
    found = {(c.patient, c.split) for c in cases if label in (None, c.label)}
    return Counter(split for _, split in found)


def test_fractions_hold_in_every_class() -> None:
    cases = split_cases(cohort(40) + cohort(8, "mel", images=2), QUARTERS)
    assert patients(cases, "nv") == {"train": 20, "val": 10, "test": 10}
    assert patients(cases, "mel") == {"train": 4, "val": 2, "test": 2}
    check_split(cases, QUARTERS)


def test_a_lone_patient_of_a_class_is_trained_on() -> None:
    cases = split_cases(cohort(30) + cohort(1, "df"), SplitSettings())
    assert patients(cases, "df") == {"train": 1}


@given(
    count=st.integers(3, 30),
    images=st.integers(1, 3),
    seed=st.integers(0, 9),
    stratify=st.booleans(),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=40, deadline=None)
def test_split_is_by_patient_and_ignores_order(count, images, seed, stratify, order) -> None:
    rule = SplitSettings(seed=seed, stratify=stratify)
    cases = cohort(count, images=images) + cohort(count // 2, "mel") + cohort(count, "nv", "south")
    one = split_cases(cases, rule)
    check_split(one, rule)
    shuffled = order.sample(cases, len(cases))
    two = split_cases(shuffled, rule)
    assert {(c.site, c.image): c.split for c in one} == {(c.site, c.image): c.split for c in two}
    for site in ("north", "south"):
        ours = patients([c for c in one if c.site == site])
        total = sum(ours.values())
        assert all(abs(ours[s] - f * total) <= 2 for s, f in zip(("train", "val", "test"), rule.fractions, strict=True))


def test_seed_changes_the_split_and_source_path_does_not() -> None:
    cases = cohort(30)
    moved = [replace(case, source="/elsewhere") for case in cases]
    first = [c.split for c in split_cases(cases, SplitSettings())]
    assert first == [c.split for c in split_cases(moved, SplitSettings())]
    assert first != [c.split for c in split_cases(cases, SplitSettings(seed=1))]


def test_given_splits_are_kept_and_followed() -> None:
    cases = [replace(c, split="test") if c.image == "nv0-0" else c for c in cohort(20, images=2)]
    done = {c.image: c.split for c in split_cases(cases, QUARTERS)}
    assert done["nv0-0"] == done["nv0-1"] == "test"


def test_tiny_sites_get_train_and_test() -> None:
    rule = SplitSettings(fractions=(0.98, 0, 0.02))
    assert patients(split_cases(cohort(2), rule)) == {"train": 1, "test": 1}
    assert patients(split_cases(cohort(3), SplitSettings())) == {"train": 1, "val": 1, "test": 1}


def test_patient_at_two_sites_of_one_table_stays_on_one_side() -> None:
    both = [Case(f"{s}{p}", f"p{p}", s, source="/common") for s in ("a", "b") for p in range(12)]
    done = {(c.site, c.patient): c.split for c in split_cases(both, QUARTERS)}
    assert all(done["a", f"p{p}"] == done["b", f"p{p}"] for p in range(12))
    apart = [replace(c, source=f"/{c.site}") for c in both]
    assert len(patient_groups(both)) == 12
    assert len(patient_groups(apart)) == 24


def test_refuses_a_patient_on_both_sides() -> None:
    cases = split_cases(cohort(8), QUARTERS)
    spoiled = [*cases, Case("x", cases[0].patient, "north", split="val", where="c.csv row 9", source="/other")]
    spoiled[0] = replace(cases[0], split="train", where="c.csv row 2")
    with pytest.raises(DataError, match=r"site 'north': patient 'nv0' is on both sides.*row 2.*'train'.*row 9.*'val'"):
        check_split(spoiled, QUARTERS)


def test_refuses_an_empty_part() -> None:
    cases = [replace(c, split="train") for c in cohort(3)] + [Case("v", "v", "north", split="val")]
    with pytest.raises(DataError, match=r"site 'north' has no test patient \(train 3, val 1, test 0; 4 images\)"):
        check_split(cases)
    no_val = split_cases(cohort(4), SplitSettings(fractions=(0.5, 0, 0.5)))
    check_split(no_val, SplitSettings(fractions=(0.5, 0, 0.5)))
    with pytest.raises(DataError, match=r"no val patient .*fractions to 0"):
        check_split(no_val, QUARTERS)


def test_write_splits(tmp_path: Path) -> None:
    write_splits({"north": split_cases(cohort(3), SplitSettings())}, tmp_path / "splits.csv")
    with (tmp_path / "splits.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["patient"] for row in rows] == ["nv0", "nv1", "nv2"]
    assert {row["split"] for row in rows} == {"train", "val", "test"}


def test_other_data_than_the_run_was_started_with_are_refused(tmp_path: Path) -> None:
    cases = [Case(f"{i}.png", f"p{i}", "north", split="train" if i else "test", source="/s") for i in range(4)]
    write_splits({"north": cases}, tmp_path / "splits.csv")
    check_splits({"north": cases}, tmp_path / "splits.csv")
    moved = [replace(case, split="test") if case.patient == "p2" else case for case in cases]
    with pytest.raises(DataError, match=r"1 images differ \(first: 's:2.png' of site 'north': train, now test\)"):
        check_splits({"north": moved}, tmp_path / "splits.csv")
    with pytest.raises(DataError, match=r"1 images differ .*'s:3.png'.*train, now absent"):
        check_splits({"north": cases[:3]}, tmp_path / "splits.csv")
