from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_contract import CNN
from toys import deployed, enlarged, sites, toy_study, trained

from polyclinic.errors import StudyError
from polyclinic.methods.pfedme import envelope_gradient
from polyclinic.models.normalisation import running_statistics

CURVATURE = torch.tensor([1.0, 2.0, 4.0])
CENTRE = torch.tensor([3.0, -1.0, 0.5])
NAMES = ("1.weight", "1.bias")


def quadratic_step(w: torch.nn.Parameter) -> Any:
    """f(w) = ½ Σ hᵢ (wᵢ − cᵢ)²."""
    return SimpleNamespace(
        model=torch.nn.Module(),
        parameters=[w],
        batch=None,
        loss=lambda batch: (0.5 * CURVATURE * (w - CENTRE) ** 2).sum(),
    )


def test_many_inner_steps_reach_the_proximal_point_and_the_envelopes_gradient() -> None:
    """On a quadratic θ = (h c + λ w) / (h + λ), and the envelope's gradient is λ h (w − c) / (h + λ)."""
    start, lam = torch.tensor([1.0, 0.0, 2.0]), 3.0
    w, theta = torch.nn.Parameter(start.clone()), [start.clone()]
    loss = envelope_gradient(theta, lam, 300, 0.1)(quadratic_step(w))
    torch.testing.assert_close(theta[0], (CURVATURE * CENTRE + lam * start) / (CURVATURE + lam))
    torch.testing.assert_close(w.grad, lam * CURVATURE * (start - CENTRE) / (CURVATURE + lam), rtol=1e-4, atol=1e-5)
    assert torch.equal(w.detach(), start)
    assert loss.item() == pytest.approx(0.5 * (4 + 2 + 4 * 2.25))


def test_theta_goes_on_from_where_the_last_step_left_it() -> None:
    """A θ that is already the proximal point stays there."""
    start, lam = torch.tensor([1.0, 0.0, 2.0]), 3.0
    point = (CURVATURE * CENTRE + lam * start) / (CURVATURE + lam)
    theta = [point.clone()]
    envelope_gradient(theta, lam, 1, 0.2)(quadratic_step(torch.nn.Parameter(start)))
    torch.testing.assert_close(theta[0], point)


def test_two_rounds_by_hand(tmp_path: Path) -> None:
    data, lam, inner, beta, lr = sites(), 2.0, 0.3, 1.5, 0.1
    settings = {"name": "pfedme", "strength": lam, "inner_steps": 3, "inner_lr": inner, "beta": beta, "rounds": 2}
    run = trained(toy_study(settings, training={"epochs": 2, "lr": lr}), data, tmp_path)
    images = {site: len(own.splits["train"]) for site, own in data.items()}
    w = [run.bench.initial[n] for n in NAMES]
    personal = {}
    for _ in range(2):
        ends = {}
        for site, own in data.items():
            inputs = ((own.images[own.splits["train"]] - 0.5) / 0.25).flatten(1)
            local, theta = list(w), list(w)
            for _ in range(2):
                for _ in range(3):
                    leaves = [t.clone().requires_grad_() for t in theta]
                    loss = F.cross_entropy(inputs @ leaves[0].T + leaves[1], own.labels("train"))
                    gradients = torch.autograd.grad(loss, leaves)
                    theta = [t - inner * (g + lam * (t - a)) for t, g, a in zip(theta, gradients, local, strict=True)]
                local = [a - lr * lam * (a - t) for a, t in zip(local, theta, strict=True)]
            ends[site], personal[site] = local, theta
        mean = [sum(images[s] * ends[s][i] for s in data) / sum(images.values()) for i in range(2)]
        w = [(1 - beta) * old + beta * new for old, new in zip(w, mean, strict=True)]
    for i, name in enumerate(NAMES):
        torch.testing.assert_close(run.state.groups["model"][name], w[i], rtol=1e-4, atol=1e-5)
        for site in data:
            torch.testing.assert_close(deployed(run, site)[name], personal[site][i], rtol=1e-4, atol=1e-5)


def test_a_step_moves_running_statistics_once(tmp_path: Path) -> None:
    """The first of K passes of the first step is at w, so its statistics are fedavg's whatever K is."""
    found = []
    for name, more in {"fedavg": {}, "pfedme": {"inner_steps": 4}}.items():
        study = toy_study(
            {"name": name, "rounds": 1, **more},
            model=CNN,
            data={"image": {"size": [8, 8]}},
            training={"steps": 1, "batch_size": 4},
        )
        run = trained(study, enlarged(8), tmp_path / name)
        found.append(run.state.groups["model"])
    statistics = running_statistics(run.bench.model) & found[0].keys()
    assert statistics
    for name in statistics:
        assert torch.equal(found[0][name], found[1][name])


def test_a_site_that_never_trained_uses_the_global_model(tmp_path: Path) -> None:
    run = trained(toy_study({"name": "pfedme", "rounds": 1, "participation": 0.34}), sites(), tmp_path)
    idle = [s for s in run.channel.sites if run.channel._sites[s].state.load("personal") is None]
    assert len(idle) == 2
    for site in idle:
        assert torch.equal(deployed(run, site)["1.weight"], run.state.groups["model"]["1.weight"])


def test_inner_steps_that_must_diverge_are_refused() -> None:
    with pytest.raises(StudyError, match=r"pfedme.*rate 0\.1 with strength 20.*inner_lr below 0\.1"):
        toy_study({"name": "pfedme", "strength": 20, "inner_lr": 0.1})
    toy_study({"name": "pfedme", "strength": 20, "inner_lr": 0.09})
