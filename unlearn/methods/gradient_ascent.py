"""Gradient ascent on the forget set (Jang et al. 2022, arXiv 2210.01504; Golatkar et al. 2020).

    max  mean NLL(forget)   =   min  -mean NLL(forget)

The mean is over the units of the whole batch (the global token mean), so it does not depend on
micro-batches. Unbounded below: run long enough it destroys any model, which the collapse guard
reports. Cost: one forward and backward per forget example and epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from unlearn.interface import ALL_TASKS, Need, Needs, Request, Subject
from unlearn.ranges import Range
from unlearn.run import Run
from unlearn.training import Term, Training, ascent


@dataclass(frozen=True, kw_only=True)
class GradientAscent(Training):
    """Climb the loss of the forget set; no retain set."""

    lr: Annotated[
        float, Field(gt=0, description="peak learning rate"), Range(1e-7, 1e-3, log=True)
    ] = 1e-5
    epochs: Annotated[
        float, Field(gt=0, description="passes over the forget set"), Range(0.1, 10.0, log=True)
    ] = 3

    needs: ClassVar[Needs] = Needs(retain=Need.NO, tasks=ALL_TASKS)

    def terms(self, subject: Subject, request: Request, run: Run) -> list[Term]:
        """Ascend."""
        return [Term("forget", request.forget_set(), ascent, "unit")]

    def trained(self, forget: int, retain: int) -> int:
        """Only forget examples are trained on."""
        return self.steps(forget) * min(self.batch_size, forget)
