"""What a site answers once, what it looks at before, and what of its answers stays small or away."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from painter import Painter, painter, painter_study
from toy_hospitals import OWNED, hospital_study, hospitals, started

from polyclinic.data.dataset import SiteData
from polyclinic.data.manifest import Case
from polyclinic.errors import MessageError, SiteError
from polyclinic.federation.message import Message
from polyclinic.federation.site import Op, Site
from polyclinic.report.heat_map import heat_map
from polyclinic.runner import Run
from polyclinic.synthesis.exchange import Exchange
from polyclinic.synthesis.pool import Samples
from polyclinic.synthesis.shelf import sized
from polyclinic.synthesis.statistics import device_names
from polyclinic.synthesis.verdict import checked_verdict

__all__ = ["painter"]
pytestmark = pytest.mark.usefixtures("painter")
DEVICES = json.dumps(["bright", "dark"])
NAMES = Message(scalars={"devices": DEVICES})


def site_of(run: Run, name: str = "north") -> Site:
    assert run.exchange is not None
    found = run.exchange._channel._sites[name]  # type: ignore[attr-defined]
    assert isinstance(found, Site)
    return found


def lines(count: int) -> Samples:
    zeros = torch.zeros(count, dtype=torch.int64)
    return Samples(zeros, zeros, torch.arange(count))


def examination(count: int) -> Message:
    return Message.pack({"samples": lines(count).arrays(), "decoder": {"seen": torch.ones(2)}}, devices=DEVICES)


def release(level: float = 5.0, **plan: torch.Tensor) -> Message:
    cells = torch.zeros(2, 2, dtype=torch.int64)
    told = {"wanted": cells, "patients": cells, "styles": torch.zeros(2, 3, 3, 3), **plan}
    images = lines(2).with_images(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    return Message.pack({"plan": told, "samples": images.arrays()}, devices=DEVICES, level=level)


@pytest.mark.parametrize(
    ("op", "message", "other"),
    [
        ("count-cells", NAMES, Message(scalars={"devices": json.dumps(["bright"])})),
        ("sum-features", NAMES, Message(scalars={"devices": json.dumps(["bright"])})),
        ("examine", examination(3), examination(2)),
        ("receive", release(), release(6.0)),
    ],
)
def test_an_answer_is_given_once(op: str, message: Message, other: Message, tmp_path: Path) -> None:
    """Repeated for a killed run, not for another message, round, or a round that is said to be an earlier one."""
    site = site_of(started(painter_study(), tmp_path))
    first = site.handle(op, 3, message)
    again = site_of(started(painter_study(), tmp_path))
    assert again.handle(op, 3, message).digest() == first.digest()
    for number, asked in ((3, other), (4, message), (2, message)):
        with pytest.raises(SiteError, match="was answered before"):
            again.handle(op, number, asked)


def test_a_damaged_journal_answers_nothing(tmp_path: Path) -> None:
    site = site_of(started(painter_study(), tmp_path))
    site.handle("count-cells", 1, NAMES)
    (site.state.folder / "answered.json").write_text("[")
    with pytest.raises(SiteError, match="damaged"):
        site.handle("count-cells", 1, NAMES)


def test_asking_again_for_noisy_counts_tells_nothing_new(tmp_path: Path) -> None:
    study = hospital_study(synthesis={"generator": [], "epsilon": 0.1})
    site = site_of(started(study, tmp_path))
    said = [site.handle("count-cells", 1, NAMES).digest() for _ in range(3)]
    assert len(set(said)) == 1
    elsewhere = site_of(started(study, tmp_path / "other")).handle("count-cells", 1, NAMES)
    assert elsewhere.digest() != said[0], "the key is not from the study's seed"


def test_noise_does_not_name_a_device_of_one_patient(tmp_path: Path) -> None:
    data = hospitals({**OWNED, "north": {**OWNED["north"], ("b", "van"): 1}})
    run = started(hospital_study(synthesis={"generator": [], "epsilon": 1.0}), tmp_path, data)
    assert json.loads(str(site_of(run).handle("enter", 1, Message()).scalars["devices"])) == ["bright"]


def test_a_style_is_never_that_of_fewer_patients_than_the_floor(tmp_path: Path) -> None:
    """Five have an image of the dark device, but four of them count on the bright one."""
    owned = {"p0": (2, 1), "p1": (2, 1), "p2": (2, 1), "p3": (2, 1), "p4": (0, 1), "p5": (2, 0)}
    cases = [
        Case(f"{who}-{device}-{k}.png", who, "north", device=device, label="a", split="train")
        for who, counts in owned.items()
        for device, count in zip(("bright", "dark"), counts, strict=True)
        for k in range(count)
    ]
    pixels = torch.randint(0, 255, (len(cases), 3, 16, 16), dtype=torch.uint8)
    none = torch.zeros(0, dtype=torch.int64)
    splits = {"train": torch.arange(len(cases)), "val": none, "test": none}
    data = {"north": SiteData("north", cases, pixels, torch.zeros(len(cases), dtype=torch.int64), splits)}
    study = hospital_study(synthesis={"generator": []}, evaluation={"select": "last"})
    cells = site_of(started(study, tmp_path, data)).handle("count-cells", 1, NAMES).group("cells")
    assert cells["patients"].tolist() == [[5, 0], [0, 0]]
    assert cells["images"].tolist() == [[10, 0], [0, 0]]
    assert cells["styles"][0].any()
    assert not cells["styles"][1].any()


@pytest.mark.parametrize("sections", [{"aggregation": "masked"}, {"synthesis": {"epsilon": 50.0}}, {}])
def test_the_gate_tells_no_number_that_sums_hide(sections: dict[str, Any], tmp_path: Path) -> None:
    run = started(painter_study(**sections), tmp_path)
    assert run.exchange is not None
    run.exchange.finish()
    gate = json.loads((tmp_path / "synthesis.json").read_text())["gate"]
    rows = [row for part in gate.values() for row in part["rows"]]
    told = {name for row in rows for name in ("train", "holdout", "fpr") if row[name]}
    assert told == (set() if sections else {"train", "holdout", "fpr"})
    assert not any("held-out patients" in row["why"] and row["why"][0].isdigit() for row in rows)


BAD = torch.full((2, 3, 3, 3), torch.nan)


@pytest.mark.parametrize(
    "plan", [{"styles": BAD}, {"styles": torch.zeros(1, 3, 3, 3)}, {"wanted": torch.full((2, 2), -1)}]
)
def test_a_plan_that_is_none_is_refused(plan: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(MessageError, match="of the plan is not"):
        site_of(started(painter_study(), tmp_path)).handle("receive", 1, release(**plan))


ROW = {
    "space": "pixels",
    "class": "a",
    "device": "all",
    "passed": True,
    "why": "",
    "copies": 0,
    "candidates": 3,
    **dict.fromkeys(("train", "holdout", "fpr", "dcr_ratio", "closer", "closer_low", "closer_high"), None),
    "nndr": 0.5,
    "nndr_holdout": 0.5,
    "auc": 0.5,
    "tpr": 0.0,
}


def verdict(**row: Any) -> str:
    return json.dumps({"accepted": 1, "refused": {"copy": 2}, "rows": [{**ROW, **row}]})


def test_a_verdict_of_the_gate_passes() -> None:
    assert checked_verdict("x", verdict(), ["a"], ["d"])["rows"] == [ROW]


@pytest.mark.parametrize(
    "text",
    [
        *("[]", "nonsense", "", '{"accepted": 1, "refused": {}, "rows": 7}', "[" * 100_000),
        *(verdict(auc=float("nan")), verdict(**{"class": "<b>"}), verdict(dcr_ratio="x")),
        *(verdict(candidates=-1), verdict(passed="yes")),
    ],
)
def test_another_verdict_is_refused(text: str) -> None:
    with pytest.raises(SiteError, match="none of the gate"):
        checked_verdict("x", text, ["a"], ["d"])


def test_a_site_without_verdict_is_refused_by_the_server(tmp_path: Path) -> None:
    run = started(painter_study(), tmp_path)
    assert run.exchange is not None
    site = site_of(run)
    leaves = site._ops["examine"].leaves
    site._ops = {**site._ops, "examine": Op(lambda s, m: Message(scalars={"report": verdict()}), leaves)}
    with pytest.raises(SiteError, match="without a verdict"):
        run.exchange.finish()


@pytest.mark.parametrize("text", ["[{}]", "7", "[", "[" * 90_000, '["a\\nb"]', '["\\ud800"]'])
def test_names_that_would_break_tables_or_the_server_are_refused(text: str) -> None:
    with pytest.raises(SiteError, match="no list of names"):
        device_names("x", text)


def test_a_long_list_of_foreign_names_is_whole() -> None:
    names = {f"{k:03d}" + "器" * 61 for k in range(256)}
    assert device_names("x", json.dumps(sorted(names))) == names


def test_a_device_name_is_no_formula() -> None:
    counts = np.ones((1, 1), dtype=np.int64)
    assert heat_map("id", "Title", counts, (["a"], ["a$\\frac{b$"]))


def test_the_budget_is_what_sites_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """42 images: candidates are twice the samples, and images of 768 bytes each."""
    run = started(painter_study(), tmp_path)
    assert run.exchange is not None
    run.exchange.finish()
    exchange = run.exchange.exchange
    assert isinstance(exchange, Exchange)
    state = type(run.state).load(tmp_path / "state" / "exchange" / "server.safetensors")
    assert exchange.budget(state) == 42
    monkeypatch.setattr("polyclinic.synthesis.exchange.MOST_BYTES", 30 * 768)
    assert exchange.budget(state) == 30
    monkeypatch.setattr("polyclinic.synthesis.exchange.MOST_SAMPLES", 40)
    assert exchange.budget(state) == 20


def test_a_copy_under_another_label_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """North owns class a alone; the generator gives out its patients whatever it is asked for."""
    owned = {
        "north": {("a", "bright"): 10},
        "south": {("a", "dark"): 12, ("b", "dark"): 9},
        "west": {("a", "bright"): 6, ("a", "dark"): 6, ("b", "dark"): 6},
    }
    data = hospitals(owned)
    north = data["north"]
    own = north.images[north.splits["train"]]
    monkeypatch.setattr(Painter, "decode", lambda self, decoder, labels, devices, seeds: own[seeds % len(own)])
    run = started(painter_study(), tmp_path, data)
    message = Message.pack(
        {"samples": replace(lines(4), labels=torch.ones(4, dtype=torch.int64)).arrays(), "decoder": {"x": own[:1]}},
        devices=DEVICES,
    )
    reply = site_of(run).handle("examine", 1, message)
    assert not reply.arrays["verdict/accepted"].any()
    assert json.loads(str(reply.scalars["report"]))["refused"] == {"copy": 4}


def test_samples_are_brought_to_size_in_parts_as_at_once() -> None:
    images = torch.randint(0, 256, (150, 3, 16, 16), dtype=torch.uint8)
    larger = torch.nn.functional.interpolate(images.float(), size=(24, 20), mode="bilinear", antialias=True)
    assert torch.equal(sized(images, (24, 20)), larger.round().clamp(0, 255).to(torch.uint8))
