"""The chapter on what networks learnt from each other: its numbers are those of the folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from made_up_folders import make_run

from polyclinic.errors import RunError
from polyclinic.report import write_report

LEVELS = ["features.stage1", "features.stage2"]
OWN = ["blocks.2", "blocks.5", "blocks.8"]


def add_transfer(folder: Path, sites: list[str], learned: bool = True) -> None:
    """Three rounds of a central model with two maps and sites with three."""
    to_site: dict[str, Any] = {
        "where": [[1.25, 0.5, 0.75], [1.0, 0.05, 1.5]],
        "entropy": [[0.9, 0.8, 1.0], [0.7, 0.9, 0.8]],
    }
    to_central: dict[str, Any] = {
        "where": [[1.1, 0.9], [1.0, 1.0], [0.8, 1.2]],
        "entropy": [[1.0, 0.5]] * 3,
        "floor": 0.0,
    }
    to_site |= {"channels": [[3.25, 0.5, 0.25, 0.0], [1.0] * 10]}
    to_central |= {"channels": [[1.05, 0.95], [1.5, 0.5], [1.0, 1.0]]}
    central: list[dict[str, Any]] = [
        {"round": n, "natural_accuracy": 0.2 * n, "loss": 2.0, "natural": 1.5 / n, "matching": 1.0, "soft": 0.01}
        | {"sites": dict.fromkeys(sites, to_central) if learned else {}}
        for n in (1, 2, 3)
    ]
    (folder / "transfer.json").write_text(json.dumps({"levels": LEVELS, "rounds": central}))
    (folder / "transfer").mkdir()
    for number, site in enumerate(sites):
        later = {"matching": 0.875, "soft": 0.02, **({**to_site, "floor": 0.25} if learned else {})}
        if learned:
            later["meta_steps"] = {"difference": 4} if number else {"jvp": 4}
        rounds = [{"round": n, "natural": 1.25, "alignment": 0.1, **(later if n > 1 else {})} for n in (1, 2, 3)]
        (folder / "transfer" / f"{site}.json").write_text(json.dumps({"site": site, "levels": OWN, "rounds": rounds}))


def chapter(folder: Path) -> str:
    page = write_report(folder).read_text()
    assert 'href="#transfer"' in page
    return page.split('<section id="transfer">')[1].split("</section>")[0]


def texts(section: str, figure: str) -> list[str]:
    svg = section.split(f'<figure id="{figure}">')[1].split("</figure>")[0]
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = make_run(tmp_path_factory.mktemp("transfer") / "run", sites=["north", "st-anne"])
    add_transfer(folder, ["north", "st-anne"])
    return chapter(folder)


def test_a_run_without_has_no_chapter(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path / "run", sites=["north"])).read_text()
    assert "transfer" not in page


def test_maps_say_what_teaches_and_what_learns(learned: str) -> None:
    down = texts(learned, "where-st-anne-central-to-site")
    for word in ("1.25", "0.50", "0.05", "1.50", "stage1", "stage2", "blocks.2", "blocks.8", "teaches", "learns"):
        assert word in down
    assert "st-anne: from central" in down
    up = texts(learned, "where-north-site-to-central")
    assert [t for t in up if re.fullmatch(r"\d\.\d\d", t)] == ["1.10", "0.90", "1.00", "1.00", "0.80", "1.20"]


def colours(section: str, figure: str) -> list[tuple[str, float]]:
    """Colour and strength of the cells of a map, row by row."""
    svg = section.split(f'<figure id="{figure}">')[1].split("</figure>")[0]
    found = re.findall(r"fill: var\(--(s\d)\); opacity: ([\d.]+)", svg)
    return [(color, float(strength)) for color, strength in found]


def test_colours_part_at_one(learned: str) -> None:
    cells = colours(learned, "where-north-site-to-central")  # 1.1 0.9, none under 1 1, 0.8 1.2
    assert [color for color, _ in cells] == ["s0", "s1", "s1", "s0"]
    strengths = [strength for _, strength in cells]
    assert 0 < strengths[0] < strengths[1] < strengths[3] < strengths[2] < 0.5
    down = colours(learned, "where-north-central-to-site")
    assert max(strength for _, strength in down) == 0.5, "0.05 is the furthest from 1"


def test_channels_are_bars_in_falling_order(learned: str) -> None:
    down = texts(learned, "what-st-anne-central-to-site")
    assert [t for t in down if re.fullmatch(r"\d\.\d\d", t)] == ["3.25", "1.00"]
    assert {"stage1", "stage2"} <= set(down)
    svg = learned.split('<figure id="what-st-anne-central-to-site">')[1].split("</figure>")[0]
    bars = re.findall(r'<path d="M [\d.]+ ([\d.]+)\nL [\d.]+ [\d.]+\nL [\d.]+ ([\d.]+)', svg)
    heights = [abs(float(foot) - float(top)) for foot, top in bars]
    assert len(heights) == 14
    assert heights[0] / heights[1] == pytest.approx(6.5, rel=0.01)
    assert heights[3] == 0
    assert heights[4:] == pytest.approx([2 * heights[1]] * 10, rel=0.01)


def test_bars_are_means_over_pairs(learned: str) -> None:
    shown = [text for text in texts(learned, "channel-entropy") if text.endswith("%")]
    assert sorted(shown) == sorted(["85%", "75%"] * 2)


def test_numbers_of_the_last_round(learned: str) -> None:
    assert "names 60%" in learned
    body = learned.split('<table id="transfer-terms">')[1].split("<tbody>")[1]
    rows = [re.findall(r">([^<]+)</t[hd]>", row) for row in re.findall(r"<tr>.*?</tr>", body)]
    assert rows[0] == ["central", "0.5", "1", "0.01", "–"]
    assert rows[1] == ["north", "1.25", "0.875", "0.02", "0.1"]
    assert "central differences" in learned  # one site could not do better


def test_a_pair_without_any_weight_is_drawn(tmp_path: Path) -> None:
    """Attention may take so much of it that the file says 0."""
    folder = make_run(tmp_path / "run", sites=["north"])
    add_transfer(folder, ["north"])
    path = folder / "transfer" / "north.json"
    path.write_text(path.read_text().replace("0.05", "0.0"))
    section = chapter(folder)
    assert "0.00" in texts(section, "where-north-central-to-site")
    assert max(colours(section, "where-north-central-to-site"), key=lambda cell: cell[1]) == ("s1", 0.5)


def test_weights_that_are_all_alike_need_no_picture(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", sites=["north"])
    add_transfer(folder, ["north"], learned=False)
    section = chapter(folder)
    assert "weights: uniform" in section
    assert "where-" not in section
    assert "channel-entropy" not in section
    assert '<figure id="natural-accuracy">' in section


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", sites=["north"])
    add_transfer(folder, ["north"])
    (folder / "transfer" / "north.json").write_text("{")
    with pytest.raises(RunError, match=r"north\.json"):
        write_report(folder)
