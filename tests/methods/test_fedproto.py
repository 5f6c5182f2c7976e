from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from linear_by_hand import close, leaves, own_images, scores, start, stepped
from mixed_sites import MOBILE, mixed_study, multi_label, passing, prepared, shapes, with_findings, without_west
from test_contract import same
from toys import deployed, enlarged, sites, toy_study, trained

from polyclinic.errors import StudyError
from polyclinic.methods.fedproto import kept_where_missing, nearest_mean


def test_two_rounds_by_hand(tmp_path: Path) -> None:
    """Linear body with three features and a head; one full-batch step a round; the means are over all sites' images."""
    data, lam = sites(), 0.7
    run = trained(toy_study({"name": "fedproto", "rounds": 2, "strength": lam, "floor": 1}), data, tmp_path)
    ends = dict.fromkeys(data, start(run))
    means = None
    for _ in range(2):
        features, labels = [], []
        for site, own in data.items():
            at, (inputs, targets) = leaves(ends[site]), own_images(own)
            hidden = scores(at[:2], inputs)
            loss = F.cross_entropy(scores(at[2:], hidden), targets)
            if means is not None:
                apart = [((h - means[int(y)]) ** 2).mean() for h, y in zip(hidden, targets, strict=True)]
                loss = loss + lam * sum(apart) / len(apart)
            ends[site] = stepped(at, loss)
            features.append(scores(ends[site][:2], inputs))
            labels.append(targets)
        every, kinds = torch.cat(features), torch.cat(labels)
        means = torch.stack([every[kinds == c].mean(0) for c in range(2)])
    torch.testing.assert_close(run.state.groups["prototypes"]["means"], means)
    for site in data:
        close(deployed(run, site), ends[site])


def test_what_passes(tmp_path: Path) -> None:
    run = prepared(toy_study({"name": "fedproto", "rounds": 2}), sites(), tmp_path)
    seen = passing(run)
    run.train()
    assert [site for site, _, _ in seen] == ["north", "south", "west"] * 2
    for number, (_, down, up) in enumerate(seen):
        later = {"prototypes/means": [2, 3], "prototypes/held": [2]} if number >= 3 else {}
        assert shapes(down) == later
        assert not down.scalars
        assert shapes(up) == {"classes/features": [2, 3], "classes/images": [2]}
        assert set(up.scalars) == {"loss", "weight/classes"}
        assert up.scalars["weight/classes"] == 1.0


def test_of_a_class_below_the_floor_nothing_leaves(tmp_path: Path) -> None:
    """Patients of a class: north 12, south 6, west 3."""
    run = prepared(toy_study({"name": "fedproto", "rounds": 1, "floor": 5}), sites(), tmp_path)
    seen = passing(run)
    run.train()
    sums = {site: up.group("classes") for site, _, up in seen}
    assert not any(bool(array.any()) for array in sums["west"].values())
    assert sums["south"]["images"].tolist() == [6, 6]
    both = sums["north"]["features"] + sums["south"]["features"]
    torch.testing.assert_close(run.state.groups["prototypes"]["means"], (both / 18).float())
    none = trained(toy_study({"name": "fedproto", "floor": 13}), sites(), tmp_path / "none")
    alone = trained(toy_study("local", model={"name": "toys:two_layers"}), sites(), tmp_path / "local")
    assert not none.state.groups["prototypes"]["held"].any()
    torch.testing.assert_close(deployed(none, "north")["1.weight"], deployed(alone, "north")["1.weight"])


def test_without_strength_it_is_local_training_bit_for_bit(tmp_path: Path) -> None:
    sections = {"model": {"name": "toys:two_layers"}, "training": {"batch_size": 5}}
    alone = trained(toy_study("local", **sections), sites(), tmp_path / "local")
    run = trained(toy_study({"name": "fedproto", "strength": 0}, **sections), sites(), tmp_path / "fedproto")
    for site in ("north", "south", "west"):
        assert same(deployed(alone, site), deployed(run, site))


def test_a_last_layer_gives_probabilities_from_distances() -> None:
    torch.manual_seed(0)
    features, means = torch.randn(5, 4), torch.randn(3, 4)
    head = nearest_mean({"means": means, "held": torch.tensor([True, True, True])}, 3)
    found = F.linear(features, head["weight"], head["bias"]).softmax(1)
    distances = torch.stack([torch.stack([((f - p) ** 2).sum() for p in means]) for f in features])
    torch.testing.assert_close(found, (-distances).softmax(1))
    assert torch.equal(found.argmax(1), distances.argmin(1))
    head = nearest_mean({"means": means, "held": torch.tensor([True, False, True])}, 3)
    found = F.linear(features, head["weight"], head["bias"]).softmax(1)
    assert found[:, 1].tolist() == [0] * 5
    torch.testing.assert_close(found[:, [0, 2]], (-distances[:, [0, 2]]).softmax(1))


