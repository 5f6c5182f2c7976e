"""Training the generator with differential privacy: DP-SGD whose unit is the patient.

Abadi et al.: Deep learning with differential privacy. CCS 2016, arXiv 1607.00133, with Poisson sampling of patients;
``accounting.py`` says how much noise it takes.

Formal guarantee: what a site sends in all rounds of one generator is (ε, δ)-differentially private for each of its
patients, against everybody who sees it, the server and other sites included. Neighbouring data sets differ in one
patient, whose images are all there or count as nothing in every step (zero-out adjacency: Kairouz et al. 2021, arXiv
2103.00039). It holds if

- the devices of the study, and the number of a site's training patients on them, may be known: the sampling
  probability and the number of steps follow from it;
- a person is one patient at one site. One who was at several sites is protected by the sum of their ε;
- nobody but the site knows its noise key. The key comes from the operating system, not from the study's seed, so two
  runs of a private study differ;
- floating-point noise passes for real noise (Mironov, CCS 2012, shows where that fails).

It speaks of the generator alone: counts and styles have ``synthesis.epsilon``, the gate's answers and the training of
the classifier have no such promise. A threshold on cells would let one patient decide about others, so private
training takes all training images, whatever ``synthesis.floor``; and it sends no loss.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from polyclinic.errors import SiteError
from polyclinic.files import whole_file
from polyclinic.synthesis.accounting import Budget
from polyclinic.synthesis.settings import VAESettings
from polyclinic.synthesis.vae import VAE, Lines, Outputs, image_losses
from polyclinic.synthesis.vae_training import Flips, checked_loss, next_batch

_AT_ONCE = 32
_JOURNAL = "generator_privacy.json"


def secret_stream(folder: Path, call: str, rounds: int, journal_name: str = _JOURNAL) -> np.random.Generator:
    """The site's own randomness for its answer to one call.

    The same call gives the same stream, so that a repeated round tells nothing new; another call gives another one.
    The site counts the calls, as a server could otherwise ask until the noise is averaged out.

    Args:
        folder: Where the site keeps its key and the calls that it has answered.
        call: Digest of the message.
        rounds: Different calls that the budget is for.
        journal_name: Of the file; each budget has one.

    Raises:
        SiteError: The budget is spent, or the site's journal is damaged.
    """
    path = folder / journal_name
    try:
        journal = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        key, answered = str(journal.get("key", "")) or secrets.token_hex(32), [str(x) for x in journal.get("calls", [])]
        stream = hmac.digest(bytes.fromhex(key), call.encode(), hashlib.sha256)
    except (ValueError, AttributeError, TypeError) as error:
        raise SiteError(f"{path}: the journal of private training is damaged ({error}); nothing was sent.") from error
    if call not in answered:
        if len(answered) >= rounds:
            raise SiteError(f"the privacy budget is spent: {rounds} calls were answered, and this is another one.")
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(path, 0o600) as file:
            file.write(json.dumps({"key": key, "calls": [*answered, call]}).encode())
    return np.random.Generator(np.random.Philox(key=int.from_bytes(stream[:16], "big")))


def clipped_sum(
    model: nn.Module, batch: tuple[Tensor, ...], noise: Tensor, settings: VAESettings, clip: float
) -> dict[str, Tensor]:
    """Sum over images of the loss's gradient, each scaled down to a norm of at most ``clip`` over all parameters.

    One image more or less moves the sum by at most ``clip``. A gradient that is not finite counts as zero.

    Args:
        model: A ``VAE``.
        batch: Images float ``[B, C, size, size]`` in 0..1, labels and devices int64 ``[B]``; B may be 0.
        noise: Of the latent, ``[B, latent]``.
        settings: The loss.
        clip: The norm.

    Returns:
        By parameter name.
    """
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(own: Mapping[str, Tensor], image: Tensor, label: Tensor, device: Tensor, latent: Tensor) -> Tensor:
        def call(*inputs: Tensor) -> Outputs:
            result: Outputs = torch.func.functional_call(model, dict(own), inputs)
            return result

        return image_losses(call, (image[None], label[None], device[None]), latent[None], settings)[0]

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0, 0))
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for start in range(0, len(noise), _AT_ONCE):
        part = [column[start : start + _AT_ONCE] for column in (*batch, noise)]
        own = gradients(parameters, *part)
        norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in own.values()]).double().norm(dim=0)
        # A little less than clip, so that rounding in float32 cannot lift a gradient above it.
        factors = (clip * (1 - 2.0**-14) / norms).clamp(max=1.0)
        factors = torch.where(norms.isfinite(), factors, 0.0).float()
        for name, gradient in own.items():
            if not bool(norms.isfinite().all()):
                gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
            total[name] += torch.tensordot(factors, gradient, dims=1)
    return total


def train_private(
    model: VAE,
    lines: Lines,
    patients: Sequence[str],
    settings: VAESettings,
    flips: Flips,
    budget: Budget,
    *,
    lr: float,
    rng: np.random.Generator,
) -> None:
    """Train in place for one round: each step takes one image of every patient that was drawn.

    Args:
        model: On the device where it is to be trained.
        lines: All training images of the site.
        patients: Whose they are.
        settings: With ``dp``.
        flips: What is mirrored.
        budget: Of this site.
        lr: Rate of adam, which sees the noisy gradients alone.
        rng: Secret.

    Raises:
        SiteError: The network is not finite any more.
    """
    assert settings.dp is not None
    clip = settings.dp.clip
    images: dict[str, list[int]] = {}
    for place, who in enumerate(patients):
        images.setdefault(who, []).append(place)
    own = list(images.values())
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    expected = budget.sampling * len(own)
    for _ in range(budget.steps):
        drawn = [own[k][rng.integers(len(own[k]))] for k in np.flatnonzero(rng.random(len(own)) < budget.sampling)]
        batch, noise = next_batch(lines, np.array(drawn, dtype=np.int64), flips, settings, rng)
        total = clipped_sum(model, batch, noise, settings, clip)
        for name, parameter in model.named_parameters():
            normal = torch.from_numpy(rng.standard_normal(tuple(parameter.shape), dtype=np.float32))
            parameter.grad = (total[name] + budget.noise * clip * normal.to(parameter.device)) / expected
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    checked_loss(model, 0.0, lr)
