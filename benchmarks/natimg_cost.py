"""What a site's step of natimg-fl costs, beside a step of local training with the same network.

``python benchmarks/natimg_cost.py`` runs whole rounds of both, at sites with different networks and a small central
model, on random images, and writes ``benchmarks/results/natimg_cost.md``. A stopped run goes on where it was. Goals: at
most 3 times a local step with uniform weights, at most 4 times with learned ones (q = 5).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from personalisation_cost import child, ratio
from tables import RESULTS, Json, Results, Table

ARMS: dict[str, Json] = {
    "local": {"name": "local"},
    "uniform": {"name": "natimg-fl", "weights": "uniform", "server_steps": 2},
    "learned": {"name": "natimg-fl", "weights": "learned", "server_steps": 2},
}
CENTRAL = "small-resnet"
NETWORKS = ("small-cnn", "small-resnet", "shufflenet", "mobilenet", "resnet18")
BATCH, STEPS, ROUNDS, WARM = 32, 20, 4, 2
"""Rounds up to ``WARM`` are not measured: in the first the central model does not teach yet."""
PUBLIC, CLASSES = 200, 10
INTRO = f"""Processor seconds of a site's whole part in a round (train, and all that is saved and sent) over its {STEPS}
steps, with one thread: 64 pixels, grey, batches of {BATCH} own and {BATCH} public images, batch norm, Adam. The central
model is {CENTRAL}, and resnet18 for resnet18. Random images. Ratios to local training of the same process; median over
processes and rounds, with the range."""


def main() -> None:
    """Measure what is not measured yet and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="two small networks, one process each")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the table goes")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.probe:
        print(json.dumps(probe(**json.loads(options.probe))), flush=True)
        return
    results = Results(f"natimg_cost{'-quick' if options.quick else ''}", options.results)
    rows = []
    for network in NETWORKS[:2] if options.quick else NETWORKS:
        found = []
        for repeat in range(1 if options.quick else 2):
            settings = {"network": network, "repeat": repeat}
            found.append(results.cell(f"{network}/{repeat}", settings, lambda: child(settings, __file__)))  # noqa: B023
        base = median(seconds for one in found for seconds in one["local"])
        ratios = [
            ratio([v / b for one in found for v, b in zip(one[arm], one["local"], strict=True)])
            for arm in ("uniform", "learned")
        ]
        rows.append([network, f"{1000 * base:.0f} ms", *ratios])
    table = Table("A step, as a multiple of local's", ["network of the site", "local", "uniform", "learned"], rows)
    results.write("What a step of natimg-fl costs", INTRO, [table], seeds=[0])


def probe(network: str, repeat: int) -> Json:
    """Processor seconds per step of each arm, for each measured round."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        public = draw_public(Path(folder))
        return {arm: seconds(method, network, public, Path(folder) / arm) for arm, method in ARMS.items()}


def draw_public(folder: Path) -> Json:
    """Write random images with classes and their manifest; the study's ``proxies``."""
    import numpy as np
    from PIL import Image

    from polyclinic.data.proxy_manifest import make_manifest

    rng, images = np.random.default_rng(0), folder / "public"
    for number in range(PUBLIC):
        path = images / f"class-{number % CLASSES}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64), dtype=np.uint8)).save(path)
    make_manifest(images, folder / "public.json", name="random")
    return {"manifest": str((folder / "public.json").absolute()), "images": str(images.absolute())}


def seconds(method: Json, network: str, public: Json, folder: Path) -> list[float]:
    """Run a study of one site; processor seconds of its step in each measured round."""
    from polyclinic.federation.message import Message
    from polyclinic.results import RunFolder
    from polyclinic.runner import Run, Silent
    from polyclinic.study import validate_study

    raw: dict[str, Any] = {
        "name": "natimg-cost",
        "task": {"kind": "multi-class", "classes": ["healthy", "ill"]},
        "data": {"tables": [{"path": "none.csv"}], "image": {"size": [64, 64]}},
        "model": {"name": "resnet18" if network == "resnet18" else CENTRAL},
        "models": {"site": {"name": network}},
        "proxies": public,
        "training": {"optimizer": "adam", "lr": 0.001, "batch_size": BATCH, "steps": STEPS},
        "method": {**method, "rounds": ROUNDS},
        "evaluation": {"bootstrap": 0, "examples": 0},
    }
    study = validate_study(raw)
    RunFolder(folder).create(study)
    run = Run(study, {"site": random_site()}, RunFolder(folder), Silent())
    stream, found = run.channel.stream, []

    def timed(op: str, messages: dict[str, Message]) -> Iterator[tuple[str, Message]]:
        started = time.process_time()
        for answer in stream(op, messages):
            if op == "train" and run.channel.round > WARM:
                found.append((time.process_time() - started) / STEPS)
            yield answer

    run.channel.stream = timed  # type: ignore[method-assign]
    run.train()
    return found


def random_site() -> Any:
    """320 random images of 160 patients, some of them for validation and test."""
    import torch

    from polyclinic.data.dataset import SiteData
    from polyclinic.data.manifest import Case

    count, kept = 320, 288
    draw = torch.Generator().manual_seed(0)
    pixels = torch.rand(count, 1, 64, 64, generator=draw)
    targets = torch.arange(count) // 2 % 2
    parts = {"train": range(kept), "val": range(kept, kept + 16), "test": range(kept + 16, count)}
    part_of = {i: part for part, rows in parts.items() for i in rows}
    names = ["healthy", "ill"]
    rows = [Case(f"{i}.png", f"p{i // 2}", "site", label=names[i // 2 % 2], split=part_of[i]) for i in range(count)]
    return SiteData("site", rows, pixels, targets, {part: torch.tensor(list(rows)) for part, rows in parts.items()})


if __name__ == "__main__":
    main()
