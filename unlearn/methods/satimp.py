"""SatImp: saturation and importance (Yang et al., ICML 2025, arXiv 2505.11953).

    min  -forget_weight * mean_t p_t^beta1 (1 - p_t)^beta2 l_t + retain_weight * R(retain)

where l_t = -log p_t is the NLL of unit t of the forget set; no gradient flows through the weight.
The first factor fades what is already unlikely (saturation), the second what the model is sure of
(importance: common words rather than facts). At p = 1 the weight vanishes: what is memorised to
certainty starts moving slowly. The weights never exceed beta1^beta1 beta2^beta2 /
(beta1 + beta2)^(beta1 + beta2), 0.067 for 5 and 1, so the retain term is weighed down with them.
The mean is over the units of the batch. No reference model. Cost: as grad_diff.
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


def satimp_units(nll: Tensor, beta1: float, beta2: float) -> Tensor:
    """The loss of each unit; same shape as ``nll``.

    Args:
        nll: of every unit, any shape, in nats.
        beta1: power of the probability, >= 0.
        beta2: power of its complement, >= 0.

    >>> import math, torch
    >>> satimp_units(torch.tensor([math.log(2)]), beta1=1.0, beta2=1.0)  # -(1/4) ln 2
    tensor([-0.1733])
    """
    fixed = nll.detach()
    return -(-beta1 * fixed).exp() * (-(-fixed).expm1()).pow(beta2) * nll


@dataclass(frozen=True, kw_only=True)
class SatImp(TwoSided):
    """Climb on the forget set where the model is confident, but not certain."""

    tasks: ClassVar[tuple[str, ...]] = WITH_LOGITS

    beta1: Annotated[
        float,
        Field(ge=0, description="power of the probability: larger stops earlier"),
        Range(0.5, 10.0, log=True),
    ] = 5.0
    beta2: Annotated[
        float,
        Field(ge=0, description="power of its complement: larger spares certain tokens"),
        Range(0.1, 5.0, log=True),
    ] = 1.0
    forget_weight: Annotated[
        float, Field(gt=0, description="weight of the forget term"), Range(0.1, 10.0, log=True)
    ] = 1.0
    retain_weight: Annotated[
        float,
        Field(ge=0, description="weight of the retain term; the authors use 0.1"),
        Range(0.01, 30.0, log=True),
    ] = 0.1

    def terms(self, subject: Subject, request: Request, run: Run) -> list[Term]:
        """Nothing to prepare."""

        def loss(predictions: Predictions, batch: Batch) -> Tensor:
            return satimp_units(predictions.unit_nll(), self.beta1, self.beta2).sum(1)

        forget = Term("forget", request.forget_set(), loss, "unit", self.forget_weight)
        return [forget, *self.held(subject, request, run)]
