"""Eight diagnoses under six dermatoscopes: exact numbers, signs that differ, devices that do what they say."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from polyclinic.data.manifest import Case, collect, read_manifest
from polyclinic.data.phantoms import CLASSES, DEVICES, phantom_cases, phantom_picture, write_phantoms
from polyclinic.data.phantoms.devices import Device, photograph
from polyclinic.errors import StudyError
from polyclinic.study import DataSettings, PhantomSettings, PhantomSite, TaskSettings, dump_study, validate_study

KIND = "skin-diagnoses"
NAMES = CLASSES[KIND]
TASK = TaskSettings(classes=list(NAMES))
COUNTS = {"train": {"NV": 7, "MEL": 2}, "val": {"NV": 1}, "test": dict.fromkeys(NAMES, 2)}


def made(counts: object = COUNTS, **site: object) -> PhantomSettings:
    return PhantomSettings(kind=KIND, sites=[PhantomSite(**{"name": "north", "counts": counts, **site})])


def seen(label: str, patient: int, device: str = "reference", size: int = 24) -> tuple[np.ndarray, np.ndarray]:
    reference = f"north/p{patient:04d}_0"
    case = Case(image=reference, patient="p", site="north", device=device, label=label, source="phantom")
    pixels, mask = phantom_picture(made(), case, [size, size])
    return pixels.astype(np.float64) / 255, mask == 1


def test_counts_are_exact_and_say_the_split() -> None:
    cases = phantom_cases(made(), TASK)
    wanted = {("train", "NV"): 7, ("train", "MEL"): 2, ("val", "NV"): 1} | {("test", name): 2 for name in NAMES}
    assert Counter((c.split, c.label) for c in cases) == wanted
    assert len({c.patient for c in cases}) == len({c.image for c in cases}) == len(cases) == 26
    assert collect(DataSettings(phantom=made()), TASK, Path())["north"] == cases


def test_one_more_patient_of_a_class_leaves_all_others_as_they_are() -> None:
    before = {c.image: (c.label, c.split) for c in phantom_cases(made(), TASK)}
    more = {**COUNTS, "train": {"NV": 7, "MEL": 3, "SCC": 1}}
    after = {c.image: (c.label, c.split) for c in phantom_cases(made(more), TASK)}
    assert before.items() < after.items()
    assert sorted(after[name] for name in after.keys() - before.keys()) == [("MEL", "train"), ("SCC", "train")]


def test_devices_are_shared_out_over_counted_patients() -> None:
    cases = phantom_cases(made({"train": {"NV": 6}, "test": {"NV": 2}}, device={"derm-warm": 3, "derm-dim": 1}), TASK)
    assert Counter(c.device for c in cases) == {"derm-warm": 6, "derm-dim": 2}


def test_counts_come_back_from_a_study_file() -> None:
    raw = {"name": "a", "task": {"classes": list(NAMES)}, "data": {"phantom": made().model_dump(mode="json")}}
    study = validate_study(raw)
    again = validate_study(yaml.safe_load(dump_study(study)))
    assert again.data.phantom == study.data.phantom == made()


def test_written_images_keep_their_split(tmp_path: Path) -> None:
    write_phantoms(made(), TASK, tmp_path, [16, 16])
    stored = read_manifest(tmp_path / "north" / "manifest.csv", TASK)
    assert Counter(c.split for c in stored) == {"train": 9, "val": 1, "test": 16}


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"train": {"nv": 1}}, "counts of site 'north' name the unknown class 'nv'. Did you mean 'NV'"),
        ({"train": {"NV": 3}, "test": {"SC": 1}}, "unknown class 'SC'"),
    ],
)
def test_a_wrong_class_is_refused(counts: object, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        phantom_cases(made(counts), TASK)


def test_what_counts_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="leave prevalence out"):
        made(prevalence={"NV": 0.5})
    with pytest.raises(ValueError, match="train"):
        made({"training": {"NV": 1}})
    several = TaskSettings(kind="multi-label", classes=["pneumonia"])
    chest = PhantomSettings(sites=[PhantomSite(name="north", counts={"train": {"pneumonia": 3}})])
    with pytest.raises(StudyError, match="multi-label does not fit"):
        phantom_cases(chest, several)


def test_a_dermatoscope_does_to_grey_what_its_numbers_say() -> None:
    grey = np.full((3, 40, 40), 0.7, dtype=np.float32)
    look = Device("", gain=0.5, gamma=2.0, noise=0.0, cast=(1.0, 0.5, 0.8), vignette=0.4)
    found = photograph(grey, look, np.random.default_rng(0)).astype(float) / 255
    # ((0.7 - 0.5) * 0.5 + 0.5)^2 = 0.36, times the factor of the colour; corners lose 40%, less half a pixel.
    assert found[:, 20, 20] == pytest.approx(0.36 * np.array([1.0, 0.5, 0.8]), abs=0.004)
    assert found[:, 0, 0] == pytest.approx(0.36 * np.array([1.0, 0.5, 0.8]) * (1 - 0.4 * (39 / 40) ** 2), abs=0.004)
    blurred = photograph(
        np.eye(41, dtype=np.float32)[None].repeat(3, 0), DEVICES["derm-slide"], np.random.default_rng(0)
    )
    assert blurred[0].max() < 200


def test_each_diagnosis_shows_its_sign() -> None:
    patients = range(25)

    def mean_colour(label: str) -> np.ndarray:
        drawn = [seen(label, patient) for patient in patients]
        return np.mean([pixels[:, mask].mean(1) for pixels, mask in drawn], axis=0)

    colour = {name: mean_colour(name) for name in NAMES}
    brightness = {name: float(value.mean()) for name, value in colour.items()}
    redness = {name: float(value[0] - value[1]) for name, value in colour.items()}
    blueness = {name: float(value[2] - value[1]) for name, value in colour.items()}
    assert min(brightness, key=lambda n: brightness[n]) in ("MEL", "VASC")
    assert max(redness, key=lambda n: redness[n]) == "VASC"
    assert blueness["BCC"] > max(blueness[n] for n in ("AK", "BKL", "NV", "SCC"))
    assert redness["AK"] > redness["BKL"]
    yellow = {name: float(value[1] - value[2]) for name, value in colour.items()}
    assert yellow["SCC"] > max(yellow[n] for n in ("AK", "BCC", "DF", "MEL"))

    def middle(label: str) -> float:
        """How much brighter the middle of a lesion is than its rim."""
        differences = []
        for patient in patients:
            pixels, mask = seen(label, patient, size=48)
            y, x = (axis[mask] for axis in np.indices(mask.shape))
            away = (y - y.mean()) ** 2 + (x - x.mean()) ** 2
            inner = away < np.quantile(away, 0.2)
            values = pixels.mean(0)[mask]
            differences.append(values[inner].mean() - values[~inner].mean())
        return float(np.mean(differences))

    assert middle("DF") > 0.02 > 0 > middle("NV")


def test_classes_are_learnable_and_overlap_and_devices_differ() -> None:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    def features(pixels: np.ndarray) -> np.ndarray:
        rings = np.hypot(*np.meshgrid(*[np.linspace(-1, 1, 24)] * 2))
        inside = [pixels[:, (rings >= low) & (rings < low + 0.25)] for low in (0.0, 0.25, 0.5, 0.75)]
        return np.concatenate([np.r_[part.mean(1), part.std(1)] for part in inside])

    labels = np.repeat(np.arange(8), 60)
    table = np.stack([features(seen(NAMES[k], patient)[0]) for k in range(8) for patient in range(60)])
    even = np.arange(len(labels)) % 2 == 0
    model = LinearDiscriminantAnalysis().fit(table[even], labels[even])
    assert 0.45 < model.score(table[~even], labels[~even]) < 0.95

    dermatoscopes = [name for name in DEVICES if name.startswith("derm-")]
    assert len(dermatoscopes) == 6
    owners = np.repeat(np.arange(6), 40)
    table = np.stack([features(seen(NAMES[p % 8], p, name)[0]) for name in dermatoscopes for p in range(40)])
    even = np.arange(len(owners)) % 2 == 0
    told = LinearDiscriminantAnalysis().fit(table[even], owners[even])
    assert told.score(table[~even], owners[~even]) > 0.8
