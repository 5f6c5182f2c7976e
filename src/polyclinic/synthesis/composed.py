"""A method with an exchange of samples: the method's own rounds, and the last layer re-calibrated where asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

from torch import nn

from polyclinic.data.dataset import SiteData
from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message
from polyclinic.federation.networks import Networks
from polyclinic.federation.site import Op, Site
from polyclinic.federation.state import ServerState
from polyclinic.methods.base import Method
from polyclinic.models.registry import start_model
from polyclinic.secure.sum import SecureSum
from polyclinic.synthesis.generators.features import FeatureGaussians, check_bias


class WithFeatureGaussians(Method):
    """Any method whose sites start from a global model with its last layer; training is not touched.

    Only rounds that end with a re-calibration can be chosen, since others would be judged with another last layer.

    Args:
        inner: The method.
    """

    def __init__(self, inner: Method) -> None:
        super().__init__(inner.study)
        self.inner, self.personal, self.simulation_only = inner, inner.personal, inner.simulation_only  # type: ignore[misc]
        synthesis = self.study.synthesis
        assert synthesis is not None
        self.gaussians = FeatureGaussians(self.study, synthesis.of_kind("features"))

    @cached_property
    def networks(self) -> Networks:
        """Those of the method."""
        return self.inner.networks

    def server(self, channel: Channel, state: ServerState, sums: SecureSum) -> Iterator[None]:
        """The method's rounds; ``state.groups["calibrated"]`` is the newest last layer."""
        network = start_model(self.study)
        check_bias(network)
        for _ in self.inner.server(channel, state, sums):
            if self.gaussians.due(state.finished + 1):
                model = self.inner.deployment(state).group("model")
                state.groups["calibrated"] = self.gaussians.calibrated(channel, sums, model, network)
            yield

    def ops(self) -> dict[str, Op]:
        """The method's and those of the Gaussians."""
        return {**self.inner.ops(), **self.gaussians.ops()}

    def ready(self, number: int) -> bool:
        """After a re-calibration."""
        return self.inner.ready(number) and self.gaussians.due(number)

    def check_networks(self, networks: Mapping[str, nn.Module]) -> None:
        """As the method."""
        self.inner.check_networks(networks)

    def check_data(self, data: SiteData) -> None:
        """As the method."""
        self.inner.check_data(data)

    def shared(self, model: nn.Module) -> list[str]:
        """As the method."""
        return self.inner.shared(model)

    def deployment(self, state: ServerState) -> Message:
        """The method's, with the re-calibrated last layer."""
        message = self.inner.deployment(state)
        calibrated = state.groups.get("calibrated", {})
        groups = {group: message.group(group) for group in message.groups()}
        groups["model"] = groups["model"] | {n: t for n, t in calibrated.items() if n in groups["model"]}
        return Message.pack(groups, **message.scalars)

    def deploy(self, site: Site, message: Message) -> None:
        """As the method."""
        self.inner.deploy(site, message)
