"""What every method must do. A method joins by being listed in ``METHODS``."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import IMAGES, deployed, enlarged, resumed, sites, toy_study, trained

from polyclinic.errors import PolyclinicError, UndeclaredError
from polyclinic.federation.message import Message
from polyclinic.federation.state import ServerState
from polyclinic.methods import METHODS
from polyclinic.models.normalisation import norm_parameter_names, running_statistics
from polyclinic.results import RunFolder
from polyclinic.runner import Run, Silent

PLAIN: dict[str, dict[str, Any]] = {
    "fedprox": {"mu": 0.0},
    "fedavg-ft": {"finetune": {"steps": 0}},
    "per-fedavg": {"alpha": 0.0},
    "pfedme": {"inner_steps": 1},
    "fediic": {"margin": 0.0, "intra": 0.0, "inter": 0.0},
    "fedssg": {"synthesis": {"generator": [], "style": 0.0}},
    "fedproto": {"strength": 0.0},
    "fedtgp": {"strength": 0.0},
    "fedgh": {"head_epochs": 0},
    "fml": {"alpha": 1.0},
    "fedkd": {"strength": 0.0},
    "fedmd": {"warm_up": 0, "digest": {"epochs": 0}},
    "ds-fl": {"digest": {"epochs": 0}},
    "fccl": {"digest": {"epochs": 0}, "previous": 0.0, "pretrained": 0.0},
    "kt-pfl": {"digest": {"epochs": 0}},
    "natimg-fl": {"alpha": 0.0, "beta": 0.0, "gamma": 0.0, "eta": 0.0},
    "data-vectors": {"recipe": {"rule": {"coefficients": "mean"}, "restoration": "none"}},
}
"""Settings under which a method with a single site is plain local training."""

STILL: dict[str, dict[str, Any]] = {
    "per-fedavg": {"alpha": 0.0},
    "pfedme": {"inner_lr": 0.0},
    "creff": {"head_epochs": 0},
    "fedgh": {"head_epochs": 0},
    "feddf": {"lr": 0.0},
    "fedssg": {"synthesis": {"generator": {"name": "features", "epochs": 0}}},
}
"""Rates of a method's own, zero."""

GENTLE: dict[str, dict[str, Any]] = {"fediic": {"intra": 0.1, "inter": 0.1}}
"""Settings under which a toy's update is no larger than 16 bits carry in one round."""

_SMALL_CNN = {f"blocks.{i}.weight" for i in (0, 1, 3, 4, 6, 7, 9, 10)} | {
    f"blocks.{i}.{leaf}" for i in (1, 4, 7, 10) for leaf in ("bias", "running_mean", "running_var")
}
COMPANION = _SMALL_CNN | {"head.weight", "head.bias"}
"""Tensors of the small network that travels where networks differ."""

BESIDE = {
    "fediic": {"losses", "images"},
    "fedssg": {"count", "first", "second", "negative"},
    "fedproto": {"features", "images"},
    "fedtgp": {"means", "held"},
    "fedgh": {"means", "held"},
    "lg-fedavg": {"weight", "bias"},
    "fml": COMPANION,
    "fedkd": COMPANION,
    "heterofl": {"held"},
    "fedmd": {"scores"},
    "ds-fl": {"probabilities"},
    "fccl": {"scores"},
    "kt-pfl": {"probabilities"},
    "natimg-fl": {f"{layer}.{leaf}" for layer in (0, 4) for leaf in ("weight", "bias")},
}
"""Arrays that a method sends beside tensors of the model: numbers per class, features, a companion."""

AT_HOME = {
    "fedproto",
    "fedtgp",
    "fedgh",
    "lg-fedavg",
    "fml",
    "fedkd",
    "heterofl",
    "fedmd",
    "ds-fl",
    "fccl",
    "kt-pfl",
    "natimg-fl",
}
"""Methods that share no running statistics of a site's own network, whatever model.norm says."""

SINGLE = {"fedtgp", "fedgh", "fedkd", "fedmd", "feddf", "ds-fl", "fccl", "kt-pfl", "natimg-fl"}
"""Methods whose server needs what single sites send, so that no sum can hide it."""

NEVER_PLAIN = {"fedrep"}
"""Methods without such settings: fedrep never trains all layers together."""

METHOD = pytest.mark.parametrize("method", sorted(METHODS))
CNN = {"name": "small-cnn", "width": 4}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def end_state(run: Run) -> dict[str, torch.Tensor]:
    """All that training leaves: the server's groups and what each site would deploy."""
    server = {f"{g}/{n}": t for g, group in run.state.groups.items() for n, t in group.items()}
    return server | {f"{s}/{n}": t for s in run.channel.sites for n, t in deployed(run, s).items()}


