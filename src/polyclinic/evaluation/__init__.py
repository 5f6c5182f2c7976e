"""Metrics per site, patient bootstrap and paired comparison. Validation chooses, test only reports."""

from polyclinic.evaluation.bootstrap import Interval, classification_replicates, interval, patient_weights
from polyclinic.evaluation.classification import classification_metrics, specificity_thresholds
from polyclinic.evaluation.names import (
    CLASSIFICATION_METRICS,
    LOWER_IS_BETTER,
    METRIC_LABELS,
    SEGMENTATION_METRICS,
    lower_is_better,
    metric_label,
)
from polyclinic.evaluation.predictions import (
    CaseScores,
    Predictions,
    read_predictions,
    score_columns,
    write_predictions,
)
from polyclinic.evaluation.results import read_results, write_replicates
from polyclinic.evaluation.segmentation import case_scores, segmentation_metrics, segmentation_replicates
from polyclinic.evaluation.summary import SiteResult, differences, site_result, summarise, table

__all__ = [
    "CLASSIFICATION_METRICS",
    "LOWER_IS_BETTER",
    "METRIC_LABELS",
    "SEGMENTATION_METRICS",
    "CaseScores",
    "Interval",
    "Predictions",
    "SiteResult",
    "case_scores",
    "classification_metrics",
    "classification_replicates",
    "differences",
    "interval",
    "lower_is_better",
    "metric_label",
    "patient_weights",
    "read_predictions",
    "read_results",
    "score_columns",
    "segmentation_metrics",
    "segmentation_replicates",
    "site_result",
    "specificity_thresholds",
    "summarise",
    "table",
    "write_predictions",
    "write_replicates",
]
