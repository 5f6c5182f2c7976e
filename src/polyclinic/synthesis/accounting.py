"""What differentially private training may spend, and has: Google's accountant over all rounds and local steps.

Rényi differential privacy of the Gaussian mechanism on Poisson samples (Mironov, Talwar, Zhang: arXiv 1908.10530),
turned into (ε, δ) as ``dp-accounting`` does (Canonne, Kamath, Steinke: arXiv 2004.00010).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

from polyclinic.errors import StudyError
from polyclinic.synthesis.settings import PrivateTraining, VAESettings

_MOST_NOISE, _LEAST_NOISE = 1e5, 1e-2
_PRECISION = 1e-3


@dataclass(frozen=True)
class Budget:
    """What a site may do with its patients in all rounds together.

    Attributes:
        sampling: Chance of each patient to be in a step.
        steps: In a round.
        rounds: In all.
        noise: Deviation of the noise as a multiple of the clipping norm.
        delta: δ of the promise.
    """

    sampling: float
    steps: int
    rounds: int
    noise: float
    delta: float

    @classmethod
    def plan(cls, patients: int, settings: VAESettings, private: PrivateTraining) -> Budget:
        """The least noise that keeps the promise over all rounds.

        Args:
            patients: The site's training patients, at least one. ``batch_size`` of them are in a step on average, all
                of them where they are fewer; a round has as many steps as ``epochs`` times all patients need.
            settings: Sizes.
            private: The promise.

        Raises:
            StudyError: dp-accounting is not installed, or no noise is enough.
        """
        sampling = min(1.0, settings.batch_size / patients)
        steps = math.ceil(settings.epochs / sampling)
        noise = noise_multiplier(private.epsilon, private.delta, sampling, steps * settings.rounds)
        return cls(sampling, steps, settings.rounds, noise, private.delta)

    def spent(self, rounds: int) -> float:
        """ε of so many rounds."""
        return epsilon_spent(self.noise, self.sampling, self.steps * rounds, self.delta)


def check_installed() -> None:
    """Raise StudyError where dp-accounting is missing."""
    try:
        import dp_accounting.rdp  # noqa: F401
    except ImportError as error:
        raise StudyError(
            "synthesis.generator.dp needs the package dp-accounting, which is not installed. Install it: "
            "pip install 'polyclinic[dp]'."
        ) from error


@lru_cache(maxsize=1024)
def epsilon_spent(noise: float, sampling: float, steps: int, delta: float) -> float:
    """ε of ``steps`` steps of the Gaussian mechanism on Poisson samples.

    Args:
        noise: Deviation over clipping norm.
        sampling: Chance of each patient to be in a step, in (0, 1].
        steps: All together.
        delta: δ.

    Raises:
        StudyError: dp-accounting is not installed.
    """
    if steps == 0:
        return 0.0
    check_installed()
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.rdp import RdpAccountant

    step = GaussianDpEvent(noise) if sampling == 1 else PoissonSampledDpEvent(sampling, GaussianDpEvent(noise))
    accountant = RdpAccountant()
    with _quiet():
        accountant.compose(SelfComposedDpEvent(step, steps))
        return float(accountant.get_epsilon(delta))


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, dp-accounting does not warn of orders that it leaves out: the others give a bound as well."""
    log = logging.getLogger("absl")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


@lru_cache(maxsize=1024)
def noise_multiplier(epsilon: float, delta: float, sampling: float, steps: int) -> float:
    """The least noise multiplier, to a thousandth and rounded up, with which ``steps`` steps spend at most ``epsilon``.

    Raises:
        StudyError: dp-accounting is not installed, or no noise is enough.
    """
    high = 1.0
    while epsilon_spent(high, sampling, steps, delta) > epsilon:
        high *= 2
        if high > _MOST_NOISE:
            raise StudyError(
                f"synthesis.generator.dp: no noise brings {steps} steps to ε {epsilon:g} with δ {delta:g}. Raise "
                "epsilon or delta, or take fewer rounds."
            )
    low = high / 2
    while low > _LEAST_NOISE and epsilon_spent(low, sampling, steps, delta) <= epsilon:
        low, high = low / 2, low
    while high - low > _PRECISION * low:
        middle = (low + high) / 2
        if epsilon_spent(middle, sampling, steps, delta) > epsilon:
            low = middle
        else:
            high = middle
    return high
