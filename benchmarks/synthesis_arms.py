"""What the FedSSG benchmark compares: methods, ablations, rounds, and the order in which cells are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cell_runs import Cell, cells_of
from synthesis_cells import NATURAL, SOURCES

Changes = dict[str, Any]
LA: Changes = {"task.loss": "logit-adjusted"}
BALANCED: Changes = {"training.balanced": True}
"""Batches that show the classes of a site equally often. With it the logit-adjusted loss only leaves out the classes
that a site does not have."""
SSG: Changes = {**LA, "method.name": "fedssg"}
VAE_SIZE = {"skin": 32, "phantom": 24}
OPEN_GATE: Changes = {"dcr_ratio": 0.0, "closer": 1.0, "nndr_gap": 1.0, "membership_auc": 1.0, "membership_tpr": 1.0}
OPEN_GATE["copy_quantile"] = 0.999999
OPENED = "fedssg, VAE at sites, gate open"
"""Not for use: it says what samples would do if none were refused."""
EARLY = {"skin": 8, "phantom": 20}
LATE = {"skin": 30, "phantom": 60}
CUT = 20
"""Rounds with the rare diagnoses cut further."""
ELSEWHERE = 10
"""Rounds without one source."""


def vae(kind: str, **other: Any) -> Changes:
    """Settings of an autoencoder: a third of the default's passes, so that it costs no more than the classifier."""
    return {"name": "vae", "size": VAE_SIZE[kind], "rounds": 10, "epochs": 2, **other}


def samples(generator: Any, **other: Any) -> Changes:
    """A fedssg with these settings of ``synthesis``."""
    return {**SSG, "method.synthesis": {"generator": generator, **other}}


CLASSES: Changes = {"name": "features", "devices": False}
CELLS: Changes = {"name": "features", "devices": True}
DEFAULT: Changes = samples([CLASSES], style=0.5)
"""Written out, so that a cell is trained again when the default changes."""


def arms(kind: str, public: Path) -> dict[str, Changes]:
    """Every method of the main tables, by name: what it changes of federated averaging with cross-entropy."""
    server = vae(kind, placement="server", public=str(public.resolve()))
    return {
        "fedavg": {},
        "logit adjustment": LA,
        "fedssg": DEFAULT,
        "amplitude mix": samples([], style=0.5),
        "Gaussians, class": samples([CLASSES], style=0.0),
        "Gaussians, class + device": samples([CELLS], style=0.0),
        "fedssg, VAE at sites": samples([vae(kind)]),
        "fedssg, VAE on server": samples([server]),
        "fedssg, amplitude": samples(["amplitude"]),
        "fedssg, VAE + features + amplitude": samples([vae(kind), CLASSES, "amplitude"]),
        OPENED: samples([vae(kind)], gate=OPEN_GATE),
        "pooled + logit adjustment": {**LA, "method.name": "pooled"},
        "local": {"method.name": "local"},
        "balanced batches": BALANCED,
        "balanced, logit adjustment": {**LA, **BALANCED},
        "balanced, amplitude mix": {**samples([], style=0.5), **BALANCED},
        "balanced, Gaussians, class + device": {**samples([CELLS], style=0.0), **BALANCED},
        "balanced, fedssg": {**DEFAULT, **BALANCED},
        "balanced, pooled": {**LA, **BALANCED, "method.name": "pooled"},
        "fediic": {"method.name": "fediic"},
        "creff": {"method.name": "creff"},
        "fedbn": {"method.name": "fedbn", "model.norm": "batch"},
        "fedprox": {"method.name": "fedprox"},
        "focal": {"task.loss": "focal"},
        "fedlc": {"task.loss": "fedlc"},
        "harmonise + logit adjustment": {**LA, "model.harmonise": 1.0},
    }


BALANCED_MINOR = ("balanced batches", "balanced, amplitude mix", "balanced, Gaussians, class + device")
BALANCED_MINOR += ("balanced, pooled",)
"""Early alone, and on the real images alone: time is short."""
MINOR = ("focal", "fedlc", "creff", "harmonise + logit adjustment", *BALANCED_MINOR)
"""Early alone."""
CUT_ARMS = ("fedavg", "logit adjustment", "fedssg", "amplitude mix", "Gaussians, class + device")
CUT_ARMS += ("fedssg, VAE at sites", OPENED, "fedssg, amplitude", "pooled + logit adjustment")
CUT_ARMS += ("balanced, logit adjustment", "balanced, fedssg")
CUT_EARLY_ARMS = ("fedavg", "logit adjustment", "fedssg", "amplitude mix", "Gaussians, class + device")
CUT_EARLY_ARMS += ("balanced, logit adjustment", "balanced, fedssg")
ELSEWHERE_ARMS = ("fedavg", "logit adjustment", "amplitude mix", "Gaussians, class + device", "fedssg")
ELSEWHERE_ARMS += ("harmonise + logit adjustment", "balanced, logit adjustment", "balanced, fedssg")
CHOICES: dict[str, Changes] = {
    "fedssg: class + device": samples([CELLS], style=0.5),
    "fedssg: class + device, style 1": samples([CELLS], style=1.0),
    "fedssg: style 1": samples([CLASSES], style=1.0),
    "amplitude mix, style 1": samples([], style=1.0),
}
"""What the default could be as well: it won on the validation images of most scenarios."""
QUICK_ARMS = ("fedavg", "logit adjustment", "amplitude mix", "Gaussians, class + device", "fedssg")
QUICK_ARMS += ("fedssg, VAE at sites",)


