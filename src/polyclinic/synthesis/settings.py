"""Settings of ``synthesis`` in a study file. No torch here: a study is read without it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from polyclinic.settings import Settings


class PrivateTraining(Settings):
    """DP-SGD for the generator: its unit is the patient. It takes all training images, whatever ``floor``, and its
    noise does not follow from the study's seed."""

    epsilon: float = Field(8.0, gt=0)
    """Largest ε over all rounds and steps together; the noise is searched for it."""
    delta: float = Field(1e-5, gt=0, lt=1)
    """δ of the same promise."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of one patient's gradient."""


class VAESettings(Settings):
    """Images from a small autoencoder that knows classes and devices."""

    name: Literal["vae"] = "vae"
    placement: Literal["sites", "server"] = "sites"
    """``sites``: trained over the sites in rounds. ``server``: trained on ``public`` images by the server alone; sites
    send means and variances of each cell in its latent space, once."""
    public: str = ""
    """server: a folder of public images (PNG, JPEG), relative to ``data.root``; of more than 5000 so many are drawn."""
    size: int = Field(32, ge=16, le=64, multiple_of=8)
    """Height and width of generated images in pixels."""
    latent: int = Field(32, ge=2, le=512)
    """Numbers that an image is made from."""
    embedding: int = Field(16, ge=1, le=256)
    """Numbers that a class, and a device, are told by."""
    rounds: int = Field(30, ge=1)
    """sites: rounds of training."""
    epochs: int = Field(2, ge=1)
    """Passes over a site's images in a round; on the server ``rounds`` times as many."""
    lr: float = Field(2e-3, gt=0)
    """Learning rate of adam in the first round; it falls by a half cosine."""
    batch_size: int = Field(32, ge=2)
    """Images per step."""
    deviation: float = Field(0.06, gt=0)
    """Deviation of a pixel about its reconstruction, for values in 0..1."""
    beta: float = Field(1.0, ge=0)
    """How much the latent's distance from a standard normal counts."""
    dp: PrivateTraining | None = None
    """Train the generator with differential privacy (placement sites; extra ``dp``)."""

    @model_validator(mode="after")
    def _server_needs_images(self) -> VAESettings:
        if self.placement == "server" and not self.public:
            raise ValueError("placement: server trains on public images; name their folder in public")
        if self.placement == "server" and self.dp is not None:
            raise ValueError("dp protects training at the sites; with placement: server no training sees a patient")
        return self


class FeaturesSettings(Settings):
    """Gaussians of the trained network's features by class; its last layer is trained anew on draws."""

    name: Literal["features"] = "features"
    devices: bool = False
    """Gaussians of class and device, so that cells nobody owns are drawn too; false: of classes alone, as in CCVR."""
    every: int = Field(10, ge=0)
    """Re-calibrate every so many rounds, where these are judged (``evaluation.every``), and after the last; 0: only
    after the last. Only such rounds can be chosen."""
    samples: int = Field(300, ge=10)
    """Features drawn per class."""
    covariance: Literal["full", "diagonal"] = "full"
    """What sites send of a class's spread."""
    lr: float = Field(0.02, gt=0)
    """Rate of sgd for the last layer."""
    epochs: int = Field(40, ge=0)
    """Passes over the draws."""


class AmplitudeSettings(Settings):
    """A site's own images in the colours of another device, for cells that nobody owns. They stay at the site."""

    name: Literal["amplitude"] = "amplitude"
    strength: float = Field(1.0, gt=0, le=1)
    """How far the low frequencies go over to those of the other device."""


GeneratorSettings = Annotated[VAESettings | FeaturesSettings | AmplitudeSettings, Field(discriminator="name")]


class PlanSettings(Settings):
    """How many samples of which class and device: under-populated cells are filled up to a common level."""

    budget: float = Field(0.3, ge=0, le=10)
    """Samples in all, as a share of the training images of all sites."""
    cap: float = Field(4.0, ge=0)
    """Most samples of a cell, as a multiple of the patients behind it."""
    borrow: float = Field(0.5, ge=0, le=1)
    """How much a patient of the same class on another device counts behind a cell."""


