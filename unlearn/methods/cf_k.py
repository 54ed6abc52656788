"""CF-k: fine-tune the last k blocks on the retain set (Goel et al. 2022, arXiv 2201.06640).

    min over the last k blocks and what follows  mean NLL(retain)

"Catastrophic forgetting" of deep layers alone: everything in front of them stays bit-identical,
batch statistics included. The forget set is never read, so this is finetune with less reach; it is
here to compare with. A block is a child of the model's largest stack (a transformer layer, a stage
of a ResNet, a layer of a sequence); an output layer that shares its weights with the input stays
with the input. Defaults follow the authors of SCRUB (arXiv 2302.09880), for classifiers: language
models want adamw. Cost: as finetune, with gradients of fewer weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from unlearn.errors import BadInput
from unlearn.interface import Need, Needs, Request, Subject
from unlearn.ranges import Range
from unlearn.run import Run
from unlearn.scope import last_blocks
from unlearn.training import Term, Training, descend, likelihood


@dataclass(frozen=True, kw_only=True)
class CFk(Training):
    """Continue training the deepest layers on the retain set alone."""

    k: Annotated[
        int, Field(ge=1, description="blocks that move, counted from the output"), Range(1, 3)
    ] = 1
    scope: Annotated[str, Field(description="must stay all: k decides what may move")] = "all"
    lr: Annotated[
        float, Field(gt=0, description="peak learning rate"), Range(1e-4, 0.1, log=True)
    ] = 0.01
    epochs: Annotated[float, Field(gt=0, description="passes over the retain set")] = 10
    optimizer: Annotated[
        Literal["adamw", "sgd"],
        Field(description="adamw (betas 0.9, 0.999) or sgd with Nesterov momentum 0.9"),
    ] = "sgd"
    weight_decay: Annotated[float, Field(ge=0, description="decoupled (adamw) or L2 (sgd)")] = 5e-4

    needs: ClassVar[Needs] = Needs(forget=Need.NO, retain=Need.REQUIRED)

    def check(self, request: Request) -> None:
        """Refuse a scope of the user's.

        Raises:
            BadInput: a scope was given.
        """
        if self.scope != "all":
            raise BadInput("cf_k moves the last k blocks: leave scope out, or use finetune")

    def unlearn(self, subject: Subject, request: Request, run: Run) -> Subject:
        """Train on, in train mode, without the forget set.

        Raises:
            BadInput: the model has fewer than k blocks.
            Unsupported: it has none.
        """
        last = {*last_blocks(subject.model, run.task, self.k)}
        scope = " ".join(
            f"^{re.escape(n)}$" for n, _ in subject.model.named_parameters() if n in last
        )
        term = Term("retain", request.retain_set(), likelihood, "unit")
        return descend(subject, [term], replace(self, scope=scope), run, dropout=True)

    def trained(self, forget: int, retain: int) -> int:
        """Every epoch is over the retain set."""
        return self.steps(retain) * min(self.batch_size, retain)
