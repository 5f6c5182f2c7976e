"""Made-up hospitals that contribute to one small base: keys, vectors, statements, folders; and a dishonest one."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tiny import TINY, changed
from torch import Tensor

from polyclinic.secure.identity import Identity, Roster
from polyclinic.study import Study, validate_study
from polyclinic.vectors.base import Base, publish_base
from polyclinic.vectors.contribution import Contribution, write_contribution
from polyclinic.vectors.folders import canonical_json
from polyclinic.vectors.kinds import form
from polyclinic.vectors.ledger import Ledger
from polyclinic.vectors.manifest import Data, Statement, Training
from polyclinic.vectors.sources import Kind

CLASSES = ("normal", "pneumonia", "covid")
SITES = ("north", "south", "west")


def small_study(classes: Sequence[str] = CLASSES, **sections: Any) -> Study:
    """A study with a network of a few hundred weights; ``sections`` are changed."""
    raw = changed(TINY, {"task": {"classes": list(classes)}, "data": {"image": {"size": [16, 16]}}})
    raw = changed(raw, {"model": {"name": "small-cnn", "width": 2}})
    return validate_study(changed(raw, sections))


def small_base(folder: Path, classes: Sequence[str] = CLASSES, **sections: Any) -> Base:
    """That network, published."""
    return publish_base(small_study(classes, **sections), None, folder, version="1")


def identity(site: str) -> Identity:
    """A site's key, always the same one: for tests only."""
    return Identity(site, Ed25519PrivateKey.from_private_bytes(hashlib.sha256(site.encode()).digest()))


def roster(sites: Sequence[str] = SITES) -> Roster:
    """The keys of these sites."""
    return Roster({site: identity(site).public for site in sites})


def vector(base: Base, seed: int = 0, scale: float = 0.01) -> dict[str, Tensor]:
    """Normal numbers for every weight, float32."""
    draw = torch.Generator().manual_seed(seed)
    return {spec.name: scale * torch.randn(spec.shape, generator=draw) for spec in base.outline.weights}


def all_kinds(base: Base, seed: int = 0) -> dict[Kind, dict[str, Tensor]]:
    """One of everything that a contribution may bring, each consistent with itself."""
    draw = torch.Generator().manual_seed(seed)
    inputs = {name: shape[0] for name, shape in form("gram", base.outline).shapes.items()}
    gram = {}
    for name, size in inputs.items():
        features = torch.randn(8, size, generator=draw)
        gram[name] = features.T @ features
    statistics = {
        name: torch.rand(shape, generator=draw) + 0.5 for name, shape in form("statistics", base.outline).shapes.items()
    }
    return {
        "vector": vector(base, seed),
        "fisher": {name: tensor.square() for name, tensor in vector(base, seed + 1).items()},
        "gram": gram,
        "statistics": statistics,
        "head": head_sums(base, draw),
    }


def head_sums(base: Base, draw: torch.Generator, images: int = 6) -> dict[str, Tensor]:
    """Sums over made-up features of so many images of each class."""
    inputs = form("head", base.outline).shapes["first"][1]
    features = torch.randn(len(base.classes), images, inputs, dtype=torch.float64, generator=draw)
    features[..., -1] = 1
    second = torch.einsum("cni,cnj->cij", features, features)
    return {"count": features[..., -1].sum(1), "first": features.sum(1), "second": second}


def statement(sequence: int = 1, *, replaces: Sequence[str] = (), **data: Any) -> Statement:
    """What a site says; ``data`` are fields of ``Data``."""
    stated = {"images": 100, "classes_held": list(CLASSES), "patient_split": True, **data}
    training = Training(optimizer="sgd", lr=0.05, epochs=1, batch_size=8, seed=0)
    return Statement(
        sequence=sequence,
        created="2026-01-31T12:00:00Z",
        training=training,
        data=Data(**stated),
        replaces=list(replaces),
    )


def contribute(
    out: Path,
    base: Base,
    site: str = "north",
    sequence: int = 1,
    *,
    replaces: Sequence[str] = (),
    tensors: Mapping[Kind, Mapping[str, Tensor]] | None = None,
    seed: int | None = None,
) -> Contribution:
    """A site's contribution; by default a vector drawn from its name and sequence."""
    if tensors is None:
        tensors = {"vector": vector(base, sum(map(ord, site)) + 1000 * sequence if seed is None else seed)}
    held = [name for name in CLASSES if name in base.classes] or list(base.classes)
    stated = statement(sequence, replaces=replaces, classes_held=held)
    return write_contribution(out, base, tensors, stated, identity(site))


def ledger_with(folder: Path, base: Base, sites: Sequence[str] = ()) -> Ledger:
    """A ledger of ``coordinator`` with all of ``SITES`` on the roster, and contributions of these already in."""
    ledger = Ledger.create(folder, base.folder, identity("coordinator"), roster())
    for site in sites:
        contribute(folder.parent / f"from-{site}", base, site)
        ledger.add(folder.parent / f"from-{site}", identity("coordinator"))
    return ledger


def forge(folder: Path, site: str = "north", edit: Callable[[dict[str, Any]], None] = lambda manifest: None) -> None:
    """What a dishonest site does: change the manifest, let it fit the files as they are, and sign it again."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    for file in manifest["files"]:
        if (folder / file["name"]).is_file():
            content = (folder / file["name"]).read_bytes()
            file.update(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    edit(manifest)
    sign(folder, canonical_json(manifest), site)


def sign(folder: Path, content: bytes, site: str, /, **fields: str) -> None:
    """Write these bytes as a manifest and sign them; ``fields`` replace those of the signature's file."""
    key = identity(site)
    signature = key.sign(b"polyclinic contribution 1\0" + content)
    own = {
        "algorithm": "Ed25519",
        "site": site,
        "key": base64.b64encode(key.public).decode(),
        "signature": base64.b64encode(signature).decode(),
        **fields,
    }
    (folder / "manifest.json").write_bytes(content)
    (folder / "signature.json").write_bytes(json.dumps(own, sort_keys=True, separators=(",", ":")).encode())


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content, and every folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"folder"
        for path in sorted(folder.rglob("*"))
    }
