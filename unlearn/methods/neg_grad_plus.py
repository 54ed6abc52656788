"""NegGrad+: fine-tune on the retain set and climb on the forget set (Kurmanji et al. 2023).

    min  alpha * mean NLL(retain) - (1 - alpha) * mean NLL(forget)

arXiv 2302.09880, where it is a baseline of SCRUB. Every step takes one batch of either
set; as in the authors' code, an epoch is a pass over the retain set, and the forget set is walked
as often as that takes. That is what sets it apart from grad_diff, whose epochs are over the forget
set. The forget side is unbounded, so ``alpha`` is next to 1: the smaller the forget set, the more
often each of its examples is climbed on. The authors train in train mode, with batch statistics.
The defaults are for classifiers: language models want adamw.
Cost: one forward and backward per retain example and epoch, and as many for forget examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from unlearn.interface import ALL_TASKS, Need, Needs, Request, Subject
from unlearn.ranges import Range
from unlearn.run import Run
from unlearn.training import Term, Training, ascent, likelihood


@dataclass(frozen=True, kw_only=True)
class NegGradPlus(Training):
    """Descend on the retain set, and a little up the forget set."""

    alpha: Annotated[
        float,
        Field(
            gt=0,
            lt=1,
            description="weight of the retain set; the forget set's is 1 - alpha. The authors use "
            "0.95 for hundreds of training examples, 0.9999 for tens of thousands",
        ),
        Range(0.5, 0.9999),
    ] = 0.95
    lr: Annotated[
        float, Field(gt=0, description="peak learning rate"), Range(1e-5, 0.1, log=True)
    ] = 0.01
    epochs: Annotated[
        float, Field(gt=0, description="passes over the retain set; the authors use 5 to 10")
    ] = 5
    optimizer: Annotated[
        Literal["adamw", "sgd"],
        Field(description="adamw (betas 0.9, 0.999) or sgd with Nesterov momentum 0.9"),
    ] = "sgd"
    weight_decay: Annotated[float, Field(ge=0, description="decoupled (adamw) or L2 (sgd)")] = 5e-4

    needs: ClassVar[Needs] = Needs(retain=Need.REQUIRED, tasks=ALL_TASKS)

    def terms(self, subject: Subject, request: Request, run: Run) -> list[Term]:
        """The retain set first: its size decides the number of steps."""
        return [
            Term("retain", request.retain_set(), likelihood, "unit", self.alpha),
            Term("forget", request.forget_set(), ascent, "unit", 1 - self.alpha),
        ]

    def trained(self, forget: int, retain: int) -> int:
        """Every step takes a batch of either set."""
        return self.steps(retain) * (min(self.batch_size, retain) + min(self.batch_size, forget))
