"""The manifest of a set of public images: classes, labels and the SHA-256 of every image, in JSON.

The manifest travels, the images do not: each party gets them itself and compares every one with its hash. ``digest`` is
the SHA-256 of all that the manifest says of the images, so that parties agree on the whole by one line.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyclinic.data.names import check_reference
from polyclinic.data.readers import PILLOW
from polyclinic.data.sources import kept_open, locate, read_bytes
from polyclinic.data.tables import load_table
from polyclinic.errors import DataError
from polyclinic.files import whole_file
from polyclinic.seeds import generator

FORMAT = "polyclinic-proxies-1"


@dataclass(frozen=True, slots=True)
class ProxyImage:
    """One public image: its path inside the folder or zip, its class, its SHA-256 in hexadecimal."""

    path: str
    label: str
    sha256: str


@dataclass(frozen=True)
class ProxyManifest:
    """What all parties must have alike."""

    name: str
    classes: tuple[str, ...]
    images: tuple[ProxyImage, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of name, classes, and path, label and hash of every image in order, hexadecimal."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()

    def _content(self) -> dict[str, Any]:
        images = [{"path": one.path, "label": one.label, "sha256": one.sha256} for one in self.images]
        return {"name": self.name, "classes": list(self.classes), "images": images}

    def save(self, path: Path) -> None:
        """Write the JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {"format": FORMAT, "digest": self.digest, **self._content()}
        with whole_file(path) as file:
            file.write((json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> ProxyManifest:
        """Read the JSON and check it as a whole; images are not looked at.

        Raises:
            DataError: No such file, not in our form, altered, or classes and labels that do not go together.
        """
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw.get("format") != FORMAT:
                raise ValueError(f"its format is {raw.get('format')!r}, not {FORMAT!r}")
            images = tuple(ProxyImage(str(i["path"]), str(i["label"]), str(i["sha256"])) for i in raw["images"])
            found = cls(str(raw["name"]), tuple(map(str, raw["classes"])), images)
            digest = str(raw["digest"])
        except FileNotFoundError:
            raise DataError(
                f"proxies.manifest: {path.name} does not exist. Put it where the study says, set data.root "
                "(POLYCLINIC_DATA), or make it with polyclinic data proxies."
            ) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise DataError(
                f"proxies.manifest: {path.name} is no manifest of public images ({reason}). Make it with polyclinic "
                "data proxies."
            ) from error
        if found.digest != digest:
            raise DataError(
                f"proxies.manifest: {path.name} was altered: its digest says {digest[:12]}..., its content is "
                f"{found.digest[:12]}.... Get it again from whoever made it."
            )
        found.check(path.name)
        return found

    def check(self, name: str) -> None:
        """Refuse classes and labels that do not go together.

        Raises:
            DataError: A class twice, a label that is no class, a path twice, or a class with fewer than two images.
        """
        if len(set(self.classes)) < len(self.classes):
            raise DataError(f"proxies: {name} lists a class twice. Its classes: {', '.join(self.classes)}.")
        counts = Counter(one.label for one in self.images)
        paths = Counter(one.path for one in self.images)
        for one in self.images:
            check_reference(one.path, f"proxies, {name}")
            if one.label not in self.classes:
                raise DataError(
                    f"proxies: image {one.path!r} of {name} has label {one.label!r}, which is not among its classes "
                    f"{', '.join(self.classes)}. Correct the table and make the manifest again."
                )
            if paths[one.path] > 1:
                raise DataError(f"proxies: image {one.path!r} stands {paths[one.path]} times in {name}.")
        few = [known for known in self.classes if counts[known] < 2]
        if few or not self.classes:
            raise DataError(
                f"proxies: class {few[0] if few else '(none)'!r} of {name} has fewer than two images; each class needs "
                "one to train with and one to judge by. Add images, or leave the class out."
            )


def make_manifest(
    images: Path,
    out: Path,
    *,
    name: str = "",
    labels: Path | None = None,
    columns: tuple[str, str] = ("image", "label"),
    classes: Sequence[str] = (),
    per_class: int | None = None,
    seed: int = 0,
) -> ProxyManifest:
    """Hash images and write their manifest.

    Args:
        images: A folder or a zip; without ``labels`` with one folder for each class.
        out: The JSON.
        name: Of the set; empty: that of the folder or zip.
        labels: CSV or Parquet with a path and a class for every image.
        columns: Its columns for path and class.
        classes: The classes to keep, in order; empty: all, in alphabetical order.
        per_class: At most so many images of each class, drawn with ``seed``; None: all.
        seed: Of that draw.

    Returns:
        What was written.

    Raises:
        DataError: No images, an image that is missing, or classes that do not go together.
    """
    labelled = _from_folders(images) if labels is None else _from_table(labels, columns)
    known = list(classes) or sorted(set(labelled.values()))
    chosen = []
    for label in known:
        own = sorted(path for path, found in labelled.items() if found == label)
        if per_class is not None and len(own) > per_class:
            drawn = generator(seed, "proxies", label).choice(len(own), size=per_class, replace=False)
            own = [own[i] for i in sorted(drawn)]
        chosen += [(path, label) for path in own]
    if not chosen:
        raise DataError(f"{images} has no images of {', '.join(known) or 'any class'}.")
    with kept_open():
        hashed = [ProxyImage(path, label, sha256_of(str(images.absolute()), path)) for path, label in chosen]
    found = ProxyManifest(name or images.stem, tuple(known), tuple(hashed))
    found.check(out.name)
    found.save(out)
    return found


def sha256_of(source: str, path: str) -> str:
    """SHA-256 of an image's file in a folder or zip.

    Raises:
        DataError: It cannot be read.
    """
    return hashlib.sha256(read_bytes(locate(source, path))).hexdigest()


def _from_table(table: Path, columns: tuple[str, str]) -> Mapping[str, str]:
    rows = load_table(table)
    path = rows.column(columns[0], "path of the image")
    label = rows.column(columns[1], "its class")
    return {row[path]: row[label] for _, row in rows.rows}


def _from_folders(images: Path) -> Mapping[str, str]:
    """Every image with the folder that it lies in."""
    if images.is_dir():
        paths = [p.relative_to(images).as_posix() for p in images.rglob("*") if p.is_file()]
    elif images.is_file() and zipfile.is_zipfile(images):
        with zipfile.ZipFile(images) as packed:
            paths = [info.filename for info in packed.infolist() if not info.is_dir()]
    else:
        raise DataError(f"{images} is neither a folder nor a zip of images.")
    paths = [path for path in paths if path.lower().endswith(PILLOW)]
    loose = [path for path in paths if "/" not in path]
    if not paths or loose:
        what = f"{loose[0]!r} lies in none" if loose else "there are no images"
        raise DataError(
            f"{images}: without a table of labels each class has a folder of its own, but {what}. Give --labels."
        )
    return {path: path.split("/")[-2] for path in paths}
