"""What a network must give at its taps is asked before anybody trains."""

from __future__ import annotations

import pytest
from torch import Tensor, nn
from toy_proxies import wide

from polyclinic.errors import StudyError
from polyclinic.study import ImageSettings
from polyclinic.transfer.teachers import Shape

IMAGE = ImageSettings(size=[8, 8])


class Tokens(nn.Module):
    """A map as ``[batch, tokens, channels]``."""

    def forward(self, values: Tensor) -> Tensor:
        return values.flatten(2).transpose(1, 2)


class Pair(nn.Module):
    """A map, twice."""

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        return values, values


class Aside(nn.Module):
    """A convolution network with modules on the side that may or may not be called."""

    def __init__(self, taps: tuple[str, ...], feature: str = "body", called: bool = True) -> None:
        super().__init__()
        self.taps, self.feature_tap, self.called = taps, feature, called
        self.body, self.tokens, self.pair = nn.Conv2d(1, 3, 3, padding=1), Tokens(), Pair()
        self.pooled, self.last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(3, 2)

    def forward(self, images: Tensor) -> Tensor:
        values = self.body(images)
        if self.called:
            self.tokens(values), self.pair(values)
        logits: Tensor = self.last(self.pooled(values))
        return logits


def test_maps_and_vectors_are_levels() -> None:
    model = Aside(("body", "pooled")).train()
    assert Shape.of(model, IMAGE) == Shape(("body", "pooled"), [3, 3], "body", 3, 2)
    assert model.training
    assert Shape.of(wide(1, 2, 2, "group"), IMAGE) == Shape(("1", "3"), [5, 5], "3", 5, 2)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Aside(("body", "tokens")), r"'tokens'.*\[1, 64, 3\].*\[batch, channels, height, width\].*another module"),
        (Aside(("body", "pair")), "'pair'.*a tuple"),
        (Aside(("body", "pair"), called=False), "'pair'.*does not call it"),
        (Aside(("body",), feature="tokens"), r"'tokens'.*feature_tap.*\[1, 64, 3\]"),
    ],
)
def test_what_is_neither_is_refused_by_name_and_shape(model: nn.Module, words: str) -> None:
    with pytest.raises(StudyError, match=words):
        Shape.of(model, IMAGE)
