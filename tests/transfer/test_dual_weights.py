"""The matching loss against loops over pairs, channels and pixels."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from polyclinic.transfer.dual_weights import Matching, Weights

MODES: tuple[Weights, ...] = ("learned", "uniform", "layer-only", "channel-only", "attention")
SOURCE, TARGET = (3, 5), (4, 2, 6)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def maps(channels: tuple[int, ...], sides: tuple[int, ...], seed: int) -> list[Tensor]:
    return [draws(7, c, s, s, seed=seed + i) for i, (c, s) in enumerate(zip(channels, sides, strict=True))]


def example(weights: Weights, seed: int = 0) -> tuple[Matching, list[Tensor], list[Tensor]]:
    torch.manual_seed(seed)
    made = Matching(SOURCE, TARGET, weights).double()
    return made, maps(SOURCE, (8, 4), 10), maps(TARGET, (6, 4, 2), 20)


def stirred(made: Matching) -> Matching:
    """With meta-networks that are no longer at their start."""
    for parameter in made.meta_parameters:
        parameter.data += draws(*parameter.shape, seed=parameter.numel()) * 0.5
    return made


def standardised(part: Tensor) -> Tensor:
    columns = part.transpose(0, 1).flatten(1)
    mean, deviation = columns.mean(1), columns.std(1, unbiased=False)
    return (part - mean[:, None, None]) / deviation[:, None, None]


def pair_error(made: Matching, source: list[Tensor], target: list[Tensor], m: int, n: int) -> Tensor:
    """``[B, c]``: the squared error of one pair, from the definition."""
    wanted = F.interpolate(standardised(source[m]), target[n].shape[2:], mode="bilinear", align_corners=False)
    conv = made.regressors[n]
    before = sum(SOURCE[:m])
    weight = conv.weight[before : before + SOURCE[m]]
    bias = conv.bias[before : before + SOURCE[m]]
    predicted = torch.einsum("oc,bchw->bohw", weight, target[n]) + bias[:, None, None]
    return (predicted - wanted).square().mean((2, 3))


def test_uniform_is_the_mean_of_pair_losses() -> None:
    made, source, target = example("uniform")
    pairs = [pair_error(made, source, target, m, n).mean() for m in range(2) for n in range(3)]
    with torch.no_grad():
        found = made(made.see(source, target), target)
        wanted = torch.stack(pairs).mean()
    assert math.isclose(float(found), float(wanted), rel_tol=1e-12)


@pytest.mark.parametrize("weights", ["learned", "layer-only", "channel-only"])
def test_at_first_channels_count_alike_and_pairs_about_one(weights: Weights) -> None:
    made, source, target = example(weights)
    seen = made.see(source, target)
    products = made.products(seen, target) * 6
    if made.what is not None:
        what = made.what(seen.means)
        for part in what.split(SOURCE, 2):
            assert torch.equal(part, torch.full_like(part, 1 / part.shape[2]))
    if made.where is not None:
        where = made.where(seen.means)
        assert where.shape == (7, 3, 2)
        assert (where - 1).abs().max() < 0.05
    torch.testing.assert_close(products.sum(2).mean(), torch.tensor(2.0).double(), rtol=0.05, atol=0)
    flat, _, _ = example("uniform")
    flat.load_state_dict(made.state_dict(), strict=False)
    torch.testing.assert_close(made(seen, target), flat(seen, target), rtol=0.05, atol=0)


def test_learned_weights_are_the_formula_written_out() -> None:
    made, source, target = example("learned")
    stirred(made)
    assert made.what is not None
    assert made.where is not None
    total = 0.0
    for m in range(2):
        g = standardised(source[m]).mean((2, 3))
        units = min(64, SOURCE[m])
        for n in range(3):
            narrow = made.what.narrow[m].weight[n * units : (n + 1) * units]
            what = ((g @ narrow.T).relu() @ made.what.wide[m][n] + made.what.bias[m][n]).softmax(1)
            layer = made.where.layers[m]
            where = 0.05 + 5.95 / (1 + (-(g @ layer.weight[n] + layer.bias[n])).exp())
            total += float((where * (what * pair_error(made, source, target, m, n)).sum(1)).detach().mean()) / 6
    assert math.isclose(float(made(made.see(source, target), target).detach()), total, rel_tol=1e-10)


@pytest.mark.parametrize("weights", MODES)
def test_a_source_a_hundred_times_as_large_is_the_same(weights: Weights) -> None:
    made, source, target = example(weights)
    stirred(made)
    source[0][:, 1] = 0.25  # a channel that says nothing
    large = [100 * source[0], source[1]]
    one, hundred = (made(made.see(part, target), target) for part in (source, large))
    torch.testing.assert_close(one, hundred, rtol=1e-9, atol=0)


def test_all_pairs_twice_is_the_same() -> None:
    made, source, target = example("learned")
    stirred(made)
    twice = Matching(SOURCE * 2, TARGET, "learned").double()
    for ours, theirs in zip(twice.regressors, made.regressors, strict=True):
        ours.weight.data, ours.bias.data = (torch.cat([t, t]) for t in (theirs.weight, theirs.bias))
    assert twice.what is not None
    assert twice.where is not None
    assert made.what is not None
    assert made.where is not None
    for ours, theirs in ((twice.what, made.what), (twice.where, made.where)):
        for name, parameter in ours.named_parameters():
            field, index, *rest = name.split(".")
            parameter.data = theirs.get_parameter(".".join([field, str(int(index) % 2), *rest])).data
    found = twice(twice.see(source * 2, target), target)
    torch.testing.assert_close(found, made(made.see(source, target), target), rtol=1e-10, atol=0)


@pytest.mark.parametrize("weights", MODES)
def test_gradients_reach_target_and_regressors_never_source_or_meta_networks(weights: Weights) -> None:
    made, source, target = example(weights)
    source, target = [t.requires_grad_() for t in source], [t.requires_grad_() for t in target]
    made(made.see(source, target), target).backward()
    assert all(t.grad is None for t in source)
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in target)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.regressors.parameters())
    assert all(p.grad is None for p in made.meta_parameters)
    if made.attention is not None:
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in made.attention.parameters())
    joint = {id(p) for p in [*made.meta_parameters, *made.joint_parameters]}
    assert joint == {id(p) for p in made.parameters()}


def test_attention_shares_out_each_source_map_among_target_maps() -> None:
    made, source, target = example("attention")
    seen = made.see(source, target)
    table = made.summary(seen, target)["where"]
    assert table.shape == (2, 3)
    torch.testing.assert_close(table.mean(1), torch.ones(2).double())
    even, _, _ = example("uniform")
    even.load_state_dict(made.state_dict(), strict=False)
    assert not torch.isclose(made(seen, target), even(seen, target), rtol=1e-9)


def test_vectors_are_maps_of_one_pixel() -> None:
    made, source, target = example("learned")
    stirred(made)
    flat = [[part.mean((2, 3)) for part in side] for side in (source, target)]
    square = [[part[:, :, None, None] for part in side] for side in flat]
    found, wanted = (made(made.see(s, t), t) for s, t in (flat, square))
    assert torch.equal(found, wanted)


def test_where_stays_within_its_bounds_and_a_neglected_pair_can_come_back() -> None:
    made, source, target = example("layer-only")
    assert made.where is not None
    biases = [layer.bias for layer in made.where.layers]
    for bias in biases:
        bias.data.fill_(-6)
    seen = made.see(source, target)
    where = made.where(seen.means)
    assert (where > 0.05).all()
    assert (where < 0.1).all()
    assert float(made.summary(seen, target)["floor"]) == 1
    assert float(made(seen, target)) > 0
    for slope in torch.autograd.grad(where.sum(), biases):
        # 7 images, each with the sigmoid's slope there: 5.95 e⁻⁶ / (1 + e⁻⁶)², and the little that u·g adds.
        torch.testing.assert_close(slope, torch.full_like(slope, 7 * 5.95 * 0.0024665), rtol=0.1, atol=0)
    for bias in biases:
        bias.data.fill_(9)
    assert (made.where(seen.means) < 6).all()
    assert (made.where(seen.means) > 5.9).all()


def test_entropy_is_one_for_even_channels_and_falls_as_they_part() -> None:
    made, source, target = example("channel-only")
    seen = made.see(source, target)
    torch.testing.assert_close(made.summary(seen, target)["entropy"], torch.ones(2, 3).double())
    assert made.what is not None
    made.what.bias[0].data[1, 0] = 50.0  # one channel takes all
    entropy = made.summary(seen, target)["entropy"]
    assert float(entropy[0, 1]) < 1e-6
    torch.testing.assert_close(entropy[1], torch.ones(3).double())


def test_sizes_are_those_of_the_fact_sheet() -> None:
    # A ResNet-34 teaches a ResNet-18, and a MobileNetV2: section 3.7.
    levels = (64, 128, 256, 512)
    made = Matching(levels, levels, "learned")
    assert made.what is not None
    assert made.where is not None
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in made.named_children()}
    assert count == {"regressors": 925_440, "what": 495_360, "where": 3_856}
    small = Matching(levels, (24, 32, 96, 320), "uniform")
    assert sum(p.numel() for p in small.parameters()) == 456_960


def test_pooled_vectors_are_matched_with_the_targets_means() -> None:
    """By hand: vectors 0 and 2 are -1 and 1 when standardised; both of the target's means are 2, its pixels are not."""
    made = Matching([1], [1], "uniform")
    torch.nn.init.ones_(made.regressors[0].weight)
    torch.nn.init.zeros_(made.regressors[0].bias)
    target = torch.tensor([[[[1.0, 3.0]]], [[[0.0, 4.0]]]], requires_grad=True)
    source = made.see([torch.tensor([[0.0], [2.0]])], [target])
    torch.testing.assert_close(made(source, [target]), torch.tensor(((2 + 1) ** 2 + (2 - 1) ** 2) / 2))
    torch.testing.assert_close(made.errors(source, [target]), torch.tensor([[[9.0]], [[1.0]]]))
    (slope,) = torch.autograd.grad(made(source, [target]), target)
    # Of ((mean - goal)^2) / 2 by each of two pixels.
    torch.testing.assert_close(slope.flatten(1), torch.tensor([[1.5, 1.5], [0.5, 0.5]]))


@pytest.mark.parametrize("weights", MODES)
def test_of_a_pooled_source_nothing_depends_on_where_things_are_in_the_target(weights: Weights) -> None:
    made, source, target = example(weights)
    vectors = [part.mean((2, 3)) for part in source]
    flat = [part.mean((2, 3), keepdim=True).expand_as(part) for part in target]
    stirred(made)
    found = [(made.see(vectors, maps), maps) for maps in (target, flat)]
    for ask in (made.forward, made.errors, lambda *said: made.summary(*said)["where"]):
        torch.testing.assert_close(*(ask(*said) for said in found))
    assert not torch.allclose(*(made(made.see(source, maps), maps) for maps in (target, flat)))
