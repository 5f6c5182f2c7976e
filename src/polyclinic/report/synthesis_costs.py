"""What an exchange of samples cost, beside the rounds of training after it.

``synthesis.json`` holds the exchange alone and ``rounds.jsonl`` the rounds alone, so nothing counts twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from polyclinic.report.curves import site_effort, traffic_table
from polyclinic.report.folder import Json, Run


def exchange_effort(run: Run) -> Json:
    """What the exchange cost beside the rounds: bytes ``up`` and ``down`` of all sites, and ``seconds``, all told."""
    moved = run.synthesis.get("bytes", {}).values()
    took = run.synthesis.get("seconds", {}).values()
    return {
        "up": sum(part.get("up", 0) for part in moved),
        "down": sum(part.get("down", 0) for part in moved),
        "seconds": run.synthesis.get("wall_seconds", sum(sum(sites.values()) for sites in took)),
    }


def site_costs(run: Run) -> list[Json]:
    """What each site took, by class where it was told, and its seconds in exchange and rounds."""
    found = run.synthesis
    training = {row["site"]: row["seconds"] for row in site_effort(run)}
    taken = {
        site: entry if isinstance(entry, Mapping) else {"samples": entry}
        for site, entry in found.get("taken", {}).items()
    }
    rows = []
    for site in dict.fromkeys([*run.sites, *taken]):
        own = sum(sites.get(site, 0) for sites in found.get("seconds", {}).values())
        trained = training.get(site, 0)
        by_class = taken.get(site, {}).get("classes", {})
        rows.append(
            {
                "site": site,
                "samples": taken.get(site, {}).get("samples"),
                "classes": ", ".join(f"{name} {count}" for name, count in by_class.items() if count),
                "exchange": own,
                "rounds": trained,
                "together": f"{1 + own / trained:.2f} ×" if trained else "–",
            }
        )
    return rows


def phase_costs(run: Run) -> list[Json]:
    """Bytes and seconds of each op of the exchange, of all of it, and of the rounds."""
    seconds, moved = run.synthesis.get("seconds", {}), run.synthesis.get("bytes", {})
    rows = [
        _phase(op, moved.get(op, {}), list(seconds.get(op, {}).values())) for op in dict.fromkeys([*seconds, *moved])
    ]
    sites = dict.fromkeys(site for part in seconds.values() for site in part)
    whole = [sum(part.get(site, 0) for part in seconds.values()) for site in sites]
    rows.append({**_phase("all of the exchange", exchange_effort(run), whole), "total": True})
    of_rounds = [row for row in traffic_table(run) if row["rounds"]]
    rounds = {way: sum(row[way] for row in of_rounds) for way in ("up", "down")}
    took = [row["seconds"] for row in site_effort(run)]
    rows.append({**_phase(f"{len(run.rounds)} rounds of training", rounds, took), "total": True})
    return rows


def _phase(name: str, moved: Mapping[str, int], seconds: Sequence[float]) -> Json:
    return {
        "op": name,
        "up": moved.get("up", 0),
        "down": moved.get("down", 0),
        "seconds": sum(seconds),
        "slowest": max(seconds, default=0),
        "total": False,
    }
