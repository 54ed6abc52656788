"""Negated task vector (Ilharco et al., ICLR 2023, arXiv 2212.04089, section 3).

    theta <- theta - alpha (theta_reinforced - theta)

where theta_reinforced comes from training the model further on the forget set: whatever direction
teaches it is walked backwards. Only parameters in scope move, adapters are merged into the weights
first. No retain set, and nothing but alpha limits the damage. Cost: one forward and backward per
forget example and epoch, and one copy of the weights in CPU memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from unlearn.interface import ALL_TASKS, Need, Needs, Request, Subject
from unlearn.ranges import Range
from unlearn.run import Run
from unlearn.training import Term, Training, descend, likelihood


@dataclass(frozen=True, kw_only=True)
class TaskVector(Training):
    """Learn the forget set further, then go the same way in reverse."""

    alpha: Annotated[
        float,
        Field(
            gt=0,
            description="length of the way back; Ilharco et al. search in 0 to 1, MUSE uses 5",
        ),
        Range(0.05, 5.0, log=True),
    ] = 1.0
    epochs: Annotated[
        float,
        Field(gt=0, description="passes over the forget set; MUSE uses 10"),
        Range(1.0, 20.0, log=True),
    ] = 10

    needs: ClassVar[Needs] = Needs(retain=Need.NO, tasks=ALL_TASKS)

    def unlearn(self, subject: Subject, request: Request, run: Run) -> Subject:
        """Reinforce, then subtract."""
        model = subject.model
        start = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()}
        term = Term("forget", request.forget_set(), likelihood, "unit")
        subject = descend(subject, [term], self, run)
        with torch.no_grad():
            for name, parameter in subject.model.named_parameters():
                origin = start.pop(name).to(parameter.device)
                parameter.copy_(origin - self.alpha * (parameter - origin))
        return subject

    def trained(self, forget: int, retain: int) -> int:
        """Only forget examples are trained on."""
        return self.steps(forget) * min(self.batch_size, forget)