@METHOD
def test_same_seed_same_result_and_another_seed_another(method: str, tmp_path: Path) -> None:
    study = toy_study(method, training={"batch_size": 4})
    first, second = (end_state(trained(study, sites(), tmp_path / name)) for name in "ab")
    assert same(first, second)
    other = study.model_copy(update={"seed": 1})
    assert not same(first, end_state(trained(other, sites(), tmp_path / "c")))


@METHOD
def test_zero_learning_rate_is_the_identity(method: str, tmp_path: Path) -> None:
    run = trained(toy_study({"name": method, **STILL.get(method, {})}, training={"lr": 0.0}), sites(), tmp_path)
    start = run.bench.initial
    assert same(dict(run.state.groups["model"]), {n: start[n] for n in run.state.groups["model"]})
    for site in run.channel.sites:
        assert same(deployed(run, site), dict(start))


@pytest.mark.parametrize("method", sorted(METHODS.keys() - NEVER_PLAIN))
def test_one_site_equals_local_training(method: str, tmp_path: Path) -> None:
    only = {"north": IMAGES["north"]}
    study = toy_study({"name": method, **PLAIN.get(method, {})})
    alone = trained(toy_study("local", model={"name": study.model.name}), sites(only), tmp_path / "local")
    run = trained(study, sites(only), tmp_path / "method")
    ours = deployed(run, "north") | ({} if method == "local" else run.state.groups["model"])
    for name, wanted in deployed(alone, "north").items():
        assert not torch.equal(wanted, run.bench.initial[name])
        torch.testing.assert_close(ours[name], wanted, rtol=1e-5, atol=1e-6)


@METHOD
def test_order_of_sites_does_not_matter(method: str, tmp_path: Path) -> None:
    study = toy_study(method, training={"batch_size": 4})
    forward = trained(study, sites(), tmp_path / "a")
    backward = trained(study, dict(reversed(sites().items())), tmp_path / "b")
    assert same(end_state(forward), end_state(backward))
    assert forward.channel.sites == backward.channel.sites == tuple(sorted(IMAGES))


@METHOD
def test_a_new_process_goes_on_bit_for_bit(method: str, tmp_path: Path) -> None:
    study = toy_study(method, training={"batch_size": 4}, model=CNN, data={"image": {"size": [8, 8]}})
    data = enlarged(8)
    whole = trained(study, data, tmp_path / "whole")
    assert same(end_state(whole), end_state(resumed(study, data, tmp_path / "parts")))


SECURE: dict[str, tuple[Any, float]] = {
    "masked": ("masked", 2e-6),
    "masked, 16 bits": ({"backend": "masked", "lanes": 16}, 4e-4),
    "ring-he": ("ring-he", 4e-5),
    "ring-he, server's key": ({"backend": "ring-he", "key_holder": "server"}, 2e-4),
}
"""Secure sums, and how far three rounds of rounding may lead away from the plain sum."""


@METHOD
@pytest.mark.parametrize("backend", SECURE)
def test_a_secure_sum_changes_nothing_but_rounding(method: str, backend: str, tmp_path: Path) -> None:
    aggregation, tolerance = SECURE[backend]
    settings = {"name": method, **GENTLE.get(method, {})}
    if method in SINGLE:
        with pytest.raises(PolyclinicError, match=r"aggregation\.backend: plain"):
            toy_study(settings, aggregation=aggregation)
        return
    plain = trained(toy_study(settings), sites(), tmp_path / "plain")
    secure = trained(toy_study(settings, aggregation=aggregation), sites(), tmp_path / "secure")
    wanted, found = end_state(plain), end_state(secure)
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance)
    assert [record["incidents"] for record in secure.records] == [[], [], []]
    for op, entry in secure.aggregation.ops.items():
        sums = [leaf.name for leaf in entry.leaves if leaf.kind == "sum"]
        assert not sums or method == "pooled", f"{op} lets {sums} out of a site"


@pytest.mark.parametrize("backend", SECURE)
def test_a_resumed_secure_run_ends_the_same(backend: str, tmp_path: Path) -> None:
    study = toy_study("fedavg", training={"batch_size": 4}, aggregation=SECURE[backend][0])
    whole = trained(study, sites(), tmp_path / "whole")
    assert same(end_state(whole), end_state(resumed(study, sites(), tmp_path / "parts")))


