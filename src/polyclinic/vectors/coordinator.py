"""The coordinator's own images: what restores a merged model, chooses between candidates, and reports.

Its training images restore, its validation images choose, its test images only report. They are no site's and are not
covered by what is promised to sites: whoever owns them is named in the model card.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from polyclinic.data.dataset import SiteData
from polyclinic.errors import ContributionError, DataError
from polyclinic.evaluation.inference import chosen_threshold, predict_cases
from polyclinic.evaluation.ops import mean_score, validation_metrics
from polyclinic.evaluation.predictions import CaseScores, Predictions
from polyclinic.evaluation.summary import SiteResult, site_result
from polyclinic.models.registry import start_model
from polyclinic.models.weights import load_tensors, shared_tensors, snapshot
from polyclinic.runner import Observer, load_sites
from polyclinic.seeds import derive_seed
from polyclinic.study import Study
from polyclinic.tasks import make_task
from polyclinic.tasks.segmentation import Segmentation
from polyclinic.vectors.base import Base
from polyclinic.vectors.restoration import Restoration, restore
from polyclinic.vectors.sources import Outline

NAME = "coordinator"


class Coordinator:
    """A network to load models into, and the images that it is restored and judged on.

    Args:
        base: The published base.
        study: With the tables of the coordinator's images; its network, images and classes must be the base's.
        folder: For memory-mapped images, where the study wants them.
        observer: Told of the reading of images.

    Raises:
        ContributionError, StudyError, DataError: The study and the base disagree, or the images are wrong.
    """

    def __init__(self, base: Base, study: Study, folder: Path, observer: Observer | None = None) -> None:
        self.study = base.site_study(study)
        if list(self.study.task.classes) != list(base.classes):
            raise ContributionError(
                f"the coordinator's study has the classes {', '.join(self.study.task.classes)}, the base has "
                f"{', '.join(base.classes)}. Images that judge all sites need the base's list in the base's order."
            )
        self.task = make_task(self.study.task, self.study.training)
        self.model = start_model(self.study)
        self.outline = Outline.of(self.model, base.classes)
        sites = load_sites(self.study, folder, observer)
        parts = [sites[name] for name in sorted(sites)]
        self.data = parts[0] if len(parts) == 1 else SiteData.concat(parts, NAME)

    @property
    def digest(self) -> str:
        """SHA-256 over names and splits of the images: which ones they were, not what is on them."""
        lines = sorted(f"{case.split}\t{case.site}\t{case.patient}\t{case.image_id}" for case in self.data.cases)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def restored(self, state: Mapping[str, Tensor], settings: Restoration) -> dict[str, Tensor]:
        """The model with these values, restored on the training images; a copy."""
        load_tensors(self.model, state)
        if settings.needs_images:
            seed = derive_seed(self.study.seed, NAME, "restoration")
            batch = self.study.evaluation.batch_size
            restore(self.model, self.data, self.task, settings, self.study.training, batch_size=batch, seed=seed)
        return snapshot(shared_tensors(self.model, [spec.name for spec in self.outline.specs]))

    def score(self, state: Mapping[str, Tensor]) -> float:
        """``evaluation.metric`` on the validation images; larger is better.

        Raises:
            DataError: There are none, or they do not define the metric.
        """
        if len(self.data.splits["val"]) == 0:
            raise DataError("the coordinator has no validation images to choose on. Give data.split a share for them.")
        load_tensors(self.model, state)
        score = mean_score(self.study, [validation_metrics(self.model, self.data, self.task, self.study)])
        if score is None:
            raise DataError(f"the coordinator's validation images do not define {self.study.evaluation.metric}.")
        return score

    def predictions(self, state: Mapping[str, Tensor]) -> Predictions | CaseScores:
        """What a model says about the validation and test images."""
        load_tensors(self.model, state)
        threshold = 0.5
        if isinstance(self.task, Segmentation):
            threshold, _ = chosen_threshold(self.model, self.data, self.task, self.study)
        batch = self.study.evaluation.batch_size
        return predict_cases(self.model, self.data, self.task, ["val", "test"], batch, threshold)

    def report(self, predictions: Predictions | CaseScores) -> SiteResult:
        """Metrics on the test images, with replicates over their patients."""
        return site_result(NAME, predictions, self.study.task, self.study.evaluation)


def ensemble(parts: Sequence[Predictions]) -> Predictions:
    """The mean of several models' probabilities for the same images."""
    first = parts[0]
    mean = np.mean([part.probabilities for part in parts], axis=0)
    return Predictions(first.images, first.patients, first.devices, first.splits, first.targets, mean)
