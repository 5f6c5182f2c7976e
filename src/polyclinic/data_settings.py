"""The ``data`` section of the study file: tables and phantoms, images, splits, partitions, scanners."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from polyclinic.settings import Settings

SiteName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class Columns(Settings):
    """Which column of a table holds what. A manifest made by ``polyclinic data build`` needs none of this."""

    image: str = "image"
    """Path of the image inside ``images``; a folder for a DICOM series; ``key#7`` for row 7 of an array in an NPZ."""
    label: str = "label"
    """Class name (multi-class), or names joined by ``|`` (multi-label; empty means none of them)."""
    mask: str = "mask"
    """Path of the mask inside ``images`` (segmentation)."""
    patient: str = "patient"
    """Patient, or what must never be on both sides of a split (a lesion, say)."""
    site: str = "site"
    """Who owns the image; ignored where ``site`` of the table is given."""
    device: str = "device"
    """Scanner or camera; may be absent."""
    split: str = "split"
    """``train``, ``val``, ``test`` or ``unused``; where it is absent or empty the study's split rule decides."""


class TableSettings(Settings):
    """One table of images: a site's manifest, or one table for several sites."""

    path: str
    """CSV or Parquet, relative to ``data.root``."""
    images: str = ""
    """Folder or zip that the paths of the image column are relative to, relative to ``data.root``; empty: the
    table's own folder."""
    site: SiteName | None = None
    """The site that owns every row of this table; without it the site column decides."""
    columns: Columns = Columns()
    """Names of the columns, where they are not the usual ones."""
    labels: dict[str, str] = {}
    """Translates the table's labels to the study's classes, as ``{table: study}``; each label of the table must then
    appear. Empty: taken as they are."""
    classes: list[str] = []
    """The site's own list of classes, where its labels or masks hold numbers: number k means the k-th, from 0. It must
    be the study's list in the study's order."""
    where: dict[str, list[str]] = {}
    """Keeps only the rows whose column holds one of the values, as ``{column: [value, ...]}``."""
    limit: int | None = Field(None, ge=1)
    """Keeps at most so many patients, drawn with the split's seed (for quick trials)."""


class PhantomSite(Settings):
    """A made-up hospital of the phantom source."""

    name: SiteName
    """Name of the site."""
    device: str | dict[str, Annotated[float, Field(gt=0)]] = "reference"
    """One of the phantom's devices (``polyclinic data phantom --list``), or several as ``{device: share}``: every
    patient is imaged with one of them, as many with each as the shares say (``{thin: 114, thick: 5}``)."""
    patients: int = Field(60, ge=3)
    """Number of patients; each has one or two images."""
    prevalence: dict[str, float] = {}
    """Share of each class; classes left out share the rest evenly."""
    counts: dict[Literal["train", "val", "test"], dict[str, Annotated[int, Field(ge=0, le=10_000)]]] = {}
    """Exact numbers of patients by split and class, instead of ``patients`` and ``prevalence``:
    ``{train: {NV: 28, VASC: 1}, test: {NV: 25, VASC: 25}}``. Each has one image; classes left out have none."""

    @model_validator(mode="after")
    def _counts_or_shares(self) -> PhantomSite:
        if self.counts and self.prevalence:
            raise ValueError("counts are exact numbers; leave prevalence out, or counts")
        return self


class PhantomSettings(Settings):
    """Made-up images with known truth: deterministic from a seed."""

    kind: Literal["chest-xray", "chest-ct", "chest-ct-volume", "skin-lesion", "skin-diagnoses"] = "chest-xray"
    """What is drawn. ``skin-lesion`` has three classes, ``skin-diagnoses`` the eight of ISIC 2019."""
    seed: int = 0
    """Seed of the drawing; the study's own seed does not change the images."""
    lesions: Literal["large", "varied"] = "large"
    """Chest CT: ``large``: few opacities, most of 4 to 10 cm; ``varied``: many, of 1 to 6 cm, several in a slice."""
    sites: list[PhantomSite] = Field(min_length=1)
    """The hospitals."""


class WindowSettings(Settings):
    """Intensity window, mapped to 0..1 and clipped."""

    center: float
    """Middle of the window, in Hounsfield units for CT."""
    width: float = Field(gt=0)
    """Width of the window, same unit."""


