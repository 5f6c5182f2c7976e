"""How much nearer candidates are to the patients that a generator was trained on than to held-out patients.

Measures of sheet 2.5, for one space and one group of images. All of them compare two sides that were divided by chance,
patient by patient. If the generator kept nobody in mind, the sides are exchangeable, whatever its images look like:
that is what every chance below is computed under.

Departures from the sheet, because a site's hold-out is small (a fifth of the training patients, sometimes five):

- *Share closer to training* takes all patients, and counts each hold-out patient as often as makes the sides equal.
  Drawing as many training patients as there are held-out ones, a generator that copies nothing but training images
  would reach only 0.5 + 0.5 · k / n: 0.61 at 70/15/15.
- Its interval is that of Clopper and Pearson for an *effective* number of candidates: many candidates share their
  nearest patient (hubs), so that they are not independent.
- *Nearest over second nearest* is also low for samples that are unlike any patient, such as blurred ones in a space of
  features. It counts only where candidates have it with training patients and not with held-out ones.
- A line that is crossed counts only if chance seldom crosses it so far; see ``gate``.

The DCR ratio is as the sheet has it, over several draws of equal size, and is therefore diluted by a small hold-out.

References:
    Meehan et al., AISTATS 2020 (hold-out comparison of copies); Carlini et al., S&P 2022 (few false positives); Chen et
    al., CCS 2020 (membership by the nearest sample); Clopper & Pearson, Biometrika 26, 1934; Mann & Whitney 1947.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyclinic.audit.membership import area, at_few_false_positives, exact_interval
from polyclinic.synthesis.distances import ByPatient, to_patients, two_nearest
from polyclinic.synthesis.settings import GateSettings

DRAWS = 8
"""Draws of as many patients of the larger side as the smaller has."""
LOW = 0.05
"""Which quantile of nearest over second-nearest distance is looked at."""
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Measures:
    """Of one space and one group. Chances are one-sided and exact under exchangeable patients.

    Attributes:
        dcr_ratio: Median distance to the nearest training image over that to the nearest held-out one, at equal numbers
            of patients; None where the latter is 0.
        closer: Share of candidates nearer to a training patient than to any held-out one, both sides weighing the same.
        closer_low, closer_high: Its interval.
        nndr: 5th percentile over candidates of the distance to the nearest training patient over that to the second.
        nndr_holdout: The same of held-out images.
        nndr_elsewhere: The same of candidates with held-out patients in the place of training patients: what samples
            have that are merely unlike any patient. None where there is one held-out patient.
        nndr_chance: That so many candidates and so few held-out patients lie below the line.
        auc: Chance that a training patient is nearer to a candidate than a held-out patient is.
        auc_chance: Of an AUC as high.
        tpr, fpr: Training patients found, and held-out ones accused, at 1% or one accused.
        tpr_chance: Of as many found.
    """

    dcr_ratio: float | None
    closer: float
    closer_low: float
    closer_high: float
    nndr: float
    nndr_holdout: float
    nndr_elsewhere: float | None
    nndr_chance: float
    auc: float
    auc_chance: float
    tpr: float
    fpr: float
    tpr_chance: float


@dataclass(frozen=True, eq=False)
class _Pass:
    """What one pass over all distances leaves.

    Attributes:
        train, held: Distance of each candidate to the nearest patient of either side, ``[m]``.
        hits: How many candidates each patient is the nearest to, ``[patients]``, training first; ties are shared.
        nearest: Distance of each patient to the nearest candidate, ``[patients]``.
        dcr_ratio: Mean over draws.
    """

    train: Tensor
    held: Tensor
    hits: Values
    nearest: Values
    dcr_ratio: float | None


def measure(
    candidates: Tensor, train: ByPatient, holdout: ByPatient, rng: np.random.Generator, *, gap: float, confidence: float
) -> Measures:
    """All measures of a group.

    Args:
        candidates: ``[m, F]``, m above 0.
        train: Patients that the generator was trained on, at least two.
        holdout: Others, at least one.
        rng: Of the draws of equal size.
        gap: How far ``nndr`` may lie below ``nndr_holdout``.
        confidence: Of the interval of ``closer``.
    """
    seen = _all_distances(candidates, train, holdout, rng)
    closer, low, high = _closer(seen, train.patients, holdout.patients, confidence)
    nndr, nndr_holdout, nndr_chance = _nndr(candidates, train, holdout, gap)
    scores = -seen.nearest
    members, others = scores[: train.patients], scores[train.patients :]
    found, accused = at_few_false_positives(members, others) if len(others) > 1 else (None, None)
    return Measures(
        dcr_ratio=seen.dcr_ratio,
        closer=closer,
        closer_low=low,
        closer_high=high,
        nndr=nndr,
        nndr_holdout=nndr_holdout,
        nndr_elsewhere=float(np.quantile(_ratios(candidates, holdout), LOW)) if holdout.patients > 1 else None,
        nndr_chance=nndr_chance,
        auc=area(np.arange(len(scores)) < len(members), scores),
        auc_chance=_rank_chance(members, others),
        tpr=found.value if found else 0.0,
        fpr=accused.value if accused else 0.0,
        tpr_chance=_found_chance(found.count, accused.count, found.of, accused.of) if found and accused else 1.0,
    )


def _all_distances(candidates: Tensor, train: ByPatient, holdout: ByPatient, rng: np.random.Generator) -> _Pass:
    sides, n = train.joined(holdout), train.patients
    few = min(n, holdout.patients)
    draws = [torch.from_numpy(np.sort(rng.permutation(max(n, holdout.patients))[:few])) for _ in range(DRAWS)]
    m = len(candidates)
    of_train, of_held, drawn = torch.empty(m), torch.empty(m), torch.empty(DRAWS, m)
    hits = torch.zeros(sides.patients, dtype=torch.float64)
    nearest = torch.full((sides.patients,), torch.inf)
    for part, distances in to_patients(candidates, sides):
        of_train[part], of_held[part] = distances[:, :n].amin(1), distances[:, n:].amin(1)
        equal = (distances == distances.amin(1, keepdim=True)).double()
        hits += (equal / equal.sum(1, keepdim=True)).sum(0)
        nearest = torch.minimum(nearest, distances.amin(0))
        larger = distances[:, :n] if few < n else distances[:, n:]
        for k, chosen in enumerate(draws):
            drawn[k, part] = larger[:, chosen].amin(1)
    near, far = (
        (drawn.quantile(0.5, dim=1), of_held.quantile(0.5))
        if few < n
        else (
            of_train.quantile(0.5),
            drawn.quantile(0.5, dim=1),
        )
    )
    ratio = float((near / far).mean()) if bool((far > 0).all()) else None
    return _Pass(of_train, of_held, hits.numpy(), nearest.double().numpy(), ratio)


def _closer(seen: _Pass, n: int, k: int, confidence: float) -> tuple[float, float, float]:
    """The share, and the bounds of its interval.

    If chance divides the patients, the hits of the training side vary as much as those of ``m / dispersion``
    independent candidates would.
    """
    m = len(seen.train)
    share = float(seen.hits[:n].sum()) / m
    dispersion = max(1.0, float(seen.hits.var(ddof=1)) / float(seen.hits.mean()))
    low, high = exact_interval(share * m / dispersion, m / dispersion, confidence)

    def even(value: float) -> float:
        """As it would be with as many patients on either side: odds are as the numbers of patients."""
        return value * k / (value * k + (1 - value) * n)

    return even(share), even(low), even(high)


def _ratios(rows: Tensor, people: ByPatient) -> Values:
    """Nearest over second-nearest patient, 1 where both are at no distance, ``[m]``."""
    nearest = two_nearest(rows, people).double()
    ratios = torch.where(nearest[:, 1] > 0, nearest[:, 0] / nearest[:, 1].clamp(min=1e-30), 1.0)
    values: Values = ratios.numpy()
    return values


def _nndr(candidates: Tensor, train: ByPatient, holdout: ByPatient, gap: float) -> tuple[float, float, float]:
    """The percentile of candidates, that of the hold-out, and the chance of such a difference.

    The chance is Fisher's of a two by two table, with patients, not images, on the held-out side.
    """
    from scipy.stats import hypergeom

    own, others = _ratios(candidates, train), _ratios(holdout.vectors, train)
    wanted = float(np.quantile(others, LOW))
    below = int((own < wanted - gap).sum())
    others_below = len(set(holdout.who.numpy()[others < wanted - gap].tolist()))
    everyone = len(own) + holdout.patients
    chance = float(hypergeom.sf(below - 1, everyone, below + others_below, len(own)))
    return float(np.quantile(own, LOW)), wanted, chance


def _rank_chance(members: Values, others: Values) -> float:
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(members, others, alternative="greater").pvalue)


def _found_chance(found: int, accused: int, members: int, others: int) -> float:
    """That at most ``accused`` others are among the ``found + accused`` who are nearest."""
    from scipy.stats import hypergeom

    return float(hypergeom.cdf(accused, members + others, others, found + accused)) if found else 1.0


def failures(found: Measures, settings: GateSettings) -> Iterator[str]:
    """Each line that is crossed further than chance would, in words."""
    chance = (1 - settings.confidence) / 2
    nearer = found.closer_low > 0.5
    if found.closer > settings.closer and nearer:
        yield f"{found.closer:.3f} closer to training than to held-out patients, at most {settings.closer:g}"
    if found.dcr_ratio is not None and found.dcr_ratio < settings.dcr_ratio and nearer:
        yield f"distance ratio {found.dcr_ratio:.3f}, at least {settings.dcr_ratio:g}"
    line = found.nndr_holdout - settings.nndr_gap
    remembers = found.nndr_elsewhere is None or found.nndr < found.nndr_elsewhere - settings.nndr_gap
    if found.nndr < line and found.nndr_chance < chance and remembers:
        yield f"5th percentile of nearest over second-nearest distance {found.nndr:.3f}, at least {line:.3f}"
    if found.auc > settings.membership_auc and found.auc_chance < chance:
        yield f"membership AUC {found.auc:.3f}, at most {settings.membership_auc:g}"
    # The line is for 1% false accusations; where one patient is more than 1%, it is as many times that share.
    most = settings.membership_tpr * max(1.0, found.fpr / 0.01)
    if found.tpr > most and found.tpr_chance < chance:
        yield f"{found.tpr:.3f} of patients found at {found.fpr:.3f} false accusations, at most {most:.3f}"
