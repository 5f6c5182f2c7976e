"""All images of a site decoded once into one array, by a few threads, in memory or in a memory-mapped file."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyclinic.data.manifest import PHANTOM, Case
from polyclinic.data.readers import Picture, read_mask, read_picture
from polyclinic.data.sources import kept_open, list_folder, locate
from polyclinic.data.transforms import mask_array, to_array
from polyclinic.errors import DataError
from polyclinic.study import ImageSettings, PhantomSettings, TaskSettings

THREADS = 4
Progress = Callable[[int, int], None]
Pair = tuple[NDArray[Any], NDArray[np.uint8] | None]


@dataclass(frozen=True, slots=True)
class Decoder:
    """How one case becomes arrays.

    Args:
        task: For masks.
        image: Size, channels, window.
        phantom: Settings of the made-up images, where cases are such.
    """

    task: TaskSettings
    image: ImageSettings
    phantom: PhantomSettings | None = None

    def decode(self, case: Case) -> Pair:
        """Image ``[C, *size]`` (uint8 or float32 in 0..1) and, for segmentation, class indices ``[*size]``.

        Raises:
            DataError: Names the site, the image, the row of the table and the fault.
        """
        try:
            picture, mask = self._read(case)
            image = to_array(picture, self.image, case.image)
            if self.task.kind != "segmentation":
                return image, None
            if mask is None:
                raise DataError("it has no mask; segmentation needs one for every image.")
            return image, mask_array(mask, picture.pixels.shape[1:], self.task, self.image, case.mask or "its mask")
        except DataError as error:
            row = f" ({case.where})" if case.where else ""
            raise DataError(f"site '{case.site}', image {case.image!r}{row}: {error}") from error

    def _read(self, case: Case) -> tuple[Picture, NDArray[Any] | None]:
        if case.source == PHANTOM:
            if self.phantom is None:
                raise DataError("a made-up image needs the phantom's settings; pass data.phantom to SiteData.load.")
            from polyclinic.data.phantoms import phantom_picture

            pixels, mask = phantom_picture(self.phantom, case, self.image.size)
            return Picture(pixels), mask
        picture = read_picture(case.source, case.image)
        if self.task.kind != "segmentation" or not case.mask:
            return picture, None
        return picture, read_mask(case.source, case.mask)


class _NeedsFloatError(Exception):
    """An image of more than 8 bits came after the array was laid out for 8-bit ones."""


def decode_all(
    site: str, cases: Sequence[Case], decoder: Decoder, folder: Path | None, on_progress: Progress | None = None
) -> tuple[NDArray[Any], NDArray[np.uint8] | None]:
    """Decode every case.

    Args:
        site: Names the memory-mapped files.
        cases: At least one.
        decoder: From case to arrays.
        folder: Where memory-mapped files lie; ``None``: in memory. A complete file of the same images (references,
            sizes, times) and settings is used again.
        on_progress: Called with images done and total, from the calling thread.

    Returns:
        Images ``[N, C, *size]``, uint8 if all are 8-bit, else float32 in 0..1; masks uint8 ``[N, *size]`` or ``None``.
    """
    if folder is None:
        return _filled(cases, decoder, None, on_progress)
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{site}-{_fingerprint(cases, decoder)}"
    paths = [stem.with_name(f"{stem.name}-{part}.npy") for part in ("masks", "images")]
    if decoder.task.kind != "segmentation":
        paths = paths[1:]
    if not all(path.is_file() for path in paths):
        parts = {path.stem.rpartition("-")[2]: path.with_name(f".{path.stem}-{os.getpid()}.part") for path in paths}
        try:
            _filled(cases, decoder, parts, on_progress)
            for path in paths:
                parts[path.stem.rpartition("-")[2]].replace(path)
        finally:
            for part in parts.values():
                part.unlink(missing_ok=True)
    arrays = [np.load(path, mmap_mode="c", allow_pickle=False) for path in paths]
    return arrays[-1], arrays[0] if len(arrays) == 2 else None


def _filled(
    cases: Sequence[Case], decoder: Decoder, parts: dict[str, Path] | None, on_progress: Progress | None
) -> Pair:
    with kept_open():
        try:
            return _fill(cases, decoder, parts, on_progress, None)
        except _NeedsFloatError:
            return _fill(cases, decoder, parts, on_progress, np.dtype(np.float32))


def _fill(
    cases: Sequence[Case],
    decoder: Decoder,
    parts: dict[str, Path] | None,
    on_progress: Progress | None,
    dtype: np.dtype[Any] | None,
) -> Pair:
    images: NDArray[Any] | None = None
    masks: NDArray[np.uint8] | None = None
    with _decoded(cases, decoder) as pairs:
        for done, (image, mask) in enumerate(pairs, start=1):
            if images is None:
                images = _array(parts, "images", (len(cases), *image.shape), dtype or image.dtype)
                masks = None if mask is None else _array(parts, "masks", (len(cases), *mask.shape), np.dtype(np.uint8))
            if images.dtype == np.uint8 and image.dtype != np.uint8:
                raise _NeedsFloatError
            images[done - 1] = image / np.float32(255) if images.dtype != image.dtype else image
            if masks is not None and mask is not None:
                masks[done - 1] = mask
            if on_progress is not None:
                on_progress(done, len(cases))
    if images is None:
        raise DataError("there are no images to decode.")
    for array in (images, masks):
        if isinstance(array, np.memmap):
            array.flush()
    return images, masks


@contextmanager
def _decoded(cases: Sequence[Case], decoder: Decoder) -> Iterator[Iterator[Pair]]:
    """Decoded cases in order, a few chunks ahead of the reader."""
    chunks = [cases[i : i + 16] for i in range(0, len(cases), 16)]

    def work(chunk: Sequence[Case]) -> list[Pair]:
        return [decoder.decode(case) for case in chunk]

    def stream() -> Iterator[Pair]:
        waiting = iter(chunks)
        running = [pool.submit(work, chunk) for chunk in islice(waiting, 2 * THREADS)]
        while running:
            done = running.pop(0).result()
            running += [pool.submit(work, chunk) for chunk in islice(waiting, 1)]
            yield from done

    pool = ThreadPoolExecutor(THREADS)
    try:
        yield stream()
    finally:
        pool.shutdown(cancel_futures=True)


def _array(parts: dict[str, Path] | None, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    if parts is None:
        return np.empty(shape, dtype)
    path = parts[name]
    try:
        mapped: NDArray[Any] = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        if hasattr(
            os, "posix_fallocate"
        ):  # a full disk is an error here, a crash of the process when pages are written
            with path.open("r+b") as stream:
                os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)
    except OSError as error:
        size = math.prod(shape) * dtype.itemsize / 2**30
        raise DataError(
            f"{path.parent}: no room for {size:.2f} GiB of decoded images ({error.strerror}). Free some, or set "
            "data.image.cache_folder to another disk."
        ) from error
    return mapped


def _fingerprint(cases: Sequence[Case], decoder: Decoder) -> str:
    """Hash of all that the decoded arrays depend on."""
    wanted = decoder.image.model_dump(include={"size", "channels", "fit", "window"})
    wanted["masks"] = len(decoder.task.classes) if decoder.task.kind == "segmentation" else 0
    if decoder.phantom is not None:
        wanted["phantom"] = decoder.phantom.model_dump()
    digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode())
    stamps: dict[Path, list[int]] = {}
    for case in cases:
        drawn = f"\0{case.label}\0{case.device}" if case.source == PHANTOM else ""
        digest.update(f"\0{case.source}\0{case.image}\0{case.mask}{drawn}".encode())
        for reference in (case.image, case.mask):
            if reference and case.source != PHANTOM:
                digest.update(repr(_stamps(case.source, reference, stamps)).encode())
    return digest.hexdigest()[:20]


def _stamps(source: str, reference: str, known: dict[Path, list[int]]) -> list[list[int]]:
    place = locate(source, reference)
    files = [place.path] if place.member else [p.path for p in list_folder(place)] or [place.path]
    for path in files:
        if path not in known:
            status = path.stat() if path.is_file() else None
            known[path] = [status.st_size, status.st_mtime_ns] if status else []
    return [known[path] for path in files]
