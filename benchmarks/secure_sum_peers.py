"""Sums that hide what each site adds, as other systems do them; what ``secure_sum.py`` compares ours with.

Each peer is a function of a case and a meter. It does the work of one round and says what travelled and how far its
mean is from the real one. Packages that only a peer needs are imported inside it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from overhead_probes import memory
from tables import Json

Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Case:
    """A round: how many sites, and how long the vector is."""

    sites: int
    parameters: int

    @property
    def threshold(self) -> int:
        """Sites that an opening needs, as in our masked sum."""
        return 2 * self.sites // 3 + 1

    def shapes(self) -> dict[str, int]:
        """Sizes of the tensors of a ResNet-18 without its last layer, scaled to ``parameters`` in all."""
        wanted = {"stem.conv": 3 * 64 * 49, "stem.norm": 2 * 64}
        width = 64
        for stage, out in enumerate((64, 128, 256, 512)):
            for block in range(2):
                for part, into in (("a", width), ("b", out)):
                    wanted[f"{stage}.{block}.{part}.conv"] = into * out * 9
                    wanted[f"{stage}.{block}.{part}.weight"] = wanted[f"{stage}.{block}.{part}.bias"] = out
                if width != out:
                    wanted[f"{stage}.{block}.skip.conv"] = width * out
                    wanted[f"{stage}.{block}.skip.norm"] = 2 * out
                width = out
        ratio = self.parameters / sum(wanted.values())
        sizes = {name: max(1, int(size * ratio)) for name, size in wanted.items()}
        largest = max(sizes, key=lambda name: sizes[name])
        sizes[largest] += self.parameters - sum(sizes.values())
        return sizes

    def update(self, site: int) -> Arrays:
        """What a site adds: normal, standard deviation 0.02."""
        draw = np.random.default_rng(site)
        return {name: draw.standard_normal(n, dtype=np.float32) * np.float32(0.02) for name, n in self.shapes().items()}

    def mean(self, sites: Sequence[int]) -> dict[str, NDArray[np.float64]]:
        """The mean over these sites, float64."""
        total = {name: np.zeros(n) for name, n in self.shapes().items()}
        for site in sites:
            for name, values in self.update(site).items():
                total[name] += values
        return {name: values / len(sites) for name, values in total.items()}


class Meter:
    """Processor and wall seconds of each party's phases, and peaks of memory.

    Attributes:
        seconds: ``{"site" or "server": {phase: [processor, wall]}}``: of one site, and of the server for all of them.
        memory: ``{op: MiB}``: most that one site's work held above what the process held before it; empty where the
            system cannot tell.
        peak: Most that the process held, MiB.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, dict[str, list[float]]] = {"site": {}, "server": {}}
        self.memory: dict[str, float] = {}
        self.peak = 0.0
        self._left_out = (0.0, 0.0)

    @contextmanager
    def phase(self, party: Literal["site", "server"], name: str, times: float = 1.0) -> Iterator[None]:
        """Time what is done inside, without phases inside it.

        Args:
            party: Who does it.
            name: Of the phase; seconds of the same name add up.
            times: How often one site, or the server, does in a round what is measured once.
        """
        with self.leave_out():
            before = self._left_out
            started = clocks()
            yield
            entry = self.seconds[party].setdefault(name, [0.0, 0.0])
            for i, (now, then) in enumerate(zip(clocks(), started, strict=True)):
                entry[i] += times * (now - then - self._left_out[i] + before[i])

    @contextmanager
    def leave_out(self) -> Iterator[None]:
        """What is done inside does not count for the phase around it."""
        before, started = self._left_out, clocks()
        yield
        spent = (now - then for now, then in zip(clocks(), started, strict=True))
        self._left_out = (before[0] + next(spent), before[1] + next(spent))

    @contextmanager
    def one_site(self, op: str) -> Iterator[None]:
        """All that a site needs memory for in an op, its update included."""
        with self.leave_out():
            self.note_peak()
            fresh = _reset_peak()
            held = memory("VmRSS")
        yield
        with self.leave_out():
            if fresh:
                self.memory[op] = max(self.memory.get(op, 0.0), memory("VmHWM") - held)
            self.note_peak()

    def note_peak(self) -> None:
        """Remember the peak so far."""
        self.peak = max(self.peak, memory("VmHWM"))


def clocks() -> tuple[float, float]:
    """Processor seconds of this process, all threads, and wall seconds."""
    return time.process_time(), time.perf_counter()


