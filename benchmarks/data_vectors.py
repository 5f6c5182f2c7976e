"""Data vectors on real skin lesions and chest radiographs: the paper's claim, every merge rule, and all controls.

``python benchmarks/data_vectors.py --full`` trains, for both data sets, N in {2, 3, 5, 10} sites drawn evenly and by
Dirichlet {1.0, 0.3, 0.1}, and the real sites, each with three seeds, from a base trained on natural images;
``--quick`` a small part of it in a few minutes. A stopped benchmark goes on after the last finished cell. It needs
the images: ``../shared/data``, or the folder that ``POLYCLINIC_DATA`` names.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from natural_start import NATURAL_EPOCHS, save_natural_start
from tables import RESULTS, ROOT, commit
from vector_cells import Cell, State, complete, measure, save, train_pooled
from vector_tables import HEADLINE, write_results

from polyclinic.data.dataset import SiteData
from polyclinic.models.normalisation import shared_names
from polyclinic.models.registry import start_model
from polyclinic.models.weights import load_tensors, read_tensors, save_tensors, shared_tensors, snapshot
from polyclinic.runner import load_sites
from polyclinic.study import Study, load_study

DATASETS = {"skin": "skin-4-sites", "chest": "chest-xray-sites"}
ROUNDS = {"skin": 10, "chest": 10}
DIVISIONS = ("iid", "dirichlet-1.0", "dirichlet-0.3", "dirichlet-0.1")
COUNTS = (2, 3, 5, 10)
SETTINGS = ["training.schedule=cosine", "training.batch_size=32", "data.image.channels=3"]
LR = {"skin": 0.002, "chest": 0.002}
"""For every method. Of 0.0005, 0.001, 0.002 and 0.004 the best for pooled training on validation images with seed 0
(skin: 0.563 balanced accuracy), or within 0.005 of it (chest: 0.886; 0.004 had 0.891)."""
WITH_INTERVALS = [*HEADLINE, "base: finetune"]


def main() -> None:
    """Measure what is missing, then write tables and plots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="three sites, one division, one seed, three rounds")
    size.add_argument("--full", action="store_true", help="everything (the default)")
    parser.add_argument("--only", choices=DATASETS, action="append", help="one data set; may be repeated")
    parser.add_argument("--norm", choices=("batch", "group"), default="batch", help="normalisation of the network")
    parser.add_argument("--tables", action="store_true", help="measure nothing, only write tables from what there is")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "data-vectors", help="where cells go")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the tables go")
    options = parser.parse_args()
    seeds = [0] if options.quick else [0, 1, 2]
    folder = options.runs / ("quick" if options.quick else "full") / options.norm
    if not options.tables:
        for name in options.only or DATASETS:
            rounds = 3 if options.quick else ROUNDS[name]
            measure_dataset(name, folder, plan(options.quick, options.norm), seeds, rounds, options.norm)
    suffix = ("-quick" if options.quick else "") + ("-group" if options.norm == "group" else "")
    write_results(f"data_vectors{suffix}", folder, options.results, seeds, options.norm)


def plan(quick: bool, norm: str) -> list[tuple[str, int]]:
    """Divisions and numbers of sites; the real sites have their own number."""
    if quick:
        return [("dirichlet-0.3", 3)]
    if norm == "group":
        return [("real", 0), *(("dirichlet-0.3", count) for count in COUNTS)]
    return [("real", 0), *((division, count) for count in COUNTS for division in DIVISIONS)]


def measure_dataset(
    name: str, folder: Path, cells: list[tuple[str, int]], seeds: list[int], rounds: int, norm: str
) -> None:
    """Every cell of one data set that is not there yet."""
    study = study_of(name, norm)
    sites = load_sites(study, folder, None)
    everything = SiteData.concat([sites[site] for site in sorted(sites)], name)
    base = base_of(study, folder / f"{name}.base.safetensors", quick=rounds < ROUNDS[name])
    for seed in seeds:
        pooled: State | None = None
        reference = folder / name / f"pooled.{seed}.safetensors"
        for division, count in cells:
            path = folder / name / f"{division}.{count}.{seed}.npz"
            cell = Cell(study, everything, base, division, count, seed, rounds)
            if path.is_file():
                added = complete(cell, WITH_INTERVALS, path.with_suffix(".safetensors"), path)
                print(f"{path.stem}: measured before{', completed' if added else ''}", flush=True)
                continue
            if pooled is None:
                if not reference.is_file():
                    reference.parent.mkdir(parents=True, exist_ok=True)
                    save_tensors(reference, train_pooled(cell, rounds))
                pooled = read_tensors(reference)[0]
            found = measure(cell, pooled, path.with_suffix(".safetensors"))
            found.facts["commit"] = commit()
            save(found, WITH_INTERVALS, path)
            print(
                f"{name} {path.stem}: {sum(v for k, v in found.facts.items() if k.startswith('seconds')):.0f} s",
                flush=True,
            )


def study_of(name: str, norm: str) -> Study:
    """The example study of a data set, in colour as its base needs, with the benchmark's settings."""
    root = os.environ.get("POLYCLINIC_DATA")
    extra = [f"training.lr={LR[name]}", f"model.norm={norm}"]
    path = ROOT / "examples" / f"{DATASETS[name]}.yaml"
    return load_study(path, overrides=[*SETTINGS, *extra], data_root=root)


def base_of(study: Study, path: Path, *, quick: bool) -> State:
    """The base that every site starts from: trained on natural images, with a new last layer for the classes."""
    model = start_model(study)
    names = shared_names(model, "batch")
    save_natural_start(study, path, 3 if quick else NATURAL_EPOCHS)
    load_tensors(model, read_tensors(path)[0])
    return snapshot(shared_tensors(model, names))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
