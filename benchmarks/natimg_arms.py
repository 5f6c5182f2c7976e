"""What the natural-image benchmark compares: methods, ablations, and the order in which cells are trained."""

from __future__ import annotations

from typing import Any

from cell_runs import Cell, cells_of
from natimg_cells import SITES, kind_of, network, proxies

Changes = dict[str, Any]
LOCAL = "local"
PRETRAINED = "local, pre-trained"
"""The decisive baseline: each site alone, from a network trained on the same natural images."""
POOLED = "pooled"
UNIFORM = "natimg-fl, uniform"
LEARNED = "natimg-fl, learned"
UNIFORM_SETTINGS: Changes = {"method.name": "natimg-fl", "method.weights": "uniform", "method.server_steps": 40}
"""With a fifth of the default's steps at the server: two cores train the central model as well."""
LOGITS = ("fedmd", "feddf", "ds-fl", "fccl", "kt-pfl")
"""Rivals that say what they know of the same natural images."""
DATA_FREE = ("fedproto", "fedtgp", "fedgh", "lg-fedavg", "fml", "fedkd")
ROUNDS = 12
ABLATIONS = ("A",)
"""How the names of ablations begin."""
RANDOM = "A13: random start"
NOISE = "A14: noise as proxies, random start"
WIDTHS = (16, 8, 4)


def arms(kind: str) -> dict[str, Changes]:
    """The main table: every method by its name, and what it changes of local training from a pre-trained start."""
    pooled = {
        f"{POOLED}, {name}": {"method.name": "pooled", "models": {}, "model": network(name, pretrained=True)}
        for name in sorted(set(SITES[kind].values()))
    }
    rivals = {name: {"method.name": name, **_own(name)} for name in (*LOGITS, *DATA_FREE)}
    return {
        LOCAL: {**from_random(kind), "proxies": None},
        PRETRAINED: {},
        UNIFORM: UNIFORM_SETTINGS,
        LEARNED: {**UNIFORM_SETTINGS, "method.weights": "learned"},
        **pooled,
        **rivals,
    }


def _own(name: str) -> Changes:
    """Settings of rivals, so that all start from the same knowledge and the server does as much work."""
    if name in ("fml", "fedkd"):
        return {"method.companion": network("small-cnn", pretrained=True)}
    return {"fedmd": {"method.warm_up": 0}, "feddf": {"method.steps": 40, "method.batch_size": 32}}.get(name, {})


def from_random(kind: str) -> Changes:
    """All networks from random weights."""
    return {"model": network("small-resnet"), "models": {site: network(name) for site, name in SITES[kind].items()}}


def ablations(kind: str) -> dict[str, Changes]:
    """What is changed of natimg-fl with uniform weights; numbers are those of the fact sheet."""
    random = from_random(kind)
    own = {
        "A6: uniform, as many kept apart": {"weights": "learned", "meta_lr": 0.0},
        "A2: proxies only": {"alpha": 0.0, "gamma": 0.0},
        "A3: auxiliary task only": {"beta": 0.0, "eta": 0.0, "server_steps": 0},
        "A4: no alignment": {"gamma": 0.0},
        "A5: CORAL": {"alignment": "coral"},
        "A5: DANN": {"alignment": "dann"},
        "A5: supervised contrast": {"alignment": "supcon"},
        "A7: layer weights only": {"weights": "layer-only"},
        "A8: channel weights only": {"weights": "channel-only"},
        "A9: sites to centre only": {"direction": "to-central"},
        "A9: centre to sites only": {"direction": "to-sites"},
        "A10: soft outputs only": {"beta": 0.0, "beta_server": 0.0},
        "A10: features only": {"eta": 0.0, "eta_server": 0.0},
        "A11: attention": {"weights": "attention"},
        "A20: pooled vectors travel": {"transport": "vectors"},
    }
    made = {name: {**UNIFORM_SETTINGS, **_method(changes)} for name, changes in own.items()}
    others = {
        RANDOM: {**UNIFORM_SETTINGS, **random},
        NOISE: {**UNIFORM_SETTINGS, **random, "proxies": proxies("noise")},
        "A14: things as proxies, random start": {**UNIFORM_SETTINGS, **random, "proxies": proxies("things")},
        "A14: scans as proxies, random start": {**UNIFORM_SETTINGS, **random, "proxies": proxies("scans")},
        "A13: learned, random start": {**UNIFORM_SETTINGS, **random, "method.weights": "learned"},
        "A13: proxies only, random start": {**UNIFORM_SETTINGS, **random, **_method(own["A2: proxies only"])},
        "A13: auxiliary task only, random start": {
            **UNIFORM_SETTINGS,
            **random,
            **_method(own["A3: auxiliary task only"]),
        },
        "A13: fedmd, random start": {"method.name": "fedmd", **random},
        "A18: batch norm, random start": {**UNIFORM_SETTINGS, **_all(kind, norm="batch")},
        "A18: local, batch norm, random start": _all(kind, norm="batch"),
    }
    # Those that answer whether the images must be natural come first.
    return {**others, **made}


