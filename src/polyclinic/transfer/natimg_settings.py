"""Settings of natimg-fl, and what they come to in a round."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from polyclinic.methods.base import MethodParams
from polyclinic.study import ModelSettings
from polyclinic.transfer.alignment import Kind
from polyclinic.transfer.dual_weights import Weights
from polyclinic.transfer.hypergradient import Scheme


class NatIMGFLParams(MethodParams):
    """Settings of natimg-fl."""

    name: Literal["natimg-fl"] = "natimg-fl"
    central: ModelSettings | None = None
    """The network of the central model; empty: the study's ``model``."""
    transport: Literal["weights", "vectors"] = "weights"
    """What travels: networks, or what they say of the natural images; then no weight leaves a site."""
    direction: Literal["both", "to-central", "to-sites"] = "both"
    """Who learns from whom. ``to-sites``: the central model knows natural images alone; soft outputs are left out."""
    weights: Weights = "uniform"
    """Of pairs of maps and of channels: both learned, all alike, one of them, or attention. Learned ones need more of a
    study than they have shown to give, so they are not the default."""
    alignment: Kind = "mmd"
    """How features of the two kinds of images are brought together; ``supcon`` takes one class an image."""
    hypergradient: Scheme = "jvp"
    """Learned weights: the cheap scheme, or the exact one of Jang et al., which takes several times as long."""
    alpha: float = Field(0.5, ge=0)
    """Weight of the natural task at the sites in the first round."""
    alpha_end: float = Field(0.2, ge=0)
    """What is left of alpha in the last round, as a share; it falls linearly."""
    gamma: float = Field(0.1, ge=0)
    """Weight of the alignment; it grows with the rounds: half of it after a tenth of them, nearly all after half."""
    beta: float = Field(0.5, ge=0)
    """Weight of D at the sites."""
    beta_server: float = Field(0.5, ge=0)
    """Weight of D at the server."""
    eta: float = Field(0.5, ge=0)
    """Weight of soft outputs at the sites."""
    eta_server: float = Field(0.5, ge=0)
    """Weight of soft outputs at the server; 0: the central model never learns the study's classes."""
    temperature: float = Field(3.0, gt=0)
    """T of soft outputs."""
    t_warm: int = Field(2, ge=1)
    """The first round in which sites learn from the central model."""
    server_steps: int = Field(200, ge=0)
    """Steps of the central model per round."""
    teachers: int = Field(4, ge=1)
    """Sites that it learns from in one step, drawn anew where more answered."""
    warmup: int = Field(0, ge=0)
    """Passes over the natural images, their labels alone, that every network makes before its first round.
    ``proxies.pretrain`` does the same for all methods of a comparison."""
    subset: int | None = Field(None, ge=2)
    """vectors: natural images of a round, drawn anew in each; empty: all."""
    q: int = Field(5, ge=1)
    """Learned weights: steps between two of theirs."""
    xi: float | None = Field(None, gt=0)
    """Learned weights: size of a virtual step; empty: the round's learning rate for sgd, 0.05 for adam."""
    meta_lr: float = Field(3e-3, ge=0)
    """Learned weights: rate of their Adam."""
    held_out: float = Field(0.1, gt=0, le=0.5)
    """Learned weights: share of a site's training images, by patients, that is not trained on but judges them."""

    @property
    def learns_weights(self) -> bool:
        """Whether there are meta-networks."""
        return self.weights in ("learned", "layer-only", "channel-only")

    @property
    def to_central(self) -> bool:
        """Whether the central model learns from sites."""
        return self.direction != "to-sites" and self.server_steps > 0 and bool(self.beta_server or self.eta_server)

    @property
    def teaches_classes(self) -> bool:
        """Whether sites that answer teach the central model the study's classes."""
        return self.to_central and self.eta_server > 0

    def to_sites(self, number: int) -> bool:
        """Whether sites learn from the central model in a round."""
        return self.direction != "to-central" and number >= self.t_warm and bool(self.beta or self.eta)

    def holds_out(self) -> bool:
        """Whether sites keep patients apart."""
        return self.learns_weights and self.beta > 0 and self.direction != "to-central"

    def alpha_of(self, number: int) -> float:
        """alpha of a round."""
        past = (number - 1) / max(self.rounds - 1, 1)
        return self.alpha * (1 - past * (1 - self.alpha_end))

    def gamma_of(self, number: int) -> float:
        """gamma of a round: ``gamma (2 / (1 + exp(−10 t / R)) − 1)`` (Ganin et al., 2016)."""
        return self.gamma * (2 / (1 + math.exp(-10 * number / self.rounds)) - 1)