def test_a_finding_is_present_where_the_mean_with_it_is_nearer() -> None:
    torch.manual_seed(0)
    features, means = torch.randn(5, 4), torch.randn(4, 4)
    head = nearest_mean({"means": means, "held": torch.tensor([True, True, True, False])}, 2)
    found = F.linear(features, head["weight"], head["bias"]).sigmoid()
    with_it, without = (((features - means[row]) ** 2).sum(1) for row in (0, 2))
    torch.testing.assert_close(found[:, 0], torch.stack([-with_it, -without], 1).softmax(1)[:, 0])
    assert found[:, 1].tolist() == [0] * 5


@pytest.mark.parametrize("kind", ["multi-class", "multi-label"])
def test_prediction_by_the_nearest_mean_in_a_run(kind: str, tmp_path: Path) -> None:
    settings = {"name": "fedproto", "predict": "prototype", "floor": 1, "rounds": 2}
    if kind == "multi-class":
        run = trained(toy_study(settings), sites(), tmp_path)
    else:
        run = trained(multi_label(settings), with_findings(), tmp_path)
    means = run.state.groups["prototypes"]
    assert len(means["held"]) == (2 if kind == "multi-class" else 6)
    own = deployed(run, "north")
    plain = run.channel._sites["north"].state.load("personal")
    assert plain is not None
    assert torch.equal(own["1.weight"], plain[0]["1.weight"])
    assert not torch.equal(own["2.weight"], plain[0]["2.weight"])
    site = run.channel._sites["north"]
    test = site.data.splits["test"]
    hidden = F.linear(site.data.inputs(test).flatten(1), own["1.weight"], own["1.bias"])
    wanted = F.linear(hidden, own["2.weight"], own["2.bias"])
    centres = means["means"]
    near = -((hidden[:, None] - centres[None]) ** 2).sum(2)
    if kind == "multi-class":
        torch.testing.assert_close(wanted.softmax(1), near.softmax(1))
    else:
        torch.testing.assert_close(wanted.sigmoid(), (near[:, :3] - near[:, 3:]).sigmoid())
    table = run.test()
    assert 0 <= table["mean"]["auroc"]["value"] <= 1


def test_the_last_mean_of_a_class_that_nobody_sent_is_kept() -> None:
    new = {"means": torch.tensor([[1.0], [0.0], [0.0]]), "held": torch.tensor([True, False, False])}
    last = {"means": torch.tensor([[7.0], [8.0], [0.0]]), "held": torch.tensor([True, True, False])}
    kept = kept_where_missing(new, last)
    assert kept["means"].tolist() == [[1.0], [8.0], [0.0]]
    assert kept["held"].tolist() == [True, True, False]
    assert kept_where_missing(new, {}) is new


def test_a_site_that_drops_out(tmp_path: Path) -> None:
    run, alone = without_west({"name": "fedproto", "floor": 1}, tmp_path)
    assert all("no power" in record["absent"]["west"] for record in run.records)
    assert same(run.state.groups["prototypes"], alone.state.groups["prototypes"])
    assert same(deployed(run, "west"), dict(run.bench.initial))


def test_different_networks_train_and_are_tested(tmp_path: Path) -> None:
    run = trained(mixed_study({"name": "fedproto", "floor": 1, "rounds": 2}), enlarged(), tmp_path)
    assert run.state.groups["prototypes"]["means"].shape == (2, 6)
    assert deployed(run, "west").keys() != deployed(run, "north").keys()
    assert set(run.test()["sites"]) == {"north", "south", "west"}


def test_findings_train_near_their_means(tmp_path: Path) -> None:
    run = prepared(multi_label({"name": "fedproto", "floor": 1}), with_findings(), tmp_path)
    seen = passing(run)
    run.train()
    assert shapes(seen[0][2]) == {"classes/features": [3, 3], "classes/images": [3]}
    site = run.channel._sites["south"]
    assert seen[-2][2].group("classes")["images"].tolist() == site.data.labels("train").sum(0).tolist()


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    study = mixed_study("fedproto", models={"west": {**MOBILE, "embedding": None}})
    with pytest.raises(StudyError, match=r"fedproto.*north 6, south 6, west 1280.*embedding"):
        prepared(study, enlarged(), tmp_path / "sizes")
    with pytest.raises(StudyError, match="segmentation"):
        toy_study(
            "fedproto", task={"kind": "segmentation", "classes": ["no", "yes"]}, model={"name": "unet", "width": 8}
        )
    study = toy_study({"name": "fedproto", "predict": "prototype"}, model={"name": "test_creff:without_bias"})
    with pytest.raises(StudyError, match=r"'1' of site 'north' has no bias.*classifier"):
        prepared(study, sites(), tmp_path / "bias")