def _reset_peak() -> bool:
    """Let the peak of resident memory start anew, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def distance(found: Mapping[str, NDArray[Any]], wanted: Mapping[str, NDArray[np.float64]]) -> float:
    """Largest absolute difference."""
    return max(float(np.abs(found[name] - values).max()) for name, values in wanted.items())


def flower(case: Case, meter: Meter) -> Json:
    """SecAgg+ of Flower 1.42.0 with its defaults: its client functions, and its server's unmasking with its functions.

    All sites are neighbours of each other and have the same number of examples. Messages go from hand to hand; putting
    them into Flower's records is not counted.
    """
    from flwr.common import bytes_to_ndarray, ndarrays_to_parameters
    from flwr.common.secure_aggregation.crypto.shamir import combine_shares
    from flwr.common.secure_aggregation.ndarrays_arithmetic import (
        factor_extract,
        get_parameters_shape,
        parameters_addition,
        parameters_mod,
        parameters_subtraction,
    )
    from flwr.common.secure_aggregation.quantization import dequantize
    from flwr.common.secure_aggregation.secaggplus_constants import Key
    from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

    # The package has a function of this module's name, which a plain import would find.
    client = import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
    clip, levels, modulus = 8.0, 2**22, 2**32
    settings = {
        Key.SAMPLE_NUMBER: case.sites,
        Key.SHARE_NUMBER: case.sites,
        Key.THRESHOLD: case.threshold,
        Key.CLIPPING_RANGE: clip,
        Key.TARGET_RANGE: levels,
        Key.MOD_RANGE: modulus,
        Key.MAX_WEIGHT: 1000.0,
    }
    states = {site: client.SecAggPlusState(nid=site) for site in range(1, case.sites + 1)}
    keys, letters = {}, {site: ([], []) for site in states}
    for site, state in states.items():
        with meter.phase("site", "keys", 1 / case.sites):
            told = client._setup(state, settings)
        keys[str(site)] = (told[Key.PUBLIC_KEY_1], told[Key.PUBLIC_KEY_2])
    for site, state in states.items():
        with meter.phase("site", "shares", 1 / case.sites):
            told = client._share_keys(state, keys)
        for to, sealed in zip(told[Key.DESTINATION_LIST], told[Key.CIPHERTEXT_LIST], strict=True):
            letters[to][0].append(site)
            letters[to][1].append(sealed)
    total, up = None, 0
    for site, state in states.items():
        received = {Key.SOURCE_LIST: letters[site][0], Key.CIPHERTEXT_LIST: letters[site][1]}
        with meter.one_site("mask"):
            update = ndarrays_to_parameters(list(case.update(site).values()))
            with meter.phase("site", "mask and serialise", 1 / case.sites):
                (masked,) = client._collect_masked_vectors(state, received, 100, update).values()
            del update
        up = sum(map(len, masked))
        with meter.phase("server", "receive and add"):
            arrays = [bytes_to_ndarray(part) for part in masked]
            total = arrays if total is None else parameters_addition(total, arrays)
        del masked, arrays
    shares: dict[int, list[bytes]] = {site: [] for site in states}
    for state in states.values():
        with meter.phase("site", "unmask", 1 / case.sites):
            told = client._unmask(state, {Key.ACTIVE_NODE_ID_LIST: list(states), Key.DEAD_NODE_ID_LIST: []})
        for owner, share in zip(told[Key.NODE_ID_LIST], told[Key.SHARE_LIST], strict=True):
            shares[owner].append(share)
    with meter.phase("server", "open"):
        total = parameters_mod(total, modulus)
        for owner in states:
            mask = pseudo_rand_gen(combine_shares(shares[owner]), modulus, get_parameters_shape(total))
            total = parameters_subtraction(total, mask)
        weight, total = factor_extract(parameters_mod(total, modulus))
        mean = dequantize(total, clip, levels)
        for values in mean:
            values += -(case.sites - 1) * clip
            values *= levels / weight
    found = dict(zip(case.shapes(), mean, strict=True))
    return {"up": up, "error": distance(found, case.mean(list(states)))}


def nvflare(case: Case, meter: Meter) -> Json:
    """CKKS as NVFlare provisions it: N = 8192, primes of 60, 40, 40 bits, scale 2**40, one secret key at all sites."""
    return _ckks(case, meter, [60, 40, 40], 40, symmetric=True)


def pppml_hmi(case: Case, meter: Meter) -> Json:
    """CKKS with the settings of the PPPML-HMI reference code: N = 8192, primes of 31, 6 x 26, 31 bits, scale 2**26."""
    return _ckks(case, meter, [31, *[26] * 6, 31], 26, symmetric=False)


def _ckks(case: Case, meter: Meter, primes: list[int], scale: int, *, symmetric: bool) -> Json:
    """One site's work, one addition, one opening; the server's n - 1 additions are counted from the one.

    Each tensor is a vector of its own, encrypted and serialised before the next one, as NVFlare's filter does it.
    """
    import tenseal as ts

    kind = ts.ENCRYPTION_TYPE.SYMMETRIC if symmetric else ts.ENCRYPTION_TYPE.ASYMMETRIC
    context = ts.context(ts.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=primes, encryption_type=kind, n_threads=1)
    context.global_scale = 2**scale
    sealed = {}
    with meter.one_site("encrypt"):
        for name, values in case.update(0).items():
            with meter.phase("site", "encrypt"):
                vector = ts.ckks_vector(context, values.astype(np.float64))
            with meter.phase("site", "serialise"):
                sealed[name] = vector.serialize()
            del vector
    found = {}
    for name, blob in sealed.items():
        with meter.phase("server", "receive", case.sites):
            total = ts.ckks_vector_from(context, blob)
        other = ts.ckks_vector_from(context, blob)
        with meter.phase("server", "add", case.sites - 1):
            total += other
        with meter.phase("server", "serialise"):
            answer = total.serialize()
        with meter.phase("site", "open"):
            found[name] = np.asarray(ts.ckks_vector_from(context, answer).decrypt()) / 2
        del total, other, answer
    return {"up": sum(map(len, sealed.values())), "error": distance(found, case.mean([0]))}


PEERS = {"flower": flower, "nvflare": nvflare, "pppml-hmi": pppml_hmi}
