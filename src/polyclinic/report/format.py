"""How numbers are written in the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from polyclinic.evaluation.names import is_distance, lower_is_better, metric_label

MISSING = "–"


def number(value: float | None, metric: str = "") -> str:
    """Three decimals, two for distances; a dash for undefined; a true minus."""
    if value is None:
        return MISSING
    return f"{value:.{_decimals(metric)}f}".replace("-", "−")


def signed(value: float | None, metric: str = "") -> str:
    """As ``number``, with a plus for gains."""
    if value is None:
        return MISSING
    return f"{value:+.{_decimals(metric)}f}".replace("-", "−")


def bounds(cell: Mapping[str, Any], metric: str = "", sign: bool = False) -> str:
    """``[low, high]``, or nothing where there is no interval."""
    if cell.get("low") is None or cell.get("high") is None:
        return ""
    write = signed if sign else number
    return f"[{write(cell['low'], metric)}, {write(cell['high'], metric)}]"


def verdict(cell: Mapping[str, Any]) -> str:
    """What a difference's interval says: better, worse, or no clear difference."""
    if cell["value"] is None:
        return "undefined"
    if cell["low"] is None:
        return "no interval"
    if cell["low"] <= 0 <= cell["high"]:
        return "no clear difference"
    gain = cell["low"] > 0
    return "better" if gain != lower_is_better(cell["metric"]) else "worse"


def size(count: float) -> str:
    """Bytes in powers of 1000: ``12.3 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def seconds(value: float | None) -> str:
    """``0.42 s``, ``12 s``, ``3 min 20 s`` or ``2 h 5 min``."""
    if value is None:
        return MISSING
    if value < 10:
        return f"{value:.2g} s" if value else "0 s"
    whole = round(value)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def direction(metric: str) -> str:
    """``lower is better`` or ``higher is better``."""
    return "lower is better" if lower_is_better(metric) else "higher is better"


def unit(metric: str, sites: Mapping[str, Mapping[str, Any]]) -> str:
    """What a distance is measured in at the sites of ``metrics.json``: ``mm``, ``pixels`` or ``mm or pixels``."""
    found = {str(entry["distance_unit"]) for entry in sites.values() if entry.get("distance_unit")}
    return " or ".join(sorted(found)) if is_distance(metric) else ""


def thresholds(sites: Mapping[str, Mapping[str, Any]]) -> str:
    """From which probability on pixels count as foreground: one number, or one a site."""
    found = {site: f"{entry['threshold']:.2f}" for site, entry in sites.items() if entry.get("threshold") is not None}
    if len(set(found.values())) <= 1:
        return next(iter(found.values()), "")
    return ", ".join(f"{value} at {site}" for site, value in found.items())


def breakable(name: str) -> str:
    """A name that may go on in the next line after an underscore (by a zero-width space)."""
    return name.replace("_", "_\u200b")


def _decimals(metric: str) -> int:
    return 2 if is_distance(metric) else 3


FILTERS: dict[str, Callable[..., Any]] = {
    "number": number,
    "signed": signed,
    "bounds": bounds,
    "verdict": verdict,
    "size": size,
    "seconds": seconds,
    "direction": direction,
    "metric_label": metric_label,
    "unit": unit,
    "breakable": breakable,
}
