"""The study file: one YAML, one schema, every default visible.

``load_study`` reads a file, applies ``--set`` overrides, refuses unknown keys with the nearest valid name and
impossible combinations with the reason and the nearest combination that works. Nothing here imports torch until the
settings of a method are looked up. The settings of ``data`` are in ``data_settings`` and can be imported from here too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, SerializeAsAny, ValidationError, field_validator

from polyclinic.data_settings import Columns as Columns
from polyclinic.data_settings import DataSettings as DataSettings
from polyclinic.data_settings import ImageSettings as ImageSettings
from polyclinic.data_settings import PartitionSettings as PartitionSettings
from polyclinic.data_settings import PhantomSettings as PhantomSettings
from polyclinic.data_settings import PhantomSite as PhantomSite
from polyclinic.data_settings import ScannerSettings as ScannerSettings
from polyclinic.data_settings import SiteName as SiteName
from polyclinic.data_settings import SplitSettings as SplitSettings
from polyclinic.data_settings import TableSettings as TableSettings
from polyclinic.data_settings import WindowSettings as WindowSettings
from polyclinic.errors import StudyError, nearest
from polyclinic.settings import Settings
from polyclinic.synthesis.settings import SynthesisSettings
from polyclinic.yaml_settings import assign, explain, override, read_yaml


class TaskSettings(Settings):
    """What is predicted."""

    kind: Literal["multi-class", "multi-label", "segmentation"] = "multi-class"
    """One class an image, any number of findings an image, or one class a pixel."""
    classes: list[str] = Field(min_length=1)
    """Class names in order: the order of the network's outputs at every site. For segmentation the first is the
    background."""
    loss: Literal["auto", "cross-entropy", "focal", "logit-adjusted", "fedlc", "dice-ce"] = "auto"
    """``auto``: cross-entropy (binary cross-entropy for multi-label), Dice + cross-entropy for segmentation;
    logit-adjusted for fedssg. ``logit-adjusted`` (balanced softmax) and ``fedlc`` favour classes that are rare among
    what a site trains on."""
    tau: float = Field(1.0, ge=0)
    """Strength of logit-adjusted and fedlc."""
    threshold: Annotated[float, Field(gt=0, lt=1)] | Literal["validation"] = 0.5
    """Segmentation with two classes: foreground is where its probability is at least this. ``validation``: each site
    takes the value with the best mean Dice on its own validation images. With more classes the likeliest counts."""
    window_overlap: float = Field(0.25, ge=0, lt=1)
    """Segmentation: overlap of neighbouring windows in sliding-window inference, as a fraction of the window."""

    @field_validator("classes")
    @classmethod
    def _distinct(cls, classes: list[str]) -> list[str]:
        twice = sorted({c for c in classes if classes.count(c) > 1})
        if twice:
            raise ValueError(f"classes are listed twice: {', '.join(twice)}")
        odd = [c for c in classes if "|" in c or not c.strip()]
        if odd:
            raise ValueError(f"class {odd[0]!r} is empty or holds '|', which joins the labels of an image")
        return classes


class ModelSettings(Settings):
    """The network that is trained."""

    name: str = "small-cnn"
    """A name of ``polyclinic methods`` (small-cnn, small-resnet, resnet18, resnet34, resnet50, mobilenet, shufflenet,
    efficientnet-b0, densenet121, densenet3d, unet, unet-2.5d), or your own as ``module:function``."""
    norm: Literal["batch", "batch-local", "group", "instance"] = "batch"
    """``batch``: running statistics are averaged over sites. ``batch-local``: they stay at the site. ``group`` and
    ``instance`` have none."""
    width: int = Field(16, ge=1)
    """Channels of the first layer of small-cnn, small-resnet and unet."""
    options: dict[str, Any] = {}
    """Further keyword arguments of the network's constructor."""
    harmonise: float = Field(0.0, ge=0, le=1)
    """Share of each image's Fourier amplitude that is replaced by one that all sites have in common (flat images), as
    in HarmoFL; 0: none."""
    harmonise_window: int | None = Field(None, ge=0)
    """harmonise: half-width of the low frequencies that are replaced; 0: the mean of each colour alone, as in HarmoFL's
    published code; empty: all."""
    embedding: int | None = Field(None, ge=1)
    """Features that enter the last layer: a linear layer to so many before it, so that different networks have features
    alike; empty: as the network has them."""
    weights: str = ""
    """A safetensors file to start from, relative to ``data.root``; empty: random, from the study's seed."""


