"""What server and sites remember between rounds, in safetensors files that a killed run can go back to."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from polyclinic.errors import RunError
from polyclinic.federation.message import Scalar
from polyclinic.models.weights import read_tensors, save_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_KEY = re.compile(r"[a-z_]+")
_VERSION = re.compile(r"^(?P<key>[a-z_]+)\.(?P<round>\d{6})\.safetensors$")


class SiteState:
    """Named sets of tensors that a site keeps, one file per set and round.

    A site that starts a round forgets what a killed attempt at that round wrote, so a resumed run sees just what the
    killed one saw. What a set was before the last finished round is deleted.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        self.folder = folder
        self.device = device
        self.round = 0

    def begin_round(self, number: int) -> None:
        """Forget what was written in this round or later ones, and all but the newest version before it."""
        if number == self.round:
            return
        self.round = number
        newest: dict[str, int] = {}
        for key, version, path in self._files():
            if version >= number:
                path.unlink()
            else:
                newest[key] = max(version, newest.get(key, 0))
        for key, version, path in self._files():
            if version < newest[key]:
                path.unlink()

    def save(self, key: str, tensors: Mapping[str, Tensor], **scalars: Scalar) -> None:
        """Keep a set of tensors and scalars under ``key``, in lower-case letters and underscores.

        Raises:
            ValueError: Another key. RunError: The file cannot be written.
        """
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no key of a site's state: use lower-case letters and underscores.")
        self.folder.mkdir(parents=True, exist_ok=True)
        save_tensors(self._path(key, self.round), tensors, {"scalars": json.dumps(scalars)})

    def load(self, key: str) -> tuple[dict[str, Tensor], dict[str, Scalar]] | None:
        """The newest tensors and scalars kept under ``key``, or None."""
        versions = [version for name, version, _ in self._files() if name == key]
        if not versions:
            return None
        tensors, metadata = read_tensors(self._path(key, max(versions)))
        placed = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        return placed, json.loads(metadata["scalars"])

    def saved(self, key: str) -> bool:
        """Whether a set was kept under ``key`` in this round."""
        return self._path(key, self.round).is_file()

    def promote(self, key: str, to: str) -> None:
        """Rename the set kept under ``key`` in this round.

        Raises:
            RunError: The folder cannot be written.
        """
        try:
            self._path(key, self.round).replace(self._path(to, self.round))
        except OSError as error:
            raise RunError(f"{self._path(to, self.round)}: cannot be written: {error.strerror or error}") from error

    def _path(self, key: str, version: int) -> Path:
        return self.folder / f"{key}.{version:06d}.safetensors"

    def _files(self) -> list[tuple[str, int, Path]]:
        found = []
        for path in sorted(self.folder.glob("*.safetensors")) if self.folder.is_dir() else []:
            match = _VERSION.match(path.name)
            if match:
                found.append((match["key"], int(match["round"]), path))
        return found


class ServerState:
    """What the server knows after a round: groups of tensors, scalars, and how many rounds are finished.

    Tensors are replaced, never written to, so a kept copy costs nothing until its group is replaced.
    """

    def __init__(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.groups: dict[str, dict[str, Tensor]] = {name: dict(tensors) for name, tensors in groups.items()}
        self.scalars: dict[str, Scalar] = {}
        self.finished = 0

    def rounds(self, total: int) -> Iterator[int]:
        """Numbers of the rounds that are still to do, from 1 to ``total``."""
        while self.finished < total:
            yield self.finished + 1

    def save(self, path: Path) -> None:
        """Write everything to one file, atomically; a tensor that stands in two groups is written once."""
        tensors: dict[str, Tensor] = {}
        first: dict[int, str] = {}
        same: dict[str, str] = {}
        for group, members in self.groups.items():
            for name, tensor in members.items():
                key = f"{group}/{name}"
                other = first.setdefault(id(tensor), key)
                if other == key:
                    tensors[key] = tensor
                else:
                    same[key] = other
        # A safetensors file does not keep the order of names, on which the length of messages depends.
        order = {group: list(members) for group, members in self.groups.items()}
        metadata = {"scalars": self.scalars, "finished": self.finished, "order": order, "same": same}
        save_tensors(path, tensors, {name: json.dumps(value) for name, value in metadata.items()})

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> ServerState:
        """Read what ``save`` wrote."""
        tensors, metadata = read_tensors(path)
        placed = {key: tensor.to(device) for key, tensor in tensors.items()}
        same = json.loads(metadata["same"])
        order = json.loads(metadata["order"])
        state = cls({g: {n: placed[same.get(f"{g}/{n}", f"{g}/{n}")] for n in names} for g, names in order.items()})
        state.scalars = json.loads(metadata["scalars"])
        state.finished = int(metadata["finished"])
        return state
