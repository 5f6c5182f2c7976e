"""First phase of the exchange: which devices there are, how many patients of each class they have, and their style.

Sums over sites, so that under a hidden sum the server learns only totals. With one device a site, though, a device's
column is that site's; ``synthesis.epsilon`` adds noise at each site for that case. Names of devices have none: a device
is named where it has a class of ``synthesis.floor`` patients, with noise or without.
"""

from __future__ import annotations

import json
import secrets

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyclinic.errors import SiteError
from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Leaf, Op, Site
from polyclinic.secure.sum import SecureSum
from polyclinic.study import Study
from polyclinic.synthesis.amplitude import windows
from polyclinic.synthesis.cells import Cells, OwnImages, count_cells, own_devices, own_images
from polyclinic.synthesis.once import once
from polyclinic.synthesis.private import secret_stream

MOST_DEVICES = 256
LONGEST_NAME = 64
_BATCH = 256


def statistics_ops(study: Study) -> dict[str, Op]:
    """The sites' side: names of devices, then counts and summed styles."""
    settings = study.synthesis
    assert settings is not None
    # A floor on true counts would undo the noise: one patient more or less could switch five on or off.
    floor = 1 if settings.epsilon else settings.floor

    def enter(site: Site, message: Message) -> Message:
        # Names have no noise: with it or without, a device of fewer patients is not named.
        return Message(scalars={"devices": json.dumps(own_devices(site.data, settings.floor))})

    def count(site: Site, message: Message) -> Message:
        once(site, "count-cells", message)
        devices = tuple(json.loads(str(message.scalars["devices"])))
        own = own_images(site.data, devices, floor)
        patients, images = count_cells(own, len(site.task.classes), len(devices))
        # Of a cell's patients most may count in another one.
        enough = patients >= floor
        patients, images = patients * enough, images * enough
        styles = summed_styles(site, own, patients.shape, settings.window, enough)
        if settings.epsilon:
            # Asked again, the site says the same: fresh noise could be averaged out.
            rng = secret_stream(site.state.folder, message.digest(), 1, "counts_privacy.json")
            patients, styles = noisy(patients, styles, settings.epsilon, rng)
            images = patients  # how many images a patient has is not bounded, so it is not told
        arrays = {
            "patients": torch.from_numpy(patients.astype(np.float64)),
            "images": torch.from_numpy(images.astype(np.float64)),
            "styles": styles,
        }
        return Message.pack({"cells": arrays}, **{"weight/cells": 1.0})

    return {
        "enter": Op(enter, (Leaf("devices", "scalar", "counts"),)),
        "count-cells": Op(count, (Leaf("cells", "sum", "images", lanes=64), Leaf("weight/*", "scalar", "nothing"))),
    }


def gather(channel: Channel, sums: SecureSum, study: Study) -> tuple[Cells, Tensor]:
    """The server's side.

    Returns:
        Counts over all sites (after noise: none below zero), and each device's mean style
        ``[devices, C, 2 half + 1, 2 half + 1]``, float32; zeros for a device whose noisy count came to nothing.

    Raises:
        SiteError: A site names devices that are no names, or no site has a cell of enough patients.
    """
    devices: set[str] = set()
    for site, reply in channel.call("enter", dict.fromkeys(channel.sites, Message())).items():
        devices |= device_names(site, str(reply.scalars.get("devices", "")))
    if not devices:
        assert study.synthesis is not None
        raise SiteError(
            f"no site has a class with {study.synthesis.floor} training patients or more on one device, so there is "
            "nothing to plan samples by. Lower synthesis.floor, or leave synthesis out."
        )
    roster = tuple(sorted(devices))
    message = Message(scalars={"devices": json.dumps(roster)})
    total = sums.sum(channel, "count-cells", dict.fromkeys(channel.sites, message)).sums["cells"]
    patients, images = (np.maximum(np.rint(total[name].numpy()), 0).astype(np.int64) for name in ("patients", "images"))
    per_device = torch.from_numpy(patients.sum(0).astype(np.float64)).clamp(min=1)
    styles = (total["styles"] / per_device.view(-1, 1, 1, 1)).clamp(0, 1).float()
    return Cells(tuple(study.task.classes), roster, patients, images), styles


def summed_styles(
    site: Site, own: OwnImages, shape: tuple[int, ...], half: int, enough: NDArray[np.bool_] | None = None
) -> Tensor:
    """Per device, the sum over its patients of the mean amplitude window of their images.

    A patient counts in one cell, as in ``count_cells``, so that his window stands on one device alone. Only cells of
    ``enough`` ``[classes, devices]`` count; None: all.

    Returns:
        float64 ``[devices, C, 2 half + 1, 2 half + 1]``.
    """
    data = site.data
    channels, side = data.picture(0).shape[0], 2 * half + 1
    total = torch.zeros(shape[1], channels, side, side, dtype=torch.float64)
    if len(own.positions) == 0:
        return total
    found = torch.cat(
        [windows(data.inputs(part).cpu() * data.std + data.mean, half) for part in torch.split(own.positions, _BATCH)]
    ).double()
    by_patient: dict[str, list[int]] = {}
    for row, who in enumerate(own.patients):
        by_patient.setdefault(who, []).append(row)
    for rows in by_patient.values():
        part = OwnImages(own.positions[rows], own.labels[rows], own.devices[rows], [own.patients[i] for i in rows])
        counted, _ = count_cells(part, shape[0], shape[1])
        label, device = (int(k) for k in np.argwhere(counted)[0])
        if enough is not None and not enough[label, device]:
            continue
        mine = [i for i in rows if own.labels[i] == label and own.devices[i] == device]
        total[device] += found[mine].mean(0)
    return total


def noisy(
    patients: NDArray[np.int64], styles: Tensor, epsilon: float, rng: np.random.Generator | None = None
) -> tuple[NDArray[np.int64], Tensor]:
    """Counts and styles with Laplace noise; half of ε each.

    Adding or taking a patient changes one count by 1, and one device's window, whose squares add up to at most 1 per
    colour, by at most C (2 half + 1) in the sum of magnitudes (Cauchy and Schwarz). ``rng`` is the site's secret, not
    from the study's seed, which the server knows, so runs with it do not repeat bit for bit; None: fresh noise.
    """
    rng = rng or np.random.default_rng(secrets.randbits(128))
    counts = patients + np.rint(rng.laplace(0, 2 / epsilon, patients.shape)).astype(np.int64)
    reach = styles.shape[1] * styles.shape[2]
    return counts, styles + torch.from_numpy(rng.laplace(0, 2 * reach / epsilon, tuple(styles.shape)))


def device_names(site: str, text: str) -> set[str]:
    """The names of devices that a site answered with.

    Raises:
        SiteError: They are no list of names.
    """
    try:
        names = json.loads(text[: MOST_DEVICES * (6 * LONGEST_NAME + 4)])  # a letter may be written as six
    except (ValueError, RecursionError):
        names = None
    fine = isinstance(names, list) and len(names) <= MOST_DEVICES
    if not fine or not all(isinstance(n, str) and 0 < len(n) <= LONGEST_NAME and n.isprintable() for n in names):
        raise SiteError(
            f"site {site!r} answered with devices that are no list of names. Names have 1 to {LONGEST_NAME} printable "
            f"letters, and a site has {MOST_DEVICES} at most; check the device column of its table."
        )
    return set(names)