class ProxySettings(Settings):
    """Public images with labels that every site and the server have; ``polyclinic data proxies`` makes the manifest."""

    manifest: str
    """JSON with classes, labels and the SHA-256 of every image; it travels with the study, so it is relative to the
    study file (in ``set`` of a comparison's method to ``data.root``)."""
    images: str
    """Folder or zip that the manifest's paths are relative to, relative to ``data.root``. Images are never sent."""
    pretrain: int = Field(0, ge=0)
    """Passes over the images before round 1 that every network starts from; its last layer stays random."""


class AugmentSettings(Settings):
    """Random changes of training images, drawn anew for every batch."""

    flip: bool = False
    """Mirror left-right (for segmentation the mask too)."""
    flip_vertical: bool = False
    """Mirror top-bottom."""
    rotate_degrees: float = Field(0.0, ge=0, le=180)
    """Largest rotation either way, within the plane."""
    scale: float = Field(0.0, ge=0, lt=1)
    """Largest relative change of size, within the plane."""
    intensity: float = Field(0.0, ge=0, lt=1)
    """Largest relative change of contrast and, in units of the range, of brightness."""


class TrainingSettings(Settings):
    """One site's local training; the same for every method."""

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """Started afresh in every round."""
    lr: float = Field(0.05, ge=0)
    """Learning rate of the first round."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """Momentum of sgd."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay."""
    batch_size: int = Field(32, ge=1)
    """Images per step."""
    epochs: int = Field(1, ge=1)
    """Passes over the site's training images per round; ignored where ``steps`` is given."""
    steps: int | None = Field(None, ge=1)
    """Gradient steps per round."""
    schedule: Literal["constant", "cosine"] = "constant"
    """How the learning rate changes from round to round."""
    clip: float | None = Field(None, gt=0)
    """Largest gradient norm."""
    balanced: bool = False
    """Draw images so that the site's classes are equally frequent (multi-class)."""
    amp: bool = True
    """Mixed precision (bfloat16) on CUDA; never on CPU."""
    patch: list[int] | None = None
    """Segmentation: train on random patches of this size and predict with a sliding window of it."""
    augment: AugmentSettings = AugmentSettings()
    """Random changes of the images."""


class AggregationSettings(Settings):
    """How updates are combined. The name of a backend alone is short for ``{backend: NAME}``."""

    backend: Literal["plain", "masked", "ring-he", "ring-as-published"] = "plain"
    """``plain``: the server sees each update. ``masked``: masks that cancel in the sum; nobody holds a key, sites may
    drop out. ``ring-he``: the cyclic sum of PPPML-HMI with BFV and masks that sum to zero. ``ring-as-published``: with
    CKKS and a Gaussian mask as in its code, for comparison only. All but plain need three sites or more."""
    weight: Literal["images", "patients", "uniform"] = "images"
    """What a site weighs in a sum over sites: its number of training images, of training patients, or one."""
    lanes: Literal[16, 32] = 32
    """masked: bits per value of an update. 16 halves the traffic; what they lose is added to the next update."""
    reach: float = Field(0.25, gt=0, le=2**20)
    """Values of an update are expected below this, or below the largest weight of their tensor where that is larger.
    32-bit lanes carry 256 times as much and refuse more; narrower ones cut it and carry it over to the next round."""
    key_holder: Literal["sites", "initiator", "server"] = "sites"
    """ring-he: who can decrypt: all sites with a common key, or the round's first site, or the server."""
    fewest: int | None = Field(None, ge=3, le=16)
    """All but plain: a site takes part in no sum over fewer sites; empty: more than two thirds of those that a round
    asks, and three at least. A server that could ask fewer could surround a site with its friends."""
    provider: Literal["auto", "seal", "tenseal"] = "auto"
    """ring-he: the library of homomorphic encryption; ``auto``: seal where it is installed, else tenseal."""

    @property
    def width(self) -> int:
        """Bits of the narrowest lanes that an update may travel in."""
        if self.backend == "ring-he":
            return 20 if self.key_holder == "sites" else 18
        return self.lanes