class ImageSettings(Settings):
    """How a file becomes the array that the network sees."""

    size: list[int] = Field([64, 64], min_length=2, max_length=3)
    """Height, width (2D) or depth, height, width (3D), in pixels."""
    channels: Literal[1, 3] = 1
    """1 grey, 3 colour. A colour image in a grey study is refused unless its channels are equal (to 8 of 255)."""
    fit: Literal["pad", "crop", "stretch"] = "pad"
    """How another aspect ratio is met: pad with the darkest value, crop the middle, or stretch."""
    spacing: list[Annotated[float, Field(gt=0)]] | None = Field(None, min_length=2, max_length=3)
    """Millimetres per pixel, in the order of ``size``, that images are resampled to; the result is then cropped and
    padded about its middle to ``size`` (``fit`` does not count). Empty: images are resized, whatever their spacing."""
    lungs: Literal["ignore", "crop", "mask"] = "ignore"
    """Chest CT in Hounsfield units: ``crop`` cuts to the box around the lungs, which are found by their density;
    ``mask`` also sets everything outside them to the smallest value of the window."""
    window: WindowSettings | None = None
    """Intensity window for DICOM and NIfTI; without it the file's own window, else its range, is used."""
    mean: float = 0.5
    """Subtracted after scaling to 0..1."""
    std: float = Field(0.25, gt=0)
    """Divided by after the mean is subtracted."""
    cache: Literal["memory", "memmap"] = "memory"
    """Decoded images are kept in memory, or in a memory-mapped file below ``cache_folder``."""
    cache_folder: str = ""
    """Where memory-mapped images lie, relative to ``data.root``; empty: ``cache`` in the results folder."""


class ScannerSettings(Settings):
    """A simulated scanner, which every image of a site is taken with: training, validation and test alike."""

    slices: int = Field(1, ge=1)
    """Volumes: neighbouring slices that are averaged into a thick one."""
    fill: Literal["interpolate", "zeros"] = "interpolate"
    """How thick slices become a volume of the old depth: interpolated back, or, as in PPPML-HMI's code, stacked in the
    middle of an empty volume."""
    blur: float = Field(0.0, ge=0)
    """Deviation of a Gaussian blur within the plane, in pixels of the resized image."""
    gain: float = Field(1.0, gt=0)
    """Contrast about mid-grey."""
    gamma: float = Field(1.0, gt=0)
    """Exponent of the grey values: below 1 brighter."""
    noise: float = Field(0.0, ge=0)
    """Deviation of Gaussian noise, in units of the grey range; drawn from the image's name, so always the same."""


class SplitSettings(Settings):
    """How patients are divided where a table does not say."""

    kind: Literal["random", "consecutive"] = "random"
    """``random``: drawn. ``consecutive``: of each class, the first patients in the table's order train, then come
    validation and test; for tables where neighbours may be the same person. ``stratify: false``: not class by class."""
    gap: int = Field(0, ge=0)
    """``consecutive``: so many patients between two parts are left out; their images are ``unused``."""
    fractions: tuple[float, float, float] = (0.6, 0.15, 0.25)
    """Train, validation and test shares of the patients of each site."""
    seed: int = 0
    """Seed of the split; the study's own seed does not change it, so that seeds are comparable."""
    stratify: bool = True
    """Keep the class shares alike in the three parts, as far as whole patients allow."""

    @field_validator("fractions")
    @classmethod
    def _sums_to_one(cls, fractions: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6 or fractions[0] == 0 or fractions[2] == 0:
            raise ValueError(f"fractions must be train, val, test, sum to 1, train and test above 0; got {fractions}")
        return fractions

    @model_validator(mode="after")
    def _gap_needs_order(self) -> SplitSettings:
        return _checked_gap(self)


class PartitionSettings(Settings):
    """Which site owns which patient, where the data do not say."""

    kind: Literal["site", "device", "iid", "dirichlet", "quantity", "consecutive"] = "site"
    """``site``: as in the tables. ``device``: one site per device. ``consecutive``: of each class, equal stretches of
    patients in the table's order. The others draw ``sites`` sites from all images."""
    sites: int = Field(4, ge=1)
    """Number of sites drawn."""
    alpha: float = Field(0.5, gt=0)
    """Concentration of the Dirichlet draw: small is uneven."""
    gap: int = Field(0, ge=0)
    """``consecutive``: of each class, so many patients between two sites are left out; their images are ``unused``."""
    seed: int = 0
    """Seed of the draw."""

    @model_validator(mode="after")
    def _gap_needs_order(self) -> PartitionSettings:
        return _checked_gap(self)


Division = TypeVar("Division", SplitSettings, PartitionSettings)


def _checked_gap(settings: Division) -> Division:
    if settings.gap and settings.kind != "consecutive":
        raise ValueError(f"gap: {settings.gap} needs kind: consecutive; patients that are drawn have no neighbours")
    return settings


class DataSettings(Settings):
    """Where the images are and how they are divided."""

    root: str = ""
    """Folder that paths are relative to: itself relative to the study file. ``--data-root`` and ``POLYCLINIC_DATA``
    move it."""
    tables: list[TableSettings] = []
    """Tables of real images."""
    phantom: PhantomSettings | None = None
    """Made-up images instead of tables."""
    image: ImageSettings = ImageSettings()
    """From file to array."""
    split: SplitSettings = SplitSettings()
    """Division into train, validation and test, always by patient."""
    partition: PartitionSettings = PartitionSettings()
    """Division into sites."""
    scanners: dict[SiteName, ScannerSettings] = {}
    """Simulated scanners by site; sites that are not named keep their images as they are."""

    @model_validator(mode="after")
    def _one_source(self) -> DataSettings:
        if bool(self.tables) == (self.phantom is not None):
            raise ValueError("give either tables (real images) or phantom (made-up images)")
        return self
