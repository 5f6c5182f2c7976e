"""Numbers by class and device as a map: the stronger a cell's colour, the more it holds."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from polyclinic.report.figures import ACCENT, INK, MUTED, Panel, panel

_FAINTEST, _STRONGEST = 0.07, 0.5
"""Strength of the accent colour under a 1 and under the largest number; ink stays readable on the latter."""
_LETTERS = 15
"""Letters of a name in one line."""
_ABREAST = 7
"""Columns that a phone shows with room for four digits."""


def heat_map(
    id: str,
    title: str,
    counts: np.ndarray,
    names: tuple[Sequence[str], Sequence[str]],
    *,
    added: np.ndarray | None = None,
    most: int = 0,
) -> Panel:
    """Draw a map: classes downwards, or devices where there are too many to stand side by side.

    Args:
        id: Distinct on the page.
        title: Heading.
        counts: int64 ``[classes, devices]``, not negative.
        names: Of classes and of devices.
        added: int64 ``[classes, devices]``: how much of a count is new, written below it; a count that is all new
            has a frame.
        most: Number of the strongest colour, so that two maps can share it; 0: the largest.
    """
    rows, columns = names
    new = np.zeros_like(counts) if added is None else added
    if len(columns) > max(len(rows), _ABREAST):
        rows, columns, counts, new = columns, rows, counts.T, new.T
    most = max(most, int(counts.max(initial=0)), 1)
    height = 0.43 * len(rows) + 0.55 + 0.14 * max((_wrapped(n, len(columns)).count("\n") for n in columns), default=0)
    with panel(id, title, shape=(5, max(height, 1.6))) as (made, axes):
        for (r, c), count in np.ndenumerate(counts):
            _cell(axes, (r, c), int(count), int(new[r, c]), most)
        _frame(axes, rows, columns)
    return made


def _cell(axes: Any, place: tuple[int, int], count: int, new: int, most: int) -> None:
    from matplotlib.patches import Rectangle

    row, column = place
    corner, side = (column - 0.48, row - 0.47), (0.96, 0.94)
    strength = _FAINTEST + (_STRONGEST - _FAINTEST) * (count / most) ** 0.5
    color, alpha = (ACCENT, strength) if count else (MUTED, 0.08)
    axes.add_patch(Rectangle(corner, *side, facecolor=color, alpha=alpha, linewidth=0))
    if new and new == count:
        axes.add_patch(Rectangle(corner, *side, fill=False, edgecolor=INK, linewidth=1.1))
    lift = 0.13 if new else 0
    text = str(count) if count else "–"
    axes.text(column, row - lift, text, ha="center", va="center", fontsize=9.5, color=INK if count else MUTED)
    if new:
        axes.text(column, row + 0.26, f"+{new}", ha="center", va="center", fontsize=7.5, color=INK)


def _frame(axes: Any, rows: Sequence[str], columns: Sequence[str]) -> None:
    axes.set_xlim(-0.5, max(len(columns), 1) - 0.5)
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    small = 8 if len(columns) > 5 else 9
    axes.set_xticks(
        range(len(columns)), [_wrapped(name, len(columns)) for name in columns], fontsize=small, parse_math=False
    )
    axes.set_yticks(
        range(len(rows)), [textwrap.fill(name, _LETTERS) for name in rows], color=INK, fontsize=9, parse_math=False
    )
    axes.grid(False)
    for side in axes.spines.values():
        side.set_visible(False)


def _wrapped(name: str, columns: int) -> str:
    """A name on lines as short as its column, broken at spaces, hyphens, underscores and points first."""
    spaced = re.sub(r"([_.])(?=\w)", r"\1 ", name)
    return re.sub(r"([_.]) ", r"\1", textwrap.fill(spaced, max(6, min(_LETTERS, 54 // max(columns, 1)))))
