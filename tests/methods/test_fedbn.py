from pathlib import Path

import torch
from test_contract import CNN
from toys import deployed, enlarged, toy_study

from polyclinic.federation.message import Message
from polyclinic.models.normalisation import norm_parameter_names
from polyclinic.results import RunFolder
from polyclinic.runner import Run, Silent


def test_norm_tensors_are_never_sent_either_way_and_differ_between_sites(tmp_path: Path) -> None:
    study = toy_study("fedbn", model=CNN, data={"image": {"size": [8, 8]}}, evaluation={"every": 1})
    RunFolder(tmp_path).create(study)
    run = Run(study, enlarged(8), RunFolder(tmp_path), Silent())
    seen: set[str] = set()
    inner = run.channel.stream

    def watched(op: str, messages: dict[str, Message]):  # type: ignore[no-untyped-def]
        for message in messages.values():
            seen.update(name.partition("/")[2] for name in message.arrays)
        for site, reply in inner(op, messages):
            seen.update(name.partition("/")[2] for name in reply.arrays)
            yield site, reply

    run.channel.stream = watched  # type: ignore[method-assign]
    run.train()
    norms = norm_parameter_names(run.bench.model)
    assert norms
    assert "head.weight" in seen
    assert not seen & norms
    north, south = deployed(run, "north"), deployed(run, "south")
    for name in north:
        if name not in norms:
            assert torch.equal(north[name], south[name])
    assert any(not torch.equal(north[n], south[n]) for n in norms & north.keys())
