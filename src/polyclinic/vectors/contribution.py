"""One contribution: a folder with a manifest, a detached signature and files of tensors; written, read, refused.

Everything is checked before anything is used, the cheap things first: names in the folder, the manifest, the signature,
the base; then each file's size, digest, header and, one tensor at a time, its values. A signature says who sent it,
never whether it is good: that is for the admission report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyclinic.data.names import check_site_name
from polyclinic.errors import ContributionError, DataError, ProtocolError, SiteError
from polyclinic.secure.identity import Identity, Roster, fingerprint
from polyclinic.secure.key_files import from_base64, to_base64
from polyclinic.vectors.base import Base
from polyclinic.vectors.folders import canonical_json, parse_json, plain_names, read_small, whole_folder, write_whole
from polyclinic.vectors.kinds import KINDS, check_values, form
from polyclinic.vectors.manifest import (
    FILES,
    LARGEST,
    SCHEMA,
    BaseReference,
    File,
    Manifest,
    Statement,
    Statistics,
    canonical,
    digest,
    parse_manifest,
)
from polyclinic.vectors.sources import Kind, Make
from polyclinic.vectors.tensor_file import TensorFile, TensorWriter, altered, header_room

MANIFEST_FILE, SIGNATURE_FILE = "manifest.json", "signature.json"
ALLOWED = (MANIFEST_FILE, SIGNATURE_FILE, *FILES)
ALGORITHM = "Ed25519"
_SIGNED = b"polyclinic contribution 1\0"
_LARGEST_SIGNATURE = 2**12


@dataclass(frozen=True)
class Contribution:
    """A checked contribution whose tensors are read when asked for; a ``sources.Source``.

    Attributes:
        folder: Where it lies.
        manifest: What the site states.
        digest: SHA-256 of the manifest, hexadecimal.
        key: The public key that signed it.
    """

    folder: Path
    manifest: Manifest
    digest: str
    key: bytes = field(repr=False)
    _files: Mapping[Kind, TensorFile] = field(repr=False, compare=False)

    @classmethod
    def load(cls, folder: Path, base: Base, roster: Roster, *, contents: bool = True) -> Contribution:
        """Check a contribution and open it.

        Args:
            folder: With ``manifest.json``, ``signature.json`` and the files that the manifest names, nothing else.
            base: What it must start from.
            roster: Whose signatures count.
            contents: Also read all tensors: digests of the files, and every value. Without it, headers only.

        Raises:
            ContributionError: The reason, and the file.
        """
        names = plain_names(folder, ALLOWED)
        manifest, key = read_statement(folder, roster)
        check_base(manifest, base, str(folder / MANIFEST_FILE))
        if names - {MANIFEST_FILE, SIGNATURE_FILE} != {file.name for file in manifest.files}:
            odd = sorted((names - {MANIFEST_FILE, SIGNATURE_FILE}) ^ {file.name for file in manifest.files})
            state = "is not in the manifest" if odd[0] in names else "is missing"
            raise ContributionError(f"{folder / odd[0]} {state}.")
        files = {_kind(file): _checked_file(folder, file, base, contents) for file in manifest.files}
        return cls(folder, manifest, digest(manifest), key, files)

    @property
    def site(self) -> str:
        """Who sent it."""
        return self.manifest.site

    @property
    def images(self) -> int:
        """Training images behind it, as stated, rounded."""
        return self.manifest.data.images

    @property
    def held(self) -> tuple[bool, ...]:
        """For each class of the base, whether the site had training images of it."""
        return tuple(name in self.manifest.data.classes_held for name in self.manifest.classes)

    @property
    def nbytes(self) -> int:
        """Of all its files of tensors."""
        return sum(file.bytes for file in self.manifest.files)

    def names(self, kind: Kind) -> frozenset[str]:
        """Names of the tensors of one kind; empty where it brought none."""
        return frozenset(self._files[kind].specs) if kind in self._files else frozenset()

    def read(self, kind: Kind, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        return self._file(kind).read(name)

    def read_into(self, kind: Kind, name: str, make: Make) -> Tensor:
        """One tensor, in memory that ``make`` gives."""
        spec = self._file(kind).spec(name)
        return self._file(kind).read_into(name, make(spec.shape, spec.dtype))

    def _file(self, kind: Kind) -> TensorFile:
        if kind not in self._files:
            raise ContributionError(f"{self.folder}: site {self.site!r} sent no {kind}.")
        return self._files[kind]

    def verify_files(self) -> None:
        """Hash every file again.

        Raises:
            ContributionError: One was altered.
        """
        for file in self.manifest.files:
            found = self._files[_kind(file)]
            if found.sha256() != file.sha256:
                raise altered(found.path)


def write_contribution(
    out: Path,
    base: Base,
    tensors: Mapping[Kind, Mapping[str, Tensor]],
    statement: Statement,
    identity: Identity,
    *,
    precision: torch.dtype = torch.float32,
) -> Contribution:
    """Write and sign a contribution, whole or not at all.

    Args:
        out: A new folder.
        base: What the vector starts from.
        tensors: By kind; ``vector`` as ``base.site_vector`` gives it. One kind at least.
        statement: What the site says.
        identity: Who signs.
        precision: Of the vector: float32, or bfloat16 for half the size.

    Raises:
        ContributionError: The folder exists, or a tensor or a statement would be refused by the receiver.
    """
    if precision not in (torch.float32, torch.bfloat16):
        raise ContributionError(f"a vector is float32 or bfloat16, not {precision}.")
    if not tensors:
        raise ContributionError("a contribution must bring one kind of tensors at least.")
    with whole_folder(out) as staged:
        files = [_write_file(staged, base, kind, tensors[kind], precision) for kind in KINDS if kind in tensors]
        manifest = _manifest(base, statement, identity.site, sorted(files, key=lambda file: file.name))
        content = canonical(manifest)
        if len(content) > LARGEST:
            raise ContributionError(f"the manifest has {len(content)} bytes; at most {LARGEST} are read.")
        write_whole(staged / MANIFEST_FILE, content)
        write_whole(staged / SIGNATURE_FILE, _signature(content, identity))
        own = Roster({identity.site: identity.public})
        Contribution.load(staged, base, own, contents=False)
    return Contribution.load(out, base, own, contents=False)


def read_statement(folder: Path, roster: Roster) -> tuple[Manifest, bytes]:
    """The manifest and the key that signed it; the tensors may be gone.

    Raises:
        ContributionError: The manifest is malformed, or not signed by a site of the roster.
    """
    content = read_small(folder / MANIFEST_FILE, LARGEST)
    manifest = parse_manifest(content, str(folder / MANIFEST_FILE))
    return manifest, _check_signature(folder / SIGNATURE_FILE, manifest, content, roster)


def check_base(manifest: Manifest, base: Base, where: str) -> None:
    """Whether a manifest is about this base.

    Raises:
        ContributionError: Another base, other classes, another order of them, or other preprocessing.
    """
    if manifest.base.sha256 != base.digest:
        raise ContributionError(
            f"{where}: it starts from another base: {manifest.base.id!r} {manifest.base.version!r} "
            f"({manifest.base.sha256[:12]}); this one is {base.spec.id!r} {base.spec.version!r} ({base.digest[:12]}). "
            "The site must train again from this base."
        )
    if tuple(manifest.classes) != base.classes:
        state = "in another order" if sorted(manifest.classes) == sorted(base.classes) else "others"
        raise ContributionError(
            f"{where}: its classes are {state}: {', '.join(manifest.classes)[:200]}; "
            f"the base has {', '.join(base.classes)[:200]}. polyclinic vectors create puts them into the base's order."
        )
    if manifest.preprocessing != base.spec.preprocessing:
        raise ContributionError(f"{where}: its images were prepared in another way than data.image of the base says.")


def _check_signature(path: Path, manifest: Manifest, content: bytes, roster: Roster) -> bytes:
    raw = read_small(path, _LARGEST_SIGNATURE)
    found = parse_json(raw, str(path))
    fields = {"algorithm", "site", "key", "signature"}
    if not isinstance(found, dict) or found.keys() != fields or not all(isinstance(v, str) for v in found.values()):
        raise ContributionError(f"{path} must have the texts {', '.join(sorted(fields))}, nothing else.")
    if found["algorithm"] != ALGORITHM:
        raise ContributionError(f"{path}: the algorithm is {found['algorithm'][:40]!r}; only {ALGORITHM} is read.")
    site = manifest.site
    if found["site"] != site:
        raise ContributionError(f"{path}: it is signed by {found['site'][:80]!r}, the manifest is of site {site!r}.")
    try:
        check_site_name(site, str(path))
        key, signature = from_base64(found["key"], "key"), from_base64(found["signature"], "signature")
        if site in roster.keys and key != roster.keys[site]:
            pinned = fingerprint(site, roster.keys[site])
            raise ContributionError(f"{path}: it names another key of site {site!r} than the pinned one, {pinned}.")
        roster.verify(site, _SIGNED + content, signature)
    except (SiteError, ProtocolError, DataError) as error:
        raise ContributionError(f"{path}: {error}") from None
    if raw != _signature_file(site, key, signature):
        raise ContributionError(f"{path} is not in the canonical form: it was altered after signing.")
    return key


def _signature(content: bytes, identity: Identity) -> bytes:
    return _signature_file(identity.site, identity.public, identity.sign(_SIGNED + content))


def _signature_file(site: str, key: bytes, signature: bytes) -> bytes:
    found = {"algorithm": ALGORITHM, "site": site, "key": to_base64(key), "signature": to_base64(signature)}
    return canonical_json(found)


def _kind(file: File) -> Kind:
    return next(kind for kind in KINDS if file.name == f"{kind}.safetensors")


def _checked_file(folder: Path, file: File, base: Base, contents: bool) -> TensorFile:
    kind, path = _kind(file), folder / file.name
    wanted = form(kind, base.outline, base.spec.task.kind)
    room = header_room(len(wanted.shapes))
    most = 8 + room + wanted.most_bytes
    if (seen := path.lstat().st_size) > most:
        raise ContributionError(f"{path} has {seen} bytes; at most {most} can be right for this base.")
    if seen != file.bytes:
        raise ContributionError(
            f"{path} has {seen} bytes, the manifest says {file.bytes}: it was altered or cut short."
        )
    found = TensorFile(path, max_bytes=most, max_header=room, sha256=file.sha256 if contents else None)
    wanted.check({name: (spec.dtype, spec.shape) for name, spec in found.specs.items()}, str(path))
    if contents:
        with found:
            check_values(kind, list(found.specs), found.read, str(path))
    return found


def _write_file(staged: Path, base: Base, kind: Kind, tensors: Mapping[str, Tensor], precision: torch.dtype) -> File:
    path, wanted = staged / f"{kind}.safetensors", form(kind, base.outline, base.spec.task.kind)
    dtype = precision if kind == "vector" else wanted.dtypes[0]
    names = sorted(tensors)
    wanted.check({name: (dtype, tuple(tensors[name].shape)) for name in names}, path.name)
    # Seen as they are written: a large value may be infinite in bfloat16.
    check_values(kind, names, lambda name: tensors[name].detach().cpu().to(dtype), path.name)
    with TensorWriter(path, [(name, dtype, tensors[name].shape) for name in names]) as writer:
        for name in names:
            writer.write(name, tensors[name].detach().cpu().to(dtype))
    return File(name=path.name, sha256=writer.sha256, bytes=writer.nbytes)


def _manifest(base: Base, statement: Statement, site: str, files: list[File]) -> Manifest:
    spec = base.spec
    own: dict[str, Any] = {name: getattr(statement, name) for name in Statement.model_fields}
    reference = BaseReference(id=spec.id, sha256=base.digest, model=spec.model.name, version=spec.version)
    included = any(file.name == "statistics.safetensors" for file in files)
    try:
        return Manifest(
            schema=SCHEMA,
            site=site,
            base=reference,
            classes=list(base.classes),
            preprocessing=spec.preprocessing,
            files=files,
            statistics=Statistics(included=included, policy=spec.model.norm),
            **own,
        )
    except ValueError as error:
        raise ContributionError(f"the statement can't be a manifest: {error}") from None
