"""FedBN: normalisation layers stay at the site, everything else is averaged.

Li, Jiang, Zhang, Kamp, Dou: FedBN: federated learning on non-IID features via local batch normalization. ICLR 2021,
Algorithm 1. arXiv 2102.07623.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import nn

from polyclinic.federation.channel import Channel
from polyclinic.federation.state import ServerState
from polyclinic.methods.base import Method, MethodParams, Op
from polyclinic.methods.fedavg import UPDATE, average_rounds, train_global
from polyclinic.models.normalisation import norm_parameter_names, shared_names
from polyclinic.secure.sum import SecureSum


class FedBNParams(MethodParams):
    """Settings of fedbn."""

    name: Literal["fedbn"] = "fedbn"


class FedBN(Method):
    """No tensor of a normalisation layer, statistics or affine, ever leaves a site."""

    Params = FedBNParams
    title = "averaging all but normalisation layers"
    reference = "Li et al., ICLR 2021, arXiv 2102.07623"
    personal = True

    def server(self, channel: Channel, state: ServerState, sums: SecureSum) -> Iterator[None]:
        """As in fedavg, on fewer tensors."""
        yield from average_rounds(self, channel, state, sums)

    def ops(self) -> dict[str, Op]:
        """One op: train the received model with the site's own normalisation layers."""
        return {"train": Op(train_global, UPDATE)}

    def shared(self, model: nn.Module) -> list[str]:
        """All but normalisation tensors."""
        norms = norm_parameter_names(model)
        return [name for name in shared_names(model, self.study.model.norm) if name not in norms]