LATER = ("A5: DANN", "A5: supervised contrast", "A13: learned, random start", "A13: proxies only, random start")
LATER += ("A13: auxiliary task only, random start", "A13: fedmd, random start")
"""Ablations for whoever has the time."""


def _method(changes: Changes) -> Changes:
    return {f"method.{name}": value for name, value in changes.items()}


def _all(kind: str, **other: Any) -> Changes:
    """All networks from random weights, with other settings."""
    networks = {site: network(name, **other) for site, name in SITES[kind].items()}
    return {"model": network("small-resnet", **other), "models": networks}


def one_network(kind: str) -> dict[str, Changes]:
    """A12: the same network at all sites, where fedavg is the bar."""
    same: Changes = {"models": {}, "model": network("small-resnet", pretrained=True)}
    names = ("local", "fedavg", "fedprox", "feddf", "fedproto")
    made = {f"A12: {name}, one network": {"method.name": name, **same} for name in names}
    return {**made, "A12: natimg-fl, one network": {**UNIFORM_SETTINGS, **same}}


def one_family(kind: str) -> dict[str, Changes]:
    """One family of networks in three widths, from random weights: what heterofl is made for."""
    widths = dict(zip(SITES[kind], WIDTHS, strict=False))
    networks = {site: network("small-cnn", width=width) for site, width in widths.items()}
    family: Changes = {"model": network("small-cnn", width=max(WIDTHS)), "models": networks}
    names = ("local", "heterofl", "fedproto", "fedmd")
    made = {f"A12: {name}, one family": {"method.name": name, **family} for name in names}
    return {**made, "A12: natimg-fl, one family": {**UNIFORM_SETTINGS, **family}}


LARGE = (
    LOCAL,
    PRETRAINED,
    UNIFORM,
    LEARNED,
    "fedmd",
    "fedproto",
    "fml",
    f"{POOLED}, small-cnn",
    f"{POOLED}, shufflenet",
)
FEW = (LOCAL, PRETRAINED, UNIFORM, LEARNED, "fedmd", "ds-fl", "fedproto", "fml")
QUICK = (LOCAL, PRETRAINED, UNIFORM, LEARNED, "fedmd", "fedproto")


def planned(seeds: list[int], quick: bool) -> list[Cell]:
    """All cells, the most important first."""
    if quick:
        return [*_main("kermany-50", seeds, 3, QUICK), *_main("findings-150", seeds, 2, (PRETRAINED, UNIFORM))]
    every = ablations("kermany")
    return [
        *_main("kermany-100", seeds),
        *_main("sources-100", seeds),
        *_main("kermany-500", seeds),
        *_main("kermany-50", seeds),
        *cells_of("kermany-100", ROUNDS, {name: c for name, c in every.items() if name not in LATER}, seeds),
        *_main("sources-500", seeds, only=FEW),
        *cells_of("kermany-100", ROUNDS, {**one_family("kermany"), **one_network("kermany")}, seeds),
        *_main("sources-50", seeds, only=FEW),
        *_main("findings-150", seeds, only=FEW),
        *_main("small-2000", seeds, only=LARGE),
        *cells_of("kermany-100", ROUNDS, {name: every[name] for name in LATER}, seeds),
    ]


def _main(scenario: str, seeds: list[int], rounds: int = ROUNDS, only: tuple[str, ...] = ()) -> list[Cell]:
    every = arms(kind_of(scenario))
    return cells_of(scenario, rounds, {name: every[name] for name in only or every}, seeds)
