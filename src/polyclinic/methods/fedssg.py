"""FedSSG (reconstruction): federated averaging with synthetic samples by class and device, shared over the sites.

Pavan, Caligiuri, Barbato, Zanuttigh: Federated medical image classification under class and domain imbalance exploiting
synthetic sample generation. ICPR 2026. arXiv 2604.26324.

Of the paper (its abstract): samples are generated and distributed over sites so that rare pathologies and
under-represented imaging devices are both covered; a class-conditional generator; little work at sites. Its formulas
and numbers are not public. Ours: everything in ``polyclinic.synthesis``, and the logit-adjusted loss.

It is a combination, not more: ``method: fedavg`` with ``synthesis`` and ``task.loss: logit-adjusted`` is the same, and
other methods take the same two settings.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from polyclinic.errors import StudyError
from polyclinic.federation.channel import Channel
from polyclinic.federation.state import ServerState
from polyclinic.methods.base import Method, MethodParams, Op
from polyclinic.methods.fedavg import UPDATE, average_rounds, train_global
from polyclinic.secure.sum import SecureSum
from polyclinic.study import Study
from polyclinic.synthesis.settings import SynthesisSettings


class FedSSGParams(MethodParams):
    """Settings of fedssg."""

    name: Literal["fedssg"] = "fedssg"
    server_lr: float = Field(1.0, ge=0)
    """Share of the mean update that the server applies."""
    synthesis: SynthesisSettings | None = None
    """As ``synthesis`` of the study, for this method alone, so that those it is compared with go without; empty: the
    study's, else all defaults."""


class FedSSG(Method):
    """Rounds are fedavg's; sites train with what they took from the exchange. Weights count real images alone."""

    Params = FedSSGParams
    title = "averaging with synthetic samples by class and device (reconstruction)"
    reference = "Pavan et al., ICPR 2026, arXiv 2604.26324"
    needs = "a multi-class task with 2D images"

    @classmethod
    def adapted(cls, study: Study) -> Study:
        """The study with this method's synthesis, and with the logit-adjusted loss where the study leaves it open."""
        found = study.synthesis or study.method.synthesis or SynthesisSettings()
        task = study.task
        if task.loss == "auto":
            task = task.model_copy(update={"loss": "logit-adjusted"})
        return study.model_copy(update={"synthesis": found, "task": task})

    @classmethod
    def check(cls, study: Study) -> None:
        """Refuse two places that say different things."""
        if study.synthesis is not None and study.method.synthesis not in (None, study.synthesis):
            raise StudyError(
                "synthesis and method.synthesis are both given and differ. Keep one: the first for every method of "
                "the study, the second for fedssg alone."
            )

    def server(self, channel: Channel, state: ServerState, sums: SecureSum) -> Iterator[None]:
        """As in fedavg."""
        yield from average_rounds(self, channel, state, sums, server_lr=self.study.method.server_lr)

    def ops(self) -> dict[str, Op]:
        """One op: train the received model, with samples."""
        return {"train": Op(train_global, UPDATE)}
