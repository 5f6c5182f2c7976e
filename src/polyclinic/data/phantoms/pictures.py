"""From a case of a made-up hospital to its pixels."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from polyclinic.data.manifest import Case
from polyclinic.data.phantoms import chest_ct, chest_xray, skin_diagnoses, skin_lesion
from polyclinic.data.phantoms.canvas import Streams, stream
from polyclinic.data.phantoms.cases import CLASSES
from polyclinic.data.phantoms.devices import DEVICES, Device, photograph, scan
from polyclinic.errors import DataError, StudyError, nearest
from polyclinic.study import PhantomSettings

_PHOTOGRAPHED = {"chest-xray": chest_xray.draw, "skin-lesion": skin_lesion.draw, "skin-diagnoses": skin_diagnoses.draw}
_REFERENCE = re.compile(r"(?P<site>[^/]+)/p(?P<patient>\d+)_(?P<image>\d+)")


def phantom_picture(
    settings: PhantomSettings, case: Case, size: Sequence[int]
) -> tuple[NDArray[np.uint8] | NDArray[np.float32], NDArray[np.uint8]]:
    """Draw one image as its device records it.

    Args:
        settings: Kind and seed.
        case: One of ``phantom_cases``; its image, device and label count.
        size: Height, width in pixels, or depth, height, width for ``chest-ct-volume``.

    Returns:
        Pixels: uint8 (1, H, W) for X-rays and (3, H, W) for skin, float32 Hounsfield units (1, H, W) or (1, D, H, W)
        for CT. Mask of what is diseased, 0 or 1, shape ``size``; for skin the lesion, whatever its class.

    Raises:
        StudyError: ``size`` does not fit the kind.
        DataError: The case is none of this phantom's.
    """
    shape = _checked_size(settings.kind, size)
    site, patient, image = _reference(case)
    device, findings = _device(case), _findings(settings.kind, case)
    streams = Streams.of(settings.seed, site, patient, image)
    noise = stream(settings.seed, site, patient, f"noise {image}")
    if settings.kind in _PHOTOGRAPHED:
        shades, mask = _PHOTOGRAPHED[settings.kind](streams, findings, (shape[-2], shape[-1]))
        return photograph(shades, device, noise), mask
    flat = settings.kind == "chest-ct"
    drawn = chest_ct.draw(streams, findings, shape, device.thickness, varied=settings.lesions == "varied")
    pixels = scan(drawn.hounsfield, device, noise)
    return (pixels, drawn.lesion[0]) if flat else (pixels[None], drawn.lesion)


def lung_mask(settings: PhantomSettings, case: Case, size: Sequence[int]) -> NDArray[np.uint8]:
    """Mask (0 or 1, shape ``size``) of both lungs, lesions included, of a CT phantom.

    Raises:
        StudyError: The kind has no lungs in slices, or ``size`` does not fit it.
        DataError: The case is none of this phantom's.
    """
    if settings.kind not in ("chest-ct", "chest-ct-volume"):
        raise StudyError(f"data.phantom.kind: {settings.kind} has no lung mask. Use chest-ct or chest-ct-volume.")
    shape = _checked_size(settings.kind, size)
    site, patient, image = _reference(case)
    streams = Streams.of(settings.seed, site, patient, image)
    drawn = chest_ct.draw(
        streams,
        _findings(settings.kind, case),
        shape,
        _device(case).thickness,
        varied=settings.lesions == "varied",
    )
    lungs = drawn.lungs
    return lungs[0] if settings.kind == "chest-ct" else lungs


def _checked_size(kind: str, size: Sequence[int]) -> tuple[int, ...]:
    wanted = 3 if kind == "chest-ct-volume" else 2
    if len(size) != wanted or min(size) < (2 if wanted == 3 else 8) or min(size[-2:]) < 8:
        names = "depth, height, width (at least 2, 8, 8)" if wanted == 3 else "height, width (at least 8, 8)"
        raise StudyError(f"data.image.size: {list(size)} does not fit a {kind} phantom. Give {names}.")
    return tuple(int(n) for n in size)


def _reference(case: Case) -> tuple[str, int, int]:
    found = _REFERENCE.fullmatch(case.image)
    if found is None:
        raise DataError(f"{case.where or case.image}: {case.image!r} is no phantom image. Wanted: north/p0012_0.")
    return found["site"], int(found["patient"]), int(found["image"])


def _device(case: Case) -> Device:
    if case.device not in DEVICES:
        raise DataError(f"{case.image}: unknown device {case.device!r}. {nearest(case.device, DEVICES)}")
    return DEVICES[case.device]


def _findings(kind: str, case: Case) -> list[str]:
    names = [name for name in case.label.split("|") if name]
    for name in names:
        if name not in CLASSES[kind]:
            raise DataError(f"{case.image}: unknown class {name!r}. {nearest(name, CLASSES[kind])}")
    return names
