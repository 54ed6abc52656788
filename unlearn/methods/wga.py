"""Weighted gradient ascent (Wang et al., ICLR 2025, arXiv 2502.19301).

    min  -forget_weight * mean_t p_t^beta l_t + retain_weight * R(retain)

where l_t = -log p_t is the NLL of unit t of the forget set; no gradient flows through the weight
p_t^beta. The gradient of l_t carries a factor 1/p_t, which makes ascent pull hardest on what is
already forgotten; the weight takes it away. The mean is over the units of the batch; beta = 0 is
grad_diff. No reference model. Cost: as grad_diff.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from unlearn.interface import WITH_LOGITS, Request, Subject
from unlearn.ranges import Range
from unlearn.retention import TwoSided
from unlearn.run import Run
from unlearn.tasks.base import Batch, Predictions
from unlearn.training import Term


def wga_units(nll: Tensor, beta: float) -> Tensor:
    """The loss of each unit; same shape as ``nll``.

    Args:
        nll: of every unit, any shape, in nats.
        beta: power of the probability that weighs a unit, >= 0.

    >>> import math, torch
    >>> wga_units(torch.tensor([math.log(2)]), beta=1.0)  # -(1/2) ln 2
    tensor([-0.3466])
    """
    return -(-beta * nll.detach()).exp() * nll


@dataclass(frozen=True, kw_only=True)
class WGA(TwoSided):
    """Climb on the forget set, less and less on what is already unlikely."""

    tasks: ClassVar[tuple[str, ...]] = WITH_LOGITS

    beta: Annotated[
        float,
        Field(
            ge=0,
            description="power of the probability that weighs a token: larger stops earlier; the "
            "authors' code uses 5",
        ),
        Range(0.1, 10.0, log=True),
    ] = 1.0
    forget_weight: Annotated[
        float, Field(gt=0, description="weight of the forget term"), Range(0.1, 10.0, log=True)
    ] = 1.0

    def terms(self, subject: Subject, request: Request, run: Run) -> list[Term]:
        """Nothing to prepare."""

        def loss(predictions: Predictions, batch: Batch) -> Tensor:
            return wga_units(predictions.unit_nll(), self.beta).sum(1)

        forget = Term("forget", request.forget_set(), loss, "unit", self.forget_weight)
        return [forget, *self.held(subject, request, run)]
