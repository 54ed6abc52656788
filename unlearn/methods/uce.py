"""Unified concept editing (Gandikota et al., WACV 2024, arXiv 2308.14761, eq. 7).

Every key and value matrix of the cross-attentions is replaced by the minimiser of

    s_e sum_i |W' c_i - W g_i|^2 + s_p sum_p |W' c_p - W c_p|^2 + lamb |W' - W|^2

over states c_i of prompts that name the concept, g_i of the anchor at the same position, and c_p
of what is kept: the empty prompt, the anchor, and ``--keep-concepts``. Solved exactly: W' = W M
(:mod:`unlearn.cross_attention`). All positions of a prompt are edited, padding too, where the
authors' code takes the last word of the concept only.

Text encoders are causal, so the state of a word depends on the words before it. A concept is
therefore edited in each of ``templates``, with the concept and with the anchor in the place of
``{}``; name it by the words that make the difference ("disc") and put what usually stands around
it there ("a red {},a blue {}"). Without an anchor, the concept becomes the empty prompt.

The edit is exactly a low-rank adapter, of at most as many dimensions as states are erased; the run
keeps that, unless ``--merge`` asks for the whole pipeline. Cost: the text encoder on the prompts
and one matrix product per layer. No data, no training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from unlearn.cross_attention import ClosedForm, embeddings, erasure, multiplied
from unlearn.interface import Request, Subject
from unlearn.pipeline import Pipeline
from unlearn.run import Run


@dataclass(frozen=True, kw_only=True)
class UCE(ClosedForm):
    """Make cross-attention read the concept as its anchor, in closed form."""

    def unlearn(self, subject: Subject, request: Request, run: Run) -> Subject:
        """Solve, and multiply."""
        at = embeddings(cast(Pipeline, subject.model), request, self.templates, run)
        m = erasure(at, self.lamb, self.erase_weight, self.keep_weight)
        run.progress.advance("unlearn", 1, 1, {})
        return multiplied(subject, m, run)
