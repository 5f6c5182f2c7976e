from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_contract import CNN
from toys import deployed, enlarged, sites, toy_study, trained

from polyclinic.models.normalisation import running_statistics

NAMES = ("1.weight", "1.bias", "2.weight", "2.bias")


@pytest.mark.parametrize("length", [{"head_epochs": 3}, {"head_epochs": 9, "head_steps": 3}])
def test_two_rounds_by_hand(length: dict[str, int], tmp_path: Path) -> None:
    """With full batches: three steps of the head on the received body, then one of the body below the new head."""
    data = sites()
    run = trained(toy_study({"name": "fedrep", "rounds": 2, **length}), data, tmp_path)
    body = [run.bench.initial[n] for n in NAMES[:2]]
    heads = {site: [run.bench.initial[n] for n in NAMES[2:]] for site in data}
    images = {site: len(own.splits["train"]) for site, own in data.items()}
    for _ in range(2):
        ends = {}
        for site, own in data.items():
            inputs = ((own.images[own.splits["train"]] - 0.5) / 0.25).flatten(1)
            values = [*body, *heads[site]]
            for moved in ((2, 3), (2, 3), (2, 3), (0, 1)):
                leaves = [t.clone().requires_grad_() for t in values]
                loss = F.cross_entropy(
                    (inputs @ leaves[0].T + leaves[1]) @ leaves[2].T + leaves[3], own.labels("train")
                )
                gradients = torch.autograd.grad(loss, leaves)
                values = [t - 0.1 * gradients[i] if i in moved else t for i, t in enumerate(values)]
            ends[site], heads[site] = values[:2], values[2:]
        body = [sum(images[s] * ends[s][i] for s in data) / sum(images.values()) for i in range(2)]
    assert list(run.state.groups["model"]) == list(NAMES[:2])
    for site in data:
        for name, wanted in zip(NAMES, (*body, *heads[site]), strict=True):
            torch.testing.assert_close(deployed(run, site)[name], wanted, rtol=1e-5, atol=1e-6)


def test_statistics_stand_still_while_the_head_is_trained(tmp_path: Path) -> None:
    """One round: the body starts alike, so with as many of its own steps its statistics do not depend on the head's."""
    found = []
    for steps in (1, 7):
        study = toy_study(
            {"name": "fedrep", "rounds": 1, "head_steps": steps},
            model=CNN,
            data={"image": {"size": [8, 8]}},
            training={"steps": 1, "batch_size": 4},
        )
        run = trained(study, enlarged(8), tmp_path / str(steps))
        statistics = running_statistics(run.bench.model) & run.state.groups["model"].keys()
        found.append({name: run.state.groups["model"][name] for name in statistics})
        assert any(not torch.equal(found[-1][name], run.bench.initial[name]) for name in statistics)
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name])
