"""The model card: everything of the record is on it, nothing from elsewhere is fetched, and nothing in it is code."""

import copy
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from polyclinic.errors import ContributionError
from polyclinic.vectors.card import card, write_card
from polyclinic.vectors.record import MergeRecord

CHROMIUM = shutil.which("chromium")
DIGESTS = {name: f"{i}c" * 32 for i, name in enumerate(["north", "south", "west", "odd"], start=1)}
LAYERS = ["stem.weight", "stem.bias", "body.0.weight", "body.1.weight", "head.weight", "head.bias"]


def contribution(site: str, **changes: Any) -> dict[str, Any]:
    made = {
        "digest": DIGESTS[site],
        "site": site,
        "sequence": 1,
        "used": True,
        "images": 470,
        "classes_held": ["normal", "pneumonia", "covid"],
        "brought": ["vector", "head"],
        "membership": {"auc": 0.5628, "low": 0.49, "high": 0.63, "limit": 0.65, "passed": True},
        "verdict": "accept",
        "licence": "CC-BY-NC-4.0",
        "ethics": "2026-117",
    }
    return {**made, **changes}


RECORD: dict[str, Any] = {
    "schema": "polyclinic-merge/1",
    "name": "chest-three",
    "created": "2026-11-21T16:00:00Z",
    "purpose": "Tells pneumonia and COVID-19 from normal on frontal chest X-rays. For research.",
    "task": "multi-class",
    "classes": ["normal", "pneumonia", "covid"],
    "image": {"size": [128, 128], "channels": 1, "fit": "pad", "mean": 0.5, "std": 0.25, "window": None},
    "model": {"name": "resnet18", "norm": "batch", "parameters": 11_172_163},
    "base_id": "natural-images",
    "base_version": "2",
    "base_digest": "ab" * 32,
    "recipe": {
        "rule": {"name": "ties", "keep": 0.2, "scale": 1.0},
        "filters": [{"name": "clip", "factor": 1.5}],
        "head": "ridge",
    },
    "recipe_digest": "34" * 32,
    "rule_in_words": "TIES: of each vector the largest fifth of the values is kept, and signs are elected.",
    "restoration": {"mode": "bn-recal", "images": 512},
    "restoration_data": "512 unlabelled images of the coordinator",
    "contributions": [
        contribution("north"),
        contribution("south", classes_held=["normal", "covid"], notes=["rows of the head changed: pneumonia (0.03)"]),
        contribution("west", membership={"auc": None, "why": "9 training patients; 10 are needed"}),
        contribution(
            "odd",
            used=False,
            verdict="quarantine",
            decision="hold",
            reasons=["the vector is 41 times as long as the others' usually are"],
            membership={"auc": 0.8, "low": 0.71, "high": 0.88, "limit": 0.85, "passed": True},
        ),
    ],
    "shares": {name: (None if name == "head.bias" else [0.1 * i, 0.3, -0.05]) for i, name in enumerate(LAYERS)},
    "metrics": [
        {
            "name": "base",
            "metrics": {"auroc": {"value": 0.61, "low": 0.52, "high": 0.7}, "accuracy": {"value": 0.4}},
            "images": 412,
            "patients": 388,
            "data": "the coordinator's test images",
        },
        {"name": "restored", "metrics": {"auroc": {"value": 0.9123, "low": 0.88, "high": 0.94}}, "images": 412},
    ],
    "checks": [
        {"name": "every variance is positive and finite", "passed": True, "detail": "40 tensors"},
        {"name": "every site stayed below its audit's limit", "passed": False, "detail": "west could not measure it"},
    ],
    "warnings": ["It differs from release 3 by one contribution: whoever has both can compute that vector."],
    "limits": ["Not tested on children."],
    "weights_sha256": "cd" * 32,
    "set_digest": "ef" * 32,
    "chain_head": "12" * 32,
    "software": {"polyclinic": "0.1.0", "torch": "2.13.0", "python": "3.11.9"},
    "verify": ["polyclinic vectors verify ledger"],
    "reproduce": ["polyclinic vectors merge ledger --recipe recipe.yaml --out again"],
}


def changed(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(RECORD), **changes}


