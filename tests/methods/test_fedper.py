from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_contract import CNN
from toys import deployed, enlarged, sites, toy_study, trained, two_layers

from polyclinic.errors import StudyError
from polyclinic.federation.message import Message
from polyclinic.methods.fedper import body_names, head_layers
from polyclinic.models.registry import build_model
from polyclinic.results import RunFolder
from polyclinic.runner import Run, Silent
from polyclinic.study import ImageSettings, ModelSettings, TaskSettings

NAMES = ("1.weight", "1.bias", "2.weight", "2.bias")


@pytest.mark.parametrize("method", ["fedper", "fedrep"])
def test_the_head_is_never_sent_either_way_and_differs_between_sites(method: str, tmp_path: Path) -> None:
    study = toy_study(method, model=CNN, data={"image": {"size": [8, 8]}}, evaluation={"every": 1})
    RunFolder(tmp_path).create(study)
    run = Run(study, enlarged(8), RunFolder(tmp_path), Silent())
    seen: set[str] = set()
    inner = run.channel.stream

    def watched(op: str, messages: dict[str, Message]) -> Any:
        for message in messages.values():
            seen.update(name.partition("/")[2] for name in message.arrays)
        for site, reply in inner(op, messages):
            seen.update(name.partition("/")[2] for name in reply.arrays)
            yield site, reply

    run.channel.stream = watched  # type: ignore[method-assign, assignment]
    run.train()
    north, south = deployed(run, "north"), deployed(run, "south")
    assert seen == north.keys() - {"head.weight", "head.bias"}
    for name in north:
        assert torch.equal(north[name], south[name]) == (not name.startswith("head."))


def test_two_rounds_by_hand(tmp_path: Path) -> None:
    """Every site makes one full-batch step of both layers; only the first layer is averaged, by images."""
    data = sites()
    run = trained(toy_study({"name": "fedper", "rounds": 2}), data, tmp_path)
    start = run.bench.initial
    body = [start[n] for n in NAMES[:2]]
    heads = {site: [start[n] for n in NAMES[2:]] for site in data}
    images = {site: len(own.splits["train"]) for site, own in data.items()}
    for _ in range(2):
        ends = {}
        for site, own in data.items():
            values = [t.clone().requires_grad_() for t in (*body, *heads[site])]
            inputs = ((own.images[own.splits["train"]] - 0.5) / 0.25).flatten(1)
            hidden = inputs @ values[0].T + values[1]
            loss = F.cross_entropy(hidden @ values[2].T + values[3], own.labels("train"))
            moved = [(t - 0.1 * g).detach() for t, g in zip(values, torch.autograd.grad(loss, values), strict=True)]
            ends[site], heads[site] = moved[:2], moved[2:]
        body = [sum(images[s] * ends[s][i] for s in data) / sum(images.values()) for i in range(2)]
    assert list(run.state.groups["model"]) == list(NAMES[:2])
    for site in data:
        for name, wanted in zip(NAMES, (*body, *heads[site]), strict=True):
            torch.testing.assert_close(deployed(run, site)[name], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "size", "kind", "head"),
    [
        ("small-cnn", [16, 16], "multi-class", {"head.weight", "head.bias"}),
        ("densenet3d", [32, 32, 32], "multi-class", {"class_layers.out.2.weight", "class_layers.out.2.bias"}),
        ("unet", [16, 16], "segmentation", {"final_conv.weight", "final_conv.bias"}),
        (
            "unet-2.5d",
            [32, 32, 32],
            "segmentation",
            {f"views.{view}.final_conv.{leaf}" for view in range(3) for leaf in ("weight", "bias")},
        ),
    ],
)
def test_the_last_layer_is_the_head(name: str, size: list[int], kind: Any, head: set[str]) -> None:
    model = build_model(
        ModelSettings(name=name), TaskSettings(kind=kind, classes=["a", "b"]), ImageSettings(size=size), seed=0
    )
    floats = {n for n in model.state_dict() if not n.endswith("num_batches_tracked")}
    assert floats - set(body_names(model, "batch")) == head


def test_a_network_or_a_study_names_other_heads(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({view: two_layers(1, 2, 2, "batch") for view in "abc"})
    assert head_layers(model) == ["c.2"]
    model.head_layers = ["a.2", "b.2", "c.2"]
    assert body_names(model, "batch") == [f"{view}.1.{leaf}" for view in "abc" for leaf in ("weight", "bias")]
    assert head_layers(model, ["a"]) == ["a"]
    run = trained(toy_study({"name": "fedper", "head": ["1"]}), sites(), tmp_path)
    assert list(run.state.groups["model"]) == ["2.weight", "2.bias"]


def test_heads_that_cannot_be() -> None:
    model = two_layers(1, 2, 2, "batch")
    with pytest.raises(StudyError, match=r"no layer 'haed'.*head"):
        head_layers(torch.nn.ModuleDict({"head": model}), ["haed"])
    with pytest.raises(StudyError, match=r"\(1, 2\) is the whole network.*local"):
        body_names(model, "batch", ["1", "2"])
