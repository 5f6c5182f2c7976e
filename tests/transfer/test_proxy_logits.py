from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from polyclinic.data.proxies import Proxies
from polyclinic.errors import SiteError
from polyclinic.federation.message import Message
from polyclinic.study import TrainingSettings
from polyclinic.transfer.proxy_logits import ProxyRound, answers, mean_answer


def public(count: int = 11) -> Proxies:
    images = torch.randint(0, 256, (count, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Proxies("made up", ["x", "y"], images, torch.arange(count) % 2, "d", 0.5, 0.25)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, 2))
    return nn.Sequential(*layers)


def test_logits_are_those_of_evaluation_in_the_order_of_the_draw_and_modes_stay() -> None:
    proxies, model = public(), network().train()
    model[1].eval()
    positions = torch.tensor([7, 2, 9, 0])
    before = [module.training for module in model.modules()]
    found = ProxyRound(proxies, positions).logits(model, 3)
    assert [module.training for module in model.modules()] == before
    wanted = model.eval()((proxies.images[positions].float() / 255 - 0.5) / 0.25)
    torch.testing.assert_close(found, wanted)
    assert not found.requires_grad


def test_a_fit_sees_the_rows_images_and_takes_plain_steps() -> None:
    proxies, model = public(), nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    positions, goal = torch.tensor([7, 2, 9, 0]), torch.randn(4, 2)
    inputs = ((proxies.images[positions].float() / 255 - 0.5) / 0.25).flatten(1)
    weight, bias = (p.detach().clone().requires_grad_() for p in model[1].parameters())
    first = (inputs[:2] @ weight.T + bias - goal[:2]).square().mean()
    slopes = torch.autograd.grad(first, (weight, bias))
    weight, bias = (p - 0.1 * g for p, g in zip((weight, bias), slopes, strict=True))
    second = (inputs[2:] @ weight.T + bias - goal[2:]).square().mean()
    slopes = torch.autograd.grad(second, (weight, bias))
    wanted = [p - 0.1 * g for p, g in zip((weight, bias), slopes, strict=True)]
    rows = [torch.tensor([0, 1]), torch.tensor([2, 3])]

    def loss(logits: Tensor, at: Tensor) -> Tensor:
        return (logits - goal[at]).square().mean()

    found = ProxyRound(proxies, positions).fit(model, loss, rows, TrainingSettings(), lr=0.1, seed=0)
    torch.testing.assert_close(list(model[1].parameters()), wanted)
    assert found == pytest.approx(float((first + second).detach()) / 2)


@dataclass
class Told:
    """A channel whose sites answer what they were given."""

    replies: dict[str, Message]
    absent: dict[str, str] = field(default_factory=dict)
    round: int = 4

    def stream(self, op: str, messages: dict[str, Message]):
        yield from self.replies.items()


def test_answers_of_unequal_shape_or_without_end_are_refused() -> None:
    def said(**arrays: Tensor) -> Message:
        return Message.pack({"answers": arrays, "other": {"x": torch.zeros(1)}})

    good = said(scores=torch.ones(3, 2))
    found = answers(Told({"a": good, "b": said(scores=3 * torch.ones(3, 2))}), "train", {})
    assert list(found) == ["a", "b"]
    assert torch.equal(mean_answer(found)["scores"], 2 * torch.ones(3, 2))
    with pytest.raises(SiteError, match=r"'b' answered with scores \[4, 2\], site 'a' with scores \[3, 2\]"):
        answers(Told({"a": good, "b": said(scores=torch.ones(4, 2))}), "train", {})
    with pytest.raises(SiteError, match=r"'b' answered with numbers that are not finite"):
        answers(Told({"a": good, "b": said(scores=torch.full((3, 2), torch.nan))}), "train", {})
    with pytest.raises(SiteError, match=r"no site answered 'train' in round 4 \(a: late\)"):
        answers(Told({}, {"a": "late"}), "train", {})
