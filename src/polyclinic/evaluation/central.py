"""The server's own model, where a method has one beside those of the sites: saved, and judged at every site.

The server sees no patient, so this is the only place where anybody learns what its model is worth. It is the model
after the last round, whatever round the sites' own models are of.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from polyclinic.errors import SiteError
from polyclinic.evaluation.inference import predict_cases
from polyclinic.evaluation.replies import REPORT, packed, unpacked
from polyclinic.evaluation.summary import SiteResult, site_result, summarise
from polyclinic.federation.message import Message
from polyclinic.federation.site import Op, Site, Workbench
from polyclinic.models.domain_statistics import estimate_statistics
from polyclinic.models.registry import describe
from polyclinic.models.weights import load_tensors, save_tensors
from polyclinic.seeds import generator
from polyclinic.study import ModelSettings, Study

if TYPE_CHECKING:
    from polyclinic.federation.channel import Channel
    from polyclinic.federation.state import ServerState
    from polyclinic.methods.base import Method

CENTRAL = "central"
"""Name of the model among a run's models, and of its network's role."""
OP = "central-test"


def central_ops(method: Method) -> dict[str, Op]:
    """The site's side, for a method that may have such a model."""
    from polyclinic.methods.base import Method

    return {} if type(method).central is Method.central else {OP: Op(_test, REPORT)}


def report_central(method: Method, channel: Channel, state: ServerState, folder: Path) -> dict[str, Any]:
    """Save the server's model as ``central.safetensors`` and let every site judge it on its test images.

    Args:
        method: Whose model.
        channel: To the sites.
        state: After the last round.
        folder: Of the run's models.

    Returns:
        For ``metrics.json``: ``central`` (by site), ``central_mean`` and ``central_model``; empty where there is none.

    Raises:
        SiteError: No site answered. RunError: The model cannot be saved.
    """
    found = method.central(state)
    if found is None:
        return {}
    settings, tensors = found
    folder.mkdir(exist_ok=True)
    save_tensors(folder / f"{CENTRAL}.safetensors", tensors, {"model": settings.model_dump_json()})
    message = Message.pack({CENTRAL: tensors}, model=settings.model_dump_json())
    results: dict[str, SiteResult] = {}
    for site, reply in channel.stream(OP, dict.fromkeys(channel.sites, message)):
        results[site] = unpacked(reply)
    if not results:
        raise SiteError(f"no site could test the central model: {dict(channel.absent)}.")
    table = summarise(results, method.study.evaluation.confidence)
    model = method.networks.of(settings, CENTRAL).model
    return {
        CENTRAL: table["sites"],
        "central_mean": table["mean"],
        "central_model": {"name": settings.name, **describe(model)},
    }


def _test(site: Site, message: Message) -> Message:
    settings = _known(site.study, str(message.scalars.get("model", "")))
    bench = site.networks.of(settings, CENTRAL)
    _fill(bench, message.group(CENTRAL))
    rng = generator(site.study.seed, "central statistics", site.name)
    size = site.study.evaluation.batch_size
    # Its running statistics, if it has any, are those of images that are no patients'.
    batches = site.data.train_batches(rng, size)
    estimate_statistics(bench.model, (site.data.inputs(part).to(bench.device) for part in batches))
    predictions = predict_cases(bench.model, site.data, site.task, ["val", "test"], size)
    return packed(site_result(site.name, predictions, site.study.task, site.study.evaluation))


def _fill(bench: Workbench, tensors: Mapping[str, Tensor]) -> None:
    bench.restart()
    load_tensors(bench.model, tensors)


def _known(study: Study, told: str) -> ModelSettings:
    """The settings of the study that the server means: a site builds no network that its study does not name."""
    params = study.method
    own = [getattr(params, name) for name in type(params).model_fields]
    for settings in [study.model, *study.models.values(), *own]:
        if isinstance(settings, ModelSettings) and settings.model_dump_json() == told:
            return settings
    raise SiteError("the server sent a central model that is none of the study's networks. It was not built.")
