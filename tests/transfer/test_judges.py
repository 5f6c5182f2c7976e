"""Weights at a site are judged by images of patients that it does not train on, and by no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from toy_proxies import MIXED
from toys import IMAGES, sites, toy_study, trained

from polyclinic.data.dataset import SiteData
from polyclinic.training import Batch, Step
from polyclinic.transfer.site_lessons import SiteLessons


@pytest.mark.parametrize("balanced", [False, True])
def test_judges_are_kept_apart(balanced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judging, chosen = False, {site: set[int]() for site in IMAGES}
    inputs, judges = SiteData.inputs, SiteLessons._judges

    def noted(self: SiteData, indices: Tensor) -> Tensor:
        if judging:
            chosen[self.site].update(indices.tolist())
        return inputs(self, indices)

    def watched(self: SiteLessons, step: Step) -> Batch:
        nonlocal judging
        judging = True
        found = judges(self, step)
        judging = False
        return found

    monkeypatch.setattr(SiteData, "inputs", noted)
    monkeypatch.setattr(SiteLessons, "_judges", watched)
    settings: dict[str, Any] = {"name": "natimg-fl", "weights": "learned", "q": 1, "t_warm": 1, "server_steps": 1}
    training = {"batch_size": 8, "balanced": balanced}
    run = trained(toy_study({**settings, "rounds": 1}, models=MIXED, training=training), sites(), tmp_path)
    for site, data in run.data.items():
        stay, apart = map(set, (part.tolist() for part in run.method.parts(data)))  # type: ignore[attr-defined]
        assert chosen[site], "some were looked at"
        assert chosen[site] <= apart
        assert not chosen[site] & stay
