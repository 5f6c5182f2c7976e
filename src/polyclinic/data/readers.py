"""From a file to pixels: PNG, JPEG, TIFF, BMP, NPZ, NIfTI; DICOM is in ``dicom``.

Axes are ``[C, H, W]`` or ``[C, D, H, W]``. Pixels are uint8 for files of at most 8 bits, otherwise float32 with the
file's own values (Hounsfield units for CT). Volumes from NIfTI are turned so that D runs from feet to head, H from
front to back and W from the patient's right to left, as in an axial DICOM series.
"""

from __future__ import annotations

import gzip
import io
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from polyclinic.data.sources import MAX_BYTES, Place, list_folder, locate, read_bytes, read_npz
from polyclinic.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 89_478_485
PILLOW = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
NIFTI = (".nii", ".nii.gz")


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded image.

    Args:
        pixels: ``[C, H, W]`` or ``[C, D, H, W]``; uint8 for files of at most 8 bits, else finite float32.
        spacing: Millimetres per pixel, ``(y, x)`` or ``(z, y, x)``, where the file says.
        window: The file's own center and width, where it has one.
    """

    pixels: NDArray[Any]
    spacing: tuple[float, ...] | None = None
    window: tuple[float, float] | None = None


def read_picture(source: str, reference: str) -> Picture:
    """Decode one image.

    Args:
        source: Folder, zip or NPZ.
        reference: File, folder with a DICOM series, or ``key#7``; see ``Case``.

    Returns:
        Pixels as in the file. Palettes become colour; an alpha channel is dropped if it is opaque everywhere; photos
        are turned as their EXIF orientation says. 16-bit colour PNG is reduced to 8 bits by Pillow.

    Raises:
        DataError: Names the file and the fault: missing, damaged, not finite, too large, of an unknown kind.
    """
    return _read(locate(source, reference), as_mask=False)


def read_mask(source: str, reference: str) -> NDArray[Any]:
    """Decode one mask into ``[H, W]`` or ``[D, H, W]``.

    Palette images keep their indices; colour is accepted only if all channels are equal.

    Raises:
        DataError: As ``read_picture``.
    """
    place = locate(source, reference)
    pixels = _read(place, as_mask=True).pixels
    if not (pixels == pixels[:1]).all():
        raise DataError(f"{place.name}: this mask is in colour. Store class indices in one channel.")
    flat: NDArray[Any] = pixels[0]
    return flat


def _read(place: Place, as_mask: bool) -> Picture:
    name = (place.member or place.path.name).lower()
    if place.path.suffix.lower() == ".npz":
        picture = _from_npz(place)
    elif name.endswith(PILLOW):
        picture = Picture(_from_pillow(place, as_mask))
    elif name.endswith(NIFTI):
        picture = _from_nifti(place)
    else:
        picture = _from_dicom(place)
    if picture.pixels.size == 0:
        raise DataError(f"{place.name} has no pixels (shape {picture.pixels.shape}).")
    if picture.pixels.dtype != np.uint8 and not np.isfinite(picture.pixels).all():
        bad = int((~np.isfinite(picture.pixels)).sum())
        at = np.argwhere(~np.isfinite(picture.pixels))[0].tolist()
        raise DataError(f"{place.name}: {bad} of {picture.pixels.size} pixels are NaN or infinite (first at {at}).")
    return picture


def _from_dicom(place: Place) -> Picture:
    from polyclinic.data.dicom import read_dicom, read_series

    files = list_folder(place)
    if files:
        return read_series(place, files)
    data = read_bytes(place)
    if data[128:132] != b"DICM" and not place.name.lower().endswith((".dcm", ".dicom", ".ima")):
        raise DataError(
            f"{place.name} is of no known kind. Known are DICOM files and series folders, NIfTI (.nii, .nii.gz), "
            f"{', '.join(PILLOW)} and rows of an .npz."
        )
    return read_dicom(place, data)


def _from_pillow(place: Place, as_mask: bool) -> NDArray[Any]:
    from PIL import Image, ImageOps

    data = read_bytes(place)
    try:
        with Image.open(io.BytesIO(data)) as opened:
            image: Image.Image = opened
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{place.name}: {image.width} x {image.height} is more than {MAX_PIXELS} pixels.")
            pages = getattr(image, "n_frames", 1)
            if pages > 1:
                raise DataError(f"{place.name} has {pages} pages. Store each as its own file.")
            if image.getexif().get(0x0112, 1) != 1:
                image = ImageOps.exif_transpose(image)
            return _channels(_plain(image, place, as_mask))
    except DataError:
        raise
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise DataError(f"{place.name} cannot be decoded ({error}). The file is damaged: fetch it again.") from error


def _plain(image: Image.Image, place: Place, as_mask: bool) -> NDArray[Any]:
    """Pixels of a Pillow image with palette and alpha resolved: [H, W] or [H, W, 3]."""
    mode = image.mode
    if mode == "P" and as_mask:
        return np.asarray(image)
    if mode in ("P", "PA"):
        has_alpha = mode == "PA" or "transparency" in image.info
        image = image.convert("RGBA" if has_alpha else "RGB")
    if image.mode in ("LA", "RGBA"):
        pixels = np.asarray(image)
        if int(pixels[..., -1].min()) < 255:
            raise DataError(
                f"{place.name} is partly transparent (alpha down to {int(pixels[..., -1].min())}). "
                "Save it without alpha."
            )
        return pixels[..., 0] if image.mode == "LA" else pixels[..., :3]
    if image.mode == "1":
        return np.asarray(image.convert("L"))
    if image.mode in ("L", "RGB"):
        return np.asarray(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.float32)
    raise DataError(f"{place.name}: colour mode {mode} is not read. Save it as grey or RGB.")


def _channels(pixels: NDArray[Any]) -> NDArray[Any]:
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _numbers(array: NDArray[Any], place: Place) -> NDArray[Any]:
    """uint8 as it is, bool as 0 and 1, other real numbers as float32."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8)
    if array.dtype.kind not in "iuf":
        raise DataError(f"{place.name} holds {array.dtype}, not real numbers.")
    return array.astype(np.float32)


