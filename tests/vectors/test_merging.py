"""From a ledger to a merged folder: what it holds, that it depends on the set alone, and what stops it."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hospitals import contribute, identity, roster, small_base, small_study, tree, vector
from safetensors.torch import load_file
from test_ledger_kills import killed_at
from torch import Tensor

from polyclinic.data.dataset import SiteData
from polyclinic.errors import ContributionError, StudyError
from polyclinic.models.registry import start_model
from polyclinic.models.weights import load_tensors
from polyclinic.runner import load_sites
from polyclinic.tasks import make_task
from polyclinic.vectors.base import Base, publish_base
from polyclinic.vectors.contribution import Contribution
from polyclinic.vectors.ledger import Ledger
from polyclinic.vectors.merged import Merged
from polyclinic.vectors.merging import evaluate_ledger, merge_ledger, verify_model
from polyclinic.vectors.publishing import publish
from polyclinic.vectors.recipe import Recipe
from polyclinic.vectors.statistics import head_sums

COORDINATOR = identity("coordinator")
ALL = ("east", "north", "south", "west")
THREE = ("north", "south", "west")
TWO_CLASSES = ("normal", "pneumonia")
FILES = {"model.safetensors", "recipe.json", "base.json", "merge.json", "card.html"}


def recipe(**settings: Any) -> Recipe:
    return Recipe.model_validate({"rule": {"coefficients": "mean"}, **settings})


def change(base: Base, seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    """A site's vector: a direction that all have, and noise of its own."""
    common, own = vector(base, 1000), vector(base, seed, 0.005)
    return {name: scale * (common[name] + own[name]) for name in common}


def send(folder: Path, base: Base, site: str, sequence: int = 1, **settings: Any) -> Contribution:
    scale = settings.pop("scale", 1.0)
    settings.setdefault("tensors", {"vector": change(base, ALL.index(site) + 10 * sequence, scale)})
    return contribute(folder, base, site, sequence, **settings)


def made(folder: Path, base: Base, sites: Sequence[str] = ()) -> Ledger:
    """A ledger with these sites' contributions, in this order; all four sites may contribute."""
    ledger = Ledger.create(folder, base.folder, COORDINATOR, roster(ALL))
    for site in sites:
        add(ledger, base, site)
    return ledger


def add(ledger: Ledger, base: Base, site: str, sequence: int = 1, **settings: Any) -> Contribution:
    sent = ledger.folder.parent / f"sent-{site}-{sequence}-{ledger.folder.name}"
    send(sent, base, site, sequence, **settings)
    return ledger.add(sent, COORDINATOR)


def result(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "model.safetensors").read_bytes(), (folder / "recipe.json").read_bytes()


