"""Retraining on the retain set: exact, and the reference every other method is held against.

    theta_0 = fresh or given weights;  min  mean NLL(retain)

Every module starts again, not only the last layer. ``init`` names a checkpoint to start from
(a pre-trained model that never saw the forget set); without it the weights are drawn anew from
the configuration and the run's seed. Cost: ordinary training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from unlearn.errors import BadInput
from unlearn.interface import Need, Needs, Request, Subject
from unlearn.run import Run
from unlearn.training import Term, Training, descend, likelihood


@dataclass(frozen=True, kw_only=True)
class Retrain(Training):
    """Train again without the forgotten data."""

    init: Annotated[
        str | None, Field(description="checkpoint to start from; none: new random weights")
    ] = None
    lr: Annotated[float, Field(gt=0, description="peak learning rate")] = 1e-3
    epochs: Annotated[float, Field(gt=0, description="passes over the retain set")] = 20

    needs: ClassVar[Needs] = Needs(forget=Need.NO, retain=Need.REQUIRED)

    def unlearn(self, subject: Subject, request: Request, run: Run) -> Subject:
        """Replace the weights, then train on the retain set in train mode."""
        with torch.random.fork_rng():
            torch.manual_seed(run.seed_of("initial weights"))
            start = run.initial_model(self.init)
        _same_shape(subject, start)
        subject.model.load_state_dict(start.state_dict())
        term = Term("retain", request.retain_set(), likelihood, "unit")
        return descend(subject, [term], self, run, dropout=True)

    def trained(self, forget: int, retain: int) -> int:
        """Every epoch is over the retain set."""
        return self.steps(retain) * min(self.batch_size, retain)


def _same_shape(subject: Subject, start: torch.nn.Module) -> None:
    ours = {name: p.shape for name, p in subject.model.named_parameters()}
    if ours != {name: p.shape for name, p in start.named_parameters()}:
        raise BadInput("init is a checkpoint of another architecture: pass one of the same shape")
