"""CKKS at the settings of the PPPML-HMI reference code."""

from __future__ import annotations

import numpy as np
import pytest

from polyclinic.errors import ProtocolError
from polyclinic.secure.ckks_as_published import CkksAsPublished

tenseal = pytest.importorskip("tenseal")

# At scale 2**26 the published code is off by about 3e-4 for a sum of two.
ERROR = 2e-3


@pytest.fixture(scope="module")
def ckks() -> CkksAsPublished:
    return CkksAsPublished()


@pytest.fixture(scope="module")
def tensors() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.normal(0, 1, size).astype(np.float32) for size in (1, 64, 4096, 4097, 9000)]


def test_sum_and_difference(ckks: CkksAsPublished, tensors: list[np.ndarray]) -> None:
    total = ckks.encrypt(tensors)
    total.add(ckks.encrypt([2 * t for t in tensors]))
    total.subtract(ckks.encrypt([np.full_like(t, 5) for t in tensors]))
    for found, wanted in zip(total.decrypt(), tensors, strict=True):
        assert found.shape == wanted.shape
        assert np.abs(found - (3 * wanted.astype(np.float64) - 5)).max() < ERROR


def test_the_error_of_the_settings_is_there(ckks: CkksAsPublished) -> None:
    """Far above float32's own: this is what fixed point does better."""
    values = np.random.default_rng(1).normal(0, 1, 4096).astype(np.float32)
    assert 1e-6 < np.abs(ckks.encrypt([values]).decrypt()[0] - values).max() < ERROR


def test_a_tensor_costs_whole_ciphertexts(ckks: CkksAsPublished) -> None:
    one, slots, more = (len(ckks.encrypt([np.ones(n, np.float32)]).to_bytes()) for n in (1, 4096, 4097))
    assert one == pytest.approx(477_000, rel=0.01)
    assert slots == pytest.approx(477_000, rel=0.01)
    assert more == pytest.approx(2 * 477_000, rel=0.01)


def test_the_ciphertexts_are_those_of_one_vector_per_tensor(
    ckks: CkksAsPublished, capfd: pytest.CaptureFixture[str]
) -> None:
    ours = len(ckks.encrypt([np.ones(9000, np.float32)]).to_bytes())
    assert "".join(capfd.readouterr()) == "", "nothing is printed"
    context = tenseal.context_from(ckks.keys(secret=True))
    theirs = len(tenseal.ckks_vector(context, [1.0] * 9000).serialize())
    capfd.readouterr()
    assert ours == pytest.approx(theirs, rel=0.001)


def test_settings_are_the_published_ones_and_within_the_table(ckks: CkksAsPublished) -> None:
    context = tenseal.context_from(ckks.keys(secret=False))
    parameters = context.seal_context().data.key_context_data().parms()
    bits = [prime.bit_count() for prime in parameters.coeff_modulus()]
    assert parameters.poly_modulus_degree() == 8192
    assert bits == [31, 26, 26, 26, 26, 26, 26, 31]
    assert sum(bits) <= 218  # Homomorphic Encryption Standard (2018), table 1
    assert context.global_scale == 2**26


def test_the_wire_between_holders_of_the_same_key(ckks: CkksAsPublished, tensors: list[np.ndarray]) -> None:
    other = CkksAsPublished(ckks.keys(secret=True))
    sizes = [len(t) for t in tensors]
    total = other.load(ckks.encrypt(tensors).to_bytes(), sizes)
    total.add(other.encrypt(tensors))
    for found, wanted in zip(ckks.load(total.to_bytes(), sizes).decrypt(), tensors, strict=True):
        assert np.abs(found - 2 * wanted.astype(np.float64)).max() < ERROR


def test_without_the_secret_key_nothing_is_decrypted(ckks: CkksAsPublished) -> None:
    public = CkksAsPublished(ckks.keys(secret=False))
    data = public.encrypt([np.ones(3, np.float32)]).to_bytes()
    with pytest.raises(ValueError, match="secret_key"):
        public.load(data, [3]).decrypt()
    assert ckks.load(data, [3]).decrypt()[0] == pytest.approx(np.ones(3), abs=ERROR)


def test_damaged_bytes_are_refused(ckks: CkksAsPublished) -> None:
    data = ckks.encrypt([np.ones(5, np.float32)]).to_bytes()
    for bad, sizes, message in [
        (data[:-1], [5], "do not hold 1"),
        (data + b"\0", [5], "1 bytes follow the last"),
        (data, [5, 5], "do not hold 2"),
        (data, [6], "holds 5 values instead of 6"),
        (b"\xff\xff\xff\x7f" + data[4:], [5], "do not hold 1"),
        (data[:4] + b"\xff" * (len(data) - 4), [5], "cannot be read"),
    ]:
        with pytest.raises(ProtocolError, match=message):
            ckks.load(bad, sizes)
    with pytest.raises(ProtocolError, match="CKKS keys cannot be read"):
        CkksAsPublished(b"no keys")


def test_tensors_of_other_sizes_are_not_added(ckks: CkksAsPublished) -> None:
    with pytest.raises(ProtocolError, match=r"of sizes \(4,\) do not fit those of sizes \(3,\)"):
        ckks.encrypt([np.ones(3, np.float32)]).add(ckks.encrypt([np.ones(4, np.float32)]))
