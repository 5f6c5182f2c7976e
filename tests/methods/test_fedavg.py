from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from toys import IMAGES, deployed, sites, toy_study, trained

from polyclinic.methods.base import draw_cohort
from polyclinic.methods.fedavg import add_update
from polyclinic.methods.fedproto import kept_where_missing


def _pooled_descent(rounds: int, lr: float, run: object) -> dict[str, torch.Tensor]:
    """Plain gradient descent on all training images, written out."""
    start = run.bench.initial  # type: ignore[attr-defined]
    weight, bias = (start[n].clone().requires_grad_() for n in ("1.weight", "1.bias"))
    parts = list(sites().values())
    inputs = torch.cat([(d.images[d.splits["train"]] - 0.5) / 0.25 for d in parts]).flatten(1)
    targets = torch.cat([d.labels("train") for d in parts])
    for _ in range(rounds):
        loss = F.cross_entropy(inputs @ weight.T + bias, targets)
        gradients = torch.autograd.grad(loss, (weight, bias))
        with torch.no_grad():
            weight -= lr * gradients[0]
            bias -= lr * gradients[1]
    return {"1.weight": weight.detach(), "1.bias": bias.detach()}


def test_one_full_batch_step_a_round_is_pooled_gradient_descent(tmp_path: Path) -> None:
    run = trained(toy_study("fedavg"), sites(), tmp_path)
    for name, wanted in _pooled_descent(3, 0.1, run).items():
        torch.testing.assert_close(run.state.groups["model"][name], wanted, rtol=1e-5, atol=1e-6)


def test_pooled_is_pooled_gradient_descent(tmp_path: Path) -> None:
    run = trained(toy_study("pooled"), sites(), tmp_path)
    for name, wanted in _pooled_descent(3, 0.1, run).items():
        torch.testing.assert_close(run.state.groups["model"][name], wanted, rtol=1e-5, atol=1e-6)


def test_server_learning_rate_scales_the_mean_update(tmp_path: Path) -> None:
    whole = trained(toy_study({"name": "fedavg", "rounds": 1}), sites(), tmp_path / "a")
    half = trained(toy_study({"name": "fedavg", "rounds": 1, "server_lr": 0.5}), sites(), tmp_path / "b")
    for name, start in whole.bench.initial.items():
        step = whole.state.groups["model"][name] - start
        torch.testing.assert_close(half.state.groups["model"][name], start + 0.5 * step)


@pytest.mark.parametrize(("kind", "weights"), [("images", IMAGES), ("uniform", dict.fromkeys(IMAGES, 1))])
def test_weights_of_the_sites(kind: str, weights: dict[str, int], tmp_path: Path) -> None:
    alone = {n: trained(toy_study({"name": "local", "rounds": 1}), sites(), tmp_path / "l") for n in IMAGES}
    run = trained(
        toy_study({"name": "fedavg", "rounds": 1}, aggregation={"weight": kind}), sites(), tmp_path / "fedavg"
    )
    for name in run.bench.initial:
        mean = sum(w * deployed(alone[site], site)[name].double() for site, w in weights.items()) / sum(
            weights.values()
        )
        torch.testing.assert_close(run.state.groups["model"][name], mean.float())


def test_participation_draws_a_share_of_the_sites_anew_each_round() -> None:
    study = toy_study({"name": "fedavg", "participation": 0.5})
    roster = [f"site{i}" for i in range(10)]
    cohorts = [draw_cohort(study, roster, number) for number in range(1, 50)]
    assert all(len(c) == 5 and c == sorted(set(c)) for c in cohorts)
    assert len({tuple(c) for c in cohorts}) > 20
    assert {site for c in cohorts for site in c} == set(roster)
    assert draw_cohort(study, roster[::-1], 7) == draw_cohort(study, roster, 7)
    assert len(draw_cohort(toy_study({"name": "fedavg", "participation": 0.01}), roster, 1)) == 1


def test_only_the_cohort_trains(tmp_path: Path) -> None:
    run = trained(toy_study({"name": "fedavg", "participation": 0.34, "rounds": 4}), sites(), tmp_path)
    heard = [sum(s["loss"] is not None for s in record["sites"].values()) for record in run.records]
    assert heard == [1, 1, 1, 1]


def test_a_sum_on_another_device_is_added_where_the_model_is() -> None:
    """Hidden sums come back on the CPU. The meta device stands for a GPU; it refuses mixed devices as that does."""
    with pytest.raises(RuntimeError, match="device"):
        torch.add(torch.ones(2, device="meta"), torch.ones(2))
    model = {"weight": torch.ones(2, dtype=torch.float16, device="meta")}
    found = add_update(model, {"weight": torch.ones(2, dtype=torch.float64)})["weight"]
    assert (found.device.type, found.dtype) == ("meta", torch.float16)
    last = {"means": torch.ones(3, 2), "held": torch.tensor([True, False, True])}
    kept = kept_where_missing({name: tensor.to("meta") for name, tensor in last.items()}, last)
    assert {tensor.device.type for tensor in kept.values()} == {"meta"}
