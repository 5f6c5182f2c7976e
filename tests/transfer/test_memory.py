"""What trains beside a pupil's network: meta-networks follow their gradient alone, however small it is."""

from __future__ import annotations

import torch
from toy_proxies import wide

from polyclinic.study import ImageSettings, TrainingSettings
from polyclinic.transfer.memory import Memory
from polyclinic.transfer.pupil import Pupil
from polyclinic.transfer.teachers import Shape


def test_meta_networks_follow_gradients_of_any_size_and_nothing_else() -> None:
    network = wide(1, 2, 2, "group")
    pupil = Pupil(network, Shape.of(network, ImageSettings(size=[8, 8])), 3, "mmd", None, 0)
    pupil.learn_from("central", [4, 5], "learned", 1)
    memory = Memory(pupil, TrainingSettings(optimizer="adam"), lr=0.1, meta_lr=0.01)
    before = {name: parameter.detach().clone() for name, parameter in pupil.meta().items()}
    for _ in range(10):
        for name, parameter in pupil.meta().items():
            parameter.grad = torch.zeros_like(parameter)
            if name.endswith("where.layers.0.bias"):
                parameter.grad[0], parameter.grad[1] = 1e-9, -1e-9
        memory.meta.step()
    for name, parameter in pupil.meta().items():
        moved = torch.zeros_like(parameter)
        if name.endswith("where.layers.0.bias"):
            moved[0], moved[1] = -0.1, 0.1  # Adam: the rate, whatever the size of a steady gradient
        torch.testing.assert_close(parameter.detach() - before[name], moved, rtol=0.01, atol=0)