def _from_npz(place: Place) -> Picture:
    """A row of an array [N, H, W], [N, H, W, 3], [N, D, H, W] or [N, D, H, W, 3] (a last axis of 1 is grey)."""
    array, row = read_npz(place)
    image = array if row is None else array[row]
    if image.ndim in (3, 4) and image.shape[-1] in (1, 3):
        image = np.moveaxis(image, -1, 0)
    elif image.ndim in (2, 3):
        image = image[None]
    else:
        raise DataError(
            f"{place.name}: one row has shape {image.shape}; it must be [H, W], [H, W, 3], [D, H, W] or [D, H, W, 3]."
        )
    return Picture(_numbers(image, place))


def _gunzip(place: Place, data: bytes) -> bytes:
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
        plain = stream.read(MAX_BYTES + 1)
    if len(plain) > MAX_BYTES:
        raise DataError(f"{place.name} is larger than 1 GiB unpacked. Store it as smaller files.")
    return plain


def _from_nifti(place: Place) -> Picture:
    import nibabel
    from nibabel.filebasedimages import ImageFileError

    data = read_bytes(place)
    try:
        plain = _gunzip(place, data) if place.name.lower().endswith(".gz") else data
        sizes = struct.unpack("<i", plain[:4]) + struct.unpack(">i", plain[:4])
        kind = nibabel.Nifti2Image if 540 in sizes else nibabel.Nifti1Image
        image = kind.from_bytes(plain)
        if image.ndim not in (2, 3) and any(n != 1 for n in image.shape[3:]):
            raise DataError(f"{place.name} has shape {image.shape}. Store one volume without time or channels.")
        if math.prod(image.shape) * image.get_data_dtype().itemsize > len(plain):
            raise DataError(f"{place.name} is cut off: its header announces {image.shape} voxels. Fetch it again.")
        shape = (*image.shape, 1)[:3]
        stored = np.asanyarray(image.dataobj).reshape(shape)
        stored = _numbers(stored, place)
        turned = nibabel.as_closest_canonical(nibabel.Nifti1Image(stored, image.affine))
    except DataError:
        raise
    except (OSError, EOFError, ValueError, struct.error, zlib.error, ImageFileError) as error:
        raise DataError(
            f"{place.name} cannot be read as NIfTI ({error}). The file is damaged: fetch it again."
        ) from error
    volume = np.asarray(turned.dataobj)[::-1, ::-1].transpose(2, 1, 0)
    spacing = tuple(float(s) for s in turned.header.get_zooms()[:3])[::-1]
    flat = [axis for axis in range(3) if volume.shape[axis] == 1]
    if flat:
        spacing = tuple(s for axis, s in enumerate(spacing) if axis != flat[0])
        volume = volume.squeeze(axis=flat[0])
    return Picture(np.ascontiguousarray(volume)[None], spacing)


def write_nifti_like(mask: NDArray[np.uint8], path: Path, source: str, reference: str) -> None:
    """Write a mask ``[D, H, W]`` as NIfTI in the space of the volume that ``read_picture`` read.

    A NIfTI volume's own affine and order of axes are kept. From a DICOM series or an NPZ come the spacing and the
    patient's orientation, with the origin at zero.
    """
    import nibabel
    from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

    place = locate(source, reference)
    turned = mask.transpose(2, 1, 0)
    if not place.name.lower().endswith(NIFTI):
        z, y, x = read_picture(source, reference).spacing or (1.0, 1.0, 1.0)
        nibabel.save(nibabel.Nifti1Image(turned, np.diag([-x, -y, z, 1.0])), path)
        return
    data = read_bytes(place)
    plain = _gunzip(place, data) if place.name.lower().endswith(".gz") else data
    sizes = struct.unpack("<i", plain[:4]) + struct.unpack(">i", plain[:4])
    original = (nibabel.Nifti2Image if 540 in sizes else nibabel.Nifti1Image).from_bytes(plain)
    back = ornt_transform(axcodes2ornt("RAS"), io_orientation(original.affine))
    own = apply_orientation(turned[::-1, ::-1], back)
    nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(own).astype(np.uint8), original.affine), path)


def image_size(source: str, reference: str) -> tuple[int, ...]:
    """Height and width, or depth, height and width, from the header alone where the format allows it.

    Raises:
        DataError: As ``read_picture``, but only for what the header shows.
    """
    place = locate(source, reference)
    name = (place.member or place.path.name).lower()
    if place.path.suffix.lower() != ".npz" and name.endswith(PILLOW):
        return _pillow_size(place)
    if place.path.suffix.lower() != ".npz" and not name.endswith(NIFTI):
        from polyclinic.data.dicom import header_size

        files = list_folder(place)
        return header_size(place, files)
    return tuple(read_picture(source, reference).pixels.shape[1:])


def _pillow_size(place: Place) -> tuple[int, int]:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(read_bytes(place))) as image:
            turned = image.getexif().get(0x0112, 1) >= 5
            return (image.width, image.height) if turned else (image.height, image.width)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise DataError(f"{place.name} cannot be decoded ({error}). The file is damaged: fetch it again.") from error
