"""What ``merge.py`` measures of ours: each probe runs in a fresh process, as ``merge_probes.py PROBE JSON``."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from overhead_probes import memory
from tables import Json
from torch import Tensor

from polyclinic.vectors.merge import merge
from polyclinic.vectors.recipe import Recipe
from polyclinic.vectors.sources import Kind, Make, Outline, Spec
from polyclinic.vectors.tensor_file import TensorFile, TensorWriter

CLASSES = 1000
READ = 2**24
"""Bytes of the buffer that all files are read into, one after the other."""
BASE_STD, VECTOR_STD = 0.02, 0.01
RECIPES: dict[str, Json] = {
    "sum": {"rule": {"name": "data-vector", "coefficients": "sum"}},
    "ties": {"rule": {"name": "ties", "density": 0.2}},
    "model-stock": {"rule": {"name": "data-vector", "coefficients": "model-stock"}},
    "median": {"rule": {"name": "median"}},
}


def shapes(width: int, depth: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a vision transformer with patches of 16 x 16; ViT-B/16 with 768 and 12."""
    found: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 197, width),
        "patch_embed.weight": (width, 3, 16, 16),
        "patch_embed.bias": (width,),
    }
    layers = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (4 * width, width)}
    layers["mlp.fc2"] = (width, 4 * width)
    for block in range(depth):
        for norm in ("norm1", "norm2"):
            found |= {f"blocks.{block}.{norm}.{part}": (width,) for part in ("weight", "bias")}
        for name, shape in layers.items():
            found |= {f"blocks.{block}.{name}.weight": shape, f"blocks.{block}.{name}.bias": shape[:1]}
    found |= {"norm.weight": (width,), "norm.bias": (width,)}
    return found | {"head.weight": (CLASSES, width), "head.bias": (CLASSES,)}


def files(folder: Path, kind: str, sites: int) -> list[Path]:
    """Where vectors or whole models lie."""
    return [folder / f"{kind}-{j}.safetensors" for j in range(sites)]


def write(folder: str, width: int, depth: int, sites: int) -> Json:
    """The base, one vector a site, and base + vector as whole models: normal values, half of a vector is shared."""
    at, specs = Path(folder), [(n, torch.float32, s) for n, s in shapes(width, depth).items()]
    at.mkdir(parents=True, exist_ok=True)
    with TensorWriter(at / "base.safetensors", specs) as out:
        for name, values in _draws(0, width, depth):
            out.write(name, values.mul_(BASE_STD))
    for j, (vector, model) in enumerate(zip(*(files(at, kind, sites) for kind in ("vector", "model")), strict=True)):
        draws = zip(*(_draws(seed, width, depth) for seed in (0, 1, 2 + j)), strict=True)
        with TensorWriter(vector, specs) as to_vector, TensorWriter(model, specs) as to_model:
            for (name, base), (_, shared), (_, own) in draws:
                change = shared.add_(own).mul_(VECTOR_STD / math.sqrt(2))
                to_vector.write(name, change)
                to_model.write(name, base.mul_(BASE_STD).add_(change))
    values = sum(math.prod(shape) for shape in shapes(width, depth).values())
    largest = max(math.prod(shape) for shape in shapes(width, depth).values())
    return {"values": values, "largest_tensor": 4 * largest, "file": (at / "base.safetensors").stat().st_size}


def _draws(seed: int, width: int, depth: int) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for name, shape in shapes(width, depth).items():
        yield name, torch.randn(shape, generator=generator)


@dataclass(frozen=True)
class FileSource:
    """A contribution that is one file of tensors, read as a ``Contribution`` reads its own."""

    file: TensorFile
    digest: str
    site: str
    images: int = 100
    held: tuple[bool, ...] = (True,) * CLASSES

    def names(self, kind: Kind) -> frozenset[str]:
        """It brought a vector only."""
        return frozenset(self.file.specs) if kind == "vector" else frozenset()

    def read(self, kind: Kind, name: str) -> Tensor:
        """One tensor."""
        return self.file.read(name)

    def read_into(self, kind: Kind, name: str, make: Make) -> Tensor:
        """One tensor, in memory that is given."""
        spec = self.file.spec(name)
        return self.file.read_into(name, make(spec.shape, spec.dtype))


