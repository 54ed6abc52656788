"""Preference optimisation against the true answers (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    L = -(2/beta) mean_i log sigmoid(beta (w_i - l_i)) + retain_weight * R(retain)

where w_i is the log-likelihood ratio between now and the starting model of an alternative answer,
and l_i that of the true one, each summed over its tokens. Used to forget in TOFU (arXiv 2401.06121)
and, beside NPO, in arXiv 2404.05868; with the factor 2/beta the two agree where w_i = 0, and the
loss starts at (2/beta) ln 2. The alternatives say "I don't know", or stand in a field of the forget
records; an epoch walks over all pairs of an alternative and a true answer. A batch holds
``batch_size`` pairs, twice as many sequences. Cost: one forward pass over both sides, then as
grad_diff with a forget set twice as large.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from unlearn.interface import Request, Subject
from unlearn.preference import Ignorance, given_answers, preference
from unlearn.preference import dpo_loss as dpo_loss
from unlearn.ranges import Range
from unlearn.run import Run
from unlearn.training import Term


@dataclass(frozen=True, kw_only=True)
class DPO(Ignorance):
    """Prefer "I don't know", or another given answer, to the true one."""

    beta: Annotated[
        float,
        Field(gt=0, description="inverse temperature: larger stops earlier"),
        Range(0.01, 1.0, log=True),
    ] = 0.1
    field: Annotated[
        str | None,
        Field(
            description="field of the forget records that holds an alternative answer or a list of "
            "them; none: I-don't-know answers"
        ),
    ] = None
    retain_weight: Annotated[
        float,
        Field(ge=0, description="weight of the retain term; the paper uses 1"),
        Range(0.5, 30.0, log=True),
    ] = 4.0

    def check(self, request: Request) -> None:
        """Also: every record brings the alternatives that ``field`` promises.

        Raises:
            BadInput: one does not, or what the other checks found.
        """
        super().check(request)
        if self.field is not None:
            given_answers(request.forget_set(), self.field)

    def terms(self, subject: Subject, request: Request, run: Run) -> list[Term]:
        """Pair every alternative with the true answer."""
        self.check(request)
        forget = request.forget_set()
        answers = given_answers(forget, self.field) if self.field else self.drawn(forget, run)
        term = preference(subject.model, forget, answers, self.beta, run)
        return [term, *self.held(subject, replace(request, forget=term.examples), run)]

    def trained(self, forget: int, retain: int) -> int:
        """A winner, a loser and a retain example in every pair; one alternative per record."""
        pairs = forget * self.draws
        return super().trained(pairs, retain) + self.steps(pairs) * min(self.batch_size, pairs)
