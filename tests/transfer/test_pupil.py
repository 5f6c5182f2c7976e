"""Every pair of networks of the registry can teach and learn, and keeps what it must."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from polyclinic.models.registry import build_model
from polyclinic.study import ImageSettings, ModelSettings, TaskSettings, TrainingSettings
from polyclinic.transfer.memory import Memory
from polyclinic.transfer.meta_step import network_of
from polyclinic.transfer.natimg_settings import NatIMGFLParams
from polyclinic.transfer.pupil import Mix, Pupil
from polyclinic.transfer.teachers import NetworkTeacher, Said, Shape, VectorTeacher
from polyclinic.transfer.wire import halved, widened

NETWORKS = ("small-cnn", "small-resnet", "mobilenet", "shufflenet", "resnet18", "densenet121", "efficientnet-b0")
IMAGE = ImageSettings(size=[64, 64])
TASK = TaskSettings(classes=["a", "b"])
SETTINGS = TrainingSettings(optimizer="adam", lr=1e-3)


@cache
def network(name: str, norm: str = "batch") -> nn.Module:
    return build_model(ModelSettings(name=name, norm=norm), TASK, IMAGE, 0)


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 1, 64, 64, generator=torch.Generator().manual_seed(1))


@cache
def taught() -> dict[str, tuple[list[int], Said]]:
    found = {}
    for name in NETWORKS:
        model, shape = network(name), Shape.of(network(name), IMAGE)
        tensors = halved({n: t for n, t in model.state_dict().items() if torch.is_floating_point(t)})
        teacher = NetworkTeacher(model, tensors, shape)
        found[name] = teacher.channels, teacher.say(torch.arange(2), images())
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_learns_from_every_other(name: str) -> None:
    teachers, model = taught(), network(name).train()
    before = {n: b.clone() for n, b in model.named_buffers()}
    pupil = Pupil(model, Shape.of(model, IMAGE), 5, "mmd", None, 0)
    for teacher, (channels, _) in teachers.items():
        pupil.learn_from(teacher, channels, "learned", 0)
    said = {teacher: found for teacher, (_, found) in teachers.items()}
    shares = dict.fromkeys(said, 1 / len(said))
    learnt = pupil.learn(images(), torch.tensor([0, 1]), said, shares, Mix(1.0, 0.5, 0.5, 3.0, False))
    learnt.loss.backward()
    assert learnt.loss.isfinite()
    assert {*learnt.terms} == {"natural", "matching", "soft"}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    meta = Memory(pupil, SETTINGS, 1e-3, 1e-3).meta_step(NatIMGFLParams(weights="learned"), 0.5)
    assert meta is not None
    phi = {n: p.detach().clone() for n, p in pupil.meta().items()}
    meta(
        images(),
        learnt.sources,
        shares,
        objective=lambda theta: torch.func.functional_call(model, network_of(theta), (images(),)).square().mean(),
        task=lambda theta: theta["network." + next(n for n, _ in model.named_parameters())].sum(),
        seed=0,
    )
    assert meta.done == {"jvp": 1}
    assert any(not torch.equal(phi[n], p) for n, p in pupil.meta().items())
    # Patients' statistics never move for public images; those of public images do.
    assert all(torch.equal(before[n], b) for n, b in model.named_buffers() if "num_batches" not in n)
    assert any(not torch.equal(before[n], t) for n, t in pupil.statistics.tensors.items())
    model.zero_grad(set_to_none=True)


def test_a_memory_goes_on_bit_for_bit() -> None:
    model = network("small-cnn")
    labels, mix = torch.tensor([0, 1]), Mix(1.0, 0.5, 0.0, 3.0, False)
    channels, said = taught()["small-resnet"]

    def fresh() -> tuple[Pupil, Memory]:
        pupil = Pupil(model, Shape.of(model, IMAGE), 5, "dann", None, 0)
        pupil.learn_from("far", channels, "attention", 0)
        return pupil, Memory(pupil, SETTINGS, 1e-3, 1e-3)

    def moved(pupil: Pupil, memory: Memory) -> None:
        pupil.learn(images(), labels, {"far": said}, {"far": 1.0}, mix).loss.backward()
        memory.beside.step()

    pupil, memory = fresh()
    moved(pupil, memory)
    kept = memory.tensors()
    assert any("@exp_avg" in name for name in kept)
    moved(pupil, memory)
    again, other = fresh()
    other.load(kept)
    moved(again, other)
    wanted, found = memory.tensors(), other.tensors()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    model.zero_grad(set_to_none=True)


def test_a_teacher_uses_what_it_received_and_leaves_its_network() -> None:
    model = network("small-cnn", "group")
    shape, before = Shape.of(model, IMAGE), {n: p.clone() for n, p in model.named_parameters()}
    zero = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    said = NetworkTeacher(model, zero, shape).say(torch.arange(2), images())
    assert torch.equal(said.logits, torch.zeros(2, 2))
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert not said.logits.requires_grad


def test_vectors_are_looked_up_by_position() -> None:
    arrays = {"tap0": torch.tensor([[1.0], [2.0], [3.0]]).half(), "logits": torch.eye(3).half()}
    teacher = VectorTeacher(arrays, torch.tensor([4, 7, 9]), torch.device("cpu"))
    said = teacher.say(torch.tensor([9, 4]), images(2))
    assert torch.equal(said.maps[0], torch.tensor([[3.0], [1.0]]))
    assert torch.equal(said.logits, torch.eye(3)[[2, 0]])
    assert teacher.channels == [1]


def test_a_pupil_of_vectors_is_matched_by_its_means() -> None:
    """In its loss and in the errors of a meta-step, with values from the definition."""
    model = network("small-cnn").eval()
    shape = Shape.of(model, IMAGE)
    pupil = Pupil(model, shape, 5, "none", None, 0)
    pupil.learn_from("far", [2], "uniform", 0)
    said = Said([torch.tensor([[0.0, 5.0], [2.0, 1.0]])], torch.zeros(2, 0), torch.zeros(2, 2))
    mix = Mix(0.0, 1.0, 0.0, 3.0, False)
    with torch.no_grad():
        learnt = pupil.learn(images(), torch.tensor([0, 1]), {"far": said}, {"far": 1.0}, mix)
        means = [part.mean((2, 3)) for part in learnt.said.maps]
        wanted = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
        pairs = zip(means, pupil.matching["far"].regressors, strict=True)
        errors = torch.stack([(regressor(mean) - wanted).square() for mean, regressor in pairs], 1)
        with pupil.statistics.natural(model):
            seen = pupil(images(), learnt.sources)
    torch.testing.assert_close(learnt.terms["matching"], errors.mean())
    torch.testing.assert_close(seen.errors[0], errors)


def test_what_does_not_fit_into_sixteen_bits_travels_in_thirty_two() -> None:
    sent = halved({"small": torch.tensor([1.0, -2.5]), "large": torch.tensor([1e6])})
    assert {name: tensor.dtype for name, tensor in sent.items()} == {"small": torch.float16, "large": torch.float32}
    back = widened(sent, "cpu")
    assert torch.equal(back["small"], torch.tensor([1.0, -2.5]))
    assert torch.equal(back["large"], torch.tensor([1e6]))