def nothing_written(folder: Path) -> None:
    """Neither the folder ``out`` nor a half one that would have become it."""
    assert not [path.name for path in folder.iterdir() if path.name.lstrip(".").startswith("out")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return small_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def ledger(base: Base, tmp_path: Path) -> Ledger:
    return made(tmp_path / "ledger", base, THREE)


# What is written.


def test_the_folder_of_a_merged_model(ledger: Ledger, base: Base, tmp_path: Path) -> None:
    before = tree(ledger.folder)
    record = merge_ledger(ledger.folder, tmp_path / "out", recipe(), purpose="to test")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert tree(ledger.folder) == before, "without a key nothing is noted"
    start = base.tensors()
    vectors = [change(base, ALL.index(site) + 10) for site in THREE]
    model = load_file(tmp_path / "out" / "model.safetensors")
    assert model.keys() == start.keys()
    for name, tensor in start.items():
        mean = np.mean([v[name].double().numpy() for v in vectors], axis=0) if name in vectors[0] else 0
        np.testing.assert_allclose(model[name], tensor.double().numpy() + mean, rtol=1e-6, atol=1e-7)
    assert Recipe.model_validate_json((tmp_path / "out" / "recipe.json").read_text()) == recipe()
    assert (tmp_path / "out" / "base.json").read_bytes() == (base.folder / "base.json").read_bytes()
    assert json.loads((tmp_path / "out" / "merge.json").read_text()) == record
    assert Merged.load(tmp_path / "out").record == record
    assert "to test" in (tmp_path / "out" / "card.html").read_text()


def test_the_record_says_what_went_in(ledger: Ledger, base: Base, tmp_path: Path) -> None:
    digests = sorted(one.digest for one in ledger.contributions)
    record = merge_ledger(ledger.folder, tmp_path / "out", recipe(), purpose="to test")
    assert [one["digest"] for one in record["contributions"]] == digests
    assert [one["used"] for one in record["contributions"]] == [True] * 3
    assert {one["site"] for one in record["contributions"]} == set(THREE)
    assert record["set_digest"] == hashlib.sha256("\n".join(digests).encode()).hexdigest()
    assert record["chain_head"] == ledger.head
    assert record["base_digest"] == base.digest
    assert record["purpose"] == "to test"
    assert record["classes"] == list(base.classes)
    assert record["model"]["parameters"] == sum(t.numel() for t in vector(base).values())
    assert set(record["shares"]) == set(vector(base))
    assert all(shares == pytest.approx([1 / 3] * 3) for shares in record["shares"].values())
    assert all(check["passed"] for check in record["checks"])
    assert record["metrics"] == []
    assert record["limits"] == ["It was not tested: no images were given."]
    assert record["warnings"] == []


def test_a_recipe_that_was_written_gives_the_same_model_again(ledger: Ledger, tmp_path: Path) -> None:
    from polyclinic.vectors.recipe import load_recipe

    chosen = recipe(rule={"name": "ties", "density": 0.5}, filters=["norm-clip", {"name": "dare"}])
    merge_ledger(ledger.folder, tmp_path / "one", chosen)
    merge_ledger(ledger.folder, tmp_path / "two", load_recipe(tmp_path / "one" / "recipe.json"))
    assert result(tmp_path / "one") == result(tmp_path / "two")


# The result is a function of the set.

RECIPES = {
    "mean": recipe(),
    "weighted": recipe(rule={"coefficients": "weighted"}),
    "ties": recipe(rule="ties"),
    "median of clipped": recipe(rule="median", filters=["norm-clip"]),
    "model-stock of dropped": recipe(rule={"coefficients": "model-stock"}, filters=["dare"]),
    "tsv": recipe(rule="tsv"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_join_then_leave_is_never_joined_byte_for_byte(name: str, base: Base, tmp_path: Path) -> None:
    never = made(tmp_path / "never", base, THREE)
    left = made(tmp_path / "left", base, ["north", "east", "west"])
    joined = next(one for one in left.contributions if one.site == "east")
    merge_ledger(left.folder, tmp_path / "with", RECIPES[name], identity=COORDINATOR)
    add(left, base, "south")
    left.remove(joined.digest, "asked to go", COORDINATOR)
    merge_ledger(never.folder, tmp_path / "a", RECIPES[name])
    merge_ledger(left.folder, tmp_path / "b", RECIPES[name])
    assert result(tmp_path / "a") == result(tmp_path / "b")
    assert result(tmp_path / "a")[0] != result(tmp_path / "with")[0]


def test_a_replaced_contribution_never_was(base: Base, tmp_path: Path) -> None:
    never = made(tmp_path / "never", base, ["south", "west"])
    add(never, base, "north", 2)
    other = made(tmp_path / "other", base, THREE)
    old = next(one.digest for one in other.contributions if one.site == "north")
    # It says that it replaces another, so its digest differs, and its place in the order; the mean does not.
    add(other, base, "north", 2, replaces=[old])
    merge_ledger(never.folder, tmp_path / "a", recipe())
    merge_ledger(other.folder, tmp_path / "b", recipe())
    mine, theirs = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-6, atol=1e-8)


def test_the_order_of_arrival_does_not_matter(base: Base, tmp_path: Path) -> None:
    found = set()
    for order in itertools.permutations(THREE):
        name = "-".join(order)
        merge_ledger(made(tmp_path / name, base, order).folder, tmp_path / f"out-{name}", recipe(filters=["dare"]))
        found.add(result(tmp_path / f"out-{name}"))
    assert len(found) == 1


# Admission.


def test_what_is_in_quarantine_waits_for_a_person(base: Base, tmp_path: Path) -> None:
    ledger = made(tmp_path / "ledger", base, THREE)
    loud = add(ledger, base, "east", scale=1e4)
    record = merge_ledger(ledger.folder, tmp_path / "without", recipe())
    quiet = made(tmp_path / "quiet", base, THREE)
    merge_ledger(quiet.folder, tmp_path / "quiet-out", recipe())
    assert result(tmp_path / "without") == result(tmp_path / "quiet-out")
    told = next(one for one in record["contributions"] if one["digest"] == loud.digest)
    assert (told["used"], told["verdict"], told["decision"]) == (False, "quarantine", None)
    assert any(w.startswith(f"{loud.digest[:12]} of east was left out: the vector is") for w in record["warnings"])

    ledger.accept(loud.digest, "a larger scanner", COORDINATOR)
    record = merge_ledger(ledger.folder, tmp_path / "with", recipe())
    assert [one["used"] for one in record["contributions"]] == [True] * 4
    assert not any("left out" in warning for warning in record["warnings"])
    model, start = load_file(tmp_path / "with" / "model.safetensors"), base.tensors()
    name = base.outline.weights[0].name
    assert float((model[name] - start[name]).abs().max()) > 1

    ledger.hold(loud.digest, "asked the site", COORDINATOR)
    record = merge_ledger(ledger.folder, tmp_path / "held", recipe())
    assert result(tmp_path / "held") == result(tmp_path / "without")
    assert any("east was left out" in warning for warning in record["warnings"])


# Releases.


def test_a_release_is_noted_and_what_differs_by_one_is_warned_of(ledger: Ledger, base: Base, tmp_path: Path) -> None:
    record = merge_ledger(ledger.folder, tmp_path / "first", recipe(), identity=COORDINATOR)
    ledger = Ledger.open(ledger.folder)
    (release,) = ledger.releases
    assert release.model == record["weights_sha256"]
    assert release.recipe == recipe().digest
    assert list(release.contributions) == sorted(one.digest for one in ledger.contributions)
    assert not release.stale

    fourth = add(ledger, base, "east")
    warnings = merge_ledger(ledger.folder, tmp_path / "second", recipe())["warnings"]
    assert len(warnings) == 1
    assert f"differs from release {release.model[:12]} by 1 contribution:" in warnings[0]
    assert "batches of 3" in warnings[0]

    gone = next(one.digest for one in ledger.contributions if one.site == "north")
    ledger.remove(gone, "left", COORDINATOR)
    ledger.remove(fourth.digest, "left too", COORDINATOR)
    warnings = merge_ledger(ledger.folder, tmp_path / "third", recipe())["warnings"]
    assert any("made of 2 contributions: whoever knows the base and all but one" in w for w in warnings)
    assert f"release {release.model[:12]} holds a contribution that was removed: withdraw it." in warnings
    assert Ledger.open(ledger.folder).releases[0].removed == (gone,)


def test_a_single_contribution_is_warned_of(base: Base, tmp_path: Path) -> None:
    ledger = made(tmp_path / "ledger", base, ["north"])
    warnings = merge_ledger(ledger.folder, tmp_path / "out", recipe())["warnings"]
    assert [w for w in warnings if w.startswith("made of 1 contribution: whoever")] == warnings


def test_another_key_cannot_note_a_release_and_nothing_is_written(ledger: Ledger, tmp_path: Path) -> None:
    before = tree(ledger.folder)
    with pytest.raises(ContributionError, match="signed by 'coordinator', but the key is .*could not be noted"):
        merge_ledger(ledger.folder, tmp_path / "out", recipe(), identity=identity("north"))
    assert not (tmp_path / "out").exists()
    assert tree(ledger.folder) == before


# Checking a model again.


def test_a_model_is_what_its_record_says(ledger: Ledger, tmp_path: Path) -> None:
    merge_ledger(ledger.folder, tmp_path / "out", recipe())
    (line,) = verify_model(ledger, tmp_path / "out")
    assert "made of 3 contributions" in line
    path = tmp_path / "out" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)
    with pytest.raises(ContributionError, match=r"model.safetensors was altered: its values are not those of merge"):
        verify_model(ledger, tmp_path / "out")
    path.write_bytes(content[:-4])
    with pytest.raises(ContributionError):
        verify_model(ledger, tmp_path / "out")


def test_a_model_with_a_removed_contribution_is_to_be_withdrawn(ledger: Ledger, base: Base, tmp_path: Path) -> None:
    merge_ledger(ledger.folder, tmp_path / "out", recipe())
    gone = ledger.contributions[1].digest
    ledger.remove(gone, "left", COORDINATOR)
    with pytest.raises(ContributionError, match=f"holds contribution {gone[:12]}, .*withdraw the model"):
        verify_model(ledger, tmp_path / "out")
    publish_base(small_study(seed=4), None, tmp_path / "other", version="1")
    other = Ledger.create(tmp_path / "others", tmp_path / "other", COORDINATOR, roster(ALL))
    with pytest.raises(ContributionError, match="from another base"):
        verify_model(other, tmp_path / "out")


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"schema": "polyclinic-merge/1"}'])
def test_a_damaged_record_is_refused_in_words(damage: bytes, ledger: Ledger, tmp_path: Path) -> None:
    merge_ledger(ledger.folder, tmp_path / "out", recipe())
    (tmp_path / "out" / "merge.json").write_bytes(damage)
    with pytest.raises(ContributionError, match=r"merge.json"):
        Merged.load(tmp_path / "out")


