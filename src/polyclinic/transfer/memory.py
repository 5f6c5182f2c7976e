"""What a pupil remembers between rounds: all that trains beside its network, the optimizers of it, and statistics."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyclinic.study import TrainingSettings
from polyclinic.training import make_optimizer
from polyclinic.transfer.kept import Kept
from polyclinic.transfer.meta_step import MetaStep
from polyclinic.transfer.natimg_settings import NatIMGFLParams
from polyclinic.transfer.pupil import Pupil

_META_EPS = 1e-12
"""Adam's, for the meta-networks. Their gradients are products of two small ones, down to 1e-9: the usual 1e-8 would
hold them still, and a weight decay, as Jang et al. (ICML 2019) have it, would be all that moves them."""
_VIRTUAL = 0.05
"""Size of a virtual step where the optimizer is no plain gradient descent, whose rate would say something."""


class Memory:
    """Optimizers of what trains beside a pupil's network, which go on from round to round.

    Args:
        pupil: With all its matchings.
        settings: The study's training: optimizer and clipping of head, judge and regressors.
        lr: Their learning rate in this round.
        meta_lr: That of the meta-networks' Adam.

    Attributes:
        beside: Head, judge, regressors, attention.
        meta: Meta-networks.
    """

    def __init__(self, pupil: Pupil, settings: TrainingSettings, lr: float, meta_lr: float) -> None:
        self._pupil, self._settings, self._lr = pupil, settings, lr
        self.beside = Kept(pupil.beside(), lambda moved: make_optimizer(moved, settings, lr), settings.clip)
        self.meta = Kept(pupil.meta(), lambda moved: torch.optim.Adam(moved, lr=meta_lr, eps=_META_EPS, fused=True))

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what ``tensors`` gave; what it does not hold is as it was made."""
        self.beside.load(tensors)
        self.meta.load(tensors)
        own = self._pupil.statistics.tensors
        own |= {name: tensors[key].clone() for name in own if (key := f"statistics/{name}") in tensors}

    def tensors(self) -> dict[str, Tensor]:
        """Copies of everything."""
        statistics = {f"statistics/{name}": t.clone() for name, t in self._pupil.statistics.tensors.items()}
        return {**self.beside.tensors(), **self.meta.tensors(), **statistics}

    def meta_step(self, params: NatIMGFLParams, beta: float) -> MetaStep | None:
        """How the meta-networks learn; None where there are none."""
        if not self._pupil.meta():
            return None
        rate = params.xi or (self._lr if self._settings.optimizer == "sgd" else _VIRTUAL)
        return MetaStep(self._pupil, params.hypergradient, beta, rate, self.meta)
