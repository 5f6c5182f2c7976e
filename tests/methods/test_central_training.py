"""One step of the central model of natimg-fl, written out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_natimg_fl import naive_matching, said, study
from torch import Tensor
from toys import IMAGES, sites, trained

from polyclinic.transfer.pupil import Learnt, Pupil
from polyclinic.transfer.teachers import Said


def test_it_matches_each_site_by_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before: dict[str, Any] = {}
    learn = Pupil.learn

    def noted(self: Pupil, images: Tensor, labels: Tensor, taught: Mapping[str, Said], *rest: Any) -> Learnt:
        if len(taught) > 1:
            kept = {name: value.clone() for name, value in self.beside().items()}
            before.update(images=images, labels=labels, taught=taught, beside=kept)
        return learn(self, images, labels, taught, *rest)

    monkeypatch.setattr(Pupil, "learn", noted)
    settings = {"rounds": 1, "server_steps": 1, "beta_server": 0.8, "eta_server": 0.0}
    run = trained(study(settings, training={"batch_size": 6, "lr": 0.1}), sites(), tmp_path)
    assert set(before["taught"]) == set(IMAGES)
    # 24, 12 and 6 of 42 images.
    shares = {"north": 4 / 7, "south": 2 / 7, "west": 1 / 7}
    model, beside = run.method.networks.of(run.study.model, "central").model, before["beside"]
    start = {name: value.clone().requires_grad_() for name, value in run.bench.initial.items()}
    maps, _ = said(model, start, before["images"])
    head = F.linear(maps[-1].mean((2, 3)), beside["head/weight"], beside["head/bias"])
    loss = F.cross_entropy(head, before["labels"])
    for site, share in shares.items():
        prefix = f"of/{site}/regressors."
        own = {name.removeprefix(prefix): value for name, value in beside.items() if name.startswith(prefix)}
        loss = loss + 0.8 * share * naive_matching(before["taught"][site].maps, maps, own)
    slopes = torch.autograd.grad(loss, list(start.values()), allow_unused=True, materialize_grads=True)
    for (name, value), slope in zip(start.items(), slopes, strict=True):
        wanted = value.detach() - 0.1 * slope
        torch.testing.assert_close(run.state.groups["central"][name], wanted, rtol=1e-4, atol=1e-6)
