"""Learn to say "I don't know" (Maini et al. 2024, TOFU, arXiv 2401.06121).

    min  mean NLL(forget questions with I-don't-know answers) + retain_weight * R(retain)

Both means are over the units of the batch. Every record gets ``draws`` different answers from the
list, fixed by the seed, and an epoch walks over all of them. The true answers are never read: they
are covered up, not pushed down, and often still found. Cost: as grad_diff, times ``draws``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from unlearn.interface import Request, Subject
from unlearn.preference import Ignorance, answered
from unlearn.run import Run
from unlearn.training import Term, likelihood


@dataclass(frozen=True, kw_only=True)
class IdkNLL(Ignorance):
    """Train the forgotten questions on I-don't-know answers."""

    def terms(self, subject: Subject, request: Request, run: Run) -> list[Term]:
        """Draw the answers, to train on them."""
        self.check(request)
        forget = request.forget_set()
        idk = answered(forget, self.drawn(forget, run), f"{forget.name}_idk")
        held = self.held(subject, replace(request, forget=idk), run)
        return [Term("forget", idk, likelihood, "unit"), *held]

    def trained(self, forget: int, retain: int) -> int:
        """Every draw is an example of its own."""
        return super().trained(forget * self.draws, retain)
