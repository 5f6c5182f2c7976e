"""Parameters that train beside a network and are remembered between rounds, the state of their optimizer with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

_OF = "@"
"""Between the name of a parameter and what its optimizer remembers of it."""


class Kept:
    """Named parameters and an optimizer of their own.

    Args:
        parameters: By name; there may be none.
        make: The optimizer for a list of parameters.
        clip: Largest norm of their gradient, all together; None: any.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        make: Callable[[list[Tensor]], torch.optim.Optimizer],
        clip: float | None = None,
    ) -> None:
        self._parameters = dict(parameters)
        self._clip = clip
        self._optimizer = make(list(self._parameters.values())) if parameters else None

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what ``tensors`` gave before; parameters that are not in it stay as they are."""
        for name, parameter in self._parameters.items():
            if name not in tensors:
                continue
            parameter.copy_(tensors[name])
            prefix = f"{name}{_OF}"
            known = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if known and self._optimizer is not None:
                self._optimizer.state[parameter] = {key: value.clone() for key, value in known.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Copies of all values, and of what the optimizer remembers of each."""
        found = {}
        for name, parameter in self._parameters.items():
            found[name] = parameter.detach().clone()
            state = {} if self._optimizer is None else self._optimizer.state.get(parameter, {})
            found |= {f"{name}{_OF}{key}": value.clone() for key, value in state.items() if isinstance(value, Tensor)}
        return found

    def step(self) -> None:
        """Follow the gradients; parameters without one stand still. Gradients are gone afterwards."""
        if self._optimizer is None:
            return
        if self._clip is not None:
            nn.utils.clip_grad_norm_(list(self._parameters.values()), self._clip, foreach=True)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
