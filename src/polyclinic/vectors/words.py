"""What a recipe does, in words for a model card."""

from __future__ import annotations

from polyclinic.vectors.recipe import Recipe

COEFFICIENTS = {
    "sum": "The vectors are added up and added to the base, as in the paper.",
    "mean": "The mean of the vectors is added to the base: the average of the sites' models.",
    "weighted": "The mean of the vectors, weighted by images with a cap for each site, is added to the base.",
    "norm-keep": "The sum of the vectors, shortened layer by layer to the length of one of them, is added to the base.",
    "model-stock": "The mean of the vectors, shrunk layer by layer the less they agree, is added to the base.",
    "search": "The sum of the vectors, scaled by what was best on validation images, is added to the base.",
}
RULES = {
    "greedy-soup": "The mean of those vectors that improve validation images, best first, is added to the base.",
    "ties": "Of each vector the largest changes are kept; where sites disagree in sign the majority by weight counts.",
    "fisher": "Each value is the sites' mean, weighted by how much each site's images say about it.",
    "regmean": "Each layer is the one whose outputs are nearest to those of the sites' own layers.",
    "tsv": "Of each site's change the main directions are kept, and made independent of those of other sites.",
    "iso-c": "The directions of the summed change are all made equally strong.",
    "median": "Each value is the median over sites, so no single site can move it far.",
    "trimmed-mean": "Each value is the mean over sites without the highest and lowest.",
    "base": "No vectors: the base's own layers.",
}
FILTERS = {
    "dare": "values are dropped at random and the others enlarged",
    "breadcrumbs": "the smallest and the very largest changes are dropped",
    "norm-clip": "vectors much longer than the median are shortened",
    "support": "rows of the head for classes that a site has no images of are left alone",
    "random": "CONTROL: each vector is replaced by noise of the same length",
    "shuffled": "CONTROL: the values of each vector are shuffled within each layer",
}


def in_words(recipe: Recipe) -> str:
    """A few sentences."""
    rule = recipe.rule
    coefficients = getattr(rule, "coefficients", None)
    parts = [RULES[rule.name] if coefficients is None else COEFFICIENTS[coefficients]]
    if recipe.filters:
        parts.append(f"Before that, {'; '.join(FILTERS[one.name] for one in recipe.filters)}.")
    if recipe.head is not None:
        parts.append(f"The last layer is solved in closed form ({recipe.head.name}) from sums over sites.")
    return " ".join(parts)
