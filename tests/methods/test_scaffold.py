from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from toys import sites, toy_study, trained

from polyclinic.errors import StudyError


def test_control_variates_of_the_sites_average_to_the_global_one(tmp_path: Path) -> None:
    run = trained(toy_study("scaffold", training={"steps": 4}), sites(), tmp_path)
    kept = [run.channel._sites[s].state.load("control") for s in run.channel.sites]
    for name, control in run.state.groups["control"].items():
        mean = sum(k[0][name].double() for k in kept if k) / len(kept)
        torch.testing.assert_close(control.double(), mean, rtol=1e-5, atol=1e-6)
        assert control.abs().sum() > 0


@pytest.mark.parametrize("participation", [1.0, 0.5])
def test_against_the_algorithm_written_out(participation: float, tmp_path: Path) -> None:
    rounds, steps, lr = 3, 4, 0.1
    study = toy_study(
        {"name": "scaffold", "rounds": rounds, "participation": participation},
        training={"steps": steps, "lr": lr},
        aggregation={"weight": "uniform"},
    )
    data = sites()
    run = trained(study, data, tmp_path)
    wanted = _scaffold(data, run.bench.initial, study, rounds, steps, lr)
    for name, tensor in wanted.items():
        torch.testing.assert_close(run.state.groups["model"][name].double(), tensor, rtol=1e-4, atol=1e-5)


def _scaffold(data, start, study, rounds, steps, lr):  # type: ignore[no-untyped-def]
    """Algorithm 1, option II, in float64, with full batches, independent of the code under test."""
    from polyclinic.methods.base import draw_cohort

    names = ["1.weight", "1.bias"]
    x = {n: start[n].double() for n in names}
    c = {n: torch.zeros_like(t) for n, t in x.items()}
    own = {s: {n: torch.zeros_like(t) for n, t in x.items()} for s in data}
    for number in range(1, rounds + 1):
        cohort = draw_cohort(study, sorted(data), number)
        ends, changes = [], []
        for site in cohort:
            inputs = ((data[site].images[data[site].splits["train"]].double() - 0.5) / 0.25).flatten(1)
            targets = data[site].labels("train")
            y = {n: t.clone() for n, t in x.items()}
            for _ in range(steps):
                leaves = [y[n].clone().requires_grad_() for n in names]
                loss = F.cross_entropy(inputs @ leaves[0].T + leaves[1], targets)
                for n, g in zip(names, torch.autograd.grad(loss, leaves), strict=True):
                    y[n] = y[n] - lr * (g - own[site][n] + c[n])
            new = {n: own[site][n] - c[n] + (x[n] - y[n]) / (steps * lr) for n in names}
            changes.append({n: new[n] - own[site][n] for n in names})
            own[site] = new
            ends.append(y)
        x = {n: sum(y[n] for y in ends) / len(ends) for n in names}
        c = {n: c[n] + sum(d[n] for d in changes) / len(data) for n in names}
    return x


@pytest.mark.parametrize(
    "training", [{"optimizer": "adam"}, {"momentum": 0.9}, {"weight_decay": 0.1}, {"clip": 1.0}], ids=str
)
def test_other_optimizers_are_refused_with_what_works(training: dict[str, object]) -> None:
    with pytest.raises(StudyError, match=r"scaffold.*sgd with momentum 0.*fedprox"):
        toy_study("scaffold", training=training)