def test_a_folder_without_a_record_is_no_merged_model(tmp_path: Path) -> None:
    with pytest.raises(ContributionError, match=r"holds no merged model: it has no merge.json"):
        Merged.load(tmp_path)


# What stops a merge.


def test_a_tampered_file_stops_the_merge(ledger: Ledger, tmp_path: Path) -> None:
    path = ledger.contributions[0].folder / "vector.safetensors"
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)
    with pytest.raises(ContributionError, match=r"vector.safetensors"):
        merge_ledger(ledger.folder, tmp_path / "out", recipe())
    nothing_written(tmp_path)


def test_a_folder_that_is_there_is_left_alone(ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(ContributionError, match="out is there already"):
        merge_ledger(ledger.folder, tmp_path / "out", recipe(), identity=COORDINATOR)
    assert tree(tmp_path) == before


def test_nothing_to_merge(base: Base, tmp_path: Path) -> None:
    empty = made(tmp_path / "empty", base)
    with pytest.raises(ContributionError, match="nothing to merge: none brings a vector"):
        merge_ledger(empty.folder, tmp_path / "out", recipe())
    held = made(tmp_path / "held", base, ["north"])
    held.hold(held.contributions[0].digest, "wait", COORDINATOR)
    with pytest.raises(ContributionError, match="nothing to merge: 1 are held back; see polyclinic vectors explain"):
        merge_ledger(held.folder, tmp_path / "out", recipe())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"restoration": "bn-recal"}, r"restoration bn-recal needs images of the coordinator's.*\(--data\)"),
        ({"restoration": "finetune"}, "restoration finetune needs images"),
        ({"rule": "greedy-soup"}, "rule greedy-soup compares candidates on the coordinator's own images"),
        ({"rule": {"coefficients": "search"}}, "compares candidates"),
        ({"rule": "fisher"}, "lacks fisher of"),
        ({"restoration": "bn-pooled"}, "lacks statistics of"),
        ({"head": "ridge"}, "closed-form head goes with rule base"),
        ({"rule": "base", "head": "ridge"}, "there are no contributions to merge"),
    ],
)
def test_what_nobody_brought(settings: dict[str, Any], message: str, ledger: Ledger, tmp_path: Path) -> None:
    with pytest.raises(ContributionError, match=message):
        merge_ledger(ledger.folder, tmp_path / "out", recipe(**settings))
    nothing_written(tmp_path)


