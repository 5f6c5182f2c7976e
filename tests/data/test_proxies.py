"""Public images: what is loaded, in which parts, and every way in which they may not be those of the manifest."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from polyclinic.data.proxies import PROXY_OPS, Proxies, agree_on_proxies, load_proxies
from polyclinic.data.proxy_manifest import ProxyManifest, make_manifest
from polyclinic.errors import DataError, RunError, SiteError, StudyError
from polyclinic.federation.local import LocalChannel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Site, Workbench
from polyclinic.federation.state import ServerState
from polyclinic.models.registry import start_model
from polyclinic.study import Study, validate_study
from polyclinic.tasks import make_task

SIZE = 6


def folder(where: Path, counts: dict[str, int] | None = None, seed: int = 0) -> Path:
    """Colour pictures of 6 x 6 pixels, one folder a class."""
    rng = np.random.default_rng(seed)
    for name, count in (counts or {"cat": 11, "tree": 4}).items():
        (where / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(where / name / f"{number}.png")
    return where


def study(root: Path, images: str = "public", **sections: Any) -> Study:
    raw: dict[str, Any] = {
        "name": "public",
        "task": {"classes": ["healthy", "ill"]},
        "data": {"root": str(root), "phantom": {"sites": [{"name": "north"}]}, "image": {"size": [SIZE, SIZE]}},
        "proxies": {"manifest": "public.json", "images": images},
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section} if isinstance(section, dict) else section
    return validate_study(raw)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with public images and their manifest."""
    make_manifest(folder(tmp_path / "public"), tmp_path / "public.json", name="mini")
    return tmp_path


def pixels(root: Path, name: str) -> np.ndarray:
    return np.asarray(Image.open(root / "public" / name)).astype(np.float64)


def test_colour_becomes_the_luminance_of_itu_r_601(root: Path) -> None:
    found = load_proxies(study(root))
    assert (found.name, found.classes, len(found)) == ("mini", ["cat", "tree"], 15)
    assert found.images.shape == (15, 1, SIZE, SIZE)
    assert found.images.dtype == torch.uint8
    assert found.labels.tolist() == [0] * 11 + [1] * 4
    colour = pixels(root, "cat/1.png")
    grey = 0.299 * colour[..., 0] + 0.587 * colour[..., 1] + 0.114 * colour[..., 2]
    paths = [one["path"] for one in json.loads((root / "public.json").read_text())["images"]]
    assert np.abs(found.images[paths.index("cat/1.png"), 0].numpy() - grey).max() <= 0.51


def test_inputs_are_normalised_as_a_sites_images(root: Path) -> None:
    found = load_proxies(study(root, data={"image": {"size": [SIZE, SIZE], "channels": 3, "mean": 0.4, "std": 0.2}}))
    first = json.loads((root / "public.json").read_text())["images"][2]["path"]
    wanted = (pixels(root, first).transpose(2, 0, 1) / 255 - 0.4) / 0.2
    inputs = found.inputs(torch.tensor([7, 2]))
    assert inputs.dtype == torch.float32
    torch.testing.assert_close(inputs[1].double(), torch.from_numpy(wanted), rtol=0, atol=1e-5)


def test_a_table_and_a_zip_give_the_same_images(root: Path) -> None:
    with zipfile.ZipFile(root / "public.zip", "w") as packed:
        for path in sorted((root / "public").rglob("*.png")):
            packed.write(path, path.relative_to(root / "public").as_posix())
    folders = load_proxies(study(root))
    with (root / "table.csv").open("w", newline="") as file:
        rows = [(p.relative_to(root / "public").as_posix(), p.parent.name) for p in (root / "public").rglob("*.png")]
        csv.writer(file).writerows([("file", "kind"), *rows])
    made = make_manifest(
        root / "public.zip", root / "public.json", name="mini", labels=root / "table.csv", columns=("file", "kind")
    )
    assert made.digest == folders.digest
    packed_images = load_proxies(study(root, images="public.zip"))
    assert torch.equal(packed_images.images, folders.images)


def test_a_share_of_each_class_is_drawn_and_classes_are_chosen(root: Path) -> None:
    again = [make_manifest(root / "public", root / "few.json", per_class=3, seed=s) for s in (0, 0, 1)]
    assert [one.label for one in again[0].images] == ["cat"] * 3 + ["tree"] * 3
    assert again[0].images == again[1].images
    assert again[0].images != again[2].images
    assert make_manifest(root / "public", root / "few.json", classes=["tree"]).classes == ("tree",)
    with pytest.raises(DataError, match="has no images of dog"):
        make_manifest(root / "public", root / "few.json", classes=["dog"])


