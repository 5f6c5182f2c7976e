"""``polyclinic vectors base``: publish what every site starts from."""

from __future__ import annotations

from pathlib import Path

from polyclinic.errors import ContributionError
from polyclinic.models.weights import read_tensors
from polyclinic.study import Study
from polyclinic.vectors.base import Base, publish_base
from polyclinic.vectors.base_spec import AT_HOME
from polyclinic.vectors.merged import Merged


def publish(
    study: Study, out: Path, *, version: str = "1", weights: Path | None = None, merged: Path | None = None
) -> Base:
    """Publish a base.

    Args:
        study: Network, preprocessing and classes; its start weights (``model.weights``, else drawn from its seed) are
            published where nothing else is given.
        out: A new folder.
        version: Free text.
        weights: A safetensors file of values, such as ``models/global.safetensors`` of a run.
        merged: Folder of a merged model, which becomes the next base; its lineage names what it was made of.

    Raises:
        ContributionError: The values do not fit the network, ``out`` exists, or both files are given.
    """
    if weights is not None and merged is not None:
        raise ContributionError("give --weights or --merged, not both.")
    if merged is None:
        return publish_base(study, None if weights is None else read_tensors(weights)[0], out, version=version)
    found = Merged.load(merged)
    base = found.base_spec
    pairs = {
        "task": (base.task, study.task, set[str]()),
        "model": (base.model, study.model, {"weights"}),
        "data.image": (base.image, study.data.image, set(AT_HOME)),
    }
    for name, (wanted, seen, but) in pairs.items():
        if wanted.model_dump(exclude=but) != seen.model_dump(exclude=but):
            raise ContributionError(f"the study's {name} differs from that of the merged model's base in {merged}.")
    return publish_base(study, found.tensors(), out, version=version, lineage=found.lineage)
