from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_contract import CNN, same
from toys import deployed, enlarged, sites, toy_study, trained

from polyclinic.errors import SiteError
from polyclinic.methods.apfl import Mixture

CURVATURE = torch.tensor([1.0, 2.0, 4.0])
CENTRE = torch.tensor([3.0, -1.0, 0.5])


class Quadratic(torch.nn.Module):
    """f(w) = ½ Σ hᵢ (wᵢ − cᵢ)², whose gradient is h (w − c)."""

    def __init__(self, start: list[float]) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(start))

    def step(self, number: int = 1) -> Any:
        def loss(batch: Any, chance: int | None = None) -> torch.Tensor:
            return (0.5 * CURVATURE * (self.w - CENTRE) ** 2).sum()

        return SimpleNamespace(model=self, parameters=[self.w], loss=loss, batch=None, seed=7, number=number)


def test_one_step_on_a_quadratic() -> None:
    w, v, alpha, lr = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([2.0, 1.0, -1.0]), 0.25, 0.01
    model, own = Quadratic(w.tolist()), {"w": v.clone()}
    mixture = Mixture(model, {"w": model.w.detach()}, own, alpha, adaptive=True, lr=lr)
    loss = mixture.rule(model.step())
    mixed = CURVATURE * (0.25 * v + 0.75 * w - CENTRE)
    # By hand: v̄ = (1.25, 0.25, 1.25), ∇f(v̄) = (-1.75, 2.5, 3), ⟨v − w, ∇f(v̄)⟩ = -1.75 + 2.5 - 9 = -8.25.
    torch.testing.assert_close(mixed, torch.tensor([-1.75, 2.5, 3.0]))
    assert loss.item() == pytest.approx(0.5 * (4 + 2 + 4 * 2.25))
    torch.testing.assert_close(model.w.grad, CURVATURE * (w - CENTRE))
    assert torch.equal(model.w.detach(), w)
    torch.testing.assert_close(own["w"], v - lr * alpha * mixed)
    assert mixture.alpha == pytest.approx(0.25 + 0.01 * 8.25)
    mixture.rule(model.step(number=2))
    assert mixture.alpha == pytest.approx(0.3325), "α moves once a round"


@pytest.mark.parametrize(("lr", "ends"), [(1.0, 1.0), (0.0, 0.25)])
def test_alpha_stays_between_0_and_1(lr: float, ends: float) -> None:
    model = Quadratic([1.0, 0.0, 2.0])
    own = {"w": torch.tensor([2.0, 1.0, -1.0])}
    mixture = Mixture(model, {"w": model.w.detach()}, own, 0.25, adaptive=True, lr=lr)
    mixture.rule(model.step())
    assert mixture.alpha == ends


def test_the_own_gradient_is_clipped_as_the_training_is() -> None:
    model, v = Quadratic([1.0, 0.0, 2.0]), torch.tensor([2.0, 1.0, -1.0])
    own = {"w": v.clone()}
    Mixture(model, {"w": model.w.detach()}, own, 0.25, lr=1.0, clip=0.5).rule(model.step())
    assert torch.norm(own["w"] - v).item() == pytest.approx(0.25 * 0.5, rel=1e-4)


def test_w_is_fedavgs_bit_for_bit_even_with_dropout(tmp_path: Path) -> None:
    sections = {
        "model": {"name": "mobilenet", "norm": "batch", "options": {"dropout": 0.5, "alpha": 0.25}},
        "data": {"image": {"size": [16, 16]}},
        "training": {"batch_size": 6, "momentum": 0.9, "clip": 1.0, "lr": 0.01},
    }
    runs = [
        trained(toy_study({"name": name, "rounds": 2}, **sections), enlarged(16), tmp_path / name)
        for name in ("fedavg", "apfl")
    ]
    assert same(runs[0].state.groups["model"], runs[1].state.groups["model"])


def test_a_whole_share_is_local_training_with_its_own_statistics(tmp_path: Path) -> None:
    sections = {"model": CNN, "data": {"image": {"size": [8, 8]}}, "training": {"batch_size": 4}}
    alone = trained(toy_study("local", **sections), enlarged(8), tmp_path / "local")
    study = toy_study({"name": "apfl", "alpha": 1.0, "adaptive": False}, **sections)
    run = trained(study, enlarged(8), tmp_path / "apfl")
    for site in run.channel.sites:
        for name, wanted in deployed(alone, site).items():
            torch.testing.assert_close(deployed(run, site)[name], wanted, rtol=1e-4, atol=1e-5)


def test_no_share_is_fedavg(tmp_path: Path) -> None:
    run = trained(toy_study({"name": "apfl", "alpha": 0.0, "adaptive": False}), sites(), tmp_path)
    assert same(deployed(run, "west"), run.state.groups["model"])


def test_three_rounds_by_hand(tmp_path: Path) -> None:
    """With full batches and the global models of fedavg, one step of v and of α a round."""
    data, names, rate = sites(), ("1.weight", "1.bias"), 0.4
    run = trained(toy_study({"name": "apfl", "personal_lr": rate}), data, tmp_path / "apfl")
    inputs = ((data["north"].images[data["north"].splits["train"]] - 0.5) / 0.25).flatten(1)
    received = [run.bench.initial]
    for rounds in (1, 2):
        plain = trained(toy_study({"name": "fedavg", "rounds": rounds}), data, tmp_path / str(rounds))
        received.append(plain.state.groups["model"])
    v, alpha = [run.bench.initial[n] for n in names], 0.5
    for model in received:
        w = [model[n] for n in names]
        mixed = [(alpha * a + (1 - alpha) * b).requires_grad_() for a, b in zip(v, w, strict=True)]
        loss = F.cross_entropy(inputs @ mixed[0].T + mixed[1], data["north"].labels("train"))
        gradients = torch.autograd.grad(loss, mixed)
        slope = sum(((a - b) * g).sum().item() for a, b, g in zip(v, w, gradients, strict=True))
        v = [a - rate * alpha * g for a, g in zip(v, gradients, strict=True)]
        alpha = min(1.0, max(0.0, alpha - rate * slope))
    kept = run.channel._sites["north"].state.load("personal")
    assert kept is not None
    assert kept[1]["alpha"] == pytest.approx(alpha, rel=1e-4)
    assert alpha != 0.5
    for name, own in zip(names, v, strict=True):
        torch.testing.assert_close(kept[0][name], own, rtol=1e-4, atol=1e-5)
        wanted = alpha * own + (1 - alpha) * run.state.groups["model"][name]
        torch.testing.assert_close(deployed(run, "north")[name], wanted, rtol=1e-4, atol=1e-5)


def test_an_own_model_that_diverges_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match=r"own model diverged.*personal_lr"):
        trained(toy_study({"name": "apfl", "personal_lr": 1e38}), sites(), tmp_path)
