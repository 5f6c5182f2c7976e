"""The arithmetic of PPPML-HMI's published code in the same ring, as a named ablation: two neighbours see through it.

Of the code: CKKS at its parameters with one context, secret key included, for all sites; one vector per tensor, in
floating point; a float32 mask of N(0, 10000^2) that the initiator draws with NumPy's generator, adds to its own update
and takes off the sum under encryption; the initiator decrypts. Ours: separate parties with signed messages, the key
sealed for each site, and weights that go through the ring like everything else.

What a site received and what its successor received, decrypted with the key that all sites have, differ by that site's
update; the mask drops out. ``polyclinic audit collusion`` does it. The mask also rounds updates to steps of about 1e-3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from polyclinic.errors import StudyError
from polyclinic.secure.bfv import Blob, Keys
from polyclinic.secure.ckks_as_published import CkksAsPublished
from polyclinic.secure.fixed_point import WEIGHT_STEPS, WIDE, Lanes, Layout, decode, word
from polyclinic.secure.hidden import layout_of, own_lanes

if TYPE_CHECKING:
    from polyclinic.federation.site import Site
    from polyclinic.secure.session import Session

MASK_SIGMA = 10_000.0


class PublishedScheme:
    """CKKS and a Gaussian mask.

    Raises:
        StudyError: ``tenseal`` is not installed.
    """

    holder = "sites"

    def __init__(self) -> None:
        try:
            import tenseal
        except ImportError as error:
            raise StudyError(
                f'aggregation.backend ring-as-published needs tenseal ({error}): pip install "polyclinic[he]"'
            ) from None
        self.facts = {"provider": f"tenseal {tenseal.__version__}, ckks", "key_holder": self.holder}

    def new_keys(self) -> Keys:
        """One context, the secret key included."""
        return Keys(CkksAsPublished().keys(secret=True), b"")

    def encrypt(self, site: Site, session: Session, key: bytes, maker: str) -> Blob:
        """Weighted values as floats, under the mask if this is the initiator, encrypted tensor by tensor."""
        layout = layout_of(site, session.attempt)
        tensors = _tensors(own_lanes(site, session), layout, len(session.attempt.sites))
        if maker == site.name:
            draw = np.random.default_rng()
            masks = [draw.normal(0.0, MASK_SIGMA, len(t)).astype(np.float32) for t in tensors]
            session.memory["mask"] = masks
            tensors = [tensor + mask for tensor, mask in zip(tensors, masks, strict=True)]
        session.memory["sizes"] = [len(tensor) for tensor in tensors]
        return _blob(CkksAsPublished(key).encrypt(tensors).to_bytes())

    def add(self, session: Session, own: Blob, token: Blob, hop: int) -> Blob:
        """Add the ciphertexts."""
        context = CkksAsPublished(session.memory["key"])
        total = context.load(token.tobytes(), session.memory["sizes"])
        total.add(context.load(own.tobytes(), session.memory["sizes"]))
        return _blob(total.to_bytes())

    def decrypt(self, session: Session | None, layout: Layout, token: Blob, secret: bytes) -> Lanes:
        """Take the mask off under encryption, decrypt, and round to the layout's steps."""
        assert session is not None, "a site opens, never the server"
        context = CkksAsPublished(secret)
        total = context.load(token.tobytes(), session.memory["sizes"])
        total.subtract(context.encrypt(session.memory.pop("mask")))
        return _lanes(total.decrypt(), layout, len(session.attempt.sites))


def _blob(data: bytes) -> Blob:
    return np.frombuffer(bytearray(data), dtype=np.uint8)


def _tensors(lanes: Lanes, layout: Layout, sites: int) -> list[NDArray[np.float32]]:
    weights, means = decode(layout, lanes, sites=sites)
    counted = np.array([steps / WEIGHT_STEPS for steps in weights.values()], dtype=np.float32)
    return [counted, *(means[e.name].reshape(-1).astype(np.float32) for e in layout.entries if e.size)]


def _lanes(tensors: list[NDArray[np.float64]], layout: Layout, sites: int) -> Lanes:
    # The mask's rounding may push a weight of zero below it, and a value at the edge of its lanes over that.
    parts: dict[int, list[NDArray[np.float64]]] = {WIDE: [np.maximum(tensors[0], 0.0) * WEIGHT_STEPS]}
    for entry, tensor in zip((e for e in layout.entries if e.size), tensors[1:], strict=True):
        parts.setdefault(entry.bits, []).append(tensor * entry.scale(sites))
    lanes: Lanes = {}
    for bits in layout.widths:
        steps = np.rint(np.concatenate(parts.get(bits, [np.empty(0)])))
        kind = np.iinfo(f"i{word(bits)}")
        lanes[bits] = np.clip(steps, kind.min, np.nextafter(kind.max, 0.0)).astype(kind.dtype)
    return lanes