class Text(HTMLParser):
    """What a reader sees, and what the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self._hidden = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._hidden = tag in ("style", "script")
        self.loads += [v for name, v in attrs if name in ("src", "href", "data", "action") and v and v[0] != "#"]

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.words.append(data)


def read(html: str) -> tuple[str, Text]:
    parsed = Text()
    parsed.feed(html)
    return re.sub(r"\s+", " ", " ".join(parsed.words)), parsed


def test_everything_in_the_record_is_on_the_page() -> None:
    text, _ = read(card(RECORD))
    for wanted in (
        "chest-three",
        "For research.",
        "natural-images, version 2",
        "TIES: of each vector",
        "rule.keep",
        "filters 1.factor",
        "1.5",
        "bn-recal",
        "512 unlabelled images",
        "11,172,163",
        "128 × 128",
        "normal, covid",
        "rows of the head changed: pneumonia (0.03)",
        "9 training patients; 10 are needed",
        "AUC 0.563",
        "left out: quarantine",
        "decided by a person: hold",
        "41 times as long",
        "0.912",
        "[0.880, 0.940]",
        "every variance is positive and finite",
        "failed",
        "differs from release 3 by one contribution",
        "Not tested on children.",
        "cd" * 32,
        "ef" * 32,
        "12" * 32,
        "34" * 32,
        "polyclinic vectors verify ledger",
        "polyclinic vectors merge ledger --recipe recipe.yaml --out again",
        "CC-BY-NC-4.0",
        "2026-117",
        "there is no bound on what it tells of a patient",
        "who was among its training patients",
    ):
        assert wanted in text, wanted


def test_the_largest_audit_is_of_what_went_in() -> None:
    text, _ = read(card(RECORD))
    # 0.8 was left out; of the three that went in one could not measure.
    assert "largest AUC of 2 of 3 sites" in text


def test_an_audit_without_a_limit_is_no_pass() -> None:
    free = {"auc": 0.9, "limit": 1.0, "passed": True}
    html = card(changed(contributions=[contribution("north", membership=free)], shares={}))
    assert "AUC 0.900 the site set no limit" in read(html)[0]
    assert '<td class="kept">AUC' not in html
    assert '<td class="kept">AUC' in card(RECORD)


def test_nothing_is_fetched() -> None:
    html = card(RECORD)
    _, parsed = read(html)
    assert parsed.loads == ["data:,"]
    assert not re.search(r"url\(|@import|https?://", html)


def test_names_from_elsewhere_are_text() -> None:
    attack = "<script>alert(1)</script>"
    record = changed(purpose=attack, warnings=[attack], software={attack: attack})
    record["contributions"][0]["reasons"] = [attack]
    record["contributions"][0]["licence"] = attack
    record["shares"] = {attack if name == "stem.bias" else name: s for name, s in RECORD["shares"].items()}
    text, parsed = read(card(record))
    assert parsed.tags.count("script") == 1  # our own
    assert text.count(attack) >= 5


def test_an_epsilon_stands_with_its_unit_and_delta() -> None:
    guarantee = {"mechanism": "DP-SGD at every site", "epsilon": 8.0, "delta": 1e-5, "unit": "patient"}
    text, _ = read(card(changed(privacy=guarantee)))
    assert "epsilon 8, delta 1e-05, for a patient (DP-SGD at every site)" in text
    bare, _ = read(card(changed(privacy={"mechanism": "DP-SGD", "epsilon": 8.0})))
    assert "delta not stated, its unit is not stated, so it says little" in bare


def test_equal_shares_are_one_row_without_a_heat_map() -> None:
    html = card(changed(shares={name: [1 / 3] * 3 for name in LAYERS}))
    text, parsed = read(html)
    assert "all 6 layers 0.333 0.333 0.333" in text
    assert "rect" not in parsed.tags


def test_images_that_all_were_measured_on_are_named_once() -> None:
    stages = [{**stage, "data": "test images of west"} for stage in RECORD["metrics"]]
    text, _ = read(card(changed(metrics=stages)))
    assert text.count("test images of west") == 1
    assert "All on test images of west." in text
    assert "All on" not in read(card(RECORD))[0]


def test_a_cell_is_as_dark_as_its_share() -> None:
    rects = re.findall(r'<rect x="(\d+)"[^>]*fill="([^"]+)" fill-opacity="([\d.]+)"><title>([^<]*)', card(RECORD))
    assert len(rects) == 3 * len(LAYERS)
    by_title = {title: (fill, float(part)) for _, fill, part, title in rects}
    # The largest share is 0.4, of the first site in the fifth layer.
    assert by_title["head.weight: 0.400"] == ("var(--accent)", 1.0)
    assert by_title["body.0.weight: 0.200"] == ("var(--accent)", 0.5)
    assert by_title["stem.weight: -0.050"] == ("var(--s1)", 0.125)
    assert by_title["head.bias: no linear combination"][0] == "var(--s7)"


def test_a_small_record_has_a_page() -> None:
    small = {name: RECORD[name] for name, field in MergeRecord.model_fields.items() if field.is_required()}
    text, _ = read(card({**small, "contributions": [], "shares": {}}))
    assert "Nobody knows how good this model is." in text
    assert "No vector went in." in text
    assert "Nothing was restored" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "polyclinic-merge/9"}, "schema"),
        ({"surprise": 1}, "surprise: there is no such key"),
        ({"shares": {"stem.weight": [1.0]}}, "stem.weight has not one share for each vector"),
    ],
)
def test_another_record_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ContributionError, match=message):
        card(changed(**changes))


def test_the_record_survives_its_file(tmp_path: Path) -> None:
    record = MergeRecord.model_validate(RECORD)
    kept = json.loads(json.dumps(record.model_dump(mode="json", by_alias=True)))
    assert MergeRecord.model_validate(kept) == record
    write_card(kept, tmp_path / "card.html")
    assert (tmp_path / "card.html").read_text() == card(RECORD)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ContributionError, match="cannot be written"):
        write_card(RECORD, tmp_path / "missing" / "card.html")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium on the PATH")
def test_it_fits_a_phone(tmp_path: Path) -> None:
    probe = (
        "<script>document.querySelectorAll('details').forEach(function (d) { d.open = true; });"
        "parent.postMessage([innerWidth, document.documentElement.scrollWidth].join(';'), '*')</script>"
    )
    (tmp_path / "card.html").write_text(card(RECORD).replace("</body>", f"{probe}</body>"))
    (tmp_path / "frame.html").write_text(
        "<title></title><script>addEventListener('message', function (e) { document.title = e.data; })</script>"
        '<iframe src="card.html" width="400" height="900" style="border:0"></iframe>'
    )
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--virtual-time-budget=3000",
        "--dump-dom",
    ]
    command = [str(CHROMIUM), *flags, f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<title>(\d+);(\d+)</title>", done.stdout)
    assert found, done.stderr[-500:]
    assert found[1] == found[2] == "400"
