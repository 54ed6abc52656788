"""Relabelling in a common pass (Graves et al., AAAI 2021, arXiv 2010.10981).

    min  mean NLL over (forget with wrong labels) and (retain), shuffled as one set

Every forget record gets one label, drawn once and uniformly from the wrong ones. Each record of
the two sets then counts alike and is seen once per epoch: a step has forget records in the share
they have of the whole. random_label differs in that: it takes as many records of either set per
step, and its epochs are over the forget set.

Benchmarks call this "amnesiac". In the paper it is "unlearning" by relabelling; its "amnesiac
unlearning" subtracts the updates that batches with forgotten records made, which must have been
kept during training. Language models get random answers as in random_label. Defaults are those of
the benchmark of SSD (arXiv 2308.07707). Cost: one forward and backward per forget and retain
example and epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch.utils.data import ConcatDataset

from unlearn.data import Examples
from unlearn.interface import ALL_TASKS, Need, Needs, Request, Subject
from unlearn.ranges import Range
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.training import Term, Training, likelihood


@dataclass(frozen=True, kw_only=True)
class Amnesiac(Training):
    """Train on the retain set and the wrongly labelled forget set as if they were one."""

    epochs: Annotated[
        float,
        Field(gt=0, description="passes over the forget and retain set together"),
        Range(0.1, 10.0, log=True),
    ] = 3

    needs: ClassVar[Needs] = Needs(retain=Need.REQUIRED, tasks=ALL_TASKS)

    def terms(self, subject: Subject, request: Request, run: Run) -> list[Term]:
        """Draw the labels, and join the sets."""
        forget, draw = request.forget_set(), run.generator("random labels")
        relabelled = [
            run.task.relabel(forget[i], forget.examples[i], draw) for i in range(len(forget))
        ]
        both = joined(forget, request.retain_set()).replaced(relabelled)  # the first of both
        return [Term("both", both, likelihood, "unit")]

    def trained(self, forget: int, retain: int) -> int:
        """Every epoch is over both sets."""
        return self.steps(forget + retain) * min(self.batch_size, forget + retain)


def joined(first: Encoded, second: Encoded) -> Encoded:
    """Both sets as one, the indices of ``first`` in front."""
    rows: Any = ConcatDataset([first.examples.rows, second.examples.rows])  # type: ignore[list-item]
    ids = [*first.examples.ids, *second.examples.ids]
    return Encoded(Examples(rows, ids, "both", "forget and retain"), first.task)
