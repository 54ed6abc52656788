"""UnDIAL: self-distillation on adjusted logits (Dong et al., NAACL 2025, arXiv 2402.10052).

    min  mean_t CE(q_t, p_t) + retain_weight * R(retain),   q_t = softmax(z_t - beta onehot(y_t))

where z_t are the starting model's logits at unit t of the forget set, y_t is the true label and
p_t what the model now says. The target is fixed and the loss bounded below by the entropy of q,
so training converges where ascent runs away. The mean is over answer tokens; the paper retains
nothing. The starting model's logits are stored as inputs of its output layer, never kept as a
second live model. Cost: one forward pass over the forget set, then one forward and backward per
forget example and epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from unlearn.interface import WITH_LOGITS, Request, Subject
from unlearn.ranges import Range
from unlearn.reference import ReferenceLogits
from unlearn.retention import OneSided
from unlearn.run import Run
from unlearn.tasks.base import Batch, Predictions
from unlearn.training import Term


def undial_units(logits: Tensor, labels: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Cross-entropy with the adjusted starting model, of every unit, in nats.

    Args:
        logits: current ones, shape (n, classes).
        labels: the true ones, shape (n,).
        reference: logits of the starting model, shape (n, classes).
        beta: what the true label's reference logit loses.

    Returns:
        Shape (n,).

    >>> import torch
    >>> even = torch.zeros(1, 2)
    >>> undial_units(even, torch.tensor([0]), even, beta=10.0)  # ln 2, whatever the target
    tensor([0.6931])
    """
    true = labels[:, None]
    target = reference.scatter(1, true, reference.gather(1, true) - beta).softmax(-1)
    return F.cross_entropy(logits, target, reduction="none")


@dataclass(frozen=True, kw_only=True)
class UnDIAL(OneSided):
    """Distil the starting model, its belief in the true answers lowered, into the model."""

    tasks: ClassVar[tuple[str, ...]] = WITH_LOGITS

    beta: Annotated[
        float,
        Field(gt=0, description="what the true label's logit loses; the paper uses 3, 10, 30"),
        Range(1.0, 30.0, log=True),
    ] = 10.0
    lr: Annotated[
        float,
        Field(gt=0, description="peak learning rate; the paper uses 1e-4 with adapters"),
        Range(1e-6, 3e-3, log=True),
    ] = 1e-4

    def terms(self, subject: Subject, request: Request, run: Run) -> list[Term]:
        """Store the starting model's logits."""
        forget = request.forget_set()
        reference = ReferenceLogits(subject.model, forget, range(len(forget)), run)

        def score(logits: Tensor, labels: Tensor, before: Tensor) -> Tensor:
            return undial_units(logits, labels, before, self.beta)

        def loss(predictions: Predictions, batch: Batch) -> Tensor:
            return predictions.each(score, reference(batch)).sum(1)

        return [Term("forget", forget, loss, "unit"), *self.held(subject, request, run)]
