"""What is held while something is forgotten: the retain side of every two-sided objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from unlearn.interface import ALL_TASKS, WITH_LOGITS, Need, Needs, Request, Subject
from unlearn.ranges import Range
from unlearn.reference import ReferenceLogits
from unlearn.run import Run
from unlearn.tasks.base import Batch, Predictions
from unlearn.training import Term, Training, likelihood, schedule


def kl_divergence(logits: Tensor, labels: Tensor, reference: Tensor) -> Tensor:
    """KL(reference || current) of every unit, in nats: a score for :meth:`Predictions.each`.

    Args:
        logits: current ones, shape (n, classes).
        labels: not used: every unit's whole distribution counts.
        reference: logits of the starting model, same shape.

    Returns:
        Shape (n,).
    """
    return F.kl_div(
        logits.log_softmax(-1), reference.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)


@dataclass(frozen=True, kw_only=True)
class TwoSided(Training):
    """Hyperparameters of methods that forget on one set and hold on to another."""

    retention: Annotated[
        Literal["none", "nll", "kl"],
        Field(
            description="what is held on the retain set: its likelihood (nll), the starting "
            "model's whole distribution (kl), nothing (none)"
        ),
    ] = "nll"
    retain_weight: Annotated[
        float, Field(ge=0, description="weight of the retain term"), Range(0.1, 30.0, log=True)
    ] = 1.0

    tasks: ClassVar[tuple[str, ...]] = ALL_TASKS

    @property
    def needs(self) -> Needs:
        """The retain set, unless nothing is retained."""
        return Needs(
            retain=Need.NO if self.retention == "none" else Need.REQUIRED,
            tasks=WITH_LOGITS if self.retention == "kl" else self.tasks,
        )

    def trained(self, forget: int, retain: int) -> int:
        """As many retain as forget examples, if anything is retained."""
        steps = self.steps(forget) * min(self.batch_size, forget)
        return steps if self.retention == "none" or self.retain_weight == 0 else 2 * steps

    def held(self, subject: Subject, request: Request, run: Run) -> list[Term]:
        """The retain term, a mean over the units of its batch; empty when nothing is retained."""
        if self.retention == "none" or self.retain_weight == 0:
            return []
        retain = request.retain_set()
        if self.retention == "nll":
            return [Term("retain", retain, likelihood, "unit", self.retain_weight)]
        plan = schedule(self, [len(request.forget_set()), len(retain)], run)[1]
        needed = [index for batch in plan for index in batch]
        reference = ReferenceLogits(subject.model, retain, needed, run)

        def loss(predictions: Predictions, batch: Batch) -> Tensor:
            return predictions.each(kl_divergence, reference(batch)).sum(1)

        return [Term("retain", retain, loss, "unit", self.retain_weight)]


@dataclass(frozen=True, kw_only=True)
class OneSided(TwoSided):
    """Hyperparameters of methods whose papers hold on to nothing; they may."""

    retention: Annotated[
        Literal["none", "nll", "kl"],
        Field(
            description="what is held on the retain set: nothing (none, as in the paper), its "
            "likelihood (nll), the starting model's whole distribution (kl)"
        ),
    ] = "none"
