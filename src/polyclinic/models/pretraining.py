"""Start weights that have seen the public images: ``proxies.pretrain``.

The network gets a second last layer over the classes of the public images, and all but its own last layer is trained
with it. So every site, whatever its network, and every method of a comparison start from the same knowledge.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyclinic.data.augment import augment
from polyclinic.data.batches import proxy_batches
from polyclinic.data.proxies import Proxies, load_proxies
from polyclinic.errors import StudyError
from polyclinic.models.amplitude_norm import BUFFER
from polyclinic.models.registry import head_name, untrained_model
from polyclinic.models.taps import feature_tap, features
from polyclinic.models.weights import load_tensors, snapshot
from polyclinic.seeds import derive_seed, generator
from polyclinic.study import ModelSettings, Study
from polyclinic.training import fit

MOST_KEPT = 8
_kept: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
"""Results of this process by what they depend on: server and sites start from the same network."""
Told = Callable[[str, int, int], None]
"""What is done, how many images of it so far, how many in all."""


def pretrain_ahead(study: Study, networks: Iterable[ModelSettings], told: Told) -> None:
    """Pre-train networks, telling of progress, so that whoever builds one of them finds it done.

    Nothing happens in a study without ``proxies.pretrain``. Raises as ``pretrain``.
    """
    if study.proxies is None or not study.proxies.pretrain:
        return
    different = {settings.model_dump_json(): settings for settings in networks}
    for settings in [*different.values()][:MOST_KEPT]:
        pretrain(untrained_model(study, settings), study, settings, told)


def pretrain(model: nn.Module, study: Study, settings: ModelSettings, told: Told | None = None) -> None:
    """Train a network in place on the training part (``Proxies.parts``) of the public images.

    Optimizer, learning rate, batch size and augmentation are those of ``training``. The network's own last layer keeps
    its values. The same study gives the same result; a process computes it once for each network.

    Args:
        model: On the CPU, with its random start weights or those of a file.
        study: With ``proxies``.
        settings: Of the network.
        told: Hears of progress; not where it was done before.

    Raises:
        StudyError: The task is segmentation, or the network does not say where its features are. DataError: From the
            public images. SiteError: Training diverged.
    """
    assert study.proxies is not None
    if study.task.kind == "segmentation":
        raise StudyError("proxies.pretrain trains networks for classification. Set it to 0 for segmentation.")
    feature_tap(model)
    proxies = load_proxies(study)
    key = _key(study, settings, proxies)
    if key not in _kept:
        total = study.proxies.pretrain * len(proxies.parts(study.seed)[0])
        name = f"pre-training of {settings.name}"
        tell = (lambda done: told(name, done, total)) if told else (lambda done: None)
        _kept[key] = _trained(copy.deepcopy(model).to(study.device), study, proxies, tell)
        while len(_kept) > MOST_KEPT:
            _kept.popitem(last=False)
    _kept.move_to_end(key)
    load_tensors(model, _kept[key])


def _trained(model: nn.Module, study: Study, proxies: Proxies, tell: Callable[[int], None]) -> dict[str, Tensor]:
    """The values after training, without those of the network's own last layer; ``tell`` hears of images done."""
    assert study.proxies is not None
    seed = derive_seed(study.seed, "pretraining")
    head = f"{head_name(model)}."
    train, _ = proxies.parts(study.seed)
    rng, draws = generator(seed, "order"), torch.Generator().manual_seed(derive_seed(seed, "augment"))
    with torch.no_grad():
        width = features(model.eval(), proxies.inputs(train[:1]).to(study.device)).shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, "second head"))
        second = nn.Linear(width, len(proxies.classes)).to(study.device)
    trunk: list[Tensor] = [p for name, p in model.named_parameters() if not name.startswith(head)]

    def loss(positions: Tensor) -> Tensor:
        inputs, _ = augment(proxies.inputs(positions), None, study.training.augment, draws)
        found = second(features(model, inputs.to(study.device)))
        return F.cross_entropy(found, proxies.labels[positions].to(study.device))

    model.train()
    batches = _counted(proxy_batches(train, rng, study.training.batch_size, passes=study.proxies.pretrain), tell)
    settings = study.training
    fit([*trunk, *second.parameters()], batches, loss, settings, lr=settings.lr, seed=seed, device=study.device)
    # The amplitude of model.harmonise is that of patients' images: their first batch sets it.
    values = {n: t for n, t in model.state_dict().items() if not n.startswith(head) and n != BUFFER}
    return {name: tensor.cpu() for name, tensor in snapshot(values).items()}


def _counted(batches: Iterable[Tensor], tell: Callable[[int], None]) -> Iterator[Tensor]:
    done = 0
    for batch in batches:
        yield batch
        done += len(batch)
        tell(done)


def _key(study: Study, settings: ModelSettings, proxies: Proxies) -> str:
    """What the result depends on."""
    weights = study.weights_of(settings)
    assert study.proxies is not None
    parts = [
        settings.model_dump(mode="json"),
        study.task.model_dump(mode="json"),
        study.data.image.model_dump(mode="json", exclude={"cache", "cache_folder"}),
        study.training.model_dump(mode="json"),
        [study.seed, study.device, study.proxies.pretrain, proxies.digest],
        [str(weights), weights.stat().st_mtime_ns if weights is not None else 0],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
