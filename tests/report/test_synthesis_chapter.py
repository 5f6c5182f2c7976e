"""The chapter on synthetic samples: its numbers are those of the folder, its pictures those of both kinds."""

import base64
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_exchange import CLASSES, DEVICES, PATIENTS, add_exchange
from made_up_folders import make_comparison, make_run
from PIL import Image

from polyclinic.errors import RunError
from polyclinic.report import write_report
from polyclinic.report.gallery import in_turn
from polyclinic.report.heat_map import heat_map


@pytest.fixture(scope="module")
def found(exchange_folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((exchange_folder / "synthesis.json").read_text())
    return record


@pytest.fixture(scope="module")
def chapter(exchange_page: str) -> str:
    return section(exchange_page)


def section(page: str) -> str:
    return page.split('<section id="synthesis">')[1].split("</section>")[0]


def rows(chapter: str, table: str) -> list[list[str]]:
    """The texts of a table's cells; a small line below a cell follows it, behind ``/``."""
    body = chapter.split(f'<table id="{table}"')[1].split("<tbody>")[1].split("</tbody>")[0]
    cells = [
        re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in re.findall(r"<tr.*?</tr>", body, re.DOTALL)
    ]
    return [[re.sub(r"<[^>]+>", "", cell.replace("<small>", "/")) for cell in row] for row in cells]


def texts(chapter: str, figure: str) -> list[str]:
    svg = chapter.split(f'<figure id="{figure}">')[1].split("</figure>")[0]
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def changed(folder: Path, to: Path, **changes: Any) -> str:
    """The chapter of a copy whose ``synthesis.json`` is changed."""
    copy = shutil.copytree(folder, to / "copy")
    record = json.loads((copy / "synthesis.json").read_text())
    (copy / "synthesis.json").write_text(json.dumps({**record, **changes}))
    return section(write_report(copy).read_text())


def test_no_exchange_no_chapter(exchange_page: str, tmp_path: Path) -> None:
    plain = write_report(make_run(tmp_path / "plain")).read_text()
    for page, shown in ((exchange_page, True), (plain, False)):
        assert ('<section id="synthesis"' in page) == ('href="#synthesis"' in page) == shown


def test_the_maps_hold_every_number(chapter: str, found: dict[str, Any]) -> None:
    released = np.array(found["released"])
    before, after = texts(chapter, "synthesis-before"), texts(chapter, "synthesis-after")
    numbers = [str(n) if n else "–" for n in PATIENTS.flatten().tolist()]
    assert [text for text in before if text in numbers or text.isdigit()] == numbers
    expected = []
    for real, new in zip(PATIENTS.flatten().tolist(), released.flatten().tolist(), strict=True):
        expected += [str(real + new) if real + new else "–", *([f"+{new}"] if new else [])]
    assert [text for text in after if re.fullmatch(r"\+?\d+|–", text)] == expected
    assert {*CLASSES} <= {*before}
    assert {*CLASSES} <= {*after}


def test_colours_of_the_maps_follow_the_page() -> None:
    made = heat_map("a", "b", np.array([[9, 0], [4, 1]]), (["x", "y"], ["u", "v"]))
    colours = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", made.svg)) - {"none"}
    assert colours <= {"var(--accent)", "var(--muted)", "var(--ink)"}
    # 9 is the largest; 4 and 1 have 2/3 and 1/3 of the way from the faintest to it, by the square root.
    strengths = [float(s) for s in re.findall(r"fill: var\(--accent\); opacity: ([\d.]+)", made.svg)]
    assert strengths == pytest.approx([0.5, 0.07 + 0.43 * 2 / 3, 0.07 + 0.43 / 3], abs=1e-5)


def test_both_maps_share_a_scale_and_frame_what_is_made_alone(chapter: str, found: dict[str, Any]) -> None:
    """120 patients are the most in both; three cells have no patient and samples."""
    strongest = "fill: var(--accent); opacity: 0.5"
    for figure in ("synthesis-before", "synthesis-after"):
        svg = chapter.split(f'<figure id="{figure}">')[1].split("</figure>")[0]
        assert svg.count(strongest) == 1
        alone = int(((PATIENTS == 0) & (np.array(found["released"]) > 0)).sum())
        assert alone == 3
        assert svg.count("stroke: var(--ink)") == (alone if figure == "synthesis-after" else 0)


def test_many_devices_go_downwards() -> None:
    names = [f"device_{k}" for k in range(9)]
    made = heat_map("a", "b", np.arange(18).reshape(2, 9), (["x", "y"], names))
    written = re.findall(r"<text[^>]*>([^<]*)</text>", made.svg)
    numbers = [text for text in written if text.isdigit() or text == "–"]
    assert numbers == ["–", "9", *(str(v) for k in range(1, 9) for v in (k, k + 9))]


def test_classes_and_cells(chapter: str, found: dict[str, Any]) -> None:
    wanted, released = np.array(found["wanted"]), np.array(found["released"])
    assert rows(chapter, "synthesis-classes") == [
        [name, *(str(int(v)) for v in (PATIENTS[c].sum(), 2 * PATIENTS[c].sum(), wanted[c].sum(), released[c].sum()))]
        for c, name in enumerate(CLASSES)
    ]
    cells = rows(chapter, "synthesis-cells")
    assert len(cells) == PATIENTS.size
    c, d = 2, 3
    row = (0, 0, found["limit"][c][d], wanted[c, d], released[c, d])
    assert cells[-1] == [CLASSES[c], DEVICES[d], *(str(int(v)) for v in row)]


def test_what_was_refused_and_why(chapter: str, found: dict[str, Any]) -> None:
    stages = rows(chapter, "synthesis-stages")
    made = found["quality"]["candidates"]
    assert stages[0] == ["Made", "candidates", str(made)]
    assert stages[1] == ["Quality filter", "its class is unlikely by the features of real images", f"−{made // 9}"]
    assert stages[3] == ["Quality filter", "nearly equal to another sample", "0"]
    assert ["Gate at north", "nothing was refused", "0"] in stages
    assert ["Gate at south", "its class failed", "−31"] in stages
    copy = "a copy: nearer to a training image than different patients hardly ever are"
    assert ["Gate at st-anne", copy, "−3"] in stages
    assert stages[-1] == ["Released", "samples", str(int(np.sum(found["released"])))]


def test_the_gate_shows_every_check(chapter: str, found: dict[str, Any]) -> None:
    summary = rows(chapter, "synthesis-gate")
    assert [row[0] for row in summary] == ["north", "south", "harbor", "st-anne"]
    assert summary[1][2:] == ["32", "16", "1"]
    assert summary[2][3:] == ["14", "0"]  # two rows of a device with too few patients are not judged
    assert chapter.count('<table class="gate">') == 4
    assert re.findall(r"<details( open)?><summary>(\w+):", chapter.split('id="synthesis-gate"')[1])[:2] == [
        ("", "north"),
        (" open", "south"),
    ]
    failed = re.findall(r'<td class="text found">failed<small>([^<]*)</small></td>', chapter)
    assert failed == ["closer to training 0.710, at most 0.6; distance ratio 0.830, at least 0.95"]
    assert chapter.count(">not judged<small>2 held-out patients, 5 are needed<") == 2
    assert chapter.count('<td class="text kept">passed</td>') == 4 * 16 - 3
    assert ">at least 0.95<" in chapter
    assert ">at most 0.55<" in chapter


def test_undefined_measures_are_dashes(chapter: str) -> None:
    row = chapter.split(">not judged<")[1].split("</tr>")[0]
    cells = [re.sub(r"<small>.*?</small>", "", cell) for cell in re.findall(r"<td>(.*?)</td>", row)]
    assert cells[:3] == ["–", "–", "–"]
    assert cells[4:6] == ["–", "–"]


def test_real_and_synthetic_pictures_stand_side_by_side(
    chapter: str, exchange_page: str, exchange_folder: Path
) -> None:
    examples = exchange_page.split('<section id="examples">')[1].split("</section>")[0]
    with np.load(exchange_folder / "synthesis" / "examples.npz") as arrays:
        images, labels = arrays["images"], arrays["labels"]
    for c, name in enumerate(CLASSES):
        part = chapter.split(f'id="synthesis-pictures-{c + 1}">')[1].split('<div class="sides"')[0]
        assert f"<h4>{name}</h4>" in part
        shown = re.findall(r'<use href="#([^"]+)"', part)
        assert 1 <= len(shown) <= 3
        for id_ in shown:
            figure = examples.split(f'id="{id_}"')[1].split("</figure>")[0]
            assert f"<b>{name}</b>" in figure
        drawn = re.findall(r"data:image/png;base64,([^\"]+)", part)
        assert len(drawn) == min(6, int((labels == c).sum()))
        known = {image.tobytes() for image in np.moveaxis(images[labels == c], 1, -1)}
        for text in drawn:
            with Image.open(io.BytesIO(base64.b64decode(text))) as picture:
                assert np.asarray(picture).tobytes() in known


def test_first_of_each_then_second() -> None:
    assert in_turn([[1, 2, 3], [], [4], [5, 6]]) == [1, 4, 5, 2, 6, 3]
    assert in_turn([]) == []


def test_costs(chapter: str) -> None:
    """North: 0.2 + 41.5 + 1.1 + 6.3 + 0.04 s in the exchange, six rounds of 0.6 s."""
    sites = rows(chapter, "synthesis-sites")
    assert sites[0] == ["north", "60", "49 s", "3.6 s", f"{1 + 49.14 / 3.6:.2f} ×"]
    assert sites[3][:2] == ["st-anne", "–"]
    phases = rows(chapter, "synthesis-phases")
    assert phases[1][:3] == ["fit-vae", "5.3 MB", "1.3 MB"]
    assert phases[1][4] == "54 s"  # the slowest of four: 41.5 s and 30% more
    assert phases[-2][:3] == ["all of the exchange", "5.4 MB", "1.4 MB"]
    assert phases[-1] == ["6 rounds of training", "2.6 MB", "5.4 MB", "18 s", "5.4 s"]


def test_privacy_and_absences_are_said(chapter: str) -> None:
    assert "<dd>ε 7.93, noise 1.2, δ 1e-05, unit patient</dd>" in chapter
    assert "<dd>placement sites, size 32, loss 812.4 → 310 in 3 rounds</dd>" in chapter
    assert "<strong>st-anne</strong>: absent from done: no answer within 30 s" in chapter
    assert "&lt;keratosis&gt; on phone" in chapter
    assert "without noise" in chapter


def test_traffic_says_when(exchange_page: str) -> None:
    traffic = exchange_page.split('<section id="traffic">')[1]
    assert re.search(r">fit-vae</th>(<td>[^<]*</td>){2}<td>before the first<", traffic)
    assert re.search(r">test</th>(<td>[^<]*</td>){2}<td>after the last<", traffic)


def test_the_chapter_is_small(chapter: str) -> None:
    assert len(chapter) < 150_000


def test_features_alone(exchange_folder: Path, tmp_path: Path) -> None:
    """A generator of features makes no images: one map, no stages, no gate, no gallery."""
    nothing = np.zeros_like(PATIENTS).tolist()
    shutil.copytree(exchange_folder, tmp_path / "features")
    shutil.rmtree(tmp_path / "features" / "synthesis")
    parts = {
        "generator": ["features"],
        "wanted": nothing,
        "released": nothing,
        "limit": nothing,
        "budget": 0,
        "level": 0.0,
    }
    empty = {"quality": {"candidates": 0, "dropped": {}}, "gate": {}, "taken": {}, "fit": {}, "epsilon": 2.0}
    page = changed(tmp_path / "features", tmp_path, **parts, **empty)
    assert "synthesis-after" not in page
    assert "synthesis-before" in page
    for absent in ("synthesis-stages", "synthesis-gate", "synthesis-pictures"):
        assert absent not in page
    assert "<dd>no samples</dd>" in page
    assert "with noise for ε = 2 per patient" in page


def test_what_sites_make_themselves_is_apart(exchange_folder: Path, tmp_path: Path, found: dict[str, Any]) -> None:
    """Samples for cells that nobody owns are wanted as well, but not missing among the released."""
    wanted = np.array(found["wanted"])
    at_sites = np.where(PATIENTS == 0, wanted, 0)
    released = wanted - at_sites
    page = changed(exchange_folder, tmp_path, at_sites=at_sites.tolist(), released=released.tolist())
    assert f"<dd>{released.sum()} of {released.sum()} samples, 100%</dd>" in page
    assert rows(page, "synthesis-classes")[2][4] == str(int(at_sites[2].sum()))


def test_counts_as_plain_numbers_and_by_class(exchange_folder: Path, tmp_path: Path) -> None:
    taken = {"north": 12, "south": {"samples": 5, "classes": {"nevus": 5, "melanoma": 0}}}
    found = rows(changed(exchange_folder, tmp_path, taken=taken), "synthesis-sites")
    assert [row[1] for row in found] == ["12", "5", "–", "–"]
    assert [row[5] for row in found] == ["–", "nevus 5", "–", "–"]


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"images": np.zeros((2, 3, 4, 4), np.uint8), "labels": np.array([0, 1])}, "lacks devices"),
        (
            {"images": np.zeros((2, 3, 4, 4)), "labels": np.array([0, 1]), "devices": np.array([0, 0])},
            "do not fit 3 classes and 4 devices",
        ),
        (
            {"images": np.zeros((2, 3, 4, 4), np.uint8), "labels": np.array([0, 3]), "devices": np.array([0, 0])},
            "is it of another run",
        ),
    ],
)
def test_damaged_examples_are_named(
    exchange_folder: Path, tmp_path: Path, arrays: dict[str, np.ndarray], reason: str
) -> None:
    copy = shutil.copytree(exchange_folder, tmp_path / "copy")
    np.savez(copy / "synthesis" / "examples.npz", **arrays)
    with pytest.raises(RunError, match=f"synthesis/examples.npz .*{reason}"):
        write_report(copy)


def test_a_comparison_with_an_exchange(tmp_path: Path) -> None:
    """The page is made, and the bytes and seconds of the exchange count."""
    folder = make_comparison(tmp_path / "both", methods=("fedavg", "ditto"), seeds=1)
    add_exchange(folder / "runs" / "ditto-seed0")
    page = write_report(folder).read_text()

    def effort(method: str) -> list[str]:
        body = page.split('<section id="effort">')[1]
        return re.findall(r"<td>([^<]*)</td>", body.split(f'<th scope="row">{method}</th>')[1].split("</tr>")[0])[2:]

    assert effort("fedavg") == ["2.6 MB", "5.4 MB", "19 s"]
    assert effort("ditto") == ["8.1 MB", "6.7 MB", "4 min 10 s"]  # + 5.4 MB, 1.4 MB, 230.5 s
