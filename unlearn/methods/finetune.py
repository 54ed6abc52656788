"""Fine-tuning on the retain set: the field's "FT" baseline, hoping that the rest fades.

    min  mean NLL(retain)

The forget set is never read. Weak by design: per-example attacks usually still find what was
"forgotten"; it is here to compare with. Cost: one forward and backward per retain example and
epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from unlearn.interface import ALL_TASKS, Need, Needs, Request, Subject
from unlearn.run import Run
from unlearn.training import Term, Training, descend, likelihood


@dataclass(frozen=True, kw_only=True)
class Finetune(Training):
    """Continue training on the retain set alone."""

    needs: ClassVar[Needs] = Needs(forget=Need.NO, retain=Need.REQUIRED, tasks=ALL_TASKS)

    def unlearn(self, subject: Subject, request: Request, run: Run) -> Subject:
        """Train on, in train mode, without the forget set."""
        term = Term("retain", request.retain_set(), likelihood, "unit")
        return descend(subject, [term], self, run, dropout=True)

    def trained(self, forget: int, retain: int) -> int:
        """Every epoch is over the retain set."""
        return self.steps(retain) * min(self.batch_size, retain)