def test_a_killed_merge_leaves_a_valid_ledger_and_a_whole_folder_or_none(ledger: Ledger, tmp_path: Path) -> None:
    chosen = recipe()
    merge_ledger(ledger.folder, tmp_path / "reference", chosen)
    wanted = result(tmp_path / "reference")
    digests = [one.digest for one in ledger.contributions]
    made_it, noted, step = [], [], 1
    while True:
        place = tmp_path / f"kill-{step}"
        shutil.copytree(ledger.folder, place / "ledger")
        out = place / "out"

        def work(place: Path = place, out: Path = out) -> None:
            merge_ledger(place / "ledger", out, chosen, identity=COORDINATOR)

        died = killed_at(step, place, work)
        found = Ledger.open(place / "ledger")
        found.verify()
        assert [one.digest for one in found.contributions] == digests
        made_it.append(out.exists())
        noted.append(bool(found.releases))
        if made_it[-1]:
            assert {path.name for path in out.iterdir()} == FILES
            verify_model(found, out)
        # The next one goes well, whatever was left.
        merge_ledger(place / "ledger", place / "again", chosen, identity=COORDINATOR)
        assert result(place / "again") == wanted
        if not died:
            break
        step += 3
    assert made_it == sorted(made_it)
    assert noted == sorted(noted)
    assert made_it.count(False) >= 5
    assert all(out for out, told in zip(made_it, noted, strict=True) if told), "no release without its model"
    assert noted[-1]


