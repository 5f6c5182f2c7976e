"""One step of the meta-networks, as a training makes it, against automatic differentiation through the virtual step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from toy_proxies import wide

from polyclinic.study import ImageSettings, TrainingSettings
from polyclinic.transfer.kept import Kept
from polyclinic.transfer.memory import Memory
from polyclinic.transfer.meta_step import network_of
from polyclinic.transfer.natimg_settings import NatIMGFLParams
from polyclinic.transfer.pupil import Mix, Pupil
from polyclinic.transfer.teachers import Said, Shape

ALPHA, BETA, SHARES = 0.7, 0.4, {"near": 0.75, "far": 0.25}


def draws(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pupil_of_two() -> Pupil:
    """With meta-networks that are no longer at their start."""
    torch.manual_seed(0)
    network = wide(1, 2, 2, "group")
    pupil = Pupil(network, Shape.of(network, ImageSettings(size=[8, 8])), 3, "none", None, 0)
    for name, channels in (("near", [4, 3]), ("far", [2])):
        pupil.learn_from(name, channels, "learned", 1)
    for number, parameter in enumerate(pupil.meta().values()):
        parameter.data += 0.5 * draws(*parameter.shape, seed=number)
    return pupil


def optimizer(name: str) -> Any:
    return TrainingSettings(optimizer=name)  # type: ignore[arg-type]


def test_its_gradient_is_that_of_one_virtual_step(monkeypatch: pytest.MonkeyPatch) -> None:
    pupil = pupil_of_two()
    images, labels = draws(6, 1, 8, 8, seed=20), torch.tensor([0, 1, 2, 0, 1, 2])
    held, wanted = draws(5, 1, 8, 8, seed=21), torch.tensor([0, 1, 0, 1, 1])
    maps = {"near": [draws(6, 4, 8, 8, seed=22), draws(6, 3, 4, 4, seed=23)], "far": [draws(6, 2, 8, 8, seed=24)]}
    taught = {name: Said(own, torch.zeros(6, 0), torch.zeros(6, 2)) for name, own in maps.items()}
    learnt = pupil.learn(images, labels, taught, SHARES, Mix(ALPHA, BETA, 0.0, 3.0, False))
    learnt.loss.backward()  # type: ignore[no-untyped-call]

    found: list[Tensor] = []
    phi = [p for name in SHARES for p in pupil.matching[name].meta_parameters]
    monkeypatch.setattr(Kept, "step", lambda self: found.extend(p.grad.clone() for p in phi if p.grad is not None))
    meta = Memory(pupil, optimizer("adam"), 0.001, 0.01).meta_step(NatIMGFLParams(weights="learned"), BETA)
    assert meta is not None

    def judged(theta: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(pupil.network, network_of(theta), (held,)), wanted)

    meta(images, learnt.sources, SHARES, objective=judged, task=judged, seed=0)
    assert meta.done == {"jvp": 1}

    theta = {n: p.detach().requires_grad_() for n, p in pupil.named_parameters() if n.startswith(("network.", "head."))}
    seen = functional_call(pupil, theta, (images, learnt.sources))
    loss = ALPHA * F.cross_entropy(seen.classes, labels)
    for (name, share), errors in zip(SHARES.items(), seen.errors, strict=True):
        products = pupil.matching[name].products(learnt.sources[name], [])
        loss = loss + BETA * share * (errors * products).sum((1, 2)).mean()
    slopes = torch.autograd.grad(loss, list(theta.values()), create_graph=True, materialize_grads=True)
    moved = {name: value - 0.05 * slope for (name, value), slope in zip(theta.items(), slopes, strict=True)}
    by_hand = torch.autograd.grad(judged(moved), phi)
    assert len(found) == len(by_hand)
    for ours, theirs in zip(found, by_hand, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize(("name", "xi", "rate"), [("adam", None, 0.05), ("sgd", None, 0.002), ("sgd", 0.3, 0.3)])
def test_how_far_a_virtual_step_goes(name: str, xi: float | None, rate: float) -> None:
    params = NatIMGFLParams(weights="learned", xi=xi)
    meta = Memory(pupil_of_two(), optimizer(name), 0.002, 0.01).meta_step(params, BETA)
    assert meta is not None
    assert meta.rate == rate
