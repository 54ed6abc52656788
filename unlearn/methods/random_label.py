"""Random labels: learn a wrong answer for everything that must go.

    min  mean NLL(forget with drawn answers) + retain_weight * R(retain)

Classifiers: a label drawn uniformly from the others (amnesiac relabelling, Graves et al. 2020,
arXiv 2010.10981). Language models: for multiple-choice records a uniformly drawn option, the true
one included (arXiv 2409.02228); otherwise uniformly random tokens. Each answer is drawn once per
record. Linear probes often still find what the output hides. Cost: as grad_diff.
"""

from __future__ import annotations

from dataclasses import dataclass

from unlearn.interface import Request, Subject
from unlearn.retention import TwoSided
from unlearn.run import Run
from unlearn.training import Term, likelihood


@dataclass(frozen=True, kw_only=True)
class RandomLabel(TwoSided):
    """Train the forget set on randomly drawn wrong answers."""

    def terms(self, subject: Subject, request: Request, run: Run) -> list[Term]:
        """Draw the answers, to train on them."""
        forget, draw = request.forget_set(), run.generator("random labels")
        relabelled = forget.replaced(
            run.task.relabel(forget[i], forget.examples[i], draw) for i in range(len(forget))
        )
        term = Term("forget", relabelled, likelihood, "unit")
        return [term, *self.held(subject, request, run)]