def ablations() -> dict[str, Changes]:
    """What is changed of fedssg with its default generator."""
    return {
        "fedssg: cross-entropy": {**DEFAULT, "task.loss": "cross-entropy"},
        "fedssg: style alone, cross-entropy": {"method.name": "fedssg", "method.synthesis": {"generator": []}},
        "fedssg: tau 0.5": {**DEFAULT, "task.tau": 0.5},
        "fedssg: style 0.25": samples([CLASSES], style=0.25),
        "fedssg: diagonal covariance": samples([{**CLASSES, "covariance": "diagonal"}], style=0.5),
    }


def pretrained(skin: dict[str, Changes]) -> dict[str, Changes]:
    """The same from a network that was trained on natural images; elsewhere pre-training is off."""
    chosen = _some(skin, ("fedavg", "logit adjustment", "fedssg", "fedssg, VAE at sites", "pooled + logit adjustment"))
    return {f"pre-trained: {name}": {**changes, "model.weights": NATURAL} for name, changes in chosen.items()}


def vae_ablations(kind: str) -> dict[str, Changes]:
    """What is changed of fedssg with an autoencoder at the sites and an open gate: it must let samples through."""
    changes: dict[str, Changes] = {
        "budget 0": {"plan": {"budget": 0.0}},
        "budget 0.1": {"plan": {"budget": 0.1}},
        "budget 1": {"plan": {"budget": 1.0}},
        "one sample per image": {"training": {"real_per_synthetic": 1.0}},
        "one sample per 10 images": {"training": {"real_per_synthetic": 10.0}},
        "no style": {"style": 0.0},
        "no filter": {"filter": 0.0},
        "weight constant": {"training": {"ramp": 0.0, "until": 1.0}},
        "weight 1": {"training": {"weight": 1.0}},
    }
    made = {f"VAE: {name}": samples([vae(kind)], gate=OPEN_GATE, **change) for name, change in changes.items()}
    return made | {"VAE: cross-entropy": {**samples([vae(kind)], gate=OPEN_GATE), "task.loss": "cross-entropy"}}


def planned(public: Path, seeds: list[int], quick: bool) -> list[Cell]:
    """All cells, the most important first."""
    skin, phantom = arms("skin", public), arms("phantom", public)
    if quick:
        return [
            *cells_of("phantom", 12, _some(phantom, QUICK_ARMS), seeds),
            *cells_of("skin", 3, _some(skin, QUICK_ARMS), seeds),
            *cells_of("without-vienna_dias", 3, _some(skin, ("logit adjustment", "fedssg")), seeds),
        ]
    early = tuple(name for name in skin if name != OPENED)
    late = tuple(name for name in early if name not in MINOR)
    made_up = {name: changes for name, changes in phantom.items() if name not in BALANCED_MINOR}
    away = _some(skin, ELSEWHERE_ARMS)
    return [
        *cells_of("skin", EARLY["skin"], _some(skin, early), seeds),
        *cells_of("phantom", EARLY["phantom"], made_up, seeds),
        *cells_of("skin", LATE["skin"], _some(skin, late), seeds),
        *cells_of("phantom", LATE["phantom"], _some(phantom, late), seeds),
        *cells_of("skin-cut", CUT, _some(skin, CUT_ARMS), seeds),
        *(cell for source in SOURCES for cell in cells_of(f"without-{source}", ELSEWHERE, away, seeds)),
        *cells_of("skin-cut", EARLY["skin"], _some(skin, CUT_EARLY_ARMS), seeds),
        *cells_of("skin", EARLY["skin"], CHOICES, seeds),
        *cells_of("skin", LATE["skin"], CHOICES, seeds),
        *cells_of("skin-cut", CUT, CHOICES, seeds),
        *cells_of("phantom", EARLY["phantom"], CHOICES, seeds),
        *cells_of("phantom", LATE["phantom"], CHOICES, seeds),
        *cells_of("skin", EARLY["skin"], pretrained(skin), seeds),
        *cells_of("skin", LATE["skin"], pretrained(skin), seeds),
        *cells_of("phantom", EARLY["phantom"], vae_ablations("phantom"), seeds),
        *cells_of("skin-cut", CUT, ablations(), seeds),
    ]


def _some(every: dict[str, Changes], names: tuple[str, ...]) -> dict[str, Changes]:
    return {name: every[name] for name in names}
