"""Made-up patients with known truth: chest radiographs, chest CT (slices and volumes), skin lesions.

Everything is drawn from formulas and a seed; no image of a patient is involved. Anatomy, disease, device and noise
are drawn independently of each other, so that a device or a prevalence can be changed alone.
"""

from polyclinic.data.phantoms.cases import CLASSES, MASK_CLASSES, phantom_cases
from polyclinic.data.phantoms.devices import DEVICES, Device
from polyclinic.data.phantoms.export import write_phantoms
from polyclinic.data.phantoms.pictures import lung_mask, phantom_picture

__all__ = [
    "CLASSES",
    "DEVICES",
    "MASK_CLASSES",
    "Device",
    "lung_mask",
    "phantom_cases",
    "phantom_picture",
    "write_phantoms",
]
