"""SimNPO (Fan et al. 2024, arXiv 2410.07163): NPO without a reference, length-normalised.

    L = forget_weight * (2/beta) mean_i softplus(-beta (S_i / n_i - delta)) + retain_weight * R

with S_i / n_i the NLL per answer token. This is the authors' code; the paper's margin gamma
corresponds to beta * delta, and with delta = 0 the two agree. Cost: as grad_diff.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from unlearn.interface import Request, Subject
from unlearn.ranges import Range
from unlearn.retention import TwoSided
from unlearn.run import Run
from unlearn.tasks.base import Batch, Predictions
from unlearn.training import Term


def simnpo_terms(nll: Tensor, units: Tensor, beta: float, delta: float) -> Tensor:
    """The loss of each example, shape (batch,); arguments as for :func:`simnpo_loss`."""
    return 2 / beta * F.softplus(-beta * (nll / units - delta))


def simnpo_loss(nll: Tensor, units: Tensor, beta: float, delta: float = 0.0) -> Tensor:
    """The SimNPO loss, a mean over the batch.

    Args:
        nll: summed over the units of each example, shape (batch,), in nats.
        units: number of units per example, shape (batch,).
        beta: inverse temperature, > 0.
        delta: NLL per unit, in nats, at which the pull has half its strength.
    """
    return simnpo_terms(nll, units, beta, delta).mean()


@dataclass(frozen=True, kw_only=True)
class SimNPO(TwoSided):
    """Push the forget set's likelihood per token down, without a reference model."""

    beta: Annotated[
        float, Field(gt=0, description="inverse temperature"), Range(0.5, 10.0, log=True)
    ] = 4.5
    delta: Annotated[float, Field(description="margin in nats per token"), Range(0.0, 10.0)] = 0.0
    forget_weight: Annotated[
        float, Field(gt=0, description="weight of the forget term"), Range(0.02, 2.0, log=True)
    ] = 0.125

    def terms(self, subject: Subject, request: Request, run: Run) -> list[Term]:
        """Nothing to prepare."""

        def loss(predictions: Predictions, batch: Batch) -> Tensor:
            return simnpo_terms(predictions.nll(), batch["units"], self.beta, self.delta)

        term = Term("forget", request.forget_set(), loss, "example", self.forget_weight)
        return [term, *self.held(subject, request, run)]