def test_parts_are_disjoint_whole_and_hold_every_class(root: Path) -> None:
    found = load_proxies(study(root))
    train, meta = found.parts(0)
    assert sorted([*train.tolist(), *meta.tolist()]) == list(range(15))
    assert torch.bincount(found.labels[meta]).tolist() == [1, 1]
    assert torch.bincount(found.labels[train]).tolist() == [10, 3]
    assert torch.equal(train, found.parts(0)[0])
    assert any(not torch.equal(meta, found.parts(seed)[1]) for seed in range(1, 4))
    many = Proxies("", ["a", "b"], torch.zeros(1), torch.arange(120) // 80, "", 0.0, 1.0)
    assert torch.bincount(many.labels[many.parts(3)[1]]).tolist() == [8, 4]


def test_a_process_holds_one_copy(root: Path) -> None:
    first = load_proxies(study(root))
    assert load_proxies(study(root, seed=4)) is first
    smaller = load_proxies(study(root, data={"root": str(root), "image": {"size": [4, 4]}}))
    assert smaller.images.shape[-1] == 4
    assert smaller.digest == first.digest
    altered(root)
    with pytest.raises(DataError, match=r"cat/4\.png"):
        load_proxies(study(root))


def altered(root: Path) -> None:
    Image.fromarray(np.zeros((SIZE, SIZE, 3), np.uint8)).save(root / "public" / "cat" / "4.png")


def missing(root: Path) -> None:
    (root / "public" / "tree" / "2.png").unlink()


def damaged(root: Path) -> None:
    """The hash is right, but it is no image."""
    (root / "public" / "tree" / "2.png").write_bytes(b"no image")
    make_manifest(root / "public", root / "public.json")


def relabelled(root: Path) -> None:
    path = root / "public.json"
    raw = json.loads(path.read_text())
    raw["images"][0]["label"] = "tree"
    path.write_text(json.dumps(raw))


def no_manifest(root: Path) -> None:
    (root / "public.json").unlink()


def other_file(root: Path) -> None:
    (root / "public.json").write_text('{"images": []}')


def no_images(root: Path) -> None:
    (root / "public").rename(root / "elsewhere")


def written(root: Path, classes: tuple[str, ...]) -> None:
    """A manifest whose digest is right and whose classes are not."""
    good = ProxyManifest.load(root / "public.json")
    ProxyManifest("mini", classes, good.images).save(root / "public.json")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (altered, ["'cat/4.png' of 'mini' is not the manifest's", "its SHA-256 is"]),
        (missing, ["'tree/2.png' of 'mini' cannot be read", "missing"]),
        (damaged, ["tree/2.png", "cannot be decoded"]),
        (relabelled, ["public.json was altered", "Get it again"]),
        (no_manifest, ["public.json does not exist", "polyclinic data proxies"]),
        (other_file, ["is no manifest of public images", "its format is None"]),
        (no_images, ["proxies.images", "does not exist", "data.root"]),
        (lambda root: written(root, ("cat",)), ["has label 'tree', which is not among its classes cat"]),
        (lambda root: written(root, ("cat", "tree", "cat")), ["lists a class twice"]),
        (lambda root: written(root, ("cat", "tree", "dog")), ["class 'dog'", "fewer than two images"]),
    ],
)
def test_other_images_than_the_manifests_are_refused(root: Path, fault: Any, words: list[str]) -> None:
    fault(root)
    with pytest.raises(DataError) as caught:
        load_proxies(study(root))
    answer = site("north", study(root), root / "run").handle("proxies", 1, Message(scalars={"digest": ""}))
    assert answer.scalars.keys() == {"fault"}
    for told in (str(caught.value), str(answer.scalars["fault"])):
        assert all(word in told for word in words), told
        # Where files lie at a site is its own business.
        assert str(root) not in told


def test_a_manifest_that_may_not_be_read_is_named_without_its_folder(root: Path) -> None:
    (root / "public.json").unlink()
    (root / "public.json").mkdir()
    with pytest.raises(DataError, match=r"public\.json is no manifest of public images \(Is a directory\)"):
        load_proxies(study(root))


def test_a_resumed_run_keeps_its_public_images(root: Path, tmp_path: Path) -> None:
    channel = LocalChannel({"north": site("north", study(root), tmp_path)})
    state = ServerState({})
    state.scalars["proxies"] = "0" * 64
    with pytest.raises(
        RunError, match=r"began with other public images.*digest 000000000000\.\.\..*new results folder"
    ):
        agree_on_proxies(channel, study(root), state)
    assert not channel.traffic.down


