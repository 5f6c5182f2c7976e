"""The devices of the phantoms: what a scanner or camera does to the same patient."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from polyclinic.data.phantoms.canvas import Array, axes

EDGE_PIXELS = 1.0
"""Deviation of the blur that edges are measured against."""


@dataclass(frozen=True)
class Device:
    """How one device renders a patient; it never changes what the patient has."""

    name: str
    """Name in the study file."""
    gain: float = 1.0
    """Contrast about mid-grey; for CT the scale of air-to-water (a miscalibrated tube), a tenth as strong."""
    gamma: float = 1.0
    """Exponent of the grey values: below 1 brighter. Not for CT."""
    blur: float = 0.0
    """Deviation of the blur, as a fraction of the shorter side; half of it for CT."""
    noise: float = 0.02
    """Deviation of the noise: of the grey range, or of 1000 HU."""
    thickness: float = 1.0
    """Slice thickness in mm (CT)."""
    offset: float = 0.0
    """Hounsfield units added everywhere (CT)."""
    edge: float = 0.0
    """Strength of the edge enhancement of a sharp kernel; the noise is enhanced too (CT)."""
    grain: float = 0.0
    """Deviation of the blur of the noise alone, in pixels: the coarse noise of a smooth kernel (CT)."""
    cast: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Factors of red, green and blue (skin)."""
    vignette: float = 0.0
    """How much darker the corners are than the middle, 0 to 1 (skin)."""


def _family(name: str, thicknesses: tuple[float, ...], look: Device) -> list[Device]:
    """One scanner with several slice thicknesses: ``name-5mm`` and so on."""
    return [replace(look, name=f"{name}-{mm:g}mm", thickness=mm) for mm in thicknesses]


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("reference"),
        Device("bright", gain=0.92, gamma=0.8, noise=0.02, thickness=2.0, cast=(1.0, 0.93, 0.80)),
        Device("soft", gain=0.9, gamma=1.05, blur=0.012, noise=0.012, thickness=5.0, cast=(0.96, 0.96, 1.0)),
        Device("grainy", gain=1.1, gamma=1.2, noise=0.055, thickness=1.0, cast=(0.80, 0.90, 1.0)),
        Device("dark", gain=0.95, gamma=1.3, blur=0.006, noise=0.025, thickness=3.0, cast=(0.92, 0.78, 0.80)),
        Device("hard", gain=1.25, gamma=0.95, noise=0.03, thickness=1.5, cast=(1.0, 1.0, 0.92)),
        # Five made-up CT scanners with the slice thicknesses of Table 2 of PPPML-HMI (arXiv 2302.11571), users A to E.
        # How they look is invented: none is a measurement of a real scanner.
        *_family("ct-old", (2.0, 3.3, 7.5), Device("", gain=0.7, offset=-10, blur=0.014, noise=0.060, grain=1.0)),
        *_family("ct-fine", (1.0, 5.0), Device("", noise=0.020)),
        *_family("ct-low-dose", (1.0,), Device("", gain=1.1, offset=10, edge=0.4, noise=0.045)),
        *_family("ct-sharp", (1.25, 5.0), Device("", gain=1.2, offset=20, edge=1.0, noise=0.025)),
        *_family("ct-smooth", (1.0, 2.0), Device("", offset=-40, blur=0.020, noise=0.020, grain=1.2)),
        # Six made-up dermatoscopes, one for each centre of Fed-ISIC2019 in simulations; none is a measurement.
        Device("derm-warm", gamma=0.85, noise=0.02, cast=(1.0, 0.90, 0.78)),
        Device("derm-video", gain=0.80, gamma=1.1, blur=0.020, noise=0.03, cast=(0.94, 1.0, 0.90), vignette=0.15),
        Device("derm-crisp", gain=1.15, noise=0.015, cast=(1.0, 0.97, 1.0)),
        Device("derm-cool", gain=1.05, gamma=1.25, noise=0.025, cast=(0.86, 0.93, 1.0), vignette=0.30),
        Device("derm-dim", gain=0.90, gamma=1.5, blur=0.010, noise=0.03, cast=(0.95, 0.90, 0.86), vignette=0.45),
        Device("derm-slide", gain=1.20, gamma=0.75, blur=0.025, noise=0.035, cast=(1.0, 0.84, 0.92), vignette=0.20),
    )
}


def photograph(picture: Array, device: Device, rng: np.random.Generator) -> NDArray[np.uint8]:
    """What ``device`` records of grey or colour values 0..1.

    Args:
        picture: Shape (C, H, W), 1 or 3 channels.
        device: Which device.
        rng: Stream of the noise.

    Returns:
        Same shape, 0 to 255.
    """
    values = _blurred(picture, device.blur * min(picture.shape[-2:]), plane=2)
    values = (values - np.float32(0.5)) * np.float32(device.gain) + np.float32(0.5)
    values = np.clip(values, 0, 1) ** np.float32(device.gamma)
    if len(values) == 3:
        values = values * np.asarray(device.cast, dtype=np.float32)[:, None, None]
        if device.vignette:
            y, x = axes((values.shape[-2], values.shape[-1]))
            values = values * (1 - np.float32(device.vignette / 2) * (y * y + x * x))
    values = values + np.float32(device.noise) * rng.standard_normal(values.shape, dtype=np.float32)
    return np.asarray(np.clip(values * 255 + np.float32(0.5), 0, 255).astype(np.uint8))


def scan(hounsfield: Array, device: Device, rng: np.random.Generator) -> Array:
    """What ``device`` reconstructs of Hounsfield units, shape (D, H, W); whole numbers from -1024 to 3071, float32.

    Thicker slices average more photons: the noise falls with the root of the thickness.
    """
    values = _blurred(hounsfield, device.blur / 2 * min(hounsfield.shape[-2:]), plane=2)
    values = (values + 1000) * np.float32(1 + (device.gain - 1) / 10) + np.float32(device.offset - 1000)
    deviation = 1000 * device.noise / device.thickness**0.5
    grain = rng.standard_normal(values.shape, dtype=np.float32)
    if device.grain:
        grain = _blurred(grain, device.grain, plane=2)
        grain = grain / grain.std()
    values = values + np.float32(deviation) * grain
    if device.edge:
        values = values + np.float32(device.edge) * (values - _blurred(values, EDGE_PIXELS, plane=2))
    return np.asarray(np.clip(np.round(values), -1024, 3071), dtype=np.float32)


def _blurred(values: Array, deviation: float, plane: int) -> Array:
    if deviation < 0.15:
        return values
    from scipy.ndimage import gaussian_filter

    sigma = (0.0,) * (values.ndim - plane) + (deviation,) * plane
    return np.asarray(gaussian_filter(values, sigma, mode="nearest", truncate=3.0), dtype=np.float32)
