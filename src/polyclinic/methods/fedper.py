"""FedPer: the last layer stays at the site, the body below it is averaged.

Arivazhagan, Aggarwal, Singh, Choudhary: Federated learning with personalization layers. 2019. Algorithms 1 and 2.
arXiv 1912.00818.

Body and head are trained together, as one network. Gradients per local step: 1, as in fedavg; the head's bytes are
saved. Ours: which layers are the head is a setting, by default the network's last one; a site that has not trained yet
uses the head of the start weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field
from torch import nn

from polyclinic.errors import StudyError, nearest
from polyclinic.federation.channel import Channel
from polyclinic.federation.state import ServerState
from polyclinic.methods.base import Method, MethodParams, Op
from polyclinic.methods.fedavg import UPDATE, average_rounds, train_global
from polyclinic.models.normalisation import shared_names
from polyclinic.models.registry import head_name
from polyclinic.secure.sum import SecureSum


class FedPerParams(MethodParams):
    """Settings of fedper."""

    name: Literal["fedper"] = "fedper"
    head: list[str] = Field([])
    """Layers that stay at the site, by their names in the network; empty: the last one, or what the network names."""


class FedPer(Method):
    """Of the head nothing ever leaves a site, its normalisation statistics included."""

    Params = FedPerParams
    title = "averaging all but the last layer"
    reference = "Arivazhagan et al. 2019, arXiv 1912.00818"
    personal = True
    starts_global = False

    def server(self, channel: Channel, state: ServerState, sums: SecureSum) -> Iterator[None]:
        """As in fedavg, on the body."""
        yield from average_rounds(self, channel, state, sums)

    def ops(self) -> dict[str, Op]:
        """One op: train the received body with the site's own head."""
        return {"train": Op(train_global, UPDATE)}

    def shared(self, model: nn.Module) -> list[str]:
        """The body."""
        return body_names(model, self.study.model.norm, self.study.method.head)


def head_layers(model: nn.Module, layers: Sequence[str] = ()) -> list[str]:
    """Names of the layers that make the head, as ``model.get_submodule`` knows them.

    Args:
        model: A network. One with several last layers lists them in its attribute ``head_layers``.
        layers: Instead of the network's own.

    Raises:
        StudyError: The network has no such layer.
    """
    found = list(layers or getattr(model, "head_layers", ())) or [head_name(model)]
    known = [name for name, _ in model.named_modules() if name]
    for name in found:
        if name not in known:
            raise StudyError(f"the network has no layer {name!r} for its head. {nearest(name, known)}")
    return found


def body_names(model: nn.Module, norm: str, layers: Sequence[str] = ()) -> list[str]:
    """Names of the shared tensors that are not the head's, in the order of ``state_dict``.

    Raises:
        StudyError: The network has no such layer, or nothing is left to share.
    """
    head = tuple(f"{name}." for name in head_layers(model, layers))
    names = [name for name in shared_names(model, norm) if not name.startswith(head)]
    if not names:
        raise StudyError(
            f"the head ({', '.join(name[:-1] for name in head)}) is the whole network, so nothing would be shared. "
            "Name fewer layers in method.head, or use method local."
        )
    return names
