"""Negative Preference Optimization (Zhang et al. 2024, arXiv 2404.05868, eq. 3).

    L = (2/beta) mean_i softplus(beta (S_i^ref - S_i)) + retain_weight * R(retain)

where S_i is the NLL of forget example i, summed over its answer, and S_i^ref the same under the
starting model. As beta -> 0 this becomes gradient ascent; at the start it is (2/beta) ln 2.
Bounded, unlike ascent: examples already forgotten stop pulling. The forget side is a sum over an
answer's tokens and the retain side a mean per token, so the retain term needs weight. The
reference values are computed once before training, never by a second live model. Cost: one
forward pass over the forget set, then as grad_diff.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from unlearn.interface import Request, Subject
from unlearn.ranges import Range
from unlearn.reference import reference_nll
from unlearn.retention import TwoSided
from unlearn.run import Run
from unlearn.tasks.base import Batch, Predictions
from unlearn.training import Term


def npo_terms(nll: Tensor, nll_ref: Tensor, beta: float) -> Tensor:
    """The loss of each example, shape (batch,); arguments as for :func:`npo_loss`."""
    return 2 / beta * F.softplus(beta * (nll_ref - nll))


def npo_loss(nll: Tensor, nll_ref: Tensor, beta: float) -> Tensor:
    """The NPO loss, a mean over the batch.

    Args:
        nll: summed over the units of each example, shape (batch,), in nats.
        nll_ref: the same under the starting model.
        beta: inverse temperature, > 0.

    >>> import torch
    >>> float(npo_loss(torch.tensor([3.0]), torch.tensor([3.0]), beta=1.0))  # 2 ln 2
    1.3862943649291992
    """
    return npo_terms(nll, nll_ref, beta).mean()


@dataclass(frozen=True, kw_only=True)
class NPO(TwoSided):
    """Push the forget set's likelihood below the starting model's, with a bounded loss."""

    beta: Annotated[
        float,
        Field(gt=0, description="inverse temperature: larger stops earlier"),
        Range(0.01, 10.0, log=True),
    ] = 0.1
    retain_weight: Annotated[
        float,
        Field(ge=0, description="weight of the retain term; the paper uses 1"),
        Range(0.5, 30.0, log=True),
    ] = 4.0

    def terms(self, subject: Subject, request: Request, run: Run) -> list[Term]:
        """Compute the reference once."""
        forget = request.forget_set()
        reference = reference_nll(subject.model, forget, run)

        def loss(predictions: Predictions, batch: Batch) -> Tensor:
            return npo_terms(predictions.nll(), reference[batch["index"]], self.beta)

        return [Term("forget", forget, loss, "example"), *self.held(subject, request, run)]
