"""What the settings of natimg-fl come to in a round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from toys import sites, toy_study, trained

from polyclinic.training import Step
from polyclinic.transfer.natimg_settings import NatIMGFLParams
from polyclinic.transfer.site_lessons import SiteLessons


@pytest.mark.parametrize(("number", "share"), [(1, 0.462117157), (2, 0.761594156), (5, 0.986614298), (10, 0.999909204)])
def test_the_alignment_grows_to_its_full_weight(number: int, share: float) -> None:
    # 2 / (1 + exp(-10 t / R)) - 1 of R = 10 rounds: tanh(t / 2).
    assert NatIMGFLParams(gamma=0.3, rounds=10).gamma_of(number) == pytest.approx(0.3 * share)


def test_the_natural_task_falls_in_a_line() -> None:
    params = NatIMGFLParams(alpha=0.5, alpha_end=0.2, rounds=5)
    assert [params.alpha_of(number) for number in range(1, 6)] == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])
    assert NatIMGFLParams(alpha=0.5, rounds=1).alpha_of(1) == 0.5


def test_sites_train_with_the_weights_of_the_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: dict[int, tuple[float, float]] = {}
    step_of = SiteLessons._step

    def noted(self: SiteLessons, step: Step, **weights: Any) -> Tensor:
        used[self.site.round] = weights["mix"].alpha, weights["gamma"]
        return step_of(self, step, **weights)

    monkeypatch.setattr(SiteLessons, "_step", noted)
    settings = {"alpha": 0.8, "alpha_end": 0.5, "gamma": 0.2, "rounds": 2, "server_steps": 1}
    trained(toy_study({"name": "natimg-fl", **settings}), sites(), tmp_path)
    assert used[1] == pytest.approx((0.8, 0.2 * 0.986614298))
    assert used[2] == pytest.approx((0.4, 0.2 * 0.999909204))
