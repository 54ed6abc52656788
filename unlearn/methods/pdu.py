"""PDU: constrained entropic unlearning (Entesari et al. 2025, arXiv 2506.05314).

    min_theta max_{lambda >= 0}  mean_t (max_v z_t[v] - mean_v z_t[v])^2
                                 + lambda (NLL(retain) - eps)

The forget side flattens the logits z_t at every unit until no answer is preferred; it needs no
softmax, and its gradient does not vanish at confident predictions. The retain side is a
constraint, and lambda its price: once per optimiser step

    lambda <- max(0, lambda + eta (NLL(retain) - eps))

with the mean NLL per unit over the whole retain batch. For the first ``dual_warmup`` epochs lambda
stays at lambda0. eps must lie above the starting model's retain loss: below it the constraint
cannot be met, lambda only grows and the forget side loses its say. Both losses are read where the
answer tokens are predicted. Cost: as grad_diff.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from unlearn.interface import Need, Needs, Request, Subject
from unlearn.ranges import Range
from unlearn.run import Run
from unlearn.tasks.base import Batch, Predictions
from unlearn.training import Numbers, Term, Training, descend, likelihood


def margin_units(logits: Tensor, labels: Tensor) -> Tensor:
    """Squared distance of the largest logit from the mean one, of every unit.

    Args:
        logits: shape (n, classes).
        labels: not used: a flat answer prefers nothing.

    Returns:
        Shape (n,).

    >>> import torch
    >>> margin_units(torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([0]))
    tensor([4.])
    """
    return (logits.amax(-1) - logits.mean(-1)).square()


def dual_step(dual: float, retain_nll: float, eps: float, eta: float) -> float:
    """The dual variable after a step at which the retain loss was ``retain_nll`` nats per unit.

    >>> dual_step(1.0, retain_nll=0.5, eps=0.25, eta=4.0)
    2.0
    """
    return max(0.0, dual + eta * (retain_nll - eps))


@dataclass(frozen=True, kw_only=True)
class PDU(Training):
    """Flatten the answers to the forget set under a limit on the retain loss."""

    lambda0: Annotated[
        float,
        Field(
            ge=0,
            description="first price of the retain loss; the paper uses 100 (TOFU), 50 (MUSE)",
        ),
        Range(1.0, 200.0, log=True),
    ] = 100.0
    eta: Annotated[
        float,
        Field(gt=0, description="step of the price; the paper uses 5 (TOFU), 1 (MUSE)"),
        Range(0.5, 20.0, log=True),
    ] = 5.0
    eps: Annotated[
        float,
        Field(
            gt=0,
            description="largest retain loss allowed, in nats per unit: above the starting "
            "model's, or nothing is forgotten; the paper uses 0.3 (TOFU), 0.1 and 1.5 (MUSE)",
        ),
        Range(0.01, 2.0, log=True),
    ] = 0.3
    dual_warmup: Annotated[
        float,
        Field(
            ge=0,
            description="epochs before the price moves; the paper uses 5 of 10 (TOFU), 3 (MUSE)",
        ),
        Range(0.0, 5.0),
    ] = 5
    epochs: Annotated[float, Field(gt=0, description="passes over the forget set")] = 10

    needs: ClassVar[Needs] = Needs(retain=Need.REQUIRED)

    def terms(self, subject: Subject, request: Request, run: Run) -> list[Term]:
        """Nothing to prepare."""

        def loss(predictions: Predictions, batch: Batch) -> Tensor:
            return predictions.each(margin_units).sum(1)

        forget = Term("forget", request.forget_set(), loss, "unit")
        return [forget, Term("retain", request.retain_set(), likelihood, "unit", self.lambda0)]

    def unlearn(self, subject: Subject, request: Request, run: Run) -> Subject:
        """Descend on the weights, ascend on the price."""
        warm = self.steps(len(request.forget_set())) * self.dual_warmup / self.epochs

        def price(done: int, weights: list[float], numbers: Numbers) -> list[float]:
            forget, dual = weights
            if done > warm:
                dual = dual_step(dual, numbers["retain_nll"], self.eps, self.eta)
            run.log("dual", step=done, dual=dual)
            return [forget, dual]

        return descend(subject, self.terms(subject, request, run), self, run, reweigh=price)
