"""What is told of the weights of a matching: means over steps, and channels in groups."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polyclinic.transfer.dual_weights import Matching
from polyclinic.transfer.looks import Looks, grouped
from polyclinic.transfer.pupil import Learnt
from polyclinic.transfer.teachers import Said


def test_means_are_over_the_first_step_and_every_qth() -> None:
    matching = Matching([2], [1], "learned")
    assert matching.what is not None
    assert matching.where is not None
    maps = [torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))]
    source = matching.see([maps[0].repeat(1, 2, 1, 1)], maps)
    said = Said(maps, torch.zeros(4, 0), torch.zeros(4, 2))
    learnt = Learnt(torch.zeros(()), said, {"far": source}, {})
    looks = Looks({"far": matching}, 3)
    # With inputs of no weight, lambda is half-way, 3.025, and then at its bounds; channels part by 3 to 1.
    matching.where.layers[0].weight.data.zero_()
    for step, bias, odds in ((1, 0.0, 3.0), (2, 50.0, 9.0), (3, -50.0, 1.0), (4, 50.0, 9.0)):
        matching.where.layers[0].bias.data.fill_(bias)
        matching.what.bias[0].data[0] = torch.tensor([0.0, odds]).log().clamp(min=0)
        looks.see(step, learnt)
    table = looks.tables()["far"]
    assert table["where"] == [[pytest.approx((3.025 + 0.05) / 2, abs=1e-3)]]
    assert table["floor"] == 0.5
    assert table["channels"] == [pytest.approx([(1.5 + 1) / 2, (0.5 + 1) / 2], abs=1e-3)]
    assert Looks({"far": matching}, 3).tables() == {}


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        (torch.tensor([0.1, 0.7, 0.2]), [2.1, 0.6, 0.3]),
        (torch.arange(20) / 190, [20 * (2 * n + 0.5) / 190 for n in range(9, -1, -1)]),
    ],
)
def test_channels_are_grouped_by_their_weight(weights: Tensor, wanted: list[float]) -> None:
    assert grouped(weights).tolist() == pytest.approx(wanted)
