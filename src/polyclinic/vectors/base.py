"""A published base: the network, its values and its classes, which every contribution starts from.

A folder of two files. ``base.json`` says what the network is, how an image becomes its input and what its outputs
mean; ``base.safetensors`` holds the values, the initialised head among them, so that all sites' heads have one start.
The digest binds both: whoever names it means these values, this preprocessing and this order of classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from polyclinic.errors import ContributionError, nearest
from polyclinic.models.registry import build_model, start_model
from polyclinic.models.weights import load_tensors, shared_tensors
from polyclinic.settings import Settings
from polyclinic.study import Study
from polyclinic.vectors.base_spec import AT_HOME, LARGEST_SPEC, SCHEMA, SPEC_FILE, WEIGHTS_FILE, BaseSpec, TensorEntry
from polyclinic.vectors.folders import (
    canonical_json,
    now,
    plain_names,
    read_small,
    validated,
    whole_folder,
    write_whole,
)
from polyclinic.vectors.sources import InMemoryTensors, Outline, Spec, Tensors
from polyclinic.vectors.tensor_file import DTYPE_NAMES, DTYPES, TensorFile, TensorWriter, header_room, tensor_bytes

__all__ = [
    "LARGEST_SPEC",
    "SPEC_FILE",
    "WEIGHTS_FILE",
    "Base",
    "BaseSpec",
    "check_finite",
    "check_variance",
    "publish_base",
    "weights_digest",
]


@dataclass(frozen=True)
class Base:
    """A base in its folder; ``read`` makes it a ``sources.Tensors``."""

    folder: Path
    spec: BaseSpec
    digest: str
    _file: TensorFile = field(repr=False, compare=False)

    @classmethod
    def load(cls, folder: Path) -> Base:
        """Open a base and check all of it: the two files and no other, digest, shapes, values.

        Raises:
            ContributionError: Names what is wrong.
        """
        names = plain_names(folder, (SPEC_FILE, WEIGHTS_FILE))
        if missing := sorted({SPEC_FILE, WEIGHTS_FILE} - names):
            raise ContributionError(f"{folder} lacks {missing[0]}: it is no base. polyclinic vectors base makes one.")
        spec = validated(BaseSpec, read_small(folder / SPEC_FILE, LARGEST_SPEC), str(folder / SPEC_FILE))
        sizes = sum(_count(entry) * DTYPES[entry.dtype].itemsize for entry in spec.tensors)
        room = header_room(len(spec.tensors))
        file = TensorFile(folder / WEIGHTS_FILE, max_bytes=sizes + room + 8, max_header=room)
        base = cls(folder, spec, spec.digest, file)
        base.verify()
        return base

    def verify(self) -> None:
        """Read the values once, one tensor in memory at a time.

        Raises:
            ContributionError: A tensor is missing, extra, of another shape or type, not finite, a variance is not
                positive, or the values are others than the digest says.
        """
        with self._file as file:
            wanted = {entry.name: (DTYPES[entry.dtype], tuple(entry.shape)) for entry in self.spec.tensors}
            found = {name: (spec.dtype, spec.shape) for name, spec in file.specs.items()}
            if found != wanted:
                odd = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
                raise ContributionError(f"{file.path}: tensor {odd[0]!r} is not as {SPEC_FILE} says ({len(odd)} such).")
            if weights_digest(self, file.specs, str(file.path)) != self.spec.weights_sha256:
                raise ContributionError(
                    f"{file.path}: the values are not those of {SPEC_FILE}: one of both was altered."
                )

    @cached_property
    def outline(self) -> Outline:
        """The network without its values."""
        entries = self.spec.tensors
        specs = tuple(Spec(e.name, tuple(e.shape), DTYPES[e.dtype], e.statistic) for e in entries)
        return Outline(specs, self.spec.head, self.classes)

    @property
    def classes(self) -> tuple[str, ...]:
        """In the order of the outputs."""
        return tuple(self.spec.task.classes)

    def read(self, name: str) -> Tensor:
        """One tensor as published, in memory of its own."""
        return self._file.read(name)

    def tensors(self) -> dict[str, Tensor]:
        """All values, running statistics among them, in the order of ``state_dict``."""
        with self._file:
            return {spec.name: self.read(spec.name) for spec in self.outline.specs}

    def study_parts(self) -> dict[str, Any]:
        """``task``, ``image`` (of ``data``) and ``model`` as a study file has them."""
        return self.spec.model_dump(mode="json", include={"task", "image", "model"})

    def network(self, tensors: Mapping[str, Tensor] | None = None, *, patch: Sequence[int] | None = None) -> nn.Module:
        """The network with the base's values, or others that fit, in training mode on the CPU.

        Args:
            tensors: Values by name, instead of the base's; those that are not named are the base's.
            patch: ``training.patch`` of the study, where there is one.

        Raises:
            ContributionError: This version builds another network from the same settings, or a value does not fit.
            StudyError: The network can't be built here.
        """
        spec = self.spec
        model = build_model(spec.model, spec.task, spec.image, 0, patch=patch)
        if Outline.of(model, self.classes) != self.outline:
            raise ContributionError(
                f"{self.folder}: model {spec.model.name!r} has other tensors here than when the base was published. "
                "Use the version of Polyclinic, and of your own network, that it was published with."
            )
        fitting = _fitted(self.outline, tensors or {}, "the given tensors", whole=False)
        load_tensors(model, {**self.tensors(), **fitting})
        return model

    def site_study(self, study: Study) -> Study:
        """A site's study as it trains from this base: checked, and without ``model.weights``, which the base replaces.

        Network, preprocessing and kind of task must be the base's. The classes may be fewer or in another order; they
        are matched by name. For segmentation they must be the base's own list.

        Raises:
            ContributionError: Names the field and both values.
        """
        pairs = {
            **_pairs("model", self.spec.model, study.model, {"weights"}),
            **_pairs("data.image", self.spec.image, study.data.image, set(AT_HOME)),
            "task.kind": (self.spec.task.kind, study.task.kind),
        }
        for place, (wanted, seen) in pairs.items():
            if wanted != seen:
                raise ContributionError(
                    f"study {study.name!r}: {place} is {seen!r}; the base {self.spec.id!r} has {wanted!r}. A "
                    "contribution must be trained as its base was published."
                )
        self._rows(study.task.classes)
        return study.model_copy(update={"model": study.model.model_copy(update={"weights": ""})})

    def start_tensors(self, classes: Sequence[str]) -> dict[str, Tensor]:
        """The base's values for a site with this list of classes: rows of the head in its order.

        Raises:
            ContributionError: A class is unknown to the base, or twice in the list.
        """
        rows = self._rows(classes)
        found = self.tensors()
        return {name: t[rows].clone() if self.outline.has_classes(name) else t for name, t in found.items()}

    def site_vector(self, tensors: Mapping[str, Tensor], classes: Sequence[str]) -> dict[str, Tensor]:
        """What training changed: float32, the site's value minus the base's, for every weight, in the base's order.

        Rows of the head for classes that are not in the site's list are zero.

        Args:
            tensors: The trained weights by name, head rows in the site's order; running statistics are left out.
            classes: The site's list.

        Raises:
            ContributionError: A tensor is missing, of another shape, or not finite.
        """
        rows = self._rows(classes)
        found = {}
        for spec in self.outline.weights:
            start = self.read(spec.name).float()
            if spec.name not in tensors:
                raise ContributionError(f"the trained network has no tensor {spec.name!r}, which the base has.")
            trained = tensors[spec.name].detach().cpu().float()
            own = start[rows] if self.outline.has_classes(spec.name) else start
            if trained.shape != own.shape:
                raise ContributionError(
                    f"the trained network's tensor {spec.name!r} has shape {tuple(trained.shape)}; {tuple(own.shape)} "
                    "is right."
                )
            change = trained - own
            check_finite(change, f"the trained network's tensor {spec.name!r}")
            if self.outline.has_classes(spec.name):
                change = torch.zeros_like(start).index_copy_(0, torch.tensor(rows), change)
            found[spec.name] = change
        return found

    def _rows(self, classes: Sequence[str]) -> list[int]:
        """For each class of a site's list, its place in the base's."""
        if unknown := [name for name in classes if name not in self.classes]:
            raise ContributionError(
                f"class {unknown[0]!r} is unknown to the base {self.spec.id!r}, which has {', '.join(self.classes)}. "
                f"{nearest(unknown[0], self.classes)} Classes are matched by name."
            )
        if len(set(classes)) < len(classes) or not classes:
            raise ContributionError("a site's list of classes must name each class once, and one at least.")
        if self.spec.task.kind == "segmentation" and tuple(classes) != self.classes:
            raise ContributionError(
                f"for segmentation a site must have the base's own list of classes: {', '.join(self.classes)}; got "
                f"{', '.join(classes)}."
            )
        return [self.classes.index(name) for name in classes]


def publish_base(
    study: Study,
    tensors: Mapping[str, Tensor] | None,
    out: Path,
    *,
    version: str,
    lineage: Sequence[str] = (),
) -> Base:
    """Write a base: the study's network, with its start weights or these.

    Args:
        study: Its name becomes the base's; task, image and network are published with it.
        tensors: Every weight by name, of a merged model or a run's ``models/global.safetensors``; running statistics
            and counters may be missing. None: the start weights, which ``model.weights`` and the seed decide.
        out: A new folder, written whole or not at all.
        version: Free text.
        lineage: Digests of the bases (and of the recipe) that the tensors came from.

    Raises:
        ContributionError: The folder exists, or a tensor does not fit, is not finite, or is no positive variance.
        StudyError: The study's network can't be built.
    """
    model = start_model(study)
    outline = Outline.of(model, study.task.classes)
    values = shared_tensors(model, [spec.name for spec in outline.specs])
    if tensors is not None:
        values = {**values, **_fitted(outline, tensors, "the given tensors", whole=True)}
    entries = [
        TensorEntry(name=s.name, dtype=_code(s.dtype), shape=list(s.shape), statistic=s.statistic)
        for s in outline.specs
    ]
    found = InMemoryTensors(values)
    spec = BaseSpec(
        schema=SCHEMA,
        id=study.name,
        version=version,
        created=now(),
        task=study.task,
        image=study.data.image,
        model=study.model,
        head=outline.head,
        tensors=entries,
        weights_sha256=weights_digest(found, {s.name: s for s in outline.specs}, "the network"),
        lineage=list(lineage),
    )
    ordered = sorted(outline.specs, key=lambda s: (-s.dtype.itemsize, s.name))
    with whole_folder(out) as staged:
        with TensorWriter(staged / WEIGHTS_FILE, [(s.name, s.dtype, s.shape) for s in ordered]) as writer:
            for entry in ordered:
                writer.write(entry.name, values[entry.name])
        write_whole(staged / SPEC_FILE, spec.model_dump_json(by_alias=True, indent=1).encode() + b"\n")
    return Base.load(out)


def check_finite(tensor: Tensor, where: str) -> None:
    """Refuse a NaN or an infinite value; one pass, no copy.

    Raises:
        ContributionError: Names the tensor.
    """
    if tensor.numel() and not all(torch.isfinite(end) for end in torch.aminmax(tensor)):
        raise ContributionError(f"{where} holds NaN or infinite values.")


def check_variance(tensor: Tensor, name: str, where: str) -> None:
    """Refuse a running variance that is not positive.

    Raises:
        ContributionError: Names the tensor and the smallest value.
    """
    if name.endswith("running_var") and tensor.numel() and (least := float(tensor.min())) <= 0:
        raise ContributionError(f"{where} holds the variance {least:g}; variances must be positive.")


def weights_digest(source: Tensors, names: Iterable[str], where: str) -> str:
    """The canonical digest; checks each value on the way, as it is in memory anyway."""
    found = hashlib.sha256(b"polyclinic weights 1\0")
    for name in sorted(names):
        tensor = source.read(name)
        check_finite(tensor, f"{where}: tensor {name!r}")
        check_variance(tensor, name, f"{where}: tensor {name!r}")
        head = canonical_json([name, DTYPE_NAMES[tensor.dtype], list(tensor.shape)])
        found.update(len(head).to_bytes(8, "little") + head)
        found.update(tensor_bytes(tensor))
    return found.hexdigest()


def _fitted(outline: Outline, tensors: Mapping[str, Tensor], where: str, *, whole: bool) -> dict[str, Tensor]:
    """The tensors in the outline's types; counters are left out."""
    specs = {spec.name: spec for spec in outline.specs}
    given = {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
    if unknown := [name for name in given if name not in specs]:
        raise ContributionError(f"{where}: the network has no tensor {unknown[0]!r}.")
    if missing := [spec.name for spec in outline.weights if whole and spec.name not in given]:
        raise ContributionError(f"{where}: tensor {missing[0]!r} is missing ({len(missing)} such).")
    for name, tensor in given.items():
        if tuple(tensor.shape) != specs[name].shape:
            raise ContributionError(
                f"{where}: tensor {name!r} has shape {tuple(tensor.shape)}; the network has {specs[name].shape}."
            )
    return {name: tensor.detach().cpu().to(specs[name].dtype) for name, tensor in given.items()}


def _pairs(section: str, wanted: Settings, seen: Settings, but: set[str]) -> dict[str, tuple[Any, Any]]:
    ours, theirs = wanted.model_dump(mode="json", exclude=but), seen.model_dump(mode="json", exclude=but)
    return {f"{section}.{name}": (ours[name], theirs[name]) for name in ours}


def _code(dtype: torch.dtype) -> Literal["F64", "F32", "F16", "BF16"]:
    if dtype not in DTYPE_NAMES:
        raise ContributionError(
            f"the network has tensors of {dtype}; a base holds float64, float32, float16 or bfloat16."
        )
    return DTYPE_NAMES[dtype]  # type: ignore[return-value]


def _count(entry: TensorEntry) -> int:
    count = 1
    for size in entry.shape:
        count *= max(size, 0)
    return count
