"""Plots as inline SVG whose colors follow the page.

matplotlib draws with placeholder colors, which become CSS variables: the same plot reads in light and dark. Panels are
as wide as a phone, and the page lays them out in a grid.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

INK, MUTED, GRID, ACCENT, PAPER = "#010101", "#020202", "#030303", "#040404", "#050505"
_SERIES = [f"#0606{i:02x}" for i in range(8)]
_DASHES: list[Any] = ["-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2))]
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", ACCENT: "--accent", PAPER: "--paper"} | {
    color: f"--s{i}" for i, color in enumerate(_SERIES)
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "polyclinic",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.titlecolor": INK,
    "axes.labelsize": 10,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": INK,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
}


@dataclass
class Panel:
    """One finished plot."""

    id: str
    title: str
    svg: Markup = field(default=Markup(""))
    note: str = ""
    """Shown below the plot, or in its place where there is nothing to draw."""


def series_style(index: int) -> dict[str, Any]:
    """Color and dash of the nth site, class or method; 32 are told apart."""
    return {"color": _SERIES[index % 8], "linestyle": _DASHES[index // 8 % len(_DASHES)]}


@dataclass(frozen=True)
class Key:
    """One entry of a legend, drawn by the page."""

    label: str
    color: str
    dash: str

    @classmethod
    def of(cls, labels: Sequence[str]) -> list[Key]:
        """Entries in the order of ``series_style``."""
        dashes = ["", "8 4", "2 3", "12 4 2 4"]
        return [cls(label, f"var(--s{i % 8})", dashes[i // 8 % 4]) for i, label in enumerate(labels)]


@contextmanager
def panel(id: str, title: str, note: str = "", shape: tuple[float, float] = (5, 3.3)) -> Iterator[tuple[Panel, Any]]:
    """Give axes to draw on; when the block ends the panel has its SVG.

    Args:
        id: Distinct on the page; letters, digits and hyphens.
        title: Heading, also what a screen reader says.
        note: Shown below.
        shape: Width and height in units of 72 pixels of the page.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    made = Panel(slug(id), title, note=note)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=shape, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set_title(title)
        yield made, axes
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    made.svg = _inline(buffer.getvalue(), made.id, title)


def slug(text: str) -> str:
    """Letters, digits and hyphens, for an HTML id."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _inline(svg: str, id: str, title: str) -> Markup:
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]+)"', body)
    body = body[body.index(">") + 1 :]
    body = _light(body)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{id}-\1"', body)
    body = re.sub(r'(xlink:href="|url\()#', rf"\1#{id}-", body)
    body = re.sub(r"font: ([^;\"]*?)'[^;\"]*", r"font: \1var(--sans)", body)
    body = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", body)
    for color, variable in _VARIABLES.items():
        body = body.replace(color, f"var({variable})")
    start = Markup('<svg viewBox="{}" role="img" aria-label="{}">').format(box[1] if box else "0 0 360 240", title)
    return start + Markup(body)


def _light(body: str) -> str:
    """Without what a page needs not: ids that nothing points to, style sheets, blank shapes, third decimals."""
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    used = set(re.findall(r"#([\w.-]+)", body))
    body = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", body)
    body = re.sub(r'<path d="[^"]*" style="fill: none"/>', "", body)
    body = re.sub(r' transform="rotate\(-0 [^"]*"', "", body)
    body = re.sub(r' (d|x|y)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), body)
    body = re.sub(r"\s*\n\s*", "\n", body)
    return re.sub(r"<(g|defs)>\s*</\1>|<g/>\n?", "", body)
