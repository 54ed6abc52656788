"""CE-U: cross-entropy unlearning (Yang 2025, arXiv 2503.01224).

    min  mean_t CE(q_t, p_t) + retain_weight * R(retain),   q_t = softmax(z_t, z_t[y_t] = -inf)

where z_t are the model's own current logits at unit t of the forget set, detached, and y_t is the
true label: the model is taught what it would say if the answer did not exist. Bounded, and it
needs neither a reference nor a retain set. The gradient at the logits is p - q: it vanishes when
the answer is forgotten, where that of ascent is largest.

The first ``skip`` answer tokens, which mostly say how an answer begins, contribute nothing, but
every example keeps its last unit (and a classifier its only one). The mean divides by all units.
Cost: one forward and backward per forget example and epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from unlearn.interface import WITH_LOGITS, Request, Subject
from unlearn.ranges import Range
from unlearn.retention import OneSided
from unlearn.run import Run
from unlearn.tasks.base import IGNORED, Batch, Predictions
from unlearn.training import Term


def ce_u_units(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with the model's own answer without the true label, of every unit, in nats.

    Args:
        logits: shape (n, classes).
        labels: the true ones, shape (n,).

    Returns:
        Shape (n,); the target takes no part in the gradient.

    >>> ce_u_units(torch.zeros(1, 2), torch.tensor([0]))  # the other label, at probability 1/2
    tensor([0.6931])
    """
    target = logits.detach().scatter(1, labels[:, None], -torch.inf).softmax(-1)
    return F.cross_entropy(logits, target, reduction="none")


def ce_u_terms(predictions: Predictions, skip: int) -> Tensor:
    """The loss of each example, shape (batch,), summed over all but its first ``skip`` units."""
    labels = predictions.labels
    last = (labels != IGNORED).sum(1) - 1
    place = torch.arange(labels.shape[1], device=labels.device)
    counted = place >= last.clamp(max=skip)[:, None]
    return (predictions.each(ce_u_units) * counted).sum(1)


@dataclass(frozen=True, kw_only=True)
class CEU(OneSided):
    """Teach the model what it would say if the true answer did not exist."""

    tasks: ClassVar[tuple[str, ...]] = WITH_LOGITS

    skip: Annotated[
        int, Field(ge=0, description="answer tokens left alone at the start, as in the paper")
    ] = 1
    lr: Annotated[
        float,
        Field(gt=0, description="peak learning rate; the author uses 2e-6 to 1e-5 at 7B"),
        Range(1e-6, 1e-3, log=True),
    ] = 5e-5

    def terms(self, subject: Subject, request: Request, run: Run) -> list[Term]:
        """Nothing to prepare."""

        def loss(predictions: Predictions, batch: Batch) -> Tensor:
            return ce_u_terms(predictions, self.skip)

        forget = Term("forget", request.forget_set(), loss, "unit")
        return [forget, *self.held(subject, request, run)]