class GateSettings(Settings):
    """What candidates must pass at each owner before they leave: none may be a copy of a patient."""

    dcr_ratio: float = Field(0.95, ge=0)
    """Median distance to the nearest training image over that to the nearest held-out one: at least this."""
    closer: float = Field(0.6, ge=0.5, le=1)
    """Share of candidates that are nearer to training images than to as many held-out ones: at most this."""
    nndr_gap: float = Field(0.05, ge=0, le=1)
    """How far the 5th percentile of nearest over second-nearest distance may lie below that of held-out images."""
    membership_auc: float = Field(0.55, ge=0.5, le=1)
    """AUC of telling training from held-out patients by their distance to the candidates: at most this."""
    membership_tpr: float = Field(0.03, ge=0, le=1)
    """Patients found at 1% false accusations: at most this share. With fewer than 100 held-out patients one of them may
    be accused, and the limit is as many times that share."""
    copy_quantile: float = Field(0.999, gt=0.5, lt=1)
    """A candidate is a copy if it is nearer to a training image than this share of training images are to the nearest
    image of another patient, as it is or relative to the second-nearest patient."""
    confidence: float = Field(0.99, gt=0.5, lt=1)
    """A line counts as crossed where a generator that knows nobody would cross it so far in at most half of what is
    missing to 1: 0.99 is one case in 200. Few held-out patients then block by chance no more often than many."""
    holdout: int = Field(5, ge=2)
    """Patients, in training and held out, that a class or device needs to be judged by itself; with fewer it is judged
    within all. Without so many in all, a site lets nothing of its classes go."""


class ShareSettings(Settings):
    """Who trains on how many of the released samples, and how they travel."""

    form: Literal["images", "decoder"] = "images"
    """``images``: 8-bit images. ``decoder``: the generator's decoder and seeds, from which sites make the images."""
    ratio: float = Field(0.5, ge=0)
    """Samples that a site takes, as a multiple of its training images."""
    small_site: int = Field(200, ge=0)
    """A site with fewer training images takes ``small_ratio`` instead."""
    small_ratio: float = Field(2.0, ge=0)
    """As ``ratio``, for small sites."""


class SyntheticTraining(Settings):
    """How local training uses samples. The number of gradient steps stays what it is without them."""

    weight: float = Field(0.5, ge=0)
    """λ: how much the loss of a synthetic batch counts beside that of the real one."""
    ramp: float = Field(0.3, ge=0, le=1)
    """λ grows from 0 until this share of the rounds."""
    until: float = Field(0.8, ge=0, le=1)
    """From this share of the rounds λ falls, to 0 in the last one; 1: it stays."""
    real_per_synthetic: float = Field(3.0, gt=0)
    """Real images per synthetic one in a step."""
    batch_norm: Literal["own", "running"] = "own"
    """Batch norm normalises synthetic batches by their ``own`` statistics, which nothing keeps, or by the ``running``
    statistics of real images."""

    @model_validator(mode="after")
    def _in_order(self) -> SyntheticTraining:
        if self.ramp > self.until:
            raise ValueError(f"ramp {self.ramp} ends after until {self.until}; give a smaller ramp")
        return self


class SynthesisSettings(Settings):
    """Synthetic samples by class and device, exchanged once before the first round."""

    generator: list[GeneratorSettings] = [FeaturesSettings()]
    """What makes samples: ``vae``, ``features``, ``amplitude``, one or several; an empty list only mixes styles."""
    floor: int = Field(5, ge=1)
    """A class on a device counts at a site from so many training patients on; of smaller cells nothing leaves the
    site, not even their count. With ``epsilon`` the noise takes the floor's place in counts and style windows; names of
    devices and generators keep the floor."""
    epsilon: float | None = Field(None, gt=0)
    """Noise on counts and style windows: ε per patient (Laplace); empty: none. Images are not counted then, so
    ``plan.budget`` is a share of patients."""
    window: int = Field(1, ge=0, le=16)
    """Half-width of a device's window of low frequencies: 1 is 3 × 3 numbers per colour."""
    style: float = Field(0.5, ge=0, le=1)
    """Chance that a training image is mixed with the style of another device; 0: never."""
    plan: PlanSettings = PlanSettings()
    """How many samples of which class and device."""
    filter: float = Field(0.2, ge=0, lt=1)
    """Before the gate the server drops candidates whose class is less than this times as probable as the likeliest,
    by linear discriminants of the untrained network's features, and those far from their class or there twice; 0: no
    filter."""
    gate: GateSettings = GateSettings()
    """What candidates must pass."""
    share: ShareSettings = ShareSettings()
    """Who trains on how many."""
    training: SyntheticTraining = SyntheticTraining()
    """How they enter training."""

    @field_validator("generator", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        entries = value if isinstance(value, list | tuple) else [] if value in (None, "none") else [value]
        return [{"name": entry} if isinstance(entry, str) else entry for entry in entries]

    @field_validator("generator")
    @classmethod
    def _each_once(cls, value: list[Any]) -> list[Any]:
        names = [entry.name for entry in value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"generator {twice[0]} is listed twice")
        return value

    def of_kind(self, name: str) -> Any:
        """The settings of one generator, or None where it is not asked for."""
        return next((entry for entry in self.generator if entry.name == name), None)
