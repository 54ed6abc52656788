"""Familiarity: begin the true answer and see whether the model goes on with it.

One of the eight methods of Lynch et al. (2024, arXiv 2402.16835), after Eldan and Russinovich
(2023, arXiv 2310.02238). Here the first half of the answer's tokens is told and the truth is the
other half; of plain texts, the second half of the text. A model that only learned to refuse, or to
open its answers otherwise, goes on fluently; a model that never knew the answer cannot.

Difference: the paper writes prompts of its own and lets another model grade the completions from 0
to 3. Here prompts are the records, and the grade is their overlap with the truth.

Cost: one greedy answer per record.
"""

from __future__ import annotations

from torch import nn

from unlearn.attacks.interface import Elicited, Ground, Inapplicable, Prompting
from unlearn.attacks.prompting import Try, begun, elicited
from unlearn.run import Run


def elicit(model: nn.Module, ground: Ground, run: Run) -> Elicited:
    """What the model goes on with; records whose answer is a single token are left out.

    Raises:
        Inapplicable: every answer is a single token.
    """
    forget = ground.forget
    halves = [(i, begun(forget, i)) for i in range(len(forget))]
    tries = [Try(i, half) for i, half in halves if half is not None]
    if not tries:
        raise Inapplicable(
            "familiarity tells half of an answer and asks for the rest, and every forget record's "
            "answer is a single token"
        )
    return elicited(model, forget, tries, run, "familiarity")


ATTACK = Prompting(
    "familiarity",
    "Continuing the first half of the answer",
    "Lynch et al. 2024, arXiv 2402.16835",
    elicit,
)
