"""Other ways to merge the files of ``merge.py``: a plain script, which this file is, and how mergekit is told to.

``python merge_peers.py RULE BASE OUT VECTOR...`` is the merge as people write it down: all files are loaded, each
tensor of all sites is stacked, sorted and added in float32. It ends with a line of JSON: the clock and its
processor seconds when its imports were done.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

DENSITY = 0.2
METHODS: dict[str, dict[str, Any]] = {
    "sum": {"merge_method": "task_arithmetic", "parameters": {"weight": 1.0, "normalize": False}},
    "ties": {"merge_method": "ties", "parameters": {"weight": 1.0, "density": DENSITY, "normalize": True}},
    "model-stock": {"merge_method": "model_stock"},
}
"""What mergekit calls our rules; it has no median."""


def mergekit_config(rule: str, base: Path, models: Sequence[Path]) -> str:
    """What ``mergekit-pytorch`` reads: it wants whole models, and subtracts the base itself."""
    config = {"base_model": str(base), "models": [{"model": str(model)} for model in models], "dtype": "float32"}
    return json.dumps({**config, **METHODS[rule]}, indent=1)  # YAML reads JSON


def merged(rule: str, stack: Tensor) -> Tensor:
    """What is added to one tensor of the base.

    Args:
        rule: As in ``merge.py``.
        stack: ``[sites, ...]``, float32.
    """
    import torch

    sites, shape = len(stack), stack.shape[1:]
    if rule == "sum":
        return stack.sum(0)
    if rule == "median":
        ordered = stack.sort(0).values
        return (ordered[(sites - 1) // 2] + ordered[sites // 2]) / 2
    flat = stack.reshape(sites, -1)
    if rule == "model-stock":
        units = torch.nn.functional.normalize(flat, dim=1)
        cosines = units @ units.T
        rho = (cosines.sum() - cosines.trace()) / (sites * (sites - 1))
        return (sites * rho / (1 + (sites - 1) * rho)).clamp(0, 1) * stack.mean(0)
    kept = max(1, round(DENSITY * flat.shape[1]))
    least = flat.abs().sort(1).values[:, -kept]
    trimmed = torch.where(flat.abs() >= least[:, None], flat, 0)
    agreeing = torch.where(trimmed.sign() == trimmed.sum(0).sign(), trimmed, 0)
    return (agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1)).reshape(shape)


def main() -> None:
    """Load everything, merge, save."""
    rule, base, out, *vectors = sys.argv[1:]
    import torch
    from safetensors.torch import load_file, save_file

    ready = {"clock": time.perf_counter(), "cpu": time.process_time()}
    start = load_file(base)
    changes = [load_file(vector) for vector in vectors]
    save_file({name: start[name] + merged(rule, torch.stack([c[name] for c in changes])) for name in start}, out)
    print(json.dumps(ready))


if __name__ == "__main__":
    main()
