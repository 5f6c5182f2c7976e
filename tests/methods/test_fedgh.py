from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from linear_by_hand import close, fitted, own_images, scores, start, trained_alone
from mixed_sites import MOBILE, mixed_study, multi_label, passing, prepared, shapes, with_findings, without_west
from test_contract import same
from toys import deployed, enlarged, sites, toy_study, trained

from polyclinic.errors import StudyError
from polyclinic.methods.fedgh import FedGHParams, fit_on_means


def test_two_rounds_by_hand(tmp_path: Path) -> None:
    """One full-batch step at each site with the received head; six means are one batch of the server's."""
    data = sites()
    settings = {"name": "fedgh", "rounds": 2, "floor": 1, "head_epochs": 3, "head_lr": 0.2}
    run = trained(toy_study(settings), data, tmp_path)
    bodies, head = dict.fromkeys(data, start(run)[:2]), start(run)[2:]
    for _ in range(2):
        means, labels = [], []
        for site, own in data.items():
            inputs, targets = own_images(own)
            bodies[site] = trained_alone([*bodies[site], *head], own)[:2]
            features = scores(bodies[site], inputs)
            for c in range(2):
                means.append(features[targets == c].mean(0))
                labels.append(c)
        for _ in range(3):
            head = fitted(head, torch.stack(means), torch.tensor(labels), lr=0.2)
    for site in data:
        close(deployed(run, site), [*bodies[site], *head])


def test_a_finding_is_learnt_from_its_own_two_means() -> None:
    """Rows: present a, present b, absent a, absent b; absent b was not sent. No mean tells of the other finding."""
    torch.manual_seed(2)
    means, held = torch.randn(4, 3), torch.tensor([True, True, True, False])
    head = {"weight": torch.randn(2, 3), "bias": torch.randn(2)}
    leaves = {key: t.clone().requires_grad_() for key, t in head.items()}
    logits = means @ leaves["weight"].T + leaves["bias"]
    loss = -(F.logsigmoid(logits[0, 0]) + F.logsigmoid(logits[1, 1]) + F.logsigmoid(-logits[2, 0])) / 3
    slopes = torch.autograd.grad(loss, list(leaves.values()))
    found = fit_on_means(
        head, {"north": {"means": means, "held": held}}, 2, FedGHParams(head_epochs=1, head_lr=0.3), seed=0
    )
    for (key, tensor), slope in zip(head.items(), slopes, strict=True):
        torch.testing.assert_close(found[key], tensor - 0.3 * slope)
    nothing = {"north": {"means": means, "held": torch.zeros(4, dtype=torch.bool)}}
    assert fit_on_means(head, nothing, 2, FedGHParams(), seed=0) is head


def test_what_passes(tmp_path: Path) -> None:
    run = prepared(toy_study({"name": "fedgh", "rounds": 2}), sites(), tmp_path)
    seen = passing(run)
    run.train()
    assert len(seen) == 6
    for site, down, up in seen:
        assert shapes(down) == {"head/weight": [2, 3], "head/bias": [2]}
        assert not down.scalars
        assert shapes(up) == {"prototypes/means": [2, 3], "prototypes/held": [2]}
        assert set(up.scalars) == {"loss"}
        assert bool(up.group("prototypes")["means"].any()) == (site != "west")
    findings = prepared(multi_label({"name": "fedgh", "rounds": 1}), with_findings(), tmp_path / "findings")
    seen = passing(findings)
    findings.train()
    assert shapes(seen[0][2]) == {"prototypes/means": [6, 3], "prototypes/held": [6]}


def test_without_the_servers_training_it_is_local_bit_for_bit(tmp_path: Path) -> None:
    sections = {"model": {"name": "toys:two_layers"}, "training": {"batch_size": 5}}
    alone = trained(toy_study("local", **sections), sites(), tmp_path / "local")
    run = trained(toy_study({"name": "fedgh", "head_epochs": 0}, **sections), sites(), tmp_path / "fedgh")
    for site in ("north", "south", "west"):
        assert same(deployed(alone, site), deployed(run, site))


def test_a_site_uses_its_body_and_the_newest_head(tmp_path: Path) -> None:
    run = trained(mixed_study({"name": "fedgh", "floor": 1, "rounds": 2}), enlarged(), tmp_path)
    head = run.state.groups["head"]
    for site, name in {"north": "head.1", "west": "classifier.1.1"}.items():
        used = deployed(run, site)
        assert torch.equal(used[f"{name}.weight"], head["weight"])
        assert torch.equal(used[f"{name}.bias"], head["bias"])
    assert set(run.test()["sites"]) == {"north", "south", "west"}


def test_a_site_that_drops_out(tmp_path: Path) -> None:
    run, alone = without_west({"name": "fedgh", "floor": 1}, tmp_path)
    assert same(run.state.groups["head"], alone.state.groups["head"])
    assert torch.equal(deployed(run, "west")["2.weight"], run.state.groups["head"]["weight"])


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        StudyError, match=r"class means of each site by itself, which aggregation\.backend ring-he hides"
    ):
        toy_study("fedgh", aggregation="ring-he")
    with pytest.raises(StudyError, match="segmentation"):
        toy_study("fedgh", task={"kind": "segmentation", "classes": ["no", "yes"]})
    study = mixed_study("fedgh", models={"west": {**MOBILE, "embedding": 7}})
    with pytest.raises(StudyError, match="fedgh.*north 6, south 6, west 7"):
        prepared(study, enlarged(), tmp_path)