def test_the_first_of_several_altered_images_is_named(root: Path) -> None:
    order = [one["path"] for one in json.loads((root / "public.json").read_text())["images"]]
    for path in (order[9], order[3]):
        (root / "public" / path).write_bytes(b"x")
    with pytest.raises(DataError, match=order[3]):
        load_proxies(study(root))


def test_classes_of_the_study_are_no_classes_of_public_images(root: Path) -> None:
    with pytest.raises(DataError, match="'tree' is a class of the public images 'mini' and of the study"):
        load_proxies(study(root, task={"classes": ["tree", "ill"]}))


def test_studies_without_public_images_or_with_volumes_are_refused(root: Path) -> None:
    with pytest.raises(StudyError, match=r"method fedavg needs public images.*polyclinic data proxies"):
        load_proxies(study(root, proxies=None))
    with pytest.raises(StudyError, match="proxies are flat images"):
        load_proxies(study(root, data={"image": {"size": [SIZE, SIZE, SIZE]}}))


def test_manifests_that_cannot_be_made(root: Path) -> None:
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(root / "public" / "loose.png")
    with pytest.raises(DataError, match=r"'loose.png' lies in none.*--labels"):
        make_manifest(root / "public", root / "new.json")
    with pytest.raises(DataError, match="neither a folder nor a zip"):
        make_manifest(root / "nothing", root / "new.json")
    (root / "table.csv").write_text("image,label\n../secret.png,cat\n")
    with pytest.raises(DataError, match="leaves the folder"):
        make_manifest(root / "public", root / "new.json", labels=root / "table.csv")


def site(name: str, own: Study, folder: Path) -> Site:
    bench = Workbench(lambda: start_model(own), "cpu")
    task = make_task(own.task, own.training)
    return Site(name, own, None, task, workbench=bench, ops=PROXY_OPS, folder=folder)  # type: ignore[arg-type]


def test_sites_with_the_same_images_agree(root: Path, tmp_path: Path) -> None:
    own = study(root)
    channel = LocalChannel({name: site(name, own, tmp_path) for name in ("north", "south")})
    replies: list[Message] = []
    channel._on_call = lambda op, name, reply: replies.append(reply)
    channel.begin_round(1)
    state = ServerState({})
    agreed = agree_on_proxies(channel, own, state)
    assert agreed is agree_on_proxies(channel, own, state)
    assert state.scalars == {"proxies": agreed.digest}
    assert [(dict(r.scalars), dict(r.arrays)) for r in replies] == [({"digest": agreed.digest}, {})] * 4
    down = Message(scalars={"name": "mini", "digest": agreed.digest}).nbytes
    assert channel.traffic.by_op()["proxies"]["down"] == 4 * down


@pytest.mark.parametrize("tolerant", [False, True])
def test_one_altered_image_at_a_site_stops_the_federation(root: Path, tmp_path: Path, tolerant: bool) -> None:
    """Also where the federation would go on without an absent site: all must have the same images."""
    own = study(root)
    away = tmp_path / "away"
    make_manifest(folder(away / "public"), away / "public.json", name="mini")
    assert ProxyManifest.load(away / "public.json").digest == load_proxies(own).digest
    altered(away)
    sites = {"north": site("north", own, tmp_path), "south": site("south", study(away), tmp_path)}
    channel = LocalChannel(sites, tolerant=tolerant)
    channel.begin_round(1)
    with pytest.raises(DataError, match=r"site 'south'.*'cat/4.png'.*SHA-256"):
        agree_on_proxies(channel, own, ServerState({}))


def test_a_site_with_another_manifest_stops_the_federation(root: Path, tmp_path: Path) -> None:
    away = tmp_path / "away"
    make_manifest(folder(away / "public", seed=1), away / "public.json", name="mini")
    channel = LocalChannel({"south": site("south", study(away), tmp_path)})
    channel.begin_round(1)
    with pytest.raises(DataError, match=r"site 'south' has other public images than the server"):
        agree_on_proxies(channel, study(root), ServerState({}))
    with pytest.raises(SiteError, match=r"site 'south' did not compare its public images 'mini'"):
        channel._sites["south"].proxies  # noqa: B018


def test_a_site_of_a_study_without_public_images_says_so(root: Path, tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="the study names no public images"):
        site("north", study(root, proxies=None), tmp_path).proxies  # noqa: B018


def test_where_images_lie_is_not_part_of_what_parties_sign(root: Path) -> None:
    moved = study(root, proxies={"manifest": "elsewhere/public.json"})
    assert moved.digest == study(root).digest
    assert study(root, proxies={"pretrain": 1}).digest != study(root).digest


def test_the_manifest_does_not_import_torch() -> None:
    code = "import sys, polyclinic.data.proxy_manifest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
