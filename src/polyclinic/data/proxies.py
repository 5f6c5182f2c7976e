"""Public images with labels that server and sites have alike: loading, checking, and agreeing on them.

They are no patients' images. Methods for sites with different networks send what networks say of them (logits,
features) or train on them on both sides; the images themselves are got locally by each party and never sent.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyclinic.data.dataset import normalized
from polyclinic.data.proxy_manifest import ProxyImage, ProxyManifest, make_manifest, sha256_of
from polyclinic.data.readers import Picture, read_picture
from polyclinic.data.sources import kept_open, locate
from polyclinic.data.transforms import place
from polyclinic.errors import DataError, RunError, StudyError
from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Leaf, Op, Site
from polyclinic.federation.state import ServerState
from polyclinic.seeds import generator
from polyclinic.study import ImageSettings, ProxySettings, Study

__all__ = ["PROXY_OPS", "Proxies", "ProxySettings", "agree_on_proxies", "load_proxies", "make_manifest"]

META_SHARE = 0.1
"""Share of each class that ``Proxies.parts`` keeps for judging."""
_GREY = np.array([0.299, 0.587, 0.114], np.float32)[:, None, None]
"""ITU-R BT.601: the weights of red, green and blue in luminance."""


@dataclass(frozen=True, eq=False)
class Proxies:
    """Public images on the study's grid.

    Attributes:
        name: Of the set.
        classes: Its own, which have nothing to do with the study's.
        images: uint8 ``[N, C, H, W]``; 0..255 stands for 0..1. Not to be written to: parties of one process share it.
        labels: int64 ``[N]``, positions in ``classes``.
        digest: SHA-256 of the manifest's content, hexadecimal.
        mean: Subtracted from images in 0..1, as the study's.
        std: Divided by after that.
    """

    name: str
    classes: list[str]
    images: Tensor
    labels: Tensor
    digest: str
    mean: float
    std: float

    def __len__(self) -> int:
        return len(self.labels)

    def inputs(self, indices: Tensor) -> Tensor:
        """Normalised images, float32 ``[B, C, H, W]``, as ``SiteData.inputs`` gives a site's.

        Args:
            indices: int64 ``[B]`` positions.
        """
        return normalized(self.images.index_select(0, indices.to(self.images.device)), self.mean, self.std)

    def parts(self, seed: int) -> tuple[Tensor, Tensor]:
        """Positions to train with and to judge by, int64 and sorted: of each class 90 and 10 percent.

        Each class has at least one image in either part. The same seed gives the same parts everywhere.
        """
        rng = generator(seed, "proxy parts")
        labels = self.labels.numpy()
        train, meta = [], []
        for index in range(len(self.classes)):
            own = rng.permutation(np.flatnonzero(labels == index))
            held = max(1, round(META_SHARE * len(own)))
            meta.append(own[:held])
            train.append(own[held:])
        return _sorted(train), _sorted(meta)


def _sorted(parts: Iterable[NDArray[np.int64]]) -> Tensor:
    return torch.from_numpy(np.sort(np.concatenate(list(parts))))


def load_proxies(study: Study) -> Proxies:
    """The public images of a study, each compared with the manifest; one copy per process for the same settings.

    Colour becomes grey (ITU-R 601) in a grey study; spacing, window and lungs of ``data.image`` do not count for them.

    Raises:
        StudyError: The study names none, or has volumes. DataError: The manifest is missing, altered or does not go
            with the study's classes; or names the first image that is missing, altered or cannot be decoded.
    """
    wanted, image = study.proxies, study.data.image
    if wanted is None:
        raise StudyError(
            f"method {study.method.name} needs public images, but the study has no proxies. Make a manifest with "
            "polyclinic data proxies and give proxies: {manifest: ..., images: ...}."
        )
    if len(image.size) != 2:
        raise StudyError(f"proxies are flat images, but data.image.size {image.size} is that of volumes.")
    manifest, images = Path(study.data.root) / wanted.manifest, Path(study.data.root) / wanted.images
    plain = image.model_copy(update={"spacing": None, "window": None, "lungs": "ignore"})
    found = _read_manifest(str(manifest), _stamp(manifest))
    if both := [name for name in found.classes if name in study.task.classes]:
        raise DataError(
            f"proxies: {both[0]!r} is a class of the public images {found.name!r} and of the study. Public images have "
            "labels of their own: leave the class out of their manifest, or give it another name there."
        )
    if not images.exists():
        raise DataError(
            f"proxies.images: {images.name!r} does not exist. Get the images of {found.name!r} and put them where the "
            "study says, or set data.root (POLYCLINIC_DATA)."
        )
    return _loaded(found, str(images), _stamps(images, found), plain.model_dump_json())


def _stamp(path: Path) -> tuple[int, int]:
    """A file that was changed since is another one."""
    if not path.exists():
        return 0, 0
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _stamps(images: Path, manifest: ProxyManifest) -> int:
    """The same for all files of a set; one that was altered since is read and hashed again, with all others."""
    if images.is_file():
        return hash(_stamp(images))
    files = dict.fromkeys(locate(str(images), one.path).path for one in manifest.images)
    return hash(tuple(_stamp(path) for path in files))


@lru_cache(maxsize=4)
def _read_manifest(path: str, stamp: tuple[int, int]) -> ProxyManifest:
    return ProxyManifest.load(Path(path))


@lru_cache(maxsize=4)
def _loaded(found: ProxyManifest, images: str, stamps: int, image: str) -> Proxies:
    settings = ImageSettings.model_validate_json(image)
    with kept_open(), ThreadPoolExecutor() as pool:
        pixels = list(pool.map(lambda one: _decoded(images, one, settings, found.name), found.images))
    labels = torch.tensor([found.classes.index(one.label) for one in found.images])
    stacked = torch.from_numpy(np.stack(pixels))
    return Proxies(found.name, list(found.classes), stacked, labels, found.digest, settings.mean, settings.std)


def _decoded(source: str, one: ProxyImage, settings: ImageSettings, name: str) -> NDArray[np.uint8]:
    try:
        found = sha256_of(source, one.path)
    except DataError as error:
        raise DataError(
            f"proxies: image {one.path!r} of {name!r} cannot be read: it is missing below proxies.images or damaged. "
            "Get the set again."
        ) from error
    if found != one.sha256:
        raise DataError(
            f"proxies: image {one.path!r} of {name!r} is not the manifest's: its SHA-256 is {found[:12]}..., wanted is "
            f"{one.sha256[:12]}.... Get the set again; all sites must have the very same images."
        )
    try:
        pixels = read_picture(source, one.path).pixels
    except DataError as error:
        # Errors are sent to the server, where the images lie here is not.
        reason = str(error).replace(locate(source, one.path).name, one.path)
        raise DataError(f"proxies, {name!r}: {reason}") from error
    if settings.channels == 1 and len(pixels) == 3:
        grey = (pixels * _GREY).sum(0, keepdims=True)
        pixels = np.rint(grey).astype(np.uint8) if pixels.dtype == np.uint8 else grey
    placed = place(Picture(pixels), settings, one.path).image()
    return placed if placed.dtype == np.uint8 else np.rint(255 * placed).astype(np.uint8)


def _compare(site: Site, message: Message) -> Message:
    """Check the site's own copies against its own manifest, say which set they are, and learn from no other."""
    site.agreed = ""
    try:
        own = site.own_proxies.digest
    except DataError as error:
        # Not raised: a tolerant channel would go on without this site, and all must have the same images.
        return Message(scalars={"fault": str(error)})
    if own == message.scalars["digest"]:
        site.agreed = own
    return Message(scalars={"digest": own})


