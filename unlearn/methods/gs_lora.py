"""GS-LoRA: forget through few groups of adapters (Zhao et al. 2024, CVPR, arXiv 2403.11530).

    L = mean NLL(retain) + beta * mean ReLU(bound - NLL(forget)) + alpha * sum_g ||theta_g||_2

Low-rank adapters on the feed-forward layers of every block; theta_g are all adapters of block g,
and nothing else moves. The second term raises every forget record's loss up to ``bound`` and then
lets go; the third leaves whole groups exactly zero (see unlearn/group_sparsity.py), so that
forgetting touches few blocks. alpha acts after the first ``alpha_from`` of the steps, when the
groups that forgetting needs have grown.

The authors bound the mean loss of a batch; here each record's own loss is bounded. The two agree
until a record reaches the bound, and by Jensen's inequality this term is never the smaller one. So
a record far beyond the bound cannot make up for another that is still known, and the result does
not depend on how a batch is cut. Of language models the NLL is a mean over the answer's tokens.

A series of requests: each trains new adapters on the model that the last one left, in which its
adapters are merged (or kept beside their base, without --merge). Classes forgotten earlier must not
be in the retain set; they stay forgotten because little moves. The retain set may be a handful of
records per class (``shots``), and may lack classes.

Cost: as grad_diff.
"""

from __future__ import annotations

from dataclasses import dataclass

from unlearn.group_sparsity import GroupSparse
from unlearn.interface import Request, Subject
from unlearn.run import Run
from unlearn.training import Term, likelihood


@dataclass(frozen=True, kw_only=True)
class GSLoRA(GroupSparse):
    """Raise the forget set's loss to a bound, with adapters in as few blocks as it takes."""

    def terms(self, subject: Subject, request: Request, run: Run) -> list[Term]:
        """Bounded ascent, and the likelihood of the retain set."""
        forget = Term("forget", request.forget_set(), self.forget_loss(run), "example", self.beta)
        return [forget, Term("retain", request.retain_set(), likelihood, "unit")]
