"""What every maker of images at the server is: rounds that fit it over the sites, and a decoder that is a function of
seeds, so that server, owner and receiver make the same image from the same line of a list."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from polyclinic.federation.channel import Channel
from polyclinic.federation.site import Op
from polyclinic.federation.state import ServerState
from polyclinic.secure.sum import SecureSum
from polyclinic.study import Study
from polyclinic.synthesis.cells import Cells


class ImageGenerator(ABC):
    """Images by class and device from a decoder that all may see.

    Args:
        study: The study; its ``synthesis`` says how.
    """

    def __init__(self, study: Study) -> None:
        assert study.synthesis is not None
        self.study, self.synthesis = study, study.synthesis

    @abstractmethod
    def fit(self, channel: Channel, state: ServerState, sums: SecureSum, cells: Cells) -> Iterator[None]:
        """Train: one ``yield`` per finished round. In the end ``state.groups["decoder"]`` is all that ``decode`` needs.

        After a restart it is called again with the last saved state and goes on where that was; the rounds that it
        counts begin behind those that were finished before it began, ``state.scalars["fit_from"]``.
        """

    @abstractmethod
    def ops(self) -> dict[str, Op]:
        """What sites do while it is fitted."""

    @abstractmethod
    def decode(self, decoder: Mapping[str, Tensor], labels: Tensor, devices: Tensor, seeds: Tensor) -> Tensor:
        """Make images.

        Args:
            decoder: From ``fit``.
            labels: int64 ``[m]``, class.
            devices: int64 ``[m]``, place in the list of devices.
            seeds: int64 ``[m]``, not negative; the same line of the three gives the same image wherever it is made.

        Returns:
            uint8 ``[m, C, size, size]``.
        """

    def summary(self, state: ServerState) -> dict[str, Any]:
        """What the report says of it: losses by round, spent privacy."""
        return {}