@pytest.mark.parametrize("backend", SECURE)
def test_a_round_lost_after_its_sum_was_opened_is_repeated(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = toy_study("fedavg", training={"batch_size": 4}, aggregation=SECURE[backend][0])
    whole = trained(study, sites(), tmp_path / "whole")
    folder = RunFolder(tmp_path / "parts")
    folder.create(study)

    class PowerCutError(Exception):
        pass

    def cut(self: RunFolder, record: Any) -> None:
        raise PowerCutError

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "add_round", cut)
        with pytest.raises(PowerCutError):
            Run(study, sites(), folder, Silent()).train()
    repeated = Run(study, sites(), folder, Silent())
    assert repeated.state.finished == 0
    repeated.train()
    assert same(end_state(whole), end_state(repeated))


@METHOD
def test_state_survives_safetensors(method: str, tmp_path: Path) -> None:
    run = trained(toy_study(method), sites(), tmp_path)
    run.state.save(tmp_path / "again.safetensors")
    back = ServerState.load(tmp_path / "again.safetensors")
    assert back.finished == run.state.finished == 3
    assert back.scalars == run.state.scalars
    assert back.groups.keys() == run.state.groups.keys()
    for group, tensors in run.state.groups.items():
        assert same(back.groups[group], tensors)


@METHOD
def test_evaluation_leaves_training_untouched(method: str, tmp_path: Path) -> None:
    data = enlarged(8)
    ends = []
    for every in (0, 1):
        study = toy_study(
            method, model=CNN, data={"image": {"size": [8, 8]}}, evaluation={"every": every, "select": "last"}
        )
        run = trained(study, data, tmp_path / str(every))
        ends.append(end_state(run))
    assert same(*ends)


@METHOD
@pytest.mark.parametrize("norm", ["batch", "batch-local", "group", "instance"])
def test_buffers_behave_as_declared(method: str, norm: str, tmp_path: Path) -> None:
    sections = {"model": {**CNN, "norm": norm}, "data": {"image": {"size": [16, 16]}}}
    if method in {"pooled", "feddf"} and norm == "batch-local":
        with pytest.raises(PolyclinicError, match="batch-local"):
            toy_study(method, **sections)
        return
    run = trained(toy_study(method, **sections), enlarged(16), tmp_path)
    sent = set(run.state.groups["model"])
    statistics = {n for n in running_statistics(run.bench.model) if not n.endswith("num_batches_tracked")}
    if method == "fedbn":
        assert not sent & norm_parameter_names(run.bench.model)
    elif norm == "batch" and method not in AT_HOME:
        assert statistics
        assert statistics <= sent
    else:
        assert not sent & statistics
    assert bool(statistics) == norm.startswith("batch")


@METHOD
def test_nothing_undeclared_leaves(method: str, tmp_path: Path) -> None:
    study = toy_study(method)
    RunFolder(tmp_path).create(study)
    run = Run(study, sites(), RunFolder(tmp_path), Silent())
    replies: dict[str, Message] = {}
    run.channel._on_call = lambda op, site, reply: replies.setdefault(op, reply)
    run.train()
    run.test()
    assert {"train", "evaluate", "test"} <= replies.keys()
    shared = set(run.method.shared(run.bench.model))
    own = run.method.ops().keys()
    for op, reply in replies.items():
        declared = {leaf.name for leaf in run.channel._sites["north"]._ops[op].leaves}
        assert set(reply.groups()) <= declared
        assert all(any(fnmatch(name, pattern) for pattern in declared) for name in reply.scalars)
        if op in own:
            assert {name.partition("/")[2] for name in reply.arrays} <= shared | BESIDE.get(method, set())
        else:
            # Judging sends numbers about images, never a tensor of the model or an image.
            assert set(reply.groups()) <= {"replicates"}
    for leaf in run.method.ops()["train"].leaves:
        assert leaf.derived_from in {"images", "labels", "counts", "nothing"}


def test_the_door_is_shut(tmp_path: Path) -> None:
    study = toy_study("fedavg")
    RunFolder(tmp_path).create(study)
    run = Run(study, sites(), RunFolder(tmp_path), Silent())
    site = run.channel._sites["north"]
    op = site._ops["train"]
    leaky = type(op)(lambda s, m: Message.pack({"images": {"all": s.data.images}}), op.leaves)
    site._ops = {"train": leaky}
    run.channel._tolerant = True
    with pytest.raises(UndeclaredError, match=r"north.*train.*images.*Declare"):
        run.train()
