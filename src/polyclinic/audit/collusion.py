"""``polyclinic audit collusion``: can some parties together find out what one site sent?

One real round of the study is run over each backend, and one site's update is attacked from exactly what each coalition
holds (``attack.py``). The same attack is made on backends that hide updates and on two that do not, so that a broken
attack cannot pass for a defence: it must succeed on the plain sum, on the ring as published, and where everyone but the
victim colludes.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polyclinic.audit.attack import Finding, attack
from polyclinic.audit.judge import as_json, flat, nearness, uniformity, verdict
from polyclinic.audit.tap import Recording, record
from polyclinic.errors import RunError, StudyError
from polyclinic.results import RunFolder, environment, plain_json
from polyclinic.runner import load_sites
from polyclinic.secure.ring import ring_order
from polyclinic.secure.session import MOST, Attempt
from polyclinic.secure.view import SERVER
from polyclinic.study import FederationSettings

if TYPE_CHECKING:
    from polyclinic.data.dataset import SiteData
    from polyclinic.runner import Observer
    from polyclinic.study import Study

Json = dict[str, Any]
FEWEST_SITES = 4
"""With three, both neighbours of a site are all the others."""
SHOWN = 400
"""Values of a scatter plot."""
BACKENDS: dict[str, dict[str, Any]] = {
    "plain": {"backend": "plain"},
    "masked, 32 bits": {"backend": "masked", "lanes": 32},
    "masked, 16 bits": {"backend": "masked", "lanes": 16},
    "ring-he, key at all sites": {"backend": "ring-he", "key_holder": "sites"},
    "ring-he, key at the initiator": {"backend": "ring-he", "key_holder": "initiator"},
    "ring-he, key at the server": {"backend": "ring-he", "key_holder": "server"},
    "ring-as-published": {"backend": "ring-as-published", "lanes": 32},
}
HIDING = ("masked", "ring-he")
"""Backends that promise to hide updates."""
COALITIONS = {
    "server": "the server",
    "site": "another site",
    "server+site": "the server and a site",
    "neighbours": "both neighbours",
    "server+neighbours": "the server and both neighbours",
    "everyone": "everyone else",
}
"""Kinds of coalitions, in words."""


def audit_collusion(
    study: Study, out: Path, observer: Observer | None = None, say: Callable[[str], None] = lambda line: None
) -> Json:
    """Run the audit and write ``collusion.json``, ``collusion.html`` and the study into a folder.

    Args:
        study: One round of its method is run over every backend, whatever its own, with all sites and with keys made
            for the audit.
        out: The folder.
        observer: Told of the reading of images.
        say: Told in a line of each backend that is done.

    Returns:
        What ``collusion.json`` holds; ``alarms`` are coalitions that found something which a backend should hide.

    Raises:
        StudyError: Fewer than four sites or more than 16, or a method that sums nothing. DataError: As for a run.
        RunError: The folder holds something else or cannot be written.
    """
    from polyclinic.audit.page import page

    if (out / "collusion.json").exists():
        raise RunError(f"{out} already holds an audit. Give another --out.")
    folder = RunFolder(out)
    folder.create(study)
    with tempfile.TemporaryDirectory() as scratch:
        sites = load_sites(study, Path(scratch), observer)
        if not FEWEST_SITES <= len(sites) <= MOST:
            raise StudyError(
                f"the audit of collusion needs {FEWEST_SITES} to {MOST} sites and this study has {len(sites)}: with "
                "three, a site's two neighbours are all the others, and nothing hides from all others."
            )
        found = _attacked(study, sites, Path(scratch), say)
    found["environment"] = environment()
    folder.write("collusion.json", json.dumps(plain_json(found), indent=1))
    folder.write("collusion.html", page(found))
    return found


def _attacked(study: Study, data: Mapping[str, SiteData], scratch: Path, say: Callable[[str], None]) -> Json:
    order = ring_order(Attempt("train", "values", 1, 1, tuple(sorted(data))), data)
    at = len(order) // 2
    victim, neighbours = order[at], (order[at - 1], order[(at + 1) % len(order)])
    backends = []
    for number, (label, settings) in enumerate(BACKENDS.items()):
        tried = _with_backend(study, settings)
        started = time.perf_counter()
        entry: Json = {"name": label, **settings}
        try:
            recording = record(tried, data, scratch / f"{number}")
        except StudyError as error:
            if settings["backend"] not in ("ring-he", "ring-as-published"):
                raise
            backends.append({**entry, "missing": str(error), "coalitions": []})
            say(f"{label}: not possible here: {error}")
            continue
        rows = [judged(recording, kind, who, victim) for kind, who in coalitions(order, victim, neighbours)]
        backends.append({**entry, **_facts(recording), "missing": "", "coalitions": rows})
        say(f"{label}: {time.perf_counter() - started:.1f} s")
    return {
        "study": study.name,
        "description": study.description,
        "method": study.method.title,
        "network": study.model.name,
        "seed": study.seed,
        "round": 1,
        "sites": sorted(data),
        "ring": order,
        "victim": victim,
        "neighbours": list(neighbours),
        "backends": backends,
        "alarms": [
            {"backend": entry["name"], "parties": row["parties"], "verdict": row["verdict"]}
            for entry in backends
            for row in entry["coalitions"]
            if entry["backend"] in HIDING and alarming(row)
        ],
    }


def alarming(row: Json) -> bool:
    """Whether a coalition short of everyone found something."""
    return row["kind"] != "everyone" and row["verdict"] in ("reconstructed", "something shows")


def coalitions(order: Sequence[str], victim: str, neighbours: tuple[str, str]) -> list[tuple[str, tuple[str, ...]]]:
    """``(kind, parties)`` of all that are tried."""
    others = [name for name in order if name != victim]
    return [
        ("server", (SERVER,)),
        *(("site", (name,)) for name in others),
        *(("server+site", (SERVER, name)) for name in others),
        ("neighbours", neighbours),
        ("server+neighbours", (SERVER, *neighbours)),
        ("everyone", (SERVER, *others)),
    ]


def _with_backend(study: Study, settings: Mapping[str, Any]) -> Study:
    aggregation = study.aggregation.model_copy(update=dict(settings))
    method = study.method.model_copy(update={"participation": 1.0})
    own = {"aggregation": aggregation, "method": method, "federation": FederationSettings()}
    return study.model_copy(update=own)


def _facts(recording: Recording) -> Json:
    """Of the attempt that was attacked."""
    if not recording.tap.held:
        return {"cipher": "", "threshold": None, "provider": ""}
    session = next(iter(recording.tap.held.values())).session
    provider = session.context.get("provider", "")
    return {"cipher": session.cipher, "threshold": session.attempt.threshold, "provider": provider}


def judged(recording: Recording, kind: str, parties: Sequence[str], victim: str) -> Json:
    """One attack and its numbers, for ``collusion.json``."""
    spoils = attack(recording, parties, victim)
    truth, weights = recording.truth(victim), recording.weights(victim)
    # Running statistics are sums apart: in 64-bit lanes noise is so much larger that it would drown everything else.
    names = [key for key in truth if key.rpartition(".")[2] not in ("running_mean", "running_var")] or list(truth)
    goal = flat(truth, names)
    row: Json = {"kind": kind, "parties": list(parties), "held": spoils.held, "why": spoils.why}
    found, near, noise = spoils.victim, None, None
    if found:
        whole = _whole(recording)
        estimate = flat(_unweighted(found, {g: whole[g] / w for g, w in weights.items() if w}), names)
        near, noise = nearness(goal, estimate), uniformity(found.residue)
        row |= {
            "about": list(found.about),
            "covered_by": [" and ".join(dict.fromkeys(pair)) for pair in found.covered],
            "guesses": found.guesses,
            "modular": found.modular,
            "weight_found": found.weights,
            "weight_true": weights,
            **as_json(near),
            **as_json(noise),
        }
        if kind == "server+neighbours":
            step = max(1, len(goal) // SHOWN)
            row["sample"] = {"true": goal[::step].tolist(), "found": estimate[::step].tolist()}
    row["verdict"] = verdict(found, near, noise)
    if spoils.rest:
        whole = _whole(recording)
        mean = {g: whole[g] / total for g, total in spoils.rest.weights.items() if total}
        row["sum_of_others"] = {
            "sites": list(spoils.rest.about),
            **as_json(nearness(goal, flat(_unweighted(spoils.rest, mean), names))),
        }
    return row


def _whole(recording: Recording) -> dict[str, float]:
    """All sites' weight per group, which the server is told."""
    whole: dict[str, float] = {}
    for name in recording.sites:
        for group, weight in recording.weights(name).items():
            whole[group] = whole.get(group, 0.0) + weight
    return whole


def _unweighted(found: Finding, factors: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Shares of a mean as values: the attacker is given the weight that it takes."""
    return {key: share * factors.get(key.partition("/")[0], 0.0) for key, share in found.shares.items()}
