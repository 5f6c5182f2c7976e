"""What makes samples; each file has both sides, as a method has.

``vae`` makes images at the server, by the interface of ``base.py``. ``amplitude`` makes them at each site from its own.
``features`` makes features of the trained network, for its last layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polyclinic.study import Study
    from polyclinic.synthesis.generators.base import ImageGenerator


def image_generator(study: Study) -> ImageGenerator | None:
    """The maker of images that the study asks for, or None."""
    assert study.synthesis is not None
    if study.synthesis.of_kind("vae") is None:
        return None
    from polyclinic.synthesis.generators.vae import VAEGenerator

    return VAEGenerator(study)
