from pathlib import Path

import torch
import torch.nn.functional as F
from toys import deployed, sites, toy_study, trained


def test_the_global_model_is_fedavgs(tmp_path: Path) -> None:
    plain = trained(toy_study("fedavg", training={"batch_size": 5}), sites(), tmp_path / "a")
    ditto = trained(toy_study("ditto", training={"batch_size": 5}), sites(), tmp_path / "b")
    for name, tensor in plain.state.groups["model"].items():
        assert torch.equal(ditto.state.groups["model"][name], tensor)


def test_without_strength_the_personal_model_is_local_training(tmp_path: Path) -> None:
    alone = trained(toy_study("local"), sites(), tmp_path / "a")
    ditto = trained(toy_study({"name": "ditto", "strength": 0}), sites(), tmp_path / "b")
    for name, tensor in deployed(alone, "south").items():
        torch.testing.assert_close(deployed(ditto, "south")[name], tensor, rtol=1e-5, atol=1e-6)


def test_personal_steps_by_hand(tmp_path: Path) -> None:
    """v ← v − η (∇F(v) + λ (v − w)) with w the global model that the round began with."""
    data, lam, lr = sites(), 0.7, 0.1
    run = trained(toy_study({"name": "ditto", "strength": lam, "rounds": 2}), data, tmp_path / "two")
    first = trained(toy_study({"name": "fedavg", "rounds": 1}), data, tmp_path / "one")
    inputs = ((data["north"].images[data["north"].splits["train"]] - 0.5) / 0.25).flatten(1)
    v = [run.bench.initial[n].clone() for n in ("1.weight", "1.bias")]
    for w in (run.bench.initial, first.state.groups["model"]):
        leaves = [t.clone().requires_grad_() for t in v]
        loss = F.cross_entropy(inputs @ leaves[0].T + leaves[1], data["north"].labels("train"))
        gradients = torch.autograd.grad(loss, leaves)
        anchors = (w["1.weight"], w["1.bias"])
        v = [t - lr * (g + lam * (t - a)) for t, g, a in zip(v, gradients, anchors, strict=True)]
    torch.testing.assert_close(deployed(run, "north")["1.weight"], v[0])
    torch.testing.assert_close(deployed(run, "north")["1.bias"], v[1])
