"""Bad teacher (Chundawat et al., AAAI 2023, arXiv 2205.08096).

    min  mean over forget and retain share of  KL(p_T(teacher) || p_T(student))

The teacher of a forget example is incompetent: a network of the same architecture with new random
weights, drawn as retrain draws them. That of a retain example is the starting model; a random
share of the retain set is enough. p_T is the softmax of logits divided by the temperature T.

The authors shuffle both sets into one. Here every step takes a batch of either set and weighs the
two means with the sizes of the sets, which has the same expectation and less noise; an epoch is
over the larger one. Their code averages over classes as well, which makes the loss that many times
smaller, and trains in train mode. Both teachers speak once, before training, and are never kept
beside the model. Cost: one forward pass over either set, then one forward and backward for every
example of the larger set and epoch, and as many of the smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from unlearn.interface import Need, Needs, Request, Subject
from unlearn.ranges import Range
from unlearn.reference import ReferenceLogits
from unlearn.retention import kl_divergence
from unlearn.run import Run
from unlearn.tasks.base import Batch, Encoded, Predictions
from unlearn.training import Term, Training


@dataclass(frozen=True, kw_only=True)
class BadTeacher(Training):
    """Learn from a network that knows nothing on the forget set, from oneself elsewhere."""

    temperature: Annotated[
        float, Field(gt=0, description="logits are divided by it"), Range(0.5, 4.0, log=True)
    ] = 1.0
    retain_share: Annotated[
        float,
        Field(gt=0, le=1, description="share of the retain set that is used"),
        Range(0.1, 1.0),
    ] = 0.3
    epochs: Annotated[
        float,
        Field(gt=0, description="passes over the larger of the forget set and the retain share"),
        Range(0.1, 10.0, log=True),
    ] = 1

    needs: ClassVar[Needs] = Needs(retain=Need.REQUIRED)

    def terms(self, subject: Subject, request: Request, run: Run) -> list[Term]:
        """Ask both teachers; the larger set comes first and decides the number of steps."""
        forget, retain = request.forget_set(), request.retain_set()
        part = retain.sample(self._used(len(retain)), run.seed_of("retain share"))
        incompetent = ReferenceLogits(_untrained(run), forget, range(len(forget)), run)
        competent = ReferenceLogits(subject.model, part, range(len(part)), run)
        whole = len(forget) + len(part)
        terms = [
            self._taught(forget, incompetent, len(forget) / whole),
            self._taught(part, competent, len(part) / whole),
        ]
        return sorted(terms, key=lambda term: -len(term.examples))

    def _taught(self, examples: Encoded, teacher: ReferenceLogits, weight: float) -> Term:
        def score(logits: Tensor, labels: Tensor, taught: Tensor) -> Tensor:
            return kl_divergence(logits / self.temperature, labels, taught / self.temperature)

        def loss(predictions: Predictions, batch: Batch) -> Tensor:
            return predictions.each(score, teacher(batch)).sum(1)

        return Term(examples.name, examples, loss, "unit", weight)

    def _used(self, retain: int) -> int:
        return max(1, round(self.retain_share * retain))

    def trained(self, forget: int, retain: int) -> int:
        """Every step takes a batch of either set."""
        used = self._used(retain)
        steps = self.steps(max(forget, used))
        return steps * (min(self.batch_size, forget) + min(self.batch_size, used))


def _untrained(run: Run) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(run.seed_of("initial weights"))
        return run.initial_model(None)
