from pathlib import Path

import torch
from toys import deployed, linear, sites, toy_study, trained

from polyclinic.methods.fedprox import proximal


def test_the_gradient_of_the_proximal_term() -> None:
    model = linear(1, 2, 2, "batch")
    anchor = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    parameters = list(model.parameters())
    term = 0.5 * 0.3 * sum((p - anchor[name]).pow(2).sum() for name, p in model.named_parameters())
    wanted = torch.autograd.grad(term, parameters)
    gradients = [torch.ones_like(p) for p in parameters]
    proximal(model, anchor, 0.3)([p.detach() for p in parameters], gradients)
    for got, extra in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, 1 + extra)


def test_parameters_without_an_anchor_are_left_alone() -> None:
    model = linear(1, 2, 2, "batch")
    gradients = [torch.ones_like(p) for p in model.parameters()]
    proximal(model, {"1.bias": torch.full((2,), 5.0)}, 1.0)([p.detach() for p in model.parameters()], gradients)
    assert torch.equal(gradients[0], torch.ones_like(gradients[0]))
    torch.testing.assert_close(gradients[1], 1 + model[1].bias.detach() - 5.0)


def test_without_strength_it_is_fedavg_bit_for_bit(tmp_path: Path) -> None:
    sections = {"training": {"batch_size": 5, "epochs": 2}}
    plain = trained(toy_study("fedavg", **sections), sites(), tmp_path / "a")
    prox = trained(toy_study({"name": "fedprox", "mu": 0}, **sections), sites(), tmp_path / "b")
    for name, tensor in plain.state.groups["model"].items():
        assert torch.equal(prox.state.groups["model"][name], tensor)


def test_a_strong_term_holds_sites_near_the_global_model(tmp_path: Path) -> None:
    moved = []
    for mu in (0.0, 5.0):
        study = toy_study({"name": "fedprox", "mu": mu, "rounds": 1}, training={"steps": 20, "lr": 0.1})
        run = trained(study, sites(), tmp_path / str(mu))
        moved.append(sum((deployed(run, "north")[n] - s).norm() for n, s in run.bench.initial.items()))
    assert moved[1] < 0.5 * moved[0]