class Seconds:
    """Adds up the time of calls."""

    def __init__(self) -> None:
        self.spent = 0.0

    def timed(self, call: Callable[[str, Tensor], None]) -> Callable[[str, Tensor], None]:
        """The same call, timed."""

        def timed(name: str, tensor: Tensor) -> None:
            started = time.perf_counter()
            call(name, tensor)
            self.spent += time.perf_counter() - started

        return timed


def ours(folder: str, rule: str, sites: int, out: str, started: float) -> Json:
    """Merge by one rule: into a file and into nothing, and hash the vectors; the files are read between these.

    Args:
        folder: With the files.
        rule: Of ``RECIPES``.
        sites: How many vectors.
        out: The merged file; stays there.
        started: Clock when this process was started.

    Returns:
        Seconds, and MiB of this process before and at most within the first merge.
    """
    start = time.perf_counter() - started
    vectors = files(Path(folder), "vector", sites)
    opened = [TensorFile(path, max_bytes=2**40) for path in vectors]
    base = TensorFile(Path(folder) / "base.safetensors", max_bytes=2**40)
    specs = [Spec(name, spec.shape, spec.dtype, statistic=False) for name, spec in base.specs.items()]
    outline = Outline(tuple(specs), "head", tuple(f"class {k}" for k in range(CLASSES)))
    sources = [FileSource(file, f"{j:064x}", f"site-{j}") for j, file in enumerate(opened)]
    recipe = Recipe.model_validate({**RECIPES[rule], "restoration": "none"})
    every = [base.path, *vectors]

    reading(every)  # warms the page cache
    held = memory("VmRSS")
    writing = Seconds()
    before, cpu = time.perf_counter(), time.process_time()
    with TensorWriter(Path(out), [(spec.name, spec.dtype, spec.shape) for spec in specs]) as writer:
        merge(outline, base, sources, recipe, writing.timed(writer.write))
        done = time.perf_counter()
    closed, cpu = time.perf_counter(), time.process_time() - cpu
    peak = memory("VmHWM")
    reads = [reading(every)]
    into_nothing = _seconds(lambda: merge(outline, base, sources, recipe, lambda name, tensor: None))
    reads.append(reading(every))
    hashing = _seconds(lambda: [file.sha256() for file in opened])
    reads.append(reading(every))
    forget(every)
    cold_read = reading(every)
    forget(every)
    cold_merge = _seconds(lambda: merge(outline, base, sources, recipe, lambda name, tensor: None))
    return {
        "start": start,
        "merge": done - before,
        "writing": writing.spent,
        "closing": closed - done,
        "cpu": cpu,
        "into_nothing": into_nothing,
        "hashing": hashing,
        "reads": reads,
        "cold_read": cold_read,
        "cold_merge": cold_merge,
        "held": held,
        "peak": peak,
    }


def reading(paths: list[Path]) -> float:
    """Seconds to read files whole, one after the other, into one buffer."""
    buffer = bytearray(READ)

    def read() -> None:
        for path in paths:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    return _seconds(read)


def forget(paths: list[Path]) -> None:
    """Ask the system to drop files from its cache, so that the next reading is from the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def apart(base: str, one: str, other: str) -> Json:
    """Distance of two merged models, Euclidean, beside that of the first from the base."""
    first, second, start = (TensorFile(Path(path), max_bytes=2**40) for path in (one, other, base))
    if first.specs.keys() != second.specs.keys():
        raise SystemExit(f"{other} has other tensors than {one}")
    between = moved = 0.0
    for name in first.specs:
        values = first.read(name).double()
        between += float((values - second.read(name).double()).square().sum())
        moved += float((values - start.read(name).double()).square().sum())
    return {"apart": math.sqrt(between / moved)}


def main() -> None:
    """Run one probe and print its JSON as the last line."""
    name, arguments = sys.argv[1], json.loads(sys.argv[2])
    print(json.dumps({"write": write, "ours": ours, "apart": apart}[name](**arguments)), flush=True)


if __name__ == "__main__":
    main()