PROXY_OPS = {"proxies": Op(_compare, (Leaf("digest", "scalar", "nothing"), Leaf("fault", "scalar", "nothing")))}
"""The site's side of ``agree_on_proxies``, for the ops of a method with public images."""


def agree_on_proxies(channel: Channel, study: Study, state: ServerState) -> Proxies:
    """Make sure that all learn from the same public images; to be called at the start of each round.

    The server sends name and digest; each site compares all its own copies with its manifest and answers its digest. A
    site that fails in this may be absent, but then its ``proxies`` refuse until it has answered in a later round. The
    digest is kept in ``state.scalars["proxies"]``, so that a resumed run has the images that it began with.

    Returns:
        The server's own copy.

    Raises:
        DataError: The server's or a site's images are others; names the site and the first image that differs.
        RunError: The run began with another set.
    """
    own = load_proxies(study)
    began = state.scalars.setdefault("proxies", own.digest)
    if began != own.digest:
        raise RunError(
            f"this run began with other public images: their manifest had digest {str(began)[:12]}..., that of "
            f"{own.name!r} is {own.digest[:12]}.... Put the first manifest and its images back, or start in a new "
            "results folder."
        )
    message = Message(scalars={"name": own.name, "digest": own.digest})
    for site, reply in channel.call("proxies", dict.fromkeys(channel.sites, message)).items():
        if "fault" in reply.scalars:
            raise DataError(f"site {site!r}: {reply.scalars['fault']}")
        if reply.scalars.get("digest") != own.digest:
            raise DataError(
                f"site {site!r} has other public images than the server: its manifest has digest "
                f"{str(reply.scalars.get('digest'))[:12]}..., that of {own.name!r} is {own.digest[:12]}.... Send the "
                "site the manifest again, and get the images that it names."
            )
    return own
