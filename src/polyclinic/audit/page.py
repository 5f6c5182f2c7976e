"""The page of the audit of collusion, made from what ``collusion.json`` holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polyclinic.audit.collusion import COALITIONS, HIDING, Json
from polyclinic.report.figures import ACCENT, INK, Panel, panel, series_style
from polyclinic.report.write import render

SEVERITY = ["nothing to attack", "nothing found", "something shows", "reconstructed"]
STYLES = dict(zip(SEVERITY, ("unseen", "kept", "shows", "found"), strict=True))
PICTURED = ("ring-as-published", "masked, 32 bits", "ring-he, key at all sites")
"""Backends with figures: the attack at its best, and two that it fails on."""
PICTURED_KIND = "server+neighbours"


def page(found: Json) -> str:
    """The HTML page."""
    rows = {entry["name"]: entry for entry in found["backends"]}
    pictured = [rows[name] for name in PICTURED if not rows[name]["missing"]]
    shown = [(entry["name"], of_kind(entry, PICTURED_KIND)[0]) for entry in pictured]
    context = {
        **found,
        "title": f"Collusion: {found['study']}",
        "kinds": COALITIONS,
        "table": {name: _cells(entry) for name, entry in rows.items()},
        "pictures": [picture for name, row in shown for picture in (_scatter(name, row), _histogram(name, row))],
        "compared": worst(rows["plain"], "server")["values"],
        "sums": _sums(rows),
        "styles": STYLES,
        "number": short,
    }
    return render("collusion.html", context)


def of_kind(entry: Json, kind: str) -> list[Json]:
    """Coalitions of a kind."""
    return [row for row in entry["coalitions"] if row["kind"] == kind]


def worst(entry: Json, kind: str) -> Json:
    """The coalition of a kind that found most; of two that found nothing, the one nearer to a finding."""
    return max(of_kind(entry, kind), key=lambda row: (SEVERITY.index(row["verdict"]), -(row.get("p") or 0.0)))


def evidence(row: Json) -> str:
    """The numbers behind a verdict, or why there are none."""
    if row["verdict"] == "nothing to attack":
        return str(row["why"])
    if row["verdict"] == "reconstructed":
        return f"relative error {short(row['relative'])}"
    r = "undefined" if row["correlation"] is None else f"{row['correlation']:+.3f}".replace("-", "−")
    return f"correlation {r}" + (f", p {short(row['p'])}" if row["modular"] and row["p"] is not None else "")


def short(value: float | None) -> str:
    """Two significant digits; 10 to a power where that is shorter."""
    if value is None:
        return "–"
    text = f"{value:.2g}"
    if "e" not in text:
        return text.replace("-", "−")
    digits, _, power = text.partition("e")
    superscript = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{digits.replace('-', '−')}·10{superscript}"


def _cells(entry: Json) -> list[Json]:
    if entry["missing"]:
        return []
    cells = []
    for kind in COALITIONS:
        row = worst(entry, kind)
        expected = kind == "everyone" and entry["backend"] in HIDING
        style = "expected" if expected else STYLES[row["verdict"]]
        cells.append({"verdict": row["verdict"], "evidence": evidence(row), "style": style})
    return cells


def _sums(rows: dict[str, Json]) -> list[Json]:
    """What remains of the sum for coalitions with the server; it is the same under every backend, up to rounding."""
    wanted = ("server", "server+site", "server+neighbours", "everyone")
    own = [row for kind in wanted for row in of_kind(rows["masked, 32 bits"], kind)]
    return [{"parties": row["parties"], **row["sum_of_others"]} for row in own if "sum_of_others" in row]


def _scatter(name: str, row: Json) -> Panel:
    if "sample" not in row:
        return Panel(f"scatter-{name}", name, note=f"{row['why']}.")
    true, found = row["sample"]["true"], row["sample"]["found"]
    note = f"Each point is one of {len(true)} values of the update. {_sentence(row)}"
    with panel(f"scatter-{name}", f"{name}: found against true", note) as (made, axes):
        axes.plot(_ends(true), _ends(true), color=INK, linewidth=0.9, zorder=1)
        style = {**series_style(1 if row["verdict"] == "reconstructed" else 2), "linestyle": "none"}
        axes.plot(true, found, marker="o", markersize=2.6, alpha=0.75, **style)
        axes.set_xlabel("what the site's training changed")
        axes.set_ylabel("what they found")
        axes.locator_params(axis="both", nbins=5)
        axes.ticklabel_format(axis="both", style="sci", scilimits=(-3, 4), useMathText=False)
    return made


def _sentence(row: Json) -> str:
    if row["verdict"] == "reconstructed":
        return "They lie along the diagonal."
    return f"The diagonal looks flat: what they found is {short(row['relative'])} times as large as the update."


def _histogram(name: str, row: Json) -> Panel:
    if "counts" not in row:
        return Panel(f"bytes-{name}", name, note=f"{row['why']}.")
    counts = row["counts"]
    p = short(row["p"])
    note = f"Chi-square {row['statistic']:.0f} with 255 degrees of freedom, p {'below 10⁻³⁰⁰' if row['p'] == 0 else p}."
    with panel(f"bytes-{name}", f"{name}: bytes of the residue", note) as (made, axes):
        axes.bar(range(len(counts)), counts, width=1.0, color=series_style(1 if row["p"] < 1e-6 else 2)["color"])
        axes.axhline(sum(counts) / len(counts), color=ACCENT, linewidth=1)
        axes.set_xlabel("value of the byte")
        axes.set_ylabel("how often")
        axes.set_xticks([0, 64, 128, 192, 255])
        axes.set_ylim(bottom=0)
        axes.grid(False, axis="x")
        axes.locator_params(axis="y", nbins=5)
    return made


def _ends(values: Sequence[float]) -> list[Any]:
    return [min(values), max(values)]