# With the coordinator's images.


@pytest.fixture(scope="module")
def imaged(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], tuple[Ledger, Base, Any]]:
    """A ledger for two classes, of which there are made-up images."""
    folder = tmp_path_factory.mktemp("imaged")
    own = small_base(folder / "base", TWO_CLASSES)
    made(folder / "ledger", own, THREE)
    return lambda: (Ledger.open(folder / "ledger"), own, small_study(TWO_CLASSES))


CONTROLS = [
    "base",
    "base, restored",
    *(f"site {site}{end}" for site in THREE for end in ("", ", restored")),
    "one site, mean",
    "one site restored, mean",
    "one site restored, best on validation",
    "ensemble of the restored sites",
    "random vectors, restored",
    "shuffled vectors, restored",
]


def test_restored_on_the_coordinators_images(imaged: Callable[[], Any], tmp_path: Path) -> None:
    ledger, base, study = imaged()
    chosen = recipe(restoration={"mode": "bn-recal", "augment": False, "balanced": False})
    record = merge_ledger(ledger.folder, tmp_path / "a", chosen, study=study)
    names = [row["name"] for row in record["metrics"]]
    assert sorted(names[:-2]) == sorted(CONTROLS), "the controls are always in the table"
    assert names[-2:] == ["merged", "merged, restored"]
    assert "restore on" in record["restoration_data"]
    assert record["limits"] == [
        "It was tested on images of north, south, west only; other hospitals' scanners and patients may differ."
    ]
    merge_ledger(ledger.folder, tmp_path / "b", chosen, study=study)
    assert result(tmp_path / "a") == result(tmp_path / "b")
    merge_ledger(ledger.folder, tmp_path / "plain", recipe())
    plain, restored = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "a"))
    for spec in base.outline.specs:
        assert torch.equal(plain[spec.name], restored[spec.name]) == (not spec.statistic), spec.name
    verify_model(ledger, tmp_path / "a")
    rows = evaluate_ledger(ledger.folder, chosen, study)
    assert [row["name"] for row in rows] == names
    for row, stage in zip(rows, record["metrics"], strict=True):
        for name, cell in stage["metrics"].items():
            assert row["metrics"][name]["value"] == cell["value"]
    assert len(list(ledger.folder.parent.iterdir())) == len(THREE) + 2, "evaluate writes nothing"


def test_images_of_another_kind_are_refused(imaged: Callable[[], Any], tmp_path: Path) -> None:
    ledger, _, _ = imaged()
    with pytest.raises(ContributionError, match="need the base's list in the base's order"):
        merge_ledger(ledger.folder, tmp_path / "out", recipe(), study=small_study(TWO_CLASSES[::-1]))
    other = small_study(TWO_CLASSES, data={"image": {"size": [24, 24]}})
    with pytest.raises(ContributionError, match=r"data.image.size"):
        merge_ledger(ledger.folder, tmp_path / "out", recipe(), study=other)
    assert not (tmp_path / "out").exists()


# Merge the backbone, publish it, collect head sums on it, solve the head.


def features(base: Base, data: SiteData) -> np.ndarray:
    """What reaches the last layer of the published network for a site's training images."""
    network = start_model(small_study(TWO_CLASSES))
    load_tensors(network, base.tensors())
    network.eval()
    seen: list[Tensor] = []
    layer = network.get_submodule(base.spec.head)
    layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].double()))
    with torch.no_grad():
        network(data.inputs(data.splits["train"]))
    return seen[0].numpy()


