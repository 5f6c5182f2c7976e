"""Which patients are kept apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from polyclinic.data.dataset import SiteData
from polyclinic.data.manifest import Case
from polyclinic.errors import DataError
from polyclinic.transfer.held_out import held_out


def site(labels: list[Any], each: int = 1) -> SiteData:
    """One patient for every ``each`` images in a row, all to train on but the last two patients'."""
    count = len(labels)
    patients = [f"p{i // each}" for i in range(count)]
    targets = torch.tensor(labels)
    rest = count - 2 * each
    splits = {"train": range(rest), "val": range(rest, rest + each), "test": range(rest + each, count)}
    cases = [Case(f"{i}.png", patients[i], "north", label="a", split="train") for i in range(count)]
    positions = {name: torch.tensor(list(part)) for name, part in splits.items()}
    return SiteData("north", cases, torch.zeros(count, 1, 2, 2), targets, positions)


def patients(data: SiteData, positions: torch.Tensor) -> set[str]:
    return {data.cases[i].patient for i in positions.tolist()}


@pytest.mark.parametrize("seed", range(5))
def test_patients_kept_apart_are_in_no_other_part(seed: int) -> None:
    data = site([0, 0, 0, 1, 1, 1] * 20, each=3)
    before = {name: part.clone() for name, part in data.splits.items()}
    stay, apart = held_out(data, 0.1, np.random.default_rng(seed))
    assert sorted([*stay.tolist(), *apart.tolist()]) == before["train"].tolist()
    held = patients(data, apart)
    for other in (stay, data.splits["val"], data.splits["test"]):
        assert not held & patients(data, other)
    assert 0.1 * 114 <= len(apart) <= 0.1 * 114 + 2 * 3  # a patient may overshoot, and one of a class that lacks
    assert all(torch.equal(before[name], part) for name, part in data.splits.items())


def test_two_images_of_every_class_are_kept_apart_however_rare() -> None:
    data = site([0] * 90 + [1] * 6 + [2] * 4 + [0, 0])
    for seed in range(10):
        stay, apart = held_out(data, 0.1, np.random.default_rng(seed))
        counts = torch.bincount(data.targets[apart], minlength=3)
        assert (counts >= 2).all()
        assert (torch.bincount(data.targets[stay], minlength=3) >= torch.tensor([45, 3, 2])).all()


def test_half_of_a_classes_patients_stay() -> None:
    data = site([0] * 20 + [1] * 2 + [0, 0])
    for seed in range(10):
        stay, _ = held_out(data, 0.1, np.random.default_rng(seed))
        assert (data.targets[stay] == 1).sum() == 1


def test_findings_count_each_for_itself() -> None:
    rows = [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [1.0, 1.0]] * 10
    data = site(rows)
    _, apart = held_out(data, 0.1, np.random.default_rng(0))
    assert (data.targets[apart].sum(0) >= 2).all()


def by_definition(data: SiteData, share: float, rng: np.random.Generator) -> set[str]:
    """The patients kept apart, with everything counted anew for each patient."""
    training = data.splits["train"].tolist()
    names = np.unique(np.array([data.cases[i].patient for i in training], dtype=object))
    has = {
        i: {int(k) for k in (data.targets[i].nonzero() if data.targets.ndim == 2 else [data.targets[i]])}
        for i in training
    }
    classes = set().union(*has.values())
    chosen: set[str] = set()

    def of(people: set[str]) -> list[int]:
        return [i for i in training if data.cases[i].patient in people]

    def holders(people: set[str], k: int) -> int:
        return len({data.cases[i].patient for i in of(people) if k in has[i]})

    for name in rng.permutation(names):
        enough = len(of(chosen)) >= share * len(training)
        lacking = {k for k in classes if sum(k in has[i] for i in of(chosen)) < 2}
        if enough and not lacking:
            break
        helps = any(has[i] & lacking for i in of({name}))
        half = all(holders(chosen | {name}, k) <= holders(set(names), k) / 2 for k in classes)
        if (not enough or helps) and half:
            chosen.add(name)
    return chosen


@pytest.mark.parametrize("multi_label", [False, True])
def test_counts_that_run_along_choose_as_counting_anew(multi_label: bool) -> None:
    rng = np.random.default_rng(3)
    for seed in range(8):
        rows = (rng.random((60, 3)) < [0.5, 0.2, 0.08]).astype(float) if multi_label else rng.integers(0, 3, 60)
        data = site(rows.tolist(), each=1 + seed % 3)
        _, apart = held_out(data, 0.2, np.random.default_rng(seed))
        assert patients(data, apart) == by_definition(data, 0.2, np.random.default_rng(seed))


def test_the_draw_alone_decides() -> None:
    data = site([0, 1] * 30)
    first, again, other = (held_out(data, 0.2, np.random.default_rng(seed))[1] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_site_without_two_patients_of_a_class_is_refused() -> None:
    with pytest.raises(DataError, match=r"north.*1\).*weights: uniform"):
        held_out(site([0] * 9, each=3), 0.1, np.random.default_rng(0))