class EvaluationSettings(Settings):
    """How a run is judged. Validation chooses, test only reports."""

    every: int = Field(1, ge=0)
    """Evaluate on validation images every so many rounds (and after the last); 0: only after the last."""
    select: Literal["best", "last"] = "best"
    """Which round's model is kept: the best by ``metric`` on validation images (mean over sites), or the last."""
    metric: str = "auto"
    """What ``best`` means: for classification any metric (``loss``, ``auroc``, ``balanced_accuracy``, ...), for
    segmentation ``dice``; ``auto``: balanced_accuracy for multi-class, auroc for multi-label, dice for segmentation."""
    bootstrap: int = Field(1000, ge=0, le=100_000)
    """Resamples of the patients for the intervals."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """Level of the intervals."""
    batch_size: int = Field(128, ge=1)
    """Images per step of inference."""
    examples: int = Field(4, ge=0, le=32)
    """Test images per site shown in the report; 0 keeps every image out of the results folder."""


class ComparisonSettings(Settings):
    """Further methods that ``polyclinic run`` trains beside the study's own, for one table."""

    methods: list[str | dict[str, Any]] = []
    """Names, or mappings with a name and settings, as in ``method``. ``set`` in a mapping changes settings of the study
    for that method alone: ``{name: fedavg, label: focal, set: {task.loss: focal}}``."""
    seeds: list[int] = []
    """Seeds that every method runs with; empty: the study's seed."""


class FederationSettings(Settings):
    """What happens when a site does not answer."""

    on_absent: Literal["stop", "continue"] = "stop"
    """``stop``: a failed site ends the run, which can be resumed. ``continue``: the round goes on without it."""
    roster: str = ""
    """File with the sites' public keys (``polyclinic keys trust``), relative to the study file; empty: sites of one
    process make keys for the run."""
    keys: str = ""
    """Folder with the sites' private keys (``polyclinic keys new``); needed where there is a roster."""


