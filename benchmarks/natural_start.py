"""A network trained on natural images, to start from: flowers and small everyday things, in colour."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from polyclinic.data.dataset import SiteData
from polyclinic.models.normalisation import shared_names
from polyclinic.models.registry import head_name, start_model
from polyclinic.models.weights import save_tensors, shared_tensors
from polyclinic.runner import load_sites
from polyclinic.study import Study, validate_study
from polyclinic.tasks import make_task
from polyclinic.training import learning_rate, train

NATURAL = ["daisy", "dandelion", "roses", "sunflowers", "tulips", "airplane", "automobile", "bird", "cat", "deer"]
NATURAL += ["dog", "frog", "horse", "ship", "truck"]
NATURAL_EPOCHS = 20


def save_natural_start(study: Study, path: Path, epochs: int = NATURAL_EPOCHS) -> None:
    """Train the study's network on natural images and keep all but its last layer.

    Args:
        study: Gives the network, the size of images and where the natural ones lie.
        path: The safetensors file, as ``model.weights`` takes it; nothing is done where it is there already.
        epochs: Passes.
    """
    if path.is_file():
        return
    natural = natural_study(study)
    sites = load_sites(natural, path.parent, None)
    images = SiteData.concat([sites[site] for site in sorted(sites)], "natural")
    trunk = start_model(natural)
    task = make_task(natural.task, natural.training)
    for number in range(1, epochs + 1):
        rate = learning_rate(natural.training, number, epochs)
        result = train(trunk, images, task, natural.training, lr=rate, seed=number)
        print(f"natural images, epoch {number}: loss {result.loss:.3f}", flush=True)
    last = head_name(trunk)
    tensors = shared_tensors(trunk, shared_names(trunk, "batch"))
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{last}.")}
    save_tensors(path, kept, {"loss": json.dumps(result.loss)})


def natural_study(study: Study) -> Study:
    """Flowers and small everyday things at the size that the study's network sees."""
    columns = {"image": "file", "label": "label_name", "patient": "file"}
    tables = [
        {"path": f"{name}/dev.csv", "images": f"{name}/dev.zip", "site": site, "columns": columns}
        for name, site in (("tf_flowers96", "flowers"), ("cifar10_jpeg_subset", "things"))
    ]
    raw: dict[str, Any] = {
        "name": "natural-images",
        "task": {"classes": NATURAL},
        "data": {
            "root": study.data.root,
            "tables": tables,
            "image": {"size": study.data.image.size, "channels": 3, "fit": "crop"},
            "split": {"fractions": [0.9, 0.0, 0.1]},
        },
        "model": study.model.model_dump(),
        "evaluation": {"select": "last"},
        "training": {
            "optimizer": "adam",
            "lr": 0.002,
            "batch_size": 64,
            "schedule": "cosine",
            "augment": {"flip": True},
        },
    }
    return validate_study(raw)
