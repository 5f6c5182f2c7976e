"""Data vectors: each site fine-tunes the same base alone and sends once what changed; the server merges and restores.

Tian, Xu, Yin, Wang, Yue: Improving the classification effect of clinical images of diseases for multi-source privacy
protection. 2024. arXiv 2408.13038. The paper's merge is ``base + sum of the vectors`` (rule ``data-vector`` with
``coefficients: sum``), then a restoration that is described once as aligning batch-norm statistics (``bn-recal``) and
once as fine-tuning on a few images (``finetune``). Everything else here is ours; docs/methods/data-vectors.md says
which. ``polyclinic vectors`` does the same with files, for sites that are never online together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from polyclinic.errors import SiteError, StudyError, nearest
from polyclinic.evaluation.ops import mean_score, validation_metrics
from polyclinic.federation.channel import Channel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Site
from polyclinic.federation.state import ServerState
from polyclinic.methods.base import Leaf, Method, MethodParams, Op, keep_local, load_global, load_own
from polyclinic.methods.fedavg import add_update
from polyclinic.models.registry import start_model
from polyclinic.models.taps import feature_tap
from polyclinic.secure.sum import SecureSum
from polyclinic.seeds import derive_seed
from polyclinic.study import SiteName, Study
from polyclinic.vectors.head import HeadSums, solve_head
from polyclinic.vectors.manifest import binned
from polyclinic.vectors.merge import merge
from polyclinic.vectors.recipe import Recipe
from polyclinic.vectors.restoration import Restoration, restore
from polyclinic.vectors.rules.base import Piece, Rule
from polyclinic.vectors.sources import InMemory, InMemoryTensors, Kind, Outline
from polyclinic.vectors.statistics import head_sums, site_statistics


class DataVectorsParams(MethodParams):
    """Settings of data-vectors. Sites train for ``rounds`` rounds, each alone; nothing is exchanged but at the end."""

    name: Literal["data-vectors"] = "data-vectors"
    recipe: Recipe = Recipe(restoration=Restoration(mode="auto"))
    """How vectors are merged and what happens to the result."""
    contributors: Literal["all", "largest"] | Annotated[list[SiteName], Field(min_length=1)] = "all"
    """Who sends a vector: all sites but the restorer, the one with most training images (a control), or those named."""
    restorer: str = ""
    """The site whose training images restore the model and whose validation images choose for rules that compare
    candidates; it sends no vector. Empty: each site restores its own copy, and all sites' validation images choose."""


