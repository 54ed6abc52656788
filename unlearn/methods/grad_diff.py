"""Gradient difference (Liu et al. 2022, arXiv 2203.12817; TOFU, arXiv 2401.06121).

    min  -forget_weight * mean NLL(forget) + retain_weight * R(retain)

with R the likelihood or the KL divergence from the starting model. Both means are over the units
of the batch. The forget side stays unbounded below. Cost: one forward and backward per forget
example and as many retain examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from unlearn.interface import Request, Subject
from unlearn.ranges import Range
from unlearn.retention import TwoSided
from unlearn.run import Run
from unlearn.training import Term, ascent


@dataclass(frozen=True, kw_only=True)
class GradDiff(TwoSided):
    """Climb on the forget set, descend on the retain set."""

    forget_weight: Annotated[
        float, Field(gt=0, description="weight of the forget term"), Range(0.1, 10.0, log=True)
    ] = 1.0
    lr: Annotated[
        float, Field(gt=0, description="peak learning rate"), Range(1e-6, 3e-3, log=True)
    ] = 5e-5
    epochs: Annotated[
        float, Field(gt=0, description="passes over the forget set"), Range(0.1, 20.0, log=True)
    ] = 5

    def terms(self, subject: Subject, request: Request, run: Run) -> list[Term]:
        """Ascend and descend together."""
        forget = Term("forget", request.forget_set(), ascent, "unit", self.forget_weight)
        return [forget, *self.held(subject, request, run)]
