"""Phantoms: what they promise (independence, determinism, truth) and what they look like to a classifier."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from polyclinic.data.manifest import Case, read_manifest
from polyclinic.data.phantoms import (
    CLASSES,
    DEVICES,
    lung_mask,
    phantom_cases,
    phantom_picture,
    write_phantoms,
)
from polyclinic.data.phantoms.canvas import clouds, covered, ripple, solid_clouds, step, stream
from polyclinic.data.phantoms.devices import scan
from polyclinic.errors import DataError, StudyError
from polyclinic.study import PhantomSettings, PhantomSite, TaskSettings

SIZES = {"chest-xray": [32, 40], "chest-ct": [32, 32], "chest-ct-volume": [6, 32, 32]}
SIZES |= {"skin-lesion": [32, 32], "skin-diagnoses": [24, 24]}
KINDS = sorted(SIZES)
GOLDEN_STREAM = [606, 969, 419, 821]
GOLDEN_MEAN = 133.232
GOLDEN_AREA = 39


def phantom(kind: str = "chest-xray", seed: int = 0, lesions: str = "large", **site: object) -> PhantomSettings:
    return PhantomSettings(
        kind=kind, seed=seed, lesions=lesions, sites=[PhantomSite(**{"name": "north", "patients": 6, **site})]
    )


def task(kind: str = "chest-xray") -> TaskSettings:
    return TaskSettings(classes=list(CLASSES[kind]))


def case(label: str, device: str = "reference", patient: int = 3, image: int = 0) -> Case:
    return Case(
        image=f"north/p{patient:04d}_{image}", patient="p", site="north", device=device, label=label, source="phantom"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_case_is_drawn_the_same(kind: str) -> None:
    one, two = (phantom_picture(phantom(kind), case(CLASSES[kind][1]), SIZES[kind]) for _ in range(2))
    assert np.array_equal(one[0], two[0])
    assert np.array_equal(one[1], two[1])


def test_numbers_are_the_same_on_every_machine() -> None:
    assert stream(0, "north", 3, "anatomy").integers(1000, size=4).tolist() == GOLDEN_STREAM
    pixels, mask = phantom_picture(phantom(), case("nodule"), [64, 64])
    assert abs(float(pixels.mean()) - GOLDEN_MEAN) < 0.01
    assert int(mask.sum()) == GOLDEN_AREA


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", ["seed", "patient", "image", "device"])
def test_seed_patient_image_and_device_each_change_the_picture(kind: str, change: str) -> None:
    label = CLASSES[kind][1]
    base, _ = phantom_picture(phantom(kind), case(label), SIZES[kind])
    seed = 1 if change == "seed" else 0
    other = case(
        label,
        device="grainy" if change == "device" else "reference",
        patient=4 if change == "patient" else 3,
        image=1 if change == "image" else 0,
    )
    changed, _ = phantom_picture(phantom(kind, seed), other, SIZES[kind])
    assert (changed != base).mean() > 0.2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", sorted(DEVICES))
def test_a_device_never_changes_what_the_patient_has(kind: str, device: str) -> None:
    label = CLASSES[kind][1]
    _, reference = phantom_picture(phantom(kind), case(label), SIZES[kind])
    _, mask = phantom_picture(phantom(kind), case(label, device), SIZES[kind])
    assert np.array_equal(mask, reference)
    if kind.startswith("chest-ct"):
        lungs = [lung_mask(phantom(kind), case(label, d), SIZES[kind]) for d in ("reference", device)]
        assert np.array_equal(*lungs)


@pytest.mark.parametrize("kind", ["chest-xray", "chest-ct", "chest-ct-volume"])
def test_a_finding_changes_nothing_outside_its_surroundings(kind: str) -> None:
    healthy, none = phantom_picture(phantom(kind), case("normal"), SIZES[kind])
    for label in CLASSES[kind][1:]:
        sick, mask = phantom_picture(phantom(kind), case(label), SIZES[kind])
        changed = sick[0] != healthy[0]
        assert 0 < changed.mean() < 0.6
        assert changed[mask == 1].mean() > 0.8
    assert none.sum() == 0


def test_prevalence_and_device_are_independent() -> None:
    plain = phantom_cases(phantom(patients=40), task())
    skewed = phantom_cases(phantom(patients=40, prevalence={"nodule": 0.9}, device="soft"), task())
    assert [(c.image, c.patient) for c in plain] == [(c.image, c.patient) for c in skewed]
    assert {c.device for c in plain} == {"reference"}
    assert {c.device for c in skewed} == {"soft"}
    assert [c.label for c in plain] == [c.label for c in phantom_cases(phantom(patients=40, device="soft"), task())]


def test_patients_of_a_hospital_share_its_devices_as_told() -> None:
    site = {"patients": 119, "device": {"ct-fine-1mm": 114, "ct-fine-5mm": 5}}
    cases = phantom_cases(phantom("chest-ct", **site), task("chest-ct"))
    device = {c.patient: c.device for c in cases}
    assert all(device[c.patient] == c.device for c in cases)
    assert Counter(device.values()) == {"ct-fine-1mm": 114, "ct-fine-5mm": 5}
    one = phantom_cases(phantom("chest-ct", patients=119), task("chest-ct"))
    assert [(c.image, c.label) for c in one] == [(c.image, c.label) for c in cases]
    thirds = phantom("chest-ct", patients=12, device={"ct-old-2mm": 5, "ct-old-3.3mm": 1, "ct-old-7.5mm": 6})
    counts = Counter({c.patient: c.device for c in phantom_cases(thirds, task("chest-ct"))}.values())
    assert counts == {"ct-old-2mm": 5, "ct-old-3.3mm": 1, "ct-old-7.5mm": 6}


def test_refuses_an_unknown_device_among_several() -> None:
    with pytest.raises(StudyError, match="unknown device 'ct-fine-2mm'"):
        phantom_cases(phantom("chest-ct", device={"ct-fine-1mm": 1, "ct-fine-2mm": 1}), task("chest-ct"))
    with pytest.raises(StudyError, match="site 'north' has no device"):
        phantom_cases(phantom("chest-ct", device={}), task("chest-ct"))


def components(lesions: str, kind: str, size: list[int]) -> tuple[float, float]:
    """Mean number of connected lesions of an image, and the share of them below 2.5 cm across."""
    from scipy.ndimage import label

    settings_ = phantom(kind, lesions=lesions)
    counts, across = [], []
    for patient in range(12):
        _, mask = phantom_picture(settings_, case("ground-glass", patient=patient), size)
        parts, count = label(mask)
        counts.append(count)
        volumes = np.bincount(parts.ravel())[1:] * (360 / size[-1]) ** 2 * (240 / size[0] if len(size) == 3 else 1)
        across += list(2 * np.sqrt(volumes / np.pi) if len(size) == 2 else np.cbrt(6 * volumes / np.pi))
    return float(np.mean(counts)), float(np.mean(np.array(across) < 25))


@pytest.mark.parametrize(("kind", "size"), [("chest-ct", [96, 96]), ("chest-ct-volume", [24, 48, 48])])
def test_varied_lesions_are_several_and_partly_small(kind: str, size: list[int]) -> None:
    many, small = components("varied", kind, size)
    few, large = components("large", kind, size)
    assert many > 1.5 * few
    assert small > 0.3 > large


def test_ct_devices_differ_in_calibration_noise_and_sharpness_as_told() -> None:
    flat = np.zeros((1, 400, 400), dtype=np.float32)

    def seen(name: str) -> tuple[float, float]:
        values = scan(flat, DEVICES[name], np.random.default_rng(0))
        return float(values.mean()), float(values.std())

    # Water: (0 + 1000) * (1 + (gain - 1) / 10) - 1000 + offset; noise 1000 * noise / sqrt(thickness).
    assert seen("ct-fine-1mm") == pytest.approx((0, 20), abs=0.5)
    assert seen("ct-old-2mm") == pytest.approx((-40, 60 / 2**0.5), abs=1)
    assert seen("ct-smooth-1mm") == pytest.approx((-40, 20), abs=1)
    # Edges enhanced by e about a Gaussian of one pixel multiply the variance of white noise by
    # (1 + e)^2 - 2 e (1 + e) / (2 pi) + e^2 / (4 pi).
    assert seen("ct-low-dose-1mm") == pytest.approx((20, 45 * (1.96 - 1.12 / (2 * np.pi) + 0.16 / 12.57) ** 0.5), abs=1)
    noise = 25 / 1.25**0.5 * (4 - 4 / (2 * np.pi) + 1 / 12.57) ** 0.5
    assert seen("ct-sharp-1.25mm") == pytest.approx((40, noise), abs=1)
    wall = np.where(np.arange(400) < 200, -870, 0).astype(np.float32) * np.ones((1, 400, 1), dtype=np.float32)
    steps = {}
    for name in ("ct-sharp-1.25mm", "ct-fine-1mm", "ct-smooth-1mm"):
        rows = scan(wall, DEVICES[name], np.random.default_rng(0))[0].mean(axis=0)
        steps[name] = float(np.diff(rows).max())
    assert steps["ct-sharp-1.25mm"] > 1.2 * steps["ct-fine-1mm"] > 2 * steps["ct-smooth-1mm"]


def test_coarse_noise_is_as_strong_as_told_and_neighbours_share_it() -> None:
    flat = np.zeros((1, 400, 400), dtype=np.float32)
    coarse = scan(flat, DEVICES["ct-smooth-1mm"], np.random.default_rng(0))[0]
    fine = scan(flat, DEVICES["ct-fine-1mm"], np.random.default_rng(0))[0]
    assert float(coarse.std()) == pytest.approx(20, abs=0.5)
    assert np.corrcoef(coarse[:, 1:].ravel(), coarse[:, :-1].ravel())[0, 1] > 0.5
    assert abs(np.corrcoef(fine[:, 1:].ravel(), fine[:, :-1].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize("kind", KINDS)
@given(
    seed=st.integers(-(2**40), 2**40),
    patient=st.integers(0, 9999),
    finding=st.integers(0, 11),
    sizes=st.tuples(*[st.integers(8, 24)] * 3),
)
@example(seed=3002, patient=251, finding=3, sizes=(8, 8, 10))  # a nodule between the pixel centres
@example(seed=44120882906, patient=3553, finding=1, sizes=(8, 19, 9))  # an opacity of a CT slice likewise
@settings(max_examples=20, deadline=None)
def test_shapes_ranges_and_masks(kind: str, seed: int, patient: int, finding: int, sizes: tuple[int, int, int]) -> None:
    label = CLASSES[kind][finding % len(CLASSES[kind])]
    size = list(sizes[-len(SIZES[kind]) :])
    pixels, mask = phantom_picture(phantom(kind, seed), case(label, patient=patient), size)
    channels = 3 if kind.startswith("skin-") else 1
    assert pixels.shape == (channels, *size)
    assert mask.shape == tuple(size)
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) <= {0, 1}
    if kind != "chest-ct" or min(size) >= 12:
        assert bool(mask.any()) == (label != "normal")
    else:  # one slice in pixels of 30 mm and more: a small opacity may lie between their centres
        assert not mask.any() or label != "normal"
    if kind.startswith("chest-ct"):
        assert pixels.dtype == np.float32
        assert pixels.min() >= -1024
        assert pixels.max() <= 3071
        assert np.array_equal(pixels, np.round(pixels))
    else:
        assert pixels.dtype == np.uint8
        assert pixels.std() > 5


def test_ct_has_air_lung_and_soft_tissue_in_hounsfield_units() -> None:
    pixels, _ = phantom_picture(phantom("chest-ct"), case("normal"), [96, 96])
    lungs = lung_mask(phantom("chest-ct"), case("normal"), [96, 96])
    assert abs(float(pixels[0, :5].mean()) + 1000) < 20
    assert -900 < float(np.median(pixels[0][lungs == 1])) < -750
    assert 0.08 < lungs.mean() < 0.35
    assert float(pixels.max()) > 300


def test_lesions_lie_in_the_lungs_and_raise_their_density() -> None:
    healthy, _ = phantom_picture(phantom("chest-ct-volume"), case("normal"), [12, 48, 48])
    sick, mask = phantom_picture(phantom("chest-ct-volume"), case("consolidation"), [12, 48, 48])
    lungs = lung_mask(phantom("chest-ct-volume"), case("consolidation"), [12, 48, 48])
    assert (lungs[mask == 1]).mean() > 0.95
    assert float((sick - healthy)[0][mask == 1].mean()) > 200


def test_neighbouring_slices_of_a_volume_belong_together() -> None:
    volume, _ = phantom_picture(phantom("chest-ct-volume"), case("normal"), [40, 32, 32])
    flat = volume[0].reshape(40, -1)
    near = np.corrcoef(flat)[np.arange(39), np.arange(1, 40)]
    assert near.min() > 0.9
    assert np.corrcoef(flat[2], flat[20])[0, 1] < near.min()


def test_thick_slices_are_quieter_and_smoother_along_the_body() -> None:
    thin, _ = phantom_picture(phantom("chest-ct-volume"), case("normal", "reference"), [40, 32, 32])
    thick, _ = phantom_picture(phantom("chest-ct-volume"), case("normal", "soft"), [40, 32, 32])
    rough = [float(np.abs(np.diff(v[0], axis=0)).mean()) for v in (thin, thick)]
    assert rough[1] < rough[0]


def test_counts_follow_the_prevalence() -> None:
    shares = {"normal": 0.5, "pneumonia": 0.3, "effusion": 0.2, "nodule": 0.0}
    cases = phantom_cases(phantom(patients=100, prevalence=shares), task())
    patients = {c.patient: c.label for c in cases}
    counts = Counter(patients.values())
    assert len(patients) == 100
    for name, share in shares.items():
        assert abs(counts[name] - 100 * share) <= 2, name
    images = Counter(c.patient for c in cases)
    assert set(images.values()) == {1, 2}
    assert len({c.image for c in cases}) == len(cases)
    assert cases[0].image == "north/p0000_0"
    assert cases[0].patient == "north-p0000"
    assert all(c.label == patients[c.patient] for c in cases)


def test_classes_left_out_share_the_rest() -> None:
    cases = phantom_cases(phantom(patients=300, prevalence={"normal": 0.7}), task())
    counts = Counter({c.patient: c.label for c in cases}.values())
    assert all(abs(counts[name] - 30) <= 2 for name in ("pneumonia", "effusion", "nodule"))


def test_only_the_classes_of_the_task_are_drawn() -> None:
    two = TaskSettings(classes=["pneumonia", "normal"])
    assert {c.label for c in phantom_cases(phantom(patients=30), two)} == {"normal", "pneumonia"}


def test_multi_label_patients_may_have_several_findings() -> None:
    several = TaskSettings(kind="multi-label", classes=["nodule", "pneumonia", "effusion"])
    labels = [c.label for c in phantom_cases(phantom(patients=200), several)]
    assert "" in labels
    assert any("|" in label for label in labels)
    assert {name for label in labels for name in label.split("|") if name} == {"nodule", "pneumonia", "effusion"}
    both, _ = phantom_picture(phantom(), case("pneumonia|nodule"), [32, 32])
    one, _ = phantom_picture(phantom(), case("pneumonia"), [32, 32])
    assert (both != one).any()


def test_segmentation_refers_to_masks_and_keeps_labels() -> None:
    cases = phantom_cases(phantom(), TaskSettings(kind="segmentation", classes=["background", "lesion"]))
    assert cases[0].mask == "north/p0000_0#mask"
    assert all(c.label in CLASSES["chest-xray"] for c in cases)


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ({"device": "grany"}, "unknown device 'grany'. Did you mean 'grainy'"),
        ({"prevalence": {"pneumona": 0.1}}, "unknown class 'pneumona'. Did you mean 'pneumonia'"),
        ({"prevalence": {"normal": 0.8, "nodule": 0.4}}, "sums to 1.2; it must sum to at most 1"),
        ({"prevalence": {"normal": -0.1}}, "'normal' the share -0.1"),
        ({"prevalence": dict.fromkeys(CLASSES["chest-xray"], 0.2)}, "sums to 0.8; it must sum to 1"),
    ],
)
def test_a_wrong_site_is_refused(site: dict[str, object], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        phantom_cases(phantom(**site), task())


@pytest.mark.parametrize(
    ("kind", "wanted", "message"),
    [
        (
            "chest-xray",
            TaskSettings(classes=["normal", "nodul"]),
            "no multi-class class 'nodul'. Did you mean 'nodule'",
        ),
        ("chest-xray", TaskSettings(classes=["normal"]), "at least two"),
        ("chest-xray", TaskSettings(kind="multi-label", classes=["normal"]), "no multi-label class 'normal'"),
        ("skin-lesion", TaskSettings(kind="multi-label", classes=["nevus"]), "exactly one class"),
        ("skin-diagnoses", TaskSettings(kind="multi-label", classes=["NV"]), "exactly one class"),
        (
            "chest-ct",
            TaskSettings(kind="segmentation", classes=["lesion"]),
            r"Set task.classes to \[background, lesion",
        ),
    ],
)
def test_a_task_without_an_answer_is_refused(kind: str, wanted: TaskSettings, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        phantom_cases(phantom(kind), wanted)


def test_wrong_sizes_references_and_twins_are_refused() -> None:
    with pytest.raises(StudyError, match=r"\[6, 32, 32\] does not fit a chest-xray"):
        phantom_picture(phantom(), case("normal"), [6, 32, 32])
    with pytest.raises(StudyError, match="depth, height, width"):
        phantom_picture(phantom("chest-ct-volume"), case("normal"), [32, 32])
    with pytest.raises(DataError, match="is no phantom image"):
        phantom_picture(phantom(), replace(case("normal"), image="a.png"), [32, 32])
    with pytest.raises(DataError, match="unknown class 'cold'"):
        phantom_picture(phantom(), case("cold"), [32, 32])
    with pytest.raises(StudyError, match="chest-xray has no lung mask"):
        lung_mask(phantom(), case("normal"), [32, 32])
    twins = PhantomSettings(sites=[PhantomSite(name="north"), PhantomSite(name="north")])
    with pytest.raises(StudyError, match="north is listed twice"):
        phantom_cases(twins, task())


@pytest.mark.parametrize("kind", KINDS)
def test_written_phantoms_read_back_as_they_were_drawn(kind: str, tmp_path: Path) -> None:
    from polyclinic.data.readers import read_mask, read_picture

    made = phantom(kind, patients=3)
    wanted = TaskSettings(kind="segmentation", classes=["background", "lesion"])
    assert write_phantoms(made, wanted, tmp_path, SIZES[kind]) == tmp_path
    drawn, stored = phantom_cases(made, wanted), read_manifest(tmp_path / "north" / "manifest.csv", wanted)
    assert [(c.patient, c.label, c.device) for c in stored] == [(c.patient, c.label, c.device) for c in drawn]
    for here, there in zip(drawn, stored, strict=True):
        pixels, mask = phantom_picture(made, here, SIZES[kind])
        assert np.array_equal(read_picture(there.source, there.image).pixels, pixels)
        assert np.array_equal(read_mask(there.source, there.mask).pixels[0], mask)
    with pytest.raises(DataError, match="is there already"):
        write_phantoms(made, wanted, tmp_path, SIZES[kind])


def test_the_class_is_learnable_and_the_device_is_visible() -> None:
    from sklearn.linear_model import LogisticRegression

    two = TaskSettings(classes=["normal", "pneumonia"])
    devices = ("reference", "bright", "soft", "grainy")
    made = PhantomSettings(
        sites=[PhantomSite(name=d, device=d, patients=200 if d == "reference" else 30) for d in devices]
    )
    cases = phantom_cases(made, two)
    images = np.stack([phantom_picture(made, c, [24, 24])[0][0] for c in cases]).astype(np.float64) / 255
    labels = np.array([c.label == "pneumonia" for c in cases])
    owners = np.array([c.device for c in cases])
    here = np.flatnonzero(owners == "reference")
    learn, test = here[: len(here) * 2 // 3], here[len(here) * 2 // 3 :]
    disease = LogisticRegression(C=0.3, max_iter=500).fit(images[learn].reshape(len(learn), -1), labels[learn])
    assert 0.75 < disease.score(images[test].reshape(len(test), -1), labels[test]) < 1.0

    grain = np.abs(np.diff(images, axis=2)).mean((1, 2))
    seen = np.stack([images.mean((1, 2)), images.std((1, 2)), grain], axis=1)
    even = np.arange(len(cases)) % 2 == 0
    scanner = LogisticRegression(C=1e4, max_iter=5000).fit(seen[even], owners[even])
    assert scanner.score(seen[~even], owners[~even]) > 0.95


def test_a_thousand_small_radiographs_take_about_a_second() -> None:
    from time import process_time

    start = process_time()
    for patient in range(100):
        phantom_picture(phantom(), case("effusion", "soft", patient), [64, 64])
    assert process_time() - start < 1.0


@given(st.integers(8, 40), st.integers(8, 40), st.integers(4, 12))
@settings(max_examples=25, deadline=None)
def test_clouds_are_smooth_finite_and_of_the_wanted_shape(height: int, width: int, knots: int) -> None:
    noise = clouds(stream(0, "a", 0, "x"), (height, width), knots)
    assert noise.shape == (height, width)
    assert noise.dtype == np.float32
    assert np.isfinite(noise).all()
    solid = solid_clouds(stream(0, "a", 0, "x"), np.array([-1.0, 0.0, 1.0], dtype=np.float32), (height, width), knots)
    assert solid.shape == (3, height, width)


def test_edges_ripples_and_covers() -> None:
    ramp = np.array([-1.0, -0.25, 0.0, 0.25, 1.0], dtype=np.float32)
    assert step(ramp, 0.5).tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert ripple(np.array([0.0, 0.5, 1.0, 7.5], dtype=np.float32)).tolist() == [1.0, 0.0, 1.0, 0.0]
    assert covered(np.array([[0.0, 0.2], [0.1, 0.0]], dtype=np.float32)).tolist() == [[0, 1], [0, 0]]
    assert covered(np.zeros((2, 2), dtype=np.float32)).sum() == 0
