"""The report of every kind of folder: what it shows, and that it needs nothing from outside."""

import base64
import io
import json
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from made_up_folders import CLASSES, OTHERS, SITES, make_comparison, make_run
from PIL import Image

from polyclinic.errors import RunError
from polyclinic.report import write_report
from polyclinic.report.pictures import example_cards, outline, side_by_side

SCORES = ("dice", "iou", "hd95", "lesion-sensitivity")
VOID = {"meta", "link", "br", "image", "path", "line", "circle", "use", "rect", "img", "input"}


class Page(HTMLParser):
    """Ids, figures and references of a page; fails on a tag that is closed out of order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.figures: dict[str, set[str]] = {}
        self.open: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [found["id"]] if found.get("id") else []
        self.references += [v for k, v in attrs if v and k in ("href", "src", "xlink:href", "action", "srcset")]
        for name, id_ in self.open:
            if name == "figure" and id_:
                self.figures[id_].add(tag)
        if tag == "figure" and found.get("id"):
            self.figures[str(found["id"])] = set()
        if tag not in VOID:
            self.open.append((tag, found.get("id") or ""))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop()[0] == tag


@pytest.mark.parametrize("kind", [*CLASSES, "exchange", "comparison", *(f"compared {kind}" for kind in OTHERS)])
def test_nothing_is_fetched_and_ids_are_distinct(pages: dict[str, str], kind: str) -> None:
    page = Page(pages[kind])
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", re.sub(r'"data:[^"]*"', "", pages[kind]))
    for reference in page.references:
        assert reference.startswith(("#", "data:", "runs/")), reference[:80]
    assert [i for i in page.ids if page.ids.count(i) > 1] == []
    anchors = {reference[1:] for reference in page.references if reference.startswith("#") and len(reference) > 1}
    assert anchors <= set(page.ids)
    assert page.open == []


def test_plots_of_a_multi_class_run(pages: dict[str, str]) -> None:
    figures = Page(pages["multi-class"]).figures
    drawn = {"curve-train-loss", "curve-val-loss", "curve-val-balanced-accuracy", "curve-val-auroc"}
    drawn |= {"traffic-bytes", "traffic-seconds"} | {f"reliability-{site}" for site in SITES}
    drawn |= {f"roc-{site}" for site in SITES if site != "harbor"}
    assert all("svg" in figures[name] for name in drawn)
    assert "svg" not in figures["roc-harbor"]
    assert all("table" in figures[f"confusion-{site}"] for site in SITES)


def test_plots_of_the_other_kinds(pages: dict[str, str]) -> None:
    assert all("svg" in Page(pages["binary"]).figures[f"roc-{site}"] for site in SITES if site != "harbor")
    labels = Page(pages["multi-label"]).figures
    assert all("svg" in labels[f"roc-{s}"] and "table" in labels[f"confusion-{s}"] for s in SITES)
    masks = Page(pages["segmentation"])
    assert all("svg" in masks.figures[f"scores-{score}-lesion"] for score in SCORES)
    assert pages["segmentation"].count('class="outline target"') == 16
    compared = Page(pages["comparison"]).figures
    assert all(
        "svg" in compared[f"{part}-{name}"] for part in ("values", "forest") for name in ("auroc", "loss", "ece")
    )
    assert "svg" in compared["curve-methods-balanced-accuracy"]


def test_masks_are_shown_with_their_unit_and_threshold(pages: dict[str, str]) -> None:
    wanted = "from a probability of 0.30 at north, 0.35 at south, 0.40 at harbor, 0.45 at st-anne on"
    for page in (pages["segmentation"], pages["compared segmentation"]):
        assert wanted in page
        assert "HD95 is in mm;" in page
        assert re.search(r"HD95\s*<(small|span class=\"hint\")>lower is better, in mm</", page)
        assert re.search(r"Lesion sensitivity\s*<(small|span class=\"hint\")>higher is better</", page)
        assert 'aria-label="HD95, lesion (mm)"' in page
    assert "from a probability of" not in pages["multi-class"]


def test_a_comparison_shows_the_plots_of_every_method(comparison_folder: Path, pages: dict[str, str]) -> None:
    page, metrics = Page(pages["comparison"]), json.loads((comparison_folder / "metrics.json").read_text())
    run = Page(write_report(comparison_folder / "runs" / "ditto-seed0").read_text())
    shared = {name: tags for name, tags in run.figures.items() if re.match("curve|roc|reliability|confusion", name)}
    assert len(shared) == 4 + 3 * len(SITES)
    assert len(metrics["methods"]) == 6
    for method in metrics["methods"]:
        assert {name: page.figures[f"{method}-{name}"] for name in shared} == shared
    for site in SITES:
        assert "svg" in page.figures[f"curve-methods-balanced-accuracy-at-{site}"]
    assert "First seed (0) of each method" in pages["comparison"]
    assert len(pages["comparison"]) < 3e6


def test_a_comparison_of_the_other_kinds(pages: dict[str, str]) -> None:
    labels, masks = Page(pages["compared multi-label"]), Page(pages["compared segmentation"])
    for method in ("fedavg", "ditto"):
        assert all("svg" in labels.figures[f"{method}-{part}-{s}"] for part in ("roc", "reliability") for s in SITES)
        assert all("table" in labels.figures[f"{method}-confusion-{site}"] for site in SITES)
        assert all("svg" in masks.figures[f"{method}-scores-{score}-lesion"] for score in SCORES)
    assert "First seed" not in pages["compared segmentation"]


def test_examples_of_a_comparison_share_their_images(comparison_folder: Path, pages: dict[str, str]) -> None:
    """16 pictures, each once, with the answer of each method: six for classes, two outlined copies for masks."""
    listed = pages["comparison"].split('id="examples"')[1].split("</section>")[0]
    assert listed.count("data:image/png") == 16
    answers = re.findall(r"<span>(.)</span> <span>([^<]*)</span> <span>(\S+) \((\d\.\d\d)\)</span>", listed)
    assert len(answers) == 16 * 6
    with np.load(comparison_folder / "runs" / "ditto-seed0" / "predictions" / f"{SITES[0]}.examples.npz") as arrays:
        target, guess, odds = (arrays[name][0] for name in ("targets", "predictions", "probabilities"))
    said = ("✓" if target == guess else "✗", "ditto", CLASSES["multi-class"][guess], f"{odds[guess]:.2f}")
    assert answers[3] == said
    masks = pages["compared segmentation"]
    assert masks.count("data:image/png") == masks.count('<use href="#picture-') == 16
    assert masks.count('class="outline predicted"') == 32


def test_large_pictures_are_shrunk_and_outlines_keep_their_pixels() -> None:
    mask = np.zeros((1, 300, 600), dtype=np.uint8)
    mask[0, 10:20, 400:500] = 1
    arrays = {"images": np.zeros((1, 3, 300, 600), dtype=np.uint8), "targets": mask, "predictions": mask}
    (card,) = example_cards(arrays, ["background", "lesion"], "segmentation", "north")
    with Image.open(io.BytesIO(base64.b64decode(card["picture"].split(",")[1]))) as picture:
        assert picture.size == (192, 96)
    assert (card["width"], card["height"], card["dice"]) == (600, 300, 1)
    assert card["outlines"][0]["path"] == "M400 10H500M400 20H500M400 10V20M500 10V20"


def test_different_examples_are_kept_apart() -> None:
    card = {"picture": "a", "target": "x"}
    other = {"picture": "b", "target": "x"}
    found = side_by_side({"fedavg": [card, card], "local": [card, other]}, "St. Anne")
    assert [(f["id"], list(f["answers"])) for f in found] == [
        ("picture-st-anne-1", ["fedavg", "local"]),
        ("picture-st-anne-2", ["fedavg"]),
        ("picture-st-anne-3", ["local"]),
    ]


def test_text_is_escaped_and_undefined_is_a_dash(pages: dict[str, str]) -> None:
    page = pages["multi-class"]
    assert "&lt;different&gt; scanners &amp; one class" in page
    assert "<different>" not in page
    assert "every test image is normal" in page
    assert "AUROC is undefined at harbor: left out of the mean and the worst site" in page
    assert "absent in round 2: no answer within 30 s" in page
    assert re.search(r"<td>\s*–\s*</td>", page)
    assert "nan" not in re.sub(r"data:[^\"]*", "", page).lower().replace("st-anne", "").split()


def test_numbers_are_those_of_the_folder(run_folders: dict[str, Path], pages: dict[str, str]) -> None:
    metrics = json.loads((run_folders["binary"] / "metrics.json").read_text())
    cell = metrics["mean"]["auroc"]
    text = re.sub(r"\s+", " ", pages["binary"])
    assert f"<dd>{cell['value']:.3f}<small>[{cell['low']:.3f}, {cell['high']:.3f}]" in text
    assert metrics["worst"]["auroc"]["site"] in text
    predictions = (run_folders["binary"] / "predictions" / "north.csv").read_text().splitlines()
    test = [line.split(",") for line in predictions if ",test," in line]
    hits = sum(row[4] == "normal" and float(row[5]) >= 0.5 for row in test)
    total = sum(row[4] == "normal" for row in test)
    assert f">{hits / total:.2f}<small>{hits}</small>" in pages["binary"]


def test_losses_are_printed_like_wins(comparison_folder: Path, pages: dict[str, str]) -> None:
    rows = json.loads((comparison_folder / "metrics.json").read_text())["differences"]
    readings = {"auroc": 1, "loss": -1}
    for row in rows:
        if row["metric"] not in readings or row["low"] is None or row["low"] <= 0 <= row["high"]:
            continue
        gain = (row["low"] > 0) == (readings[row["metric"]] > 0)
        value = f"{row['value']:+.3f}".replace("-", "−")
        pattern = rf"{re.escape(value)}<small>[^<]*</small><small>{'better' if gain else 'worse'}</small>"
        assert re.search(pattern, pages["comparison"]), (row, pattern)


def test_the_metric_that_chose_the_round_is_marked(pages: dict[str, str]) -> None:
    from polyclinic.evaluation import names, ops

    assert ops.AUTO_METRIC == names.AUTO_METRIC
    marked = re.findall(r'<figure id="([^"]*)">(?:(?!</figure>).)*Chose the round', pages["binary"], re.DOTALL)
    assert marked == ["curve-val-balanced-accuracy"]


def test_same_folder_same_report(run_folders: dict[str, Path], pages: dict[str, str]) -> None:
    assert write_report(run_folders["binary"]).read_text() == pages["binary"]


def test_a_comparison_takes_seconds(comparison_folder: Path) -> None:
    start = time.process_time()
    write_report(comparison_folder)
    assert time.process_time() - start < 30


def test_lean_folders(tmp_path: Path) -> None:
    """One site, one round, no examples, no privacy record, no bootstrap; and a comparison of one method."""
    folder = make_run(tmp_path / "lean", sites=["alone"], rounds=1)
    (folder / "privacy.json").unlink()
    (folder / "predictions" / "alone.examples.npz").unlink()
    page = write_report(folder).read_text()
    assert 'id="examples"' not in page
    assert "curve-train-loss" in page
    one = write_report(make_comparison(tmp_path / "one", methods=("local",), seeds=1)).read_text()
    assert "nothing to compare" in one


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.json", "{", r"metrics\.json: cannot be read"),
        ("metrics.json", "[]", "wanted a JSON object"),
        ("rounds.jsonl", "{}\n{", r"rounds\.jsonl line 2"),
        ("study.yaml", "a: [", r"study\.yaml: cannot be read"),
        ("study.yaml", "text", "wanted a mapping"),
        ("predictions/north.csv", "image\n", r"north\.csv: columns are"),
        ("predictions/north.examples.npz", "no", r"north\.examples\.npz: cannot be read"),
    ],
)
def test_damaged_files_are_named(
    tmp_path: Path, run_folders: dict[str, Path], name: str, text: str, message: str
) -> None:
    folder = shutil.copytree(run_folders["binary"], tmp_path / "run")
    (folder / name).write_text(text)
    with pytest.raises(RunError, match=message):
        write_report(folder)


def test_outline_follows_pixel_edges() -> None:
    mask = np.zeros((4, 5), dtype=bool)
    mask[1:3, 2:4] = True
    assert outline(mask) == "M2 1H4M2 3H4M2 1V3M4 1V3"
    assert outline(np.zeros((3, 3))) == ""
    assert outline(np.ones((2, 2))) == "M0 0H2M0 2H2M0 0V2M2 0V2"