class DataVectors(Method):
    """theta = theta_base + merge(theta_1 - theta_base, ..., theta_N - theta_base), then restored."""

    Params = DataVectorsParams
    title = "one vector per site, merged once"
    reference = "Tian et al. 2024, arXiv 2408.13038"
    exchanges = False

    def __init__(self, study: Study) -> None:
        super().__init__(study)
        self.params: DataVectorsParams = study.method
        model = start_model(study)
        self.outline = Outline.of(model, study.task.classes)
        self.recipe = self.params.recipe.resolved(model)
        self.restoration = self.recipe.restoration
        self._check_network(model)
        self.personal = self.personal or (self.restoration.needs_images and not self.params.restorer)

    @classmethod
    def check(cls, study: Study) -> None:
        """One-shot: all sites at once, and sums that hide a vector need a rule that is a sum."""
        params, recipe = study.method, study.method.recipe
        if params.participation != 1:
            raise StudyError("data-vectors exchanges once, so method.participation must be 1.")
        if study.aggregation.backend != "plain" and not _is_sum(recipe):
            raise StudyError(
                f"rule {recipe.rule.name} {'with filters ' if recipe.filters else ''}must see each site's vector, but "
                f"aggregation {study.aggregation.backend} hides it. Use {{name: data-vector, coefficients: mean}} "
                "without norm-clip, or aggregation: plain."
            )
        if recipe.head is not None and study.task.kind == "segmentation":
            raise StudyError("recipe.head refits the last layer of a classification network. Leave it out.")

    @classmethod
    def controls(cls, params: MethodParams) -> list[dict[str, Any]]:
        """The base and a single site with the same restoration, and vectors of noise: did the vectors help?"""
        given = params.model_dump(mode="json")
        recipe = given["recipe"]
        if params.title.startswith(f"{params.name}."):
            return []

        def control(label: str, **changed: Any) -> dict[str, Any]:
            return {**given, "label": f"{params.name}.{label}", **changed}

        return [
            control("base-only", recipe={**recipe, "rule": {"name": "base"}, "filters": []}),
            control("one-site", contributors="largest"),
            control("random", recipe={**recipe, "filters": ["random", *recipe["filters"]]}),
            control("shuffled", recipe={**recipe, "filters": ["shuffled", *recipe["filters"]]}),
        ]

    def _check_network(self, model: nn.Module) -> None:
        """Before anybody trains: whether there are features for a head, and running statistics to restore."""
        if self.recipe.head is not None:
            feature_tap(model)
        mode = self.restoration.mode
        if mode not in ("bn-pooled", "bn-recal"):
            return
        if not any(spec.statistic for spec in self.outline.specs):
            raise StudyError(
                f"restoration {mode} is about running statistics, and network {self.study.model.name!r} has none. Set "
                "restoration: none, head-only or finetune."
            )
        if mode == "bn-pooled" and self.study.model.norm == "batch-local":
            raise StudyError(
                "restoration bn-pooled sends running statistics, which model.norm: batch-local keeps at the site. Set "
                "restoration: bn-recal, or norm: batch."
            )

    def ready(self, number: int) -> bool:
        """The vectors are merged once, at the end."""
        return number == self.params.rounds

    def server(self, channel: Channel, state: ServerState, sums: SecureSum) -> Iterator[None]:
        """Let the sites train alone; after the last round collect, merge and restore."""
        for number in state.rounds(self.params.rounds):
            sizes = {site: int(r.scalars["images"]) for site, r in self._ask(channel, "enter", channel.sites).items()}
            who = self._contributors(channel.sites, sizes)
            if self.recipe.rule.name != "base":
                channel.call("train", dict.fromkeys(who, Message()))
            if number == self.params.rounds:
                model, sent = self._merged(channel, state.groups["model"], sums, who, sizes)
                state.groups["model"] = self._finished(channel, model, sums, sent)
            yield

    def ops(self) -> dict[str, Op]:
        """Train alone, contribute once; beside that what the recipe asks for."""
        kind: Literal["sum", "array"] = "sum" if _is_sum(self.recipe) else "array"
        weight = (Leaf("weight/*", "scalar", "counts"),)
        extra = tuple(Leaf(name, "array", "images") for name in sorted(self.recipe.needs) if name != "statistics")
        about = () if kind == "sum" else (Leaf("images", "scalar", "counts"), Leaf("held", "scalar", "labels"))
        ops = {"enter": Op(enter, (Leaf("images", "scalar", "counts"),))}
        if self.recipe.rule.name != "base":
            ops["train"] = Op(train_alone, (Leaf("loss", "scalar", "images"),))
            ops["contribute"] = Op(self.contribute, (Leaf("vector", kind, "images"), *extra, *about, *weight))
        if self.recipe.rule.judged:
            ops["judge"] = Op(self.judge, (Leaf("val/*", "scalar", "images"),))
        if self.restoration.mode == "bn-pooled":
            ops["means"] = Op(send_means, (Leaf("means", "sum", "images", lanes=64), *weight))
            ops["variances"] = Op(send_variances, (Leaf("variances", "sum", "images", lanes=64), *weight))
        if self.recipe.head is not None:
            ops["head"] = Op(self.send_head_sums, (Leaf("head", "sum", "images", lanes=64), *weight))
        if self.params.restorer:
            ops["restore"] = Op(self.restored, (Leaf("model", "array", "images"),))
        return ops

    def deploy(self, site: Site, message: Message) -> None:
        """Load the merged model; where no site restored it for all, restore it on the site's own images."""
        load_global(site, message)
        if self.restoration.needs_images and not self.params.restorer:
            self._restore(site)

    # The server's side.

    def _ask(self, channel: Channel, op: str, sites: Sequence[str]) -> Mapping[str, Message]:
        return channel.call(op, dict.fromkeys(sites, Message()))

    def _contributors(self, sites: Sequence[str], sizes: Mapping[str, int]) -> list[str]:
        """Of the roster's sites those that answered with their number of images and shall contribute."""
        wanted, restorer = self.params.contributors, self.params.restorer
        if restorer and restorer not in sites:
            raise SiteError(f"method.restorer: there is no site {restorer!r}. {nearest(restorer, sites)}")
        able = {site: n for site, n in sizes.items() if site != restorer}
        if isinstance(wanted, list):
            others = [site for site in sites if site != restorer]
            unknown = [site for site in wanted if site not in others]
            if unknown:
                raise SiteError(f"method.contributors: {unknown[0]!r} cannot contribute. {nearest(unknown[0], others)}")
            able = {site: n for site, n in able.items() if site in wanted}
        if not able:
            beside = f" beside the restorer {restorer!r}" if restorer else ""
            raise SiteError(f"no site answered{beside} that could contribute.")
        return [max(sorted(able), key=lambda site: able[site])] if wanted == "largest" else sorted(able)

    def _merged(
        self, channel: Channel, base: dict[str, Tensor], sums: SecureSum, who: list[str], sizes: Mapping[str, int]
    ) -> tuple[dict[str, Tensor], list[str]]:
        """The merged model, and who is in it."""
        if self.recipe.rule.name == "base":
            return base, who
        if _is_sum(self.recipe):
            # One message for all: masks cancel only between sites that were told the same. It says what a site can
            # check of itself, not the shares: with those a server could have one site's vector as the sum.
            told = {f"counts/{site}": _counts(self.recipe.rule, sizes[site]) for site in who}
            total = sums.sum(channel, "contribute", dict.fromkeys(who, Message.pack({"model": base}, **told)))
            sent = [site for site in who if site in total.scalars]
            # The mean, times the sum of the shares that those who answered have among themselves.
            scale = sum(_shares(self.recipe.rule, [sizes[site] for site in sent]))
            moved = total.mean("vector")
            return base | add_update({name: base[name] for name in moved}, moved, scale), sent
        message = Message.pack({"model": base})
        sources = [_source(s, r) for s, r in channel.stream("contribute", dict.fromkeys(who, message))]
        outline = self.outline.only(base)
        found: dict[str, Tensor] = {}
        recipe = self.recipe.model_copy(update={"head": None, "restoration": Restoration()})
        judge = None
        if recipe.rule.judged:
            judges = [self.params.restorer] if self.params.restorer else list(channel.sites)

            def judge(candidate: Mapping[str, Tensor]) -> float:
                replies = channel.call("judge", dict.fromkeys(judges, Message.pack({"model": candidate})))
                score = mean_score(self.study, [_validation(reply) for reply in replies.values()])
                if score is None:
                    raise SiteError(f"rule {recipe.rule.name} needs validation images at {', '.join(judges)}.")
                return score

        start = {name: tensor.cpu() for name, tensor in base.items()}
        merge(outline, InMemoryTensors(start), sources, recipe, found.__setitem__, judge=judge)
        return found, [source.site for source in sources]

    def _finished(
        self, channel: Channel, model: dict[str, Tensor], sums: SecureSum, who: list[str]
    ) -> dict[str, Tensor]:
        """Pool statistics, refit the head, restore: what the recipe asks for beside the merge."""
        if self.restoration.mode == "bn-pooled":
            means = sums.sum(channel, "means", dict.fromkeys(who, Message())).mean("means")
            spread = sums.sum(channel, "variances", dict.fromkeys(who, Message.pack({"means": means})))
            pooled = {f"{n}.running_mean": t for n, t in means.items()}
            pooled |= {f"{n}.running_var": t for n, t in spread.mean("variances").items()}
            model = model | {n: t.to(model[n].dtype) for n, t in pooled.items() if n in model}
        # The head goes on the features that the model will have; fine-tuning starts from that head.
        recalibrated = self.restoration.mode == "bn-recal"
        if recalibrated:
            model = self._restored_once(channel, model)
        if self.recipe.head is not None:
            total = sums.sum(channel, "head", dict.fromkeys(who, Message.pack({"model": model})))
            solved = solve_head(
                HeadSums.from_tensors(**total.sums["head"], classes=len(self.study.task.classes)),
                self.recipe.head,
                self.study.task.kind,
            )
            name = self.outline.head
            model = model | {f"{name}.{leaf}": t.to(model[f"{name}.{leaf}"].dtype) for leaf, t in solved.items()}
        return model if recalibrated else self._restored_once(channel, model)

    def _restored_once(self, channel: Channel, model: dict[str, Tensor]) -> dict[str, Tensor]:
        """The model as the restorer restores it, where there is one and something to restore."""
        restorer = self.params.restorer
        if not (restorer and self.restoration.needs_images):
            return model
        replies = channel.call("restore", {restorer: Message.pack({"model": model})})
        if restorer not in replies:
            raise SiteError(f"the restorer {restorer!r} did not answer: {channel.absent.get(restorer, 'no reason')}.")
        return replies[restorer].group("model")

    # The site's side.

    def contribute(self, site: Site, message: Message) -> Message:
        """Load what the site's own training came to, and send how it differs from the base."""
        if site.state.load("personal") is None:
            raise SiteError(f"site {site.name!r} has not trained in any round, so it has nothing to contribute.")
        load_finished(site)
        received = message.group("model")
        keep_local(site, received)
        moving = {n for n in received if n.endswith(("running_mean", "running_var"))}
        vector = site.update({n: t for n, t in received.items() if n not in moving})
        if _is_sum(self.recipe):
            weight = 1000 * self._own_share(site, message)
            return Message.pack({"vector": self._filtered(site, vector)}, **{"weight/vector": weight})
        seed = derive_seed(site.study.seed, site.name, "statistics")
        extra = site_statistics(site.model, site.data, site.task, self.recipe.needs - {"statistics"}, seed)
        held = "".join("1" if present else "0" for present in _held(site))
        groups: dict[str, Mapping[str, Tensor]] = {"vector": vector}
        groups |= {str(kind): tensors for kind, tensors in extra.items()}
        return Message.pack(groups, images=binned(site.images), held=held)

    def _own_share(self, site: Site, message: Message) -> float:
        """The site's share with scale 1, from what all sites were told that each counts.

        Raises:
            SiteError: It was told another count of this site than its own.
        """
        told = {n.removeprefix("counts/"): v for n, v in message.scalars.items() if n.startswith("counts/")}
        own = _counts(self.recipe.rule, binned(site.images))
        counts = [value for value in told.values() if isinstance(value, int) and value >= 0]
        if told.get(site.name) != own or len(counts) < len(told):
            raise SiteError(
                f"site {site.name!r} counts {own}, but was told {told.get(site.name)}: with other shares than the "
                "rule's own the sum would show a single site's vector."
            )
        # Whatever scale they have, sites weigh as with scale 1: a secure sum takes no weights below zero.
        shares = _shares(self.recipe.rule.model_copy(update={"scale": 1.0}), counts)
        return shares[list(told).index(site.name)]

    def _filtered(self, site: Site, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the recipe's filters make of a vector; where vectors are added up, its own site applies them."""
        found = dict(vector)
        absent = tuple(k for k, held in enumerate(_held(site)) if not held)
        for order, one in enumerate(self.recipe.filters):
            for name, change in found.items():
                seed = derive_seed(site.study.seed, site.name, "filter", order, name)
                rows = absent if self.outline.has_classes(name) else ()
                piece = Piece(name, change.cpu(), seed, norm=math.nan, median_norm=math.nan, absent_rows=rows)
                found[name] = one.apply(piece).to(change.device)
        return found

    def judge(self, site: Site, message: Message) -> Message:
        """Validation metrics of a candidate, with its batch-norm statistics restored first where the recipe does so."""
        if len(site.data.splits["val"]) == 0:
            return Message()
        load_global(site, message)
        if self.restoration.mode == "bn-recal":
            self._restore(site)
        return Message(scalars={f"val/{name}": value for name, value in measured(site).items()})

    def restored(self, site: Site, message: Message) -> Message:
        """The merged model, restored on the restorer's images."""
        received = load_global(site, message)
        self._restore(site)
        return Message.pack({"model": {name: site.tensors[name].clone() for name in received}})

    def send_head_sums(self, site: Site, message: Message) -> Message:
        """Sums over the features that the merged network gives for the site's training images, as it will be used."""
        load_global(site, message)
        if self.restoration.mode == "bn-recal" and not self.params.restorer:
            self._restore(site)
        return Message.pack({"head": head_sums(site.model, site.data, site.task)}, **{"weight/head": 1.0})

    def _restore(self, site: Site) -> None:
        restore(
            site.model,
            site.data,
            site.task,
            self.restoration,
            site.study.training,
            batch_size=site.study.evaluation.batch_size,
            seed=derive_seed(site.study.seed, site.name, "restoration"),
        )


def enter(site: Site, message: Message) -> Message:
    """How many training images the site has, binned."""
    return Message(scalars={"images": binned(site.images)})


def train_alone(site: Site, message: Message) -> Message:
    """A round of local training; the state that does best on the site's own validation images is kept aside."""
    load_own(site)
    result = site.train()
    site.state.save("personal", site.tensors)
    settings = site.study.evaluation
    judged = site.round == site.study.method.rounds or (settings.every and site.round % settings.every == 0)
    if settings.select == "best" and judged:
        score = mean_score(site.study, [measured(site)] if len(site.data.splits["val"]) else [])
        kept = site.state.load("best")
        if score is not None and (kept is None or score > float(kept[1]["score"])):
            site.state.save("best", site.tensors, score=score)
    return Message(scalars={"loss": result.loss})


def measured(site: Site) -> dict[str, float]:
    """Validation metrics of the network as it is."""
    return validation_metrics(site.model, site.data, site.task, site.study)


def load_finished(site: Site) -> None:
    """Load the state of the site's own training that it contributes."""
    kept = site.state.load("best")
    if kept:
        site.load(kept[0])
    else:
        load_own(site)


def send_means(site: Site, message: Message) -> Message:
    """Running means of batch normalisation, as the site's own network saw them, weighted by training images."""
    load_finished(site)
    means = {n.removesuffix(".running_mean"): t.clone() for n, t in site.tensors.items() if n.endswith("running_mean")}
    return Message.pack({"means": means}, **{"weight/means": float(site.images)})


def send_variances(site: Site, message: Message) -> Message:
    """Running variances about the mean of all sites: what makes a pooled variance that cannot be negative."""
    load_finished(site)
    spread: dict[str, Tensor] = {}
    for name, mean in message.group("means").items():
        own, variance = site.tensors[f"{name}.running_mean"], site.tensors[f"{name}.running_var"]
        spread[name] = (variance.double() + (own.double() - mean.to(own.device)).square()).to(variance.dtype)
    return Message.pack({"variances": spread}, **{"weight/variances": float(site.images)})


def _is_sum(recipe: Recipe) -> bool:
    """Whether the merged vector is a sum with shares that no vector must be seen for.

    A filter that looks at one vector alone is applied by its site; so the random and shuffled controls, which join
    every comparison, can stand beside a method whose vectors nobody sees.
    """
    rule, alone = recipe.rule, not any(one.needs_norms for one in recipe.filters)
    return alone and not rule.judged and rule.shares([1, 1], None) is not None


def _shares(rule: Rule, images: Sequence[int]) -> list[float]:
    shares = rule.shares(images, None)
    assert shares is not None, "only rules that are sums get here"
    return shares


def _counts(rule: Rule, images: int) -> int:
    """What a site counts in a rule that is a sum: its images, where they weigh, else 1."""
    return images if rule.shares([1, 2], None) != rule.shares([1, 1], None) else 1


def _held(site: Site) -> list[bool]:
    targets = site.data.labels("train")
    if targets.dtype == torch.int64 and targets.ndim == 1:
        return (torch.bincount(targets, minlength=len(site.task.classes)) > 0).tolist()
    if targets.ndim == 2:
        return (targets > 0).any(0).tolist()
    return [True] * len(site.task.classes)


def _source(site: str, reply: Message) -> InMemory:
    kinds: dict[Kind, Any] = {
        kind: {name: tensor.cpu() for name, tensor in reply.group(kind).items()}
        for kind in ("vector", "fisher", "gram")
        if kind in reply.groups()
    }
    held = tuple(mark == "1" for mark in str(reply.scalars["held"]))
    return InMemory(reply.digest(), site, int(reply.scalars["images"]), held, kinds)


def _validation(reply: Message) -> dict[str, float]:
    return {name.removeprefix("val/"): float(value) for name, value in reply.scalars.items()}