class Study(Settings):
    """One experiment."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    """Name of the study; begins the name of the results folder."""
    description: str = ""
    """Printed at the head of the report."""
    seed: int = Field(0, ge=0)
    """Seed of everything that is random in training: start weights, order of images, augmentation."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the networks run."""
    task: TaskSettings
    """What is predicted."""
    data: DataSettings
    """Where the images are."""
    model: ModelSettings = ModelSettings()
    """The network."""
    models: dict[SiteName, ModelSettings] = {}
    """The network of a site that has one of its own; sites not named use ``model``."""
    proxies: ProxySettings | None = None
    """Public images that sites and server have alike, for methods that exchange knowledge through them; empty: none."""
    training: TrainingSettings = TrainingSettings()
    """Local training."""
    method: SerializeAsAny[Any] = Field("fedavg", validate_default=True)
    """How the sites learn together: a name and that method's settings."""
    aggregation: AggregationSettings = AggregationSettings()
    """How updates are combined."""
    synthesis: SynthesisSettings | None = None
    """Synthetic samples that sites exchange before the first round; empty: none."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """How the run is judged."""
    compare: ComparisonSettings = ComparisonSettings()
    """Further methods for the same table."""
    federation: FederationSettings = FederationSettings()
    """What happens when a site does not answer."""

    @field_validator("method", mode="before")
    @classmethod
    def _known_method(cls, value: Any) -> Any:
        from polyclinic.methods import parse_params

        return parse_params(value)

    @field_validator("aggregation", mode="before")
    @classmethod
    def _named_backend(cls, value: Any) -> Any:
        return {"backend": value} if isinstance(value, str) else value

    def cohort_size(self, sites: int) -> int:
        """How many of so many sites train in a round."""
        share: float = self.method.participation
        return max(1, round(share * sites))

    @property
    def digest(self) -> str:
        """SHA-256 of what all parties must agree on, hexadecimal: everything but where data and keys lie."""
        own = self.model_dump(mode="json", exclude={"data", "device", "compare", "federation", "description"})
        if own["proxies"] is not None:
            # Where they lie is a site's own business; what they are is compared before each round.
            own["proxies"] = {"pretrain": own["proxies"]["pretrain"]}
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()

    def model_of(self, site: str) -> ModelSettings:
        """The network of a site: its own in ``models``, else ``model``."""
        return self.models.get(site, self.model)

    @property
    def mixed(self) -> bool:
        """Whether any site has other network settings than ``model``."""
        return any(own != self.model for own in self.models.values())

    @property
    def weights_path(self) -> Path | None:
        """The file that training starts from, or None for a random start."""
        return self.weights_of(self.model)

    def weights_of(self, model: ModelSettings) -> Path | None:
        """The file that a network starts from, or None for a random start."""
        return Path(self.data.root) / model.weights if model.weights else None


def load_study(
    path: Path | str,
    *,
    overrides: Sequence[str] = (),
    data_root: Path | str | None = None,
) -> Study:
    """Read, override and validate a study file.

    Args:
        path: The YAML file.
        overrides: ``key.path=value`` texts, values in YAML, as ``--set`` takes them.
        data_root: Moves ``data.root``; else the environment's ``POLYCLINIC_DATA``, else the file's own value,
            which is relative to the study file.

    Returns:
        The study with ``data.root`` absolute.

    Raises:
        StudyError: The file is missing, is no YAML, has an unknown key, a wrong value or an impossible combination.
    """
    path = Path(path)
    raw = read_yaml(path)
    for text in overrides:
        section = raw.get("aggregation")
        override(raw, text)
        if isinstance(section, dict) and isinstance(raw["aggregation"], str):
            # --set aggregation=masked changes the backend, not the weights.
            raw["aggregation"] = {**section, "backend": raw["aggregation"]}
    raw.setdefault("name", path.stem)
    study = validate_study(raw, str(path))
    moved = data_root or os.environ.get("POLYCLINIC_DATA")
    root = Path(moved) if moved else path.parent / study.data.root
    data = study.data.model_copy(update={"root": str(root.expanduser().resolve())})
    own = {name: getattr(study.federation, name) for name in ("roster", "keys")}
    own = {name: str((path.parent / value).expanduser().resolve()) for name, value in own.items() if value}
    proxies = study.proxies
    if proxies is not None:
        manifest = str((path.parent / proxies.manifest).expanduser().resolve())
        proxies = proxies.model_copy(update={"manifest": manifest})
    federation = study.federation.model_copy(update=own)
    return study.model_copy(update={"data": data, "federation": federation, "proxies": proxies})


def validate_study(raw: Mapping[str, Any], where: str = "study") -> Study:
    """Validate a mapping as a study; ``where`` names its origin in error messages.

    Raises:
        StudyError: With one line per fault.
    """
    from polyclinic.methods import check_combination

    study = _parsed(raw, where)
    _check_metric(study)
    _check_synthesis_used(study)
    check_combination(study)
    return study


def _parsed(raw: Mapping[str, Any], where: str) -> Study:
    try:
        return Study.model_validate(dict(raw))
    except ValidationError as error:
        raise StudyError(explain(error, Study, f"{where} is not a valid study:", raw)) from None


def _check_synthesis_used(study: Study) -> None:
    """Refuse samples that no method of the study could use."""
    from polyclinic.methods import METHODS, method_class

    if study.synthesis is None:
        return
    listed = [study.method.name, *(m if isinstance(m, str) else m.get("name") for m in study.compare.methods)]
    if not any(method_class(name).exchanges for name in listed if name in METHODS):
        raise StudyError(
            f"synthesis: sites exchange nothing before method {study.method.name}, so nobody would train with samples. "
            "Leave synthesis out (--set synthesis=null), or use method fedavg, fedavg-ft or per-fedavg."
        )


def _check_metric(study: Study) -> None:
    from polyclinic.evaluation.names import CLASSIFICATION_METRICS, THRESHOLD_METRICS

    measured = [name for name in CLASSIFICATION_METRICS if name not in THRESHOLD_METRICS]
    known = ["auto", *(["dice"] if study.task.kind == "segmentation" else measured)]
    if study.evaluation.metric not in known:
        raise StudyError(
            f"evaluation.metric: {study.evaluation.metric!r} is not measured on validation images of a "
            f"{study.task.kind} task. {nearest(study.evaluation.metric, known)}"
        )


def dump_study(study: Study) -> str:
    """The study as YAML with every default written out; ``load_study`` reads it back to an equal study."""
    return yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def with_method(study: Study, method: str | Mapping[str, Any], seed: int) -> Study:
    """The same study with another method and seed and nothing to compare with.

    Settings that the two methods share by name (``rounds``, ``participation``) carry over unless ``method`` sets them.
    ``set`` of a mapping overrides settings of the study for this method alone, as ``{key.path: value}``. A method
    whose sites exchange nothing beforehand goes without the study's ``synthesis``.
    """
    from polyclinic.methods import check_combination, method_class, params_class, parse_params

    wanted = {"name": method} if isinstance(method, str) else dict(method)
    changes: Any = wanted.pop("set", {})
    study = _with_own_settings(study, changes)
    name = wanted.get("name")
    if not isinstance(name, str):
        raise StudyError(f"compare.methods: {wanted} has no name. Write {{name: fedprox, mu: 0.1}}, for instance.")
    try:
        fields = params_class(name).model_fields
        kept = study.method.model_dump().items()
        same = name == study.method.name
        carried = {k: v for k, v in kept if k in fields and (same or k in ("rounds", "participation")) and k != "label"}
        params = parse_params({**carried, **wanted})
    except ValidationError as error:
        raise StudyError(explain(error, params_class(name), f"compare.methods, {name}:")) from None
    except ValueError as error:
        raise StudyError(f"compare.methods: {error}") from None
    changed = study.model_copy(update={"method": params, "seed": seed, "compare": ComparisonSettings()})
    if study.synthesis is not None and not method_class(name).exchanges:
        if any(str(key).split(".")[0] == "synthesis" for key in changes):
            raise StudyError(f"compare.methods: set gives {name} a synthesis that its sites would not use. Remove it.")
        changed = changed.model_copy(update={"synthesis": None})
    check_combination(changed)
    return changed


OWN_SECTIONS = ("task.loss", "task.tau", "model", "models", "proxies", "training", "aggregation", "synthesis")
"""What ``set`` of a method in a comparison may change: never the images, the classes or how a run is judged."""


def _with_own_settings(study: Study, changes: Any) -> Study:
    if not isinstance(changes, Mapping):
        raise StudyError("compare.methods: set holds overrides as {key.path: value}, such as {task.loss: focal}.")
    if not changes:
        return study
    raw = study.model_dump(mode="json")
    for key, value in changes.items():
        if not any(key == own or str(key).startswith(f"{own}.") for own in OWN_SECTIONS):
            raise StudyError(
                f"compare.methods: set cannot change {key!r}, for all methods of a table must see the same images and "
                f"be judged alike. It takes {', '.join(OWN_SECTIONS)} and what is below them."
            )
        # The name of a backend alone changes the backend, not the weights.
        short = key == "aggregation" and isinstance(value, str)
        assign(raw, "aggregation.backend" if short else str(key), value, f"compare.methods, set {key}")
    # Not as a whole study: what it is combined with is another method than the study's own.
    return _parsed(raw, f"compare.methods, set {', '.join(map(str, changes))}")


def study_schema() -> dict[str, Any]:
    """JSON schema of the study file, with the settings of every method."""
    from polyclinic.methods import METHODS, method_class, params_class

    schema = Study.model_json_schema()
    choices: list[dict[str, Any]] = [{"enum": sorted(METHODS)}]
    for name in sorted(METHODS):
        part = params_class(name).model_json_schema(ref_template="#/$defs/{model}")
        part["properties"]["name"]["description"] = method_class(name).title
        schema["$defs"].update(part.pop("$defs", {}))
        schema["$defs"][part["title"]] = part
        choices.append({"$ref": f"#/$defs/{part['title']}"})
    for part in schema["$defs"].values():
        name = part.get("properties", {}).get("name", {})
        if "const" in name and "description" not in name:
            # One of several kinds of settings, such as a merge rule: its name says what the settings do.
            name["description"] = part["description"].partition("\n\n")[0]
    description = schema["properties"]["method"].get("description", "")
    schema["properties"]["method"] = {"description": description, "default": "fedavg", "anyOf": choices}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