def test_merged_published_and_given_a_pooled_head(imaged: Callable[[], Any], tmp_path: Path) -> None:
    ledger, first, study = imaged()
    chosen = recipe(restoration="bn-recal")
    merge_ledger(ledger.folder, tmp_path / "backbone", chosen, study=study)
    second = publish(study, tmp_path / "second", version="2", merged=tmp_path / "backbone")
    assert second.spec.lineage == [first.digest, chosen.digest]
    for name, tensor in load_file(tmp_path / "backbone" / "model.safetensors").items():
        assert torch.equal(second.read(name), tensor)

    heads = Ledger.create(tmp_path / "heads", second.folder, COORDINATOR, roster(ALL))
    sites, task = load_sites(study, tmp_path), make_task(study.task, study.training)
    network = second.network()
    for site in THREE:
        sums = head_sums(network, sites[site], task, fewest=1)
        contribute(tmp_path / f"head-{site}", second, site, tensors={"head": sums})
        heads.add(tmp_path / f"head-{site}", COORDINATOR)
    solved = recipe(rule="base", head={"name": "ridge", "gamma": 0.1, "temperature": 5.0})
    record = merge_ledger(heads.folder, tmp_path / "final", solved, identity=COORDINATOR)
    assert [one["used"] for one in record["contributions"]] == [True] * 3
    assert record["base_lineage"] == second.spec.lineage

    x = np.vstack([features(second, sites[site]) for site in THREE])
    labels = np.concatenate([sites[site].labels("train").numpy() for site in THREE])
    width = x.shape[1]
    pull = np.sqrt(0.1 * np.square(x - x.mean(0)).sum() / width)
    tall = np.block([[x, np.ones((len(x), 1))], [pull * np.eye(width), np.zeros((width, 1))]])
    wanted = 5.0 * np.linalg.lstsq(tall, np.vstack([np.eye(2)[labels], np.zeros((width, 2))]), rcond=None)[0].T
    model = load_file(tmp_path / "final" / "model.safetensors")
    np.testing.assert_allclose(model[f"{second.spec.head}.weight"], wanted[:, :-1], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(model[f"{second.spec.head}.bias"], wanted[:, -1], rtol=1e-4, atol=1e-4)
    for name, tensor in model.items():
        assert torch.equal(tensor, second.read(name)) != name.startswith(f"{second.spec.head}."), name
    third = publish(study, tmp_path / "third", merged=tmp_path / "final")
    assert third.spec.lineage == [first.digest, chosen.digest, second.digest, solved.digest]

    held = heads.contributions[0].digest
    heads = Ledger.open(heads.folder)
    heads.hold(held, "asked the site", COORDINATOR)
    record = merge_ledger(heads.folder, tmp_path / "fewer", solved)
    assert [one["used"] for one in record["contributions"]] == [False, True, True]
    with pytest.raises(ContributionError, match="nothing to merge: none brings a vector"):
        merge_ledger(heads.folder, tmp_path / "no", recipe())


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"data": {"image": {"size": [24, 24]}}}, "data.image"),
        ({"model": {"width": 4}}, "model"),
        ({"task": {"classes": ["normal", "covid", "pneumonia"]}}, "task"),
    ],
)
def test_the_next_base_is_the_merged_models_network(
    sections: dict[str, Any], named: str, ledger: Ledger, tmp_path: Path
) -> None:
    merge_ledger(ledger.folder, tmp_path / "out", recipe())
    with pytest.raises(ContributionError, match=f"the study's {named} differs"):
        publish(small_study(**sections), tmp_path / "next", merged=tmp_path / "out")
    with pytest.raises(ContributionError, match="--weights or --merged, not both"):
        publish(small_study(), tmp_path / "next", merged=tmp_path / "out", weights=tmp_path / "x")
    assert not (tmp_path / "next").exists()


def test_a_recipe_that_is_none() -> None:
    from polyclinic.vectors.recipe import load_recipe

    with pytest.raises(StudyError, match="there is no rule 'tis'. Did you mean 'ties'"):
        load_recipe(None, ["rule=tis"])
