"""Admission in words: why a contribution should be looked at, and what else to know of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyclinic.vectors.likeness import FEWEST_OTHERS

if TYPE_CHECKING:
    from polyclinic.vectors.admission import Admission, AdmissionLimits


def reasons_of(found: Admission, others: int, largest_held: float, limits: AdmissionLimits) -> list[str]:
    """Why a person should look, each a clause.

    Args:
        found: The numbers.
        others: How many it was compared with.
        largest_held: Largest change of the head's row of a class that the site has images of.
        limits: Beyond what.
    """
    if found.norm == 0:
        return ["the vector is zero: the site's model is the base, so nothing was learned there"]
    reasons = []
    if found.nearest_cosine is not None and found.nearest_cosine > limits.duplicate:
        reasons.append(
            f"it is all but the vector of another site, {found.nearest[:12]} (cosine {found.nearest_cosine:.4f}, limit "
            f"{limits.duplicate:g}): one of the two may be a copy"
        )
    for row in found.absent_rows:
        if row.norm > limits.absent_row * largest_held:
            reasons.append(
                f"the head's row of {row.name!r}, a class that the site says it has no images of, changed by "
                f"{row.norm:.3g}, more than {limits.absent_row:g} times the most of a class that it has "
                f"({largest_held:.3g}): are its classes in the base's order?"
            )
    return reasons + _unlike_others(found, limits) if others >= FEWEST_OTHERS else reasons


def _unlike_others(found: Admission, limits: AdmissionLimits) -> list[str]:
    reasons = []
    z = found.norm_z or 0.0
    if z > limits.longer or z < -limits.shorter:
        limit = limits.longer if z > 0 else limits.shorter
        reasons.append(
            f"the vector is {found.norm_ratio:.3g} times as long as the others' usually are (z-score {z:+.1f}, limit "
            f"{limit:g}): was it trained with other settings?"
        )
    if found.odd_layers:
        name, z = found.odd_layers[0]
        more = f" and {len(found.odd_layers) - 1} more layers" if len(found.odd_layers) > 1 else ""
        reasons.append(
            f"layer {name}{more} changed far more than at the others (z-score {z:+.1f}, limit {limits.layer_norm:g})"
        )
    if (
        found.beyond_chance is not None
        and found.beyond_chance < limits.chance
        and (found.most_alike or 0) < limits.unlike
    ):
        reasons.append(
            f"it has no more in common with any other than noise would have ({found.beyond_chance:.1f} standard "
            f"deviations, {limits.chance:g} wanted; cosine {found.most_alike or 0:.3f}): noise, or other "
            "images"
        )
    if not _common(found, limits):
        return reasons
    if found.cosine is not None and found.cosine < limits.cosine:
        reasons.append(
            f"it points elsewhere than the others, who agree (cosine {found.cosine:+.3f}, limit {limits.cosine:g}): "
            "other images, unusual patients, or an attack"
        )
    if found.influence is not None and found.influence > limits.influence:
        reasons.append(
            f"the mean of all would change by {found.influence:.0%} of itself without it (limit {limits.influence:.0%})"
        )
    return reasons


def _common(found: Admission, limits: AdmissionLimits) -> bool:
    """Whether the others have a direction in common to judge by."""
    return found.agreement is not None and found.agreement >= limits.agreement


def figures_of(found: Admission) -> str:
    """What a person compares contributions by, in one line; figures that need others are left out without them."""
    figures = [f"norm {found.norm:.3g}"]
    if found.norm_ratio is not None:
        figures[0] += f", {found.norm_ratio:.2f} times the others' median (z-score {found.norm_z or 0:+.1f})"
    if found.cosine is not None:
        figures.append(f"cosine to the others {found.cosine:+.2f}")
    if found.worst_cosine is not None:
        figures.append(f"least in {found.worst_layer} {found.worst_cosine:+.2f}")
    if found.influence is not None:
        figures.append(f"the mean changes by {found.influence:.0%} without it")
    return "; ".join(figures)


def notes_of(found: Admission, others: int, limits: AdmissionLimits) -> list[str]:
    """What else a reader should know; no reason to hold it."""
    notes = []
    if others < FEWEST_OTHERS:
        notes.append(f"with {others} other contribution{'s' * (others != 1)} there is nothing to compare it with")
    elif not _common(found, limits):
        notes.append(
            f"the others do not agree among themselves (median cosine {found.agreement or 0:+.2f}), as with unlike "
            "class mixes: its direction was not judged, and a plain sum or mean will cancel much"
        )
    if found.absent_rows:
        rows = ", ".join(f"{row.name} ({row.norm:.3g})" for row in found.absent_rows)
        notes.append(f"rows of the head changed without images of their class: {rows}; rules can leave them out")
    if found.changed is not None and 0 < found.changed < limits.changed:
        notes.append(f"only {found.changed:.2%} of the values changed: most of the network was frozen")
    return notes
