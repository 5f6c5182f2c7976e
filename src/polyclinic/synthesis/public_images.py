"""A folder of public images, for a generator that is trained at the server alone."""

from __future__ import annotations

from pathlib import Path

import torch

from polyclinic.data.decode import Decoder
from polyclinic.data.manifest import Case
from polyclinic.errors import DataError
from polyclinic.seeds import generator
from polyclinic.study import Study
from polyclinic.synthesis.vae import Lines, shrunk_pictures

MOST_IMAGES = 5000
"""Of more images, so many are drawn."""
KINDS = (".png", ".jpg", ".jpeg")


def public_lines(study: Study, folder: str, size: int) -> Lines:
    """The images, placed on the study's grid as a site's would be, then shrunk; all of class 0 and device 0.

    Args:
        study: Its ``data.root``, ``data.image`` and seed count.
        folder: Relative to ``data.root``; folders in it are looked through as well.
        size: Height and width in pixels.

    Raises:
        DataError: No such folder, no PNG or JPEG in it, or an image that cannot be read.
    """
    root = Path(study.data.root) / folder
    if not root.is_dir():
        raise DataError(
            f"synthesis.generator.public: {root} is no folder. Give a folder of public images, relative to data.root."
        )
    found = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.suffix.lower() in KINDS and p.is_file())
    if not found:
        raise DataError(f"synthesis.generator.public: {root} holds no PNG or JPEG image.")
    if len(found) > MOST_IMAGES:
        chosen = generator(study.seed, "public images").choice(len(found), MOST_IMAGES, replace=False)
        found = [found[k] for k in sorted(chosen.tolist())]
    decoder = Decoder(study.task, study.data.image)
    images = []
    for name in found:
        case = Case(name, name, "public", source=str(root), where="synthesis.generator.public")
        images.append(shrunk_pictures(torch.from_numpy(decoder.decode(case).image)[None], size))
    nothing = torch.zeros(len(images), dtype=torch.int64)
    return Lines(torch.cat(images), nothing, nothing)
